"""Restored pictures as files: PNG, WebP or JPEG with what is carried over, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training.restore.carried import Carried

SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
"""The ending of files of each format."""
PART = ".part"
"""The ending of files that are being written."""
_LONGEST_SIDE = {"png": 2**31 - 1, "webp": 16383, "jpeg": 65500}
_MOST_IN_A_MARKER = {"exif": 65533, "xmp": 65533 - 29}
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})


class NoRoomError(OSError):
    """Nothing more can be written."""


@dataclass(frozen=True)
class OutputFormat:
    """The format of the results.

    Args:
        kind: `png` and `webp` are lossless, `jpeg` is not.
        jpeg_quality: Of JPEGs, 1 to 100; their colours are not subsampled.
    """

    kind: str = "png"
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"expected --jpeg-quality from 1 to 100, got {self.jpeg_quality}.")

    @property
    def suffix(self) -> str:
        """The ending of its files."""
        return SUFFIXES[self.kind]

    def check_size(self, width: int, height: int) -> None:
        """Refuse, before time is spent on it, a picture that the format cannot hold.

        Raises:
            ValueError: A side is too long.
        """
        longest = _LONGEST_SIDE[self.kind]
        if max(width, height) > longest:
            raise ValueError(
                f"it is {width}x{height}, and {self.kind} holds sides of up to {longest} pixels: choose --format png"
            )


def encode_picture(picture: Image.Image, output: OutputFormat, carried: Carried) -> tuple[bytes, list[str]]:
    """The bytes of a file, and remarks on what the format could not take.

    Args:
        picture: Of the mode L, RGB or RGBA.
        output: The format.
        carried: What is written beside the pixels.
    """
    notes = list(carried.notes)
    extras = _fitting(carried, output, notes)
    if output.kind == "jpeg" and picture.mode == "RGBA":
        picture = picture.convert("RGB")
        notes.append("without its transparency, which JPEG does not have")
    buffer = io.BytesIO()
    picture.save(buffer, output.kind.upper(), **_encoder_options(output), **extras)
    return buffer.getvalue(), notes


def _encoder_options(output: OutputFormat) -> dict[str, Any]:
    if output.kind == "jpeg":
        return {"quality": output.jpeg_quality, "subsampling": "4:4:4"}
    return {"lossless": True, "exact": True} if output.kind == "webp" else {}


def _fitting(carried: Carried, output: OutputFormat, notes: list[str]) -> dict[str, Any]:
    """What Pillow is told to write beside the pixels; what the format cannot hold is noted."""
    extras: dict[str, Any] = {"exif": carried.exif, "xmp": carried.xmp, "icc_profile": carried.icc}
    if output.kind == "jpeg":
        for key, most in _MOST_IN_A_MARKER.items():
            if len(extras[key]) > most:
                notes.append(f"without its {key.upper()}, which is {len(extras.pop(key))} bytes, too many for JPEG")
    if output.kind == "webp" and carried.is_gray_profile:
        notes.append("without its ICC profile, which is for gray pictures: WebP has none")
        del extras["icc_profile"]
    if output.kind == "png" and (xmp := extras.pop("xmp")):
        extras["pnginfo"] = _png_text(xmp)
    if output.kind != "webp" and carried.dpi is not None:
        extras["dpi"] = carried.dpi
    return {key: value for key, value in extras.items() if value}


def _png_text(xmp: bytes) -> PngInfo:
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
    return text


def write_whole(target: Path, data: bytes, stale: Iterable[Path] = ()) -> None:
    """Write a file so that a kill at any moment leaves it whole or absent.

    Who may read it is as for all files that the user makes (umask).

    Args:
        target: The file; its folder is made.
        data: What it holds.
        stale: Files that killed writings of the same target left behind (`StaleParts`); they are removed.

    Raises:
        OSError: It cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{_mark(target)}-{secrets.token_hex(4)}{PART}")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        remove(stale)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Make a folder, and refuse one in which no file can be made, before time is spent on what would go there.

    Raises:
        ValueError: It cannot be made, or be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"expected a folder that can be written to, got {folder} ({error.strerror}). Give another OUT, or see to "
            "its permissions and its room."
        ) from error


def no_room(folder: Path, error: OSError) -> NoRoomError | None:
    """What to say of a failed writing where those of further files would fail as well, else None."""
    if error.errno in _FULL:
        return NoRoomError(f"{folder} takes no more ({error.strerror}): make room and repeat the command")
    if error.errno in _CLOSED:
        return NoRoomError(
            f"{folder} cannot be written to ({error.strerror}): see to its permissions, or give another OUT, and "
            "repeat the command"
        )
    return None


def remove(parts: Iterable[Path]) -> None:
    """Remove files, where they still are."""
    for part in parts:
        part.unlink(missing_ok=True)


class StaleParts:
    """Files that killed writings left in folders, by what they were to become; each folder is looked through once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[Path]]] = {}

    def of(self, target: Path) -> list[Path]:
        """Those of one file."""
        folder = target.parent
        if folder not in self._folders:
            self._folders[folder] = _parts_in(folder)
        return self._folders[folder].get(_mark(target), [])


def _parts_in(folder: Path) -> dict[str, list[Path]]:
    parts: dict[str, list[Path]] = {}
    names = os.listdir(folder) if folder.is_dir() else []
    for name in names:
        if name.startswith(".") and name.endswith(PART):
            parts.setdefault(name[1:].partition("-")[0], []).append(folder / name)
    return parts


def _mark(target: Path) -> str:
    """What the names of a file's parts begin with: short, as its own may be as long as the file system allows."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
