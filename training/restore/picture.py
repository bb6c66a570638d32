"""One picture from its file to its restoration: what is read, which function of the core restores it, what is made."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from restoration.jpeg import JPEGConstraint, JPEGData, apply_orientation, read_jpeg_and_pixels
from restoration.pictures import picture_format, read_picture
from training.restore.carried import METADATA_FAILURES, Carried, read_carried
from training.restore.plan import is_jpeg

_GRAY_MODES = ("1", "L", "La", "LA", "I", "F")
_16_BITS = "I;16"


RestorePicture = Callable[[Tensor, JPEGData | None, JPEGConstraint | None], Tensor]
"""From a picture (1, 3, H, W) in [0, 1], its JPEG and what it is held to, both or none, to its restoration."""


@dataclass(frozen=True)
class SourcePicture:
    """A picture as it was read.

    Args:
        pixels: (1, 3, H, W) in [0, 1], upright.
        jpeg: What the file holds without loss, of JPEGs.
        gray: Whether it has no colours.
        alpha: Its transparency, upright, of files that have one.
        carried: What is written beside the restored pixels.
        description: A few words for the report.
    """

    pixels: Tensor
    jpeg: JPEGData | None
    gray: bool
    alpha: Image.Image | None
    carried: Carried
    description: str


def read_source(path: Path, *, metadata: bool = True) -> SourcePicture:
    """Read a JPEG with all that it says, or another picture.

    Args:
        path: A JPEG, PNG, WebP, BMP or TIFF, told by its content.
        metadata: Whether anything is to be carried over.

    Raises:
        ValueError: It is none of these, or damaged; one sentence says what is wrong.
        OSError: It cannot be read.
    """
    read = _read_jpeg if is_jpeg(path) or picture_format(path) is None else _read_other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of metadata, which `read_carried` notes
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the core has a limit of its own
        return read(path, metadata)


def _read_jpeg(path: Path, metadata: bool) -> SourcePicture:
    data = path.read_bytes()
    jpeg, pixels = read_jpeg_and_pixels(data, name=path.name)
    upright, gray = apply_orientation(pixels, jpeg.orientation)[None], jpeg.color_space == "gray"
    carried = Carried()
    if metadata:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            carried = read_carried(picture, (jpeg.upright_width, jpeg.upright_height), gray=gray)
    kind = "" if jpeg.quality.exact else "about "
    described = f"{_size(upright)}, {jpeg.subsampling}, quality {kind}{jpeg.quality.quality:.0f}"
    return SourcePicture(upright, jpeg, gray, None, carried, described)


def _read_other(path: Path, metadata: bool) -> SourcePicture:
    pixels = read_picture(path)[None]
    height, width = pixels.shape[-2:]
    with Image.open(path, formats=(str(picture_format(path)),)) as picture:
        gray = picture.mode in _GRAY_MODES or picture.mode.startswith(_16_BITS)
        alpha = _alpha(picture)
        carried = read_carried(picture, (width, height), gray=gray) if metadata else Carried()
        described = f"{_size(pixels)}, {picture.format}"
    if alpha is not None and alpha.size != (width, height):
        raise ValueError(f"{path.name} turns in two ways: its EXIF data contradict each other. Save it again.")
    return SourcePicture(pixels, None, gray, alpha, carried, described)


def _alpha(picture: Image.Image) -> Image.Image | None:
    """The transparency, turned as `read_picture` turns the colours; None where nothing is transparent."""
    if "A" not in picture.getbands() and "a" not in picture.getbands() and "transparency" not in picture.info:
        return None
    if picture.mode.startswith("I"):  # 16 bits with one transparent value, which is lost when they become 8
        return None
    alpha = _upright(picture).convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except METADATA_FAILURES:
        return picture


def restore_source(restore: RestorePicture, source: SourcePicture, *, consistency: bool) -> Image.Image:
    """The restored picture, of the mode RGB, L where the source is gray, or RGBA where it is transparent.

    The gray value of a restored pixel is libjpeg's brightness of it, the very one that a JPEG is held to.

    Args:
        restore: What restores, of `training.restore.families`.
        source: The picture.
        consistency: Whether it is held to the coefficients of its JPEG, if it is one.

    Raises:
        ValueError: It cannot be restored by this restorer.
    """
    constraint = JPEGConstraint(source.jpeg) if consistency and source.jpeg is not None else None
    with torch.inference_mode():
        restored = restore(source.pixels, source.jpeg, constraint)
    picture = Image.fromarray(_levels(restored))
    if source.gray:
        picture = picture.convert("L")
        if source.carried.icc and not source.carried.is_gray_profile:
            picture = picture.convert("RGB")
    if source.alpha is not None:
        picture = picture.convert("RGB")
        picture.putalpha(source.alpha)
    return picture


def _levels(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of (1, 3, H, W) in whole 8-bit levels."""
    return (image[0] * 255).round().to(torch.uint8).movedim(0, -1).contiguous().cpu().numpy()


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
