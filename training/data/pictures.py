"""Clean pictures in folders and in shards: found, looked at, decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from restoration.upright import upright
from training.data.reading import ForbiddenFileError, UnreadableError, patiently, read_file
from training.data.shards import find_members, is_shards, shard_of

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_READERS = 8


class BrokenPictureError(ValueError):
    """What is in a file is no whole picture; the message says how that was seen."""


DECODE_ERRORS = (BrokenPictureError,)
"""What is raised of files that are truncated, broken or not pictures at all; not of disks that do not answer."""


def find_images(source: str | Path, option: str = "--data.train") -> list[Path]:
    """All pictures below a folder, sorted by path, or all in shards, in their order there.

    Args:
        source: A folder, or a pattern of shards as `training.data.shards.expand_shards` takes it. The pictures in
            shards are paths through them, which `load_image` opens.
        option: That named it, for messages.

    Raises:
        FileNotFoundError: The folder or shards are missing, or hold no picture.
        ShardError: The shards cannot be used.
    """
    if is_shards(source):
        return find_members(source, IMAGE_EXTENSIONS)
    folder = Path(source)
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds the pictures, e.g. {folder.parent}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the folder that holds the pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    if not paths:
        shards = len(list(folder.glob("*.tar")))
        packed = f"; it holds {shards} shard(s): give {option} '{folder}/*.tar'" if shards else ""
        endings = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise FileNotFoundError(
            f"no picture found in {folder}: expected files ending in {endings}, also in sub-folders{packed}"
        )
    return paths


def scan_images(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Opens each file's header: the readable paths in their order, and the others with a reason.

    What comes after the header is not read: a picture that is broken there is found, named and left out when its turn
    comes, like members of shards, which count as readable.

    Raises:
        UnreadableError: The disk does not answer. That a file may not be read is a reason, like being broken.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        reasons = list(pool.map(_reason_against, paths))
    good = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    return good, [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason is not None]


def _reason_against(path: Path) -> str | None:
    def look() -> None:
        with opened(path):
            pass

    if shard_of(path) is not None:
        return None
    try:
        patiently(look, path)
    except (BrokenPictureError, ForbiddenFileError) as error:
        return str(error)
    return None


def load_image(path: Path) -> np.ndarray:
    """Decodes a picture upright (EXIF orientation applied) to (H,W,3) uint8 RGB; transparency is dropped, not blended.

    Pictures of 16 bits a channel are scaled to 8. `path` may lead through a shard.

    Raises:
        BrokenPictureError: It cannot be decoded.
        UnreadableError: The disk does not give it, also after some seconds.
    """
    with opened(read_picture(path)) as picture:
        return upright_rgb(picture)


def read_picture(path: Path) -> bytes:
    """The bytes of a picture's file. `path` may lead through a shard.

    Raises:
        BrokenPictureError: The shard does not have them, or not all.
        UnreadableError: The disk does not give them, also after some seconds.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise BrokenPictureError(f"{type(error).__name__}: {error}") from error


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """A picture, opened: whatever goes wrong with it from here on is the picture's fault.

    Args:
        source: Its file, or what is in it.

    Raises:
        BrokenPictureError: Opening it, or what is done with it, fails.
        OSError: With an `errno`: the disk does not give it.
        MemoryError: It does not fit.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            yield picture
    except (MemoryError, UnreadableError):
        raise
    except UnidentifiedImageError as error:
        name = "" if isinstance(source, bytes) else f" {os.fspath(source)!r}"
        raise BrokenPictureError(f"{type(error).__name__}: cannot identify image file{name}") from error
    except Exception as error:  # Pillow's readers let through whatever comes of a broken file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BrokenPictureError(f"{type(error).__name__}: {error}") from error


def upright_rgb(picture: Image.Image) -> np.ndarray:
    """What `load_image` gives of an opened picture."""
    picture.load()
    turned = upright(picture)
    if turned.mode.startswith("I;16"):
        return np.repeat((np.asarray(turned).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(turned.convert("RGB"))
