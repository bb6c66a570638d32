"""Clean pictures in folders and in shards: found, looked at, decoded."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from training.data.shards import find_members, is_shards, open_member, shard_of

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that are missing, truncated, broken or not pictures at all."""
_READERS = 8


def find_images(source: str | Path) -> list[Path]:
    """All pictures below a folder, sorted by path, or all in shards, in their order there.

    Args:
        source: A folder, or a pattern of shards as `training.data.shards.expand_shards` takes it. The pictures in
            shards are paths through them, which `load_image` opens.

    Raises:
        FileNotFoundError: The folder or shards are missing, or hold no picture.
        ShardError: The shards cannot be used.
    """
    if is_shards(source):
        return find_members(source, IMAGE_EXTENSIONS)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the folder that holds the training pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    if not paths:
        shards = len(list(folder.glob("*.tar")))
        packed = f"; its {shards} shards are named as {folder}/*.tar" if shards else ""
        endings = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise FileNotFoundError(
            f"no picture found in {folder}: expected files ending in {endings}, also in sub-folders{packed}"
        )
    return paths


def scan_images(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Opens each file's header: the readable paths in their order, and the others with a reason.

    Members of shards count as readable; those that are not are found, named and left out when their turn comes.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        reasons = list(pool.map(_reason_against, paths))
    good = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    return good, [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason is not None]


def _reason_against(path: Path) -> str | None:
    if shard_of(path) is not None:
        return None
    try:
        with Image.open(path) as picture:
            picture.verify()
    except DECODE_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_image(path: Path) -> np.ndarray:
    """Decodes a picture upright (EXIF orientation applied) to (H,W,3) uint8 RGB; transparency is dropped, not blended.

    Pictures of 16 bits a channel are scaled to 8. `path` may lead through a shard.
    """
    with Image.open(open_member(path) or path) as opened:
        return upright_rgb(opened)


def upright_rgb(opened: Image.Image) -> np.ndarray:
    """What `load_image` gives of an opened picture."""
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I;16"):
        return np.repeat((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))
