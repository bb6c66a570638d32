"""How far a run is: a bar in a terminal, a line every half minute in a file."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from tqdm import tqdm

_SECONDS = 30.0


def mute(stream: TextIO) -> None:
    """Whoever read a stream is gone; what comes later is written to nowhere, and nothing ends because of that."""
    with contextlib.suppress(OSError, ValueError):  # no file at all, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a line without tearing a bar; to nobody where nobody reads along any more."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        mute(sys.stdout)


class Progress(Protocol):
    """Shows images, the loss, images a second, and an estimate of the end."""

    def update(self, images: int, loss: float) -> None:
        """So many more images are done."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


def make_progress(done: int, total: int, say: Callable[[str], None], *, main: bool) -> Progress:
    """A bar where a person looks on, lines elsewhere.

    Args:
        done: Images that were done before.
        total: Images at the end.
        say: Prints a line.
        main: Whether this process shows anything.
    """
    return Bar(done, total, main=main) if sys.stderr.isatty() else Lines(done, total, say if main else _nothing)


def _nothing(_: str) -> None:
    pass


class Bar:
    """tqdm's bar."""

    def __init__(self, done: int, total: int, *, main: bool) -> None:
        self._bar = tqdm(
            total=total, initial=done, unit="image", disable=not main, smoothing=0.05, dynamic_ncols=True,
            mininterval=0.2, maxinterval=0.4,
        )  # fmt: skip

    def update(self, images: int, loss: float) -> None:
        try:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(images)
        except OSError:
            mute(sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Lines:
    """Lines of text, `12,000 of 100,000 images, loss 0.0123, 38.2 images/s, 38 min left (about 23:10)`.

    Args:
        done: Images that were done before.
        total: Images at the end.
        say: Prints a line.
        seconds: Between two lines.
        clock: Seconds, from any moment on.
    """

    def __init__(
        self, done: int, total: int, say: Callable[[str], None], *, seconds: float = _SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._first = self._done = done
        self._total, self._say, self._seconds, self._clock = total, say, seconds, clock
        self._began = self._said = clock()

    def update(self, images: int, loss: float) -> None:
        self._done += images
        now = self._clock()
        if now - self._said >= self._seconds:
            self._said = now
            self._say(self._line(loss, (self._done - self._first) / (now - self._began)))

    def _line(self, loss: float, rate: float) -> str:
        left = max(0, self._total - self._done) / rate
        end = datetime.datetime.now() + datetime.timedelta(seconds=left)
        when = f"{end:%H:%M}" if end.date() == datetime.date.today() else f"{end:%Y-%m-%d %H:%M}"
        return (
            f"{self._done:,} of {self._total:,} images, loss {loss:.4f}, {rate:.1f} images/s, "
            f"{duration(left)} left (about {when})"
        )

    def close(self) -> None:
        """Lines need no end."""


def duration(seconds: float) -> str:
    """A time in words: `45 s`, `38 min`, `5 h 20 min`, `3 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
