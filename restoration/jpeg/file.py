"""JPEG files: their coefficients, tables and orientation through jpeglib, their pixels through Pillow."""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jpeglib
import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from .codec import Coefficients
from .header import Header, JPEGError, huffman_tables, scan_header, without_metadata
from .tables import QualityEstimate, estimate_quality

Source = str | os.PathLike[str] | bytes
"""A path, or the bytes of a file."""

FLIPPED = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
"""By orientation, the dimensions that turning a stored picture upright flips, after it transposed them from 5 on."""

_ORIENTATION = 0x0112
_PILLOW_FAILURES = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_COLOR_SPACES = {"JCS_YCbCr": "ycbcr", "JCS_RGB": "rgb", "JCS_GRAYSCALE": "gray"}
_PILLOW_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "gray")


@dataclass(frozen=True)
class JPEGData:
    """One JPEG without loss: `coefficients` (batch 1, int16, on the CPU), estimated `quality`, EXIF `orientation` 1..8.

    Coefficients and size are as stored, before the orientation is applied; `name` is the file's, without its folder.
    """

    coefficients: Coefficients
    quality: QualityEstimate
    orientation: int
    progressive: bool
    name: str

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Quantization table of each component, (1, 8, 8) int32."""
        return self.coefficients.tables

    @property
    def width(self) -> int:
        """Stored width in pixels."""
        return self.coefficients.width

    @property
    def height(self) -> int:
        """Stored height in pixels."""
        return self.coefficients.height

    @property
    def upright_width(self) -> int:
        """Width in pixels once the orientation is applied."""
        return self.height if self.orientation >= 5 else self.width

    @property
    def upright_height(self) -> int:
        """Height in pixels once the orientation is applied."""
        return self.width if self.orientation >= 5 else self.height

    @property
    def subsampling(self) -> str:
        """Such as "4:2:0", "gray", or "2x2,2x1,1x2" for factors without a name."""
        return self.coefficients.subsampling

    @property
    def color_space(self) -> str:
        """What the components are: "ycbcr", "rgb" or "gray"."""
        return self.coefficients.color_space


def read_jpeg(source: Source, *, name: str | None = None) -> JPEGData:
    """Read a JPEG's coefficients and all that describes them; `name` replaces the file's own in messages and result.

    Raises JPEGError, one sentence, for what is not a complete 8-bit Huffman-coded JPEG, grayscale or color, that Pillow
    and libjpeg can both decode.
    """
    return read_jpeg_and_pixels(source, name=name)[0]


def read_jpeg_and_pixels(source: Source, *, name: str | None = None) -> tuple[JPEGData, Tensor]:
    """`read_jpeg` and `decode_pixels` of one file at the price of the two, without decoding twice."""
    data, name = _load(source, name)
    header = scan_header(data, name)
    pixels, orientation = _decode(data, header, name)
    coefficients = _read_coefficients(data, header, name)
    return _described(coefficients, name, orientation, header.progressive), pixels


def decode_pixels(source: Source, *, name: str | None = None) -> Tensor:
    """Pillow's decode of a JPEG as stored (EXIF orientation not applied): float32 RGB (3, H, W) in [0, 1].

    Grayscale gives three equal channels. Raises JPEGError as `read_jpeg` does.
    """
    data, name = _load(source, name)
    return _decode(data, scan_header(data, name), name)[0]


def jpeg_data_from(coefficients: Coefficients, name: str) -> JPEGData:
    """Wrap coefficients that the codec made, of one picture (`coefficients[i]` of a batch), as if read from a file."""
    if len(coefficients) != 1:
        raise ValueError(f"jpeg_data_from expected one picture, got {len(coefficients)}: pass coefficients[i]")
    whole = coefficients.to("cpu", torch.int16)
    tables = tuple(table.to(torch.int32) for table in whole.tables)
    stored = Coefficients(whole.planes, tables, whole.height, whole.width, whole.sampling, whole.color_space)
    return _described(stored, name, orientation=1, progressive=False)


def encode_with_pillow(image: Tensor, quality: int, subsampling: str = "4:2:0") -> bytes:
    """The JPEG file that Pillow writes of an RGB image (3, H, W) in [0, 1], at `quality` 0..100.

    `subsampling` is "4:4:4", "4:2:2", "4:2:0" or "gray"; Pillow writes no other, and ValueError says so.
    """
    if subsampling not in _PILLOW_SUBSAMPLINGS:
        raise ValueError(f"Pillow writes {', '.join(_PILLOW_SUBSAMPLINGS)}, not {subsampling!r}: choose one of these")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"encode_with_pillow expected (3, H, W), got {tuple(image.shape)}: pass one RGB image")
    levels = (image.detach().float().cpu() * 255).round().clamp(0, 255).byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    if subsampling == "gray":
        picture.convert("L").save(buffer, "JPEG", quality=quality)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def apply_orientation(image: Tensor, orientation: int) -> Tensor:
    """Turn a stored picture (..., H, W) upright: EXIF 2.3 orientation 1..8, as PIL.ImageOps.exif_transpose does."""
    if orientation not in range(1, 9):
        raise ValueError(f"orientation expected 1 to 8, got {orientation}: pass the orientation of the file")
    if orientation >= 5:
        image = image.transpose(-2, -1)
    flipped = FLIPPED.get(orientation, ())
    return image.flip(flipped) if flipped else image


def undo_orientation(image: Tensor, orientation: int) -> Tensor:
    """Turn an upright picture (..., H, W) back to how the file stores it: the inverse of `apply_orientation`."""
    return apply_orientation(image, {6: 8, 8: 6}.get(orientation, orientation))


def _load(source: Source, name: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, name or "untitled.jpg"
    name = name or Path(source).name
    try:
        with open(source, "rb") as file:
            start = file.read(2)
            return start + (file.read() if start == b"\xff\xd8" else b""), name
    except OSError as error:
        raise JPEGError(f"{name} cannot be read ({error.strerror}): check the path {os.fspath(source)}") from error


def _decode(data: bytes, header: Header, name: str) -> tuple[Tensor, int]:
    """Pixels (3, H, W) in [0, 1] and EXIF orientation by Pillow."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image, refusing_truncated_files():
            image.load()
            size, orientation = image.size, _orientation(image)
            levels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    except _PILLOW_FAILURES as error:
        reason = "its headers contradict the standard" if isinstance(error, UnidentifiedImageError) else str(error)
        raise JPEGError(f"{name} is cut short or damaged ({reason}): get a complete copy of the file") from error
    if size != (header.width, header.height):
        raise JPEGError(f"{name} states two sizes, {header.width}x{header.height} and {size}: save it again")
    return levels.permute(2, 0, 1).float().div_(255), orientation


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where the file has none, or EXIF data that cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _PILLOW_FAILURES:
        return 1
    return value if value in range(1, 9) else 1


def _read_coefficients(data: bytes, header: Header, name: str) -> Coefficients:
    """Coefficients as int16 by jpeglib, which opens files by path only."""
    stripped = without_metadata(data, _standard_huffman_tables())
    try:
        with tempfile.TemporaryDirectory(prefix="jpeg-restorer-") as folder:
            path = Path(folder, "stripped.jpg")
            path.write_bytes(stripped)
            jpeg = _load_coefficients(path, name)
    except OSError as error:
        where = tempfile.gettempdir()
        raise JPEGError(
            f"{name} needs a temporary file, which {where} does not take ({error}): free space there"
        ) from error
    components = [jpeg.Y, jpeg.Cb, jpeg.Cr][: len(header.sampling)]
    steps = [jpeg.get_component_qt(i).astype(np.int32) for i in range(len(components))]
    return Coefficients(
        tuple(torch.from_numpy(np.ascontiguousarray(plane, np.int16))[None] for plane in components),
        tuple(torch.from_numpy(step)[None] for step in steps),
        header.height,
        header.width,
        header.sampling,
        _COLOR_SPACES[jpeg.jpeg_color_space.name],
    )


def _load_coefficients(path: Path, name: str) -> Any:
    try:
        jpeg = jpeglib.read_dct(str(path))
        jpeg.load()
    except OSError as error:
        raise JPEGError(f"{name} is damaged (libjpeg cannot read its coefficients): save it again") from error
    return jpeg


@contextmanager
def refusing_truncated_files() -> Iterator[None]:
    """Turn Pillow's switch, which other packs set for the whole process, off meanwhile: a cut file is an error here."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _described(coefficients: Coefficients, name: str, orientation: int, progressive: bool) -> JPEGData:
    tables = coefficients.tables[:1] if coefficients.color_space == "rgb" else coefficients.tables
    return JPEGData(coefficients, estimate_quality(tables), orientation, progressive, name)


@cache
def _standard_huffman_tables() -> bytes:
    """The tables of ITU-T T.81, K.3, as libjpeg writes them in every file that is not optimized."""
    return huffman_tables(encode_with_pillow(torch.zeros(3, 8, 8), 75))
