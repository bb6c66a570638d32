"""Files as they are on their disk: a short outage is waited for, and a longer one is no fault of the pictures."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from training.data.shards import open_member

R = TypeVar("R")
_WAITS = (0.5, 1.0, 2.0)
"""Seconds before each further attempt."""
_GONE = (errno.ENOENT, errno.ENOTDIR)
_REFUSED = (errno.EACCES, errno.EPERM)

logger = logging.getLogger(__name__)


class UnreadableError(RuntimeError):
    """A file cannot be read now; nothing is known to be wrong with what is in it."""


class ForbiddenFileError(UnreadableError):
    """There is no permission to read it."""


def read_file(path: Path) -> bytes:
    """The bytes of a file, or of a member of a shard, read again for some seconds where the disk does not give them.

    Raises:
        UnreadableError: The disk does not give them.
        OSError: Without an `errno`: there is no such member, or its shard ends within it.
    """

    def read() -> bytes:
        member = open_member(path)
        return path.read_bytes() if member is None else member.read()

    return patiently(read, path)


def patiently(read: Callable[[], R], path: Path) -> R:
    """What `read` gives; where the disk does not answer, it is called again.

    Args:
        read: Reads the file.
        path: The file, for messages.

    Raises:
        UnreadableError: It still does not; one sentence says what to do.
        OSError: Without an `errno`, which is about what is in the file, at once.
    """
    for wait in (*_WAITS, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None:
                raise
            if wait is None or error.errno in _REFUSED:
                raise _refusal(path, error) from error
            logger.warning("%s: %s; it is tried again", path, error.strerror)
        time.sleep(wait)
    raise AssertionError("the last call returns or raises")


def _refusal(path: Path, error: OSError) -> UnreadableError:
    """What is told of a file that the disk does not give."""
    place = Path(error.filename) if isinstance(error.filename, str) else path
    if error.errno in _REFUSED:
        return ForbiddenFileError(
            f"{path}: there is no permission to read it. Give it, or take the file away, and repeat the command, which "
            "goes on where it stopped."
        )
    if error.errno in _GONE and place.parent.is_dir():
        return UnreadableError(
            f"{place} is gone, though its folder is there. Put it back, or mount its disk again, and repeat the "
            "command, which goes on where it stopped."
        )
    return UnreadableError(
        f"{path} cannot be read ({error.strerror}), {1 + len(_WAITS)} times in a row: its disk or network does not "
        "answer. When it does, repeat the command, which goes on where it stopped."
    )
