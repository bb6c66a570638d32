"""The same work on many things, in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class LostProcessError(RuntimeError):
    """A process was ended from outside."""


def in_processes(work: Callable[[T], R], things: Sequence[T], jobs: int, chunk: int = 1) -> Iterator[R]:
    """What `work` gives of each thing, in their order. With one job, or one thing, it is done in this process.

    Args:
        work: A function of a module, which processes can import.
        things: What it is done on; they and the results travel between processes.
        jobs: Processes.
        chunk: Things that a process gets at a time.

    Raises:
        LostProcessError: A process was killed, most often for want of memory.
    """
    jobs = min(jobs, len(things))
    if jobs <= 1:
        yield from map(work, things)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_the_parent)
    try:
        yield from pool.map(work, things, chunksize=chunk)
    except BrokenProcessPool as error:
        raise LostProcessError(
            "a process was ended from outside, most often because the main memory is used up: lower --jobs."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_the_parent() -> None:
    """Ctrl-C reaches all processes, and the parent says what follows; when it was killed, nobody else ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
