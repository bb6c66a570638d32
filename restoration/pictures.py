"""Pictures in files that are no JPEG, as training reads them: upright, 8-bit RGB, transparency dropped."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .jpeg import MAX_PIXELS
from .jpeg.file import refusing_truncated_files
from .upright import upright

_STARTS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}


class PictureError(ValueError):
    """A file that cannot be used as a picture; the message is one sentence with the file's name and what to do."""


def picture_format(path: str | os.PathLike[str]) -> str | None:
    """PNG, WEBP, BMP or TIFF, by a file's first bytes, whatever its ending; None for everything else."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return None
    for kind, starts in _STARTS.items():
        if start.startswith(starts) and (kind != "WEBP" or start[8:12] == b"WEBP"):
            return kind
    return None


def read_picture(path: str | os.PathLike[str]) -> Tensor:
    """The first picture of a PNG, WebP, BMP or TIFF: float32 RGB (3, H, W) in [0, 1].

    EXIF orientation is applied, transparency dropped, not blended; 16 bits a channel are scaled to 8.

    Raises:
        PictureError: It is none of these, cut short or damaged, of 32 bits a channel, or larger than `MAX_PIXELS`.
    """
    name, kind = Path(path).name, picture_format(path)
    if kind is None:
        raise PictureError(f"{name} is no PNG, WebP, BMP or TIFF: save it as one of these")
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes()), formats=(kind,)) as opened, refusing_truncated_files():
            _check(opened, name)
            opened.load()
            levels = _levels(upright(opened))
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers let through whatever comes of a broken file
        reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise PictureError(f"{name} is cut short or damaged ({reason}): get a complete copy of the file") from error
    return torch.from_numpy(levels).movedim(-1, 0).float().div_(255)


def _check(picture: Image.Image, name: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise PictureError(
            f"{name} is {picture.width}x{picture.height}, more than {MAX_PIXELS // 10**6} million pixels: crop or "
            "shrink it"
        )
    if picture.mode in ("I", "F") and picture.format != "PNG":
        raise PictureError(f"{name} has 32 bits a channel where 8 or 16 were expected: save it with fewer")


def _levels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8."""
    if picture.mode.startswith("I"):  # 16 bits; older Pillows call PNGs of 16 bits "I"
        return np.repeat((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))
