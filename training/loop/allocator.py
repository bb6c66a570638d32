"""Main memory for trainings on a CPU: what a step frees is kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""What mallopt(3) calls its parameters, from glibc's malloc.h."""
_STEP = 1 << 26
"""Bytes that the heap grows by at least."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, in this process and in those that it starts by forking.

    A step takes and frees the same tensors as the one before. As it comes, glibc asks the system for large ones each
    time and gives them back, and the system clears every page: up to a third of a step's time. Other systems, other
    allocators, and environments with settings of malloc of their own are left alone.

    Returns:
        Whether anything was done.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if own or not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(name, value) for name, value in ((_TRIM_THRESHOLD, -1), (_TOP_PAD, _STEP), (_MMAP_MAX, 0)))
    return False
