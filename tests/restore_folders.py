"""Folders of small pictures, and the command that restores them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

from training.restore.command import run


def cut(width: int = 40, height: int = 24, left: int = 200) -> Image.Image:
    """A piece of a photograph."""
    return Image.fromarray(data.astronaut()).crop((left, 60, left + width, 60 + height))


def save(path: Path, picture: Image.Image | None = None, **options: Any) -> Path:
    """Save a picture; its ending says the format, JPEGs have the quality 20 unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = cut() if picture is None else picture
    if path.suffix.lower() in (".jpg", ".jpeg"):
        options = {"quality": 20, **options}
    picture.save(path, **options)
    return path


def restore(source: Path, output: Path, restorer: Path, *options: str) -> int:
    """Run the command on the CPU in this process; returns its exit status."""
    return run([str(source), str(output), "--restorer", str(restorer), "--device", "cpu", *options])


def levels(path: Path) -> np.ndarray:
    """The pixels of a picture file as Pillow reads it, not turned."""
    with Image.open(path) as picture:
        return np.asarray(picture)


def files(folder: Path) -> list[str]:
    """All files of a folder and below it, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
