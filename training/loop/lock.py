"""One training at a time writes into a folder."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import IO

_NAME = "run.lock"


class LockedError(RuntimeError):
    """Another process holds the folder; the message says which."""


class FolderLock:
    """Held by this process until it is released or ends, however it ends; not by processes that it starts.

    Where a disk knows no locks, as some network disks, nothing is held and nothing refused.

    Args:
        folder: What only one process may write to; it exists.

    Raises:
        LockedError: Another process holds it.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME
        self._file: IO[str] | None = self.path.open("a+", encoding="utf-8")
        try:
            _lock(self._file)
        except BlockingIOError as error:
            holder = self._holder()
            self._file.close()
            raise LockedError(
                f"{folder}: another training writes there{holder}. Wait for its end, or give --run.output another "
                "folder."
            ) from error
        self._file.truncate(0)
        self._file.write(f" {os.getpid()} on {socket.gethostname()}")  # Windows locks the first byte
        self._file.flush()

    def _holder(self) -> str:
        assert self._file is not None
        try:
            self._file.seek(1)
            said = self._file.read().strip()
        except OSError:  # Windows, where it is locked
            return ""
        return f" (process {said})" if said else ""

    def release(self) -> None:
        """Let others write; the file stays. Releasing again does nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        """A record lock, which belongs to the process: children that outlive it do not hold it."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BlockingIOError from error
        except OSError:
            return
