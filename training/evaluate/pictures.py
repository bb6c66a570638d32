"""Which pictures are evaluated, and how a clean one becomes a JPEG."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from restoration.jpeg import JPEGData, apply_orientation, encode_with_pillow, read_jpeg_and_pixels
from restoration.pictures import read_picture
from training.data.pictures import find_images
from training.restore.plan import is_jpeg

_SHIFT = 4
"""How far the second block grid of a double JPEG is displaced, pixels: FBCNN's, which DriftRec compares with."""
_MOST_NAMED = 3


@dataclass(frozen=True)
class Source:
    """A picture by its path inside of the folder, with slashes, and the files that there are of it."""

    name: str
    clean: Path | None
    degraded: Path | None


@dataclass(frozen=True)
class Condition:
    """What happened to pictures before they are restored.

    Args:
        label: In tables: `10`, `30/10`, or `as given`.
        quality: Of the last compression, 1 to 100; None for pictures that are degraded already.
        first_quality: Of a compression before that, on another grid; None where there was none.
    """

    label: str
    quality: int | None
    first_quality: int | None = None


@dataclass(frozen=True)
class Degraded:
    """A picture as a restorer gets it.

    Args:
        pixels: (1, 3, H, W) in [0, 1], whole 8-bit levels.
        clean: What it should be, alike; None where nobody knows.
        jpeg: What its file holds, of JPEGs.
        file: The bytes of that file.
    """

    pixels: Tensor
    clean: Tensor | None
    jpeg: JPEGData | None
    file: bytes | None

    @property
    def bits_per_pixel(self) -> float | None:
        """Of the JPEG's file, headers and all."""
        return None if self.file is None else 8 * len(self.file) / (self.pixels.shape[-1] * self.pixels.shape[-2])


def find_sources(data: Path | None, degraded: Path | None, limit: int = 0) -> list[Source]:
    """The pictures of a folder; of two folders, those of the second with their clean ones of the first.

    Files belong together when their paths without the ending are the same.

    Raises:
        FileNotFoundError: A folder is missing, or has no pictures.
        ValueError: A degraded picture has no clean one, or more than one.
    """
    if degraded is None:
        assert data is not None
        sources = [Source(path.relative_to(data).as_posix(), path, None) for path in find_images(data)]
    elif data is None:
        sources = [Source(path.relative_to(degraded).as_posix(), None, path) for path in find_images(degraded)]
    else:
        sources = _paired(data, degraded)
    return sources[: limit or None]


def _paired(data: Path, degraded: Path) -> list[Source]:
    clean: dict[str, list[Path]] = {}
    for path in find_images(data):
        clean.setdefault(_key(path, data), []).append(path)
    sources, alone = [], []
    for path in find_images(degraded):
        found = clean.get(_key(path, degraded), [])
        if len(found) == 1:
            sources.append(Source(path.relative_to(degraded).as_posix(), found[0], path))
        else:
            alone.append(f"{path.relative_to(degraded).as_posix()} has {len(found) or 'none'}")
    if alone:
        more = f", and {len(alone) - _MOST_NAMED} more" if len(alone) > _MOST_NAMED else ""
        raise ValueError(
            f"expected one clean picture of the same name in {data} for each picture in {degraded}, but "
            f"{', '.join(alone[:_MOST_NAMED])}{more}. Rename or remove them."
        )
    return sources


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def read_clean(path: Path) -> Tensor:
    """A picture (1, 3, H, W) in [0, 1], upright; JPEGs by libjpeg.

    Raises:
        ValueError: It is damaged, or no picture.
        OSError: It cannot be read.
    """
    if not is_jpeg(path):
        return read_picture(path)[None]
    jpeg, pixels = read_jpeg_and_pixels(path)
    return apply_orientation(pixels, jpeg.orientation)[None]


def read_degraded(source: Source) -> Degraded:
    """A picture that is degraded already, beside its clean one where there is one.

    Raises:
        ValueError: A file is damaged, or the two differ in size.
        OSError: A file cannot be read.
    """
    assert source.degraded is not None
    clean = None if source.clean is None else read_clean(source.clean)
    file = source.degraded.read_bytes() if is_jpeg(source.degraded) else None
    if file is None:
        degraded = Degraded(read_picture(source.degraded)[None], clean, None, None)
    else:
        jpeg, pixels = read_jpeg_and_pixels(file, name=source.name)
        degraded = Degraded(apply_orientation(pixels, jpeg.orientation)[None], clean, jpeg, file)
    if clean is not None and clean.shape != degraded.pixels.shape:
        sizes = [f"{picture.shape[-1]}x{picture.shape[-2]}" for picture in (degraded.pixels, clean)]
        raise ValueError(
            f"{source.name} is {sizes[0]}, its clean picture {sizes[1]}: give pictures of one size, not resized ones"
        )
    return degraded


def compressed(clean: Tensor, condition: Condition, subsampling: str, name: str) -> Degraded:
    """A clean picture (1, 3, H, W) as libjpeg compresses it, once or twice.

    For the second time it is cut 4 pixels further right and down, and the clean picture with it.

    Raises:
        ValueError: The picture is too small for that.
    """
    assert condition.quality is not None
    if condition.first_quality is not None:
        if min(clean.shape[-2:]) <= _SHIFT:
            raise ValueError(f"{name} is too small to be compressed twice: remove it")
        first = encode_with_pillow(clean[0], condition.first_quality, subsampling)
        whole = read_jpeg_and_pixels(first, name=name)[1][None]
        source, clean = (picture[..., _SHIFT:, _SHIFT:] for picture in (whole, clean))
    else:
        source = clean
    file = encode_with_pillow(source[0], condition.quality, subsampling)
    jpeg, pixels = read_jpeg_and_pixels(file, name=name)
    return Degraded(pixels[None], clean, jpeg, file)


def fingerprint(picture: Tensor) -> str:
    """A short name of a picture's levels, so that figures of another picture are not taken for its own."""
    levels = (picture * 255).round().to(torch.uint8).contiguous().numpy()
    return hashlib.blake2b(levels.tobytes() + str(levels.shape).encode(), digest_size=8).hexdigest()
