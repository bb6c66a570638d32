"""Files that are whole or not there: written beside their place and renamed, whenever a kill may come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from restoration.replacing import replace

PART = ".part"
"""Ending of a file that is being written; one that a kill left behind is of no use to anybody."""


class FileProblemError(RuntimeError):
    """Something is wrong with a file; the message says what, and what to do.

    Args:
        message: What happened, and what to do.
        filename: What could not be written or read, if that is why.
    """

    def __init__(self, message: str, filename: str | None = None) -> None:
        super().__init__(message)
        self.filename = filename


def replace_file(path: Path, write: Callable[[BinaryIO], object], *, flush: bool = False) -> None:
    """Write a file beside its place, then rename it.

    Args:
        path: The file; what was there before stays whole until it is replaced.
        write: Writes the contents.
        flush: Whether to wait until they are on the disk, so that a power failure cannot spoil them either.

    Raises:
        OSError: The disk is full or not writable; nothing has changed then.
    """
    temporary = path.with_name(path.name + PART)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with UTF-8 text."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in the place of another.

    Raises:
        OSError: The disk is full or not writable.
    """
    with source.open("rb") as opened:
        replace_file(target, lambda file: shutil.copyfileobj(opened, file), flush=True)


def remove_parts(folder: Path, pattern: str) -> None:
    """Remove what a kill left half written in a folder, of files whose names are like a pattern."""
    for path in folder.glob(f"{pattern}{PART}"):
        path.unlink(missing_ok=True)
