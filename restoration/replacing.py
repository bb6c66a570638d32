"""Renaming over files that others may have open."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TRIES = 20
_SECONDS = 0.25


def replace(temporary: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """`os.replace`, patient on Windows: a virus scanner, or a program that has the file mapped, bars it for a while.

    Raises:
        OSError: It cannot be replaced, on Windows after five seconds.
    """
    for left in reversed(range(_TRIES if os.name == "nt" else 1)):
        try:
            os.replace(temporary, target)
            return
        except PermissionError:
            if not left or not Path(temporary).exists():
                raise
            time.sleep(_SECONDS)
