"""Files that are whole or not there: written beside their place and renamed, whenever a kill may come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PART = ".part"
"""Ending of a file that is being written; one that a kill left behind is of no use to anybody."""


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
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with UTF-8 text."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")))


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, in the place of what had it; a copy where the disk knows no second names.

    Neither may be changed afterwards but by replacing it.

    Raises:
        OSError: The disk is full or not writable.
    """
    temporary = target.with_name(target.name + PART)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # FAT and some network disks
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # renaming does nothing where both are names of one file already


def remove_parts(folder: Path) -> None:
    """Remove what a kill left half written in a folder."""
    for path in folder.glob(f"*{PART}"):
        path.unlink(missing_ok=True)
