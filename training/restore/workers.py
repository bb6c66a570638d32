"""The work on a share of the pictures, one after the other, in this process or in several; what came of it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from restoration.devices import accelerator_available
from restoration.restorer_file import read_restorer
from training.restore.carried import METADATA_FAILURES
from training.restore.families import Loading, load_restorer
from training.restore.picture import RestorePicture, SourcePicture, read_source, restore_source
from training.restore.plan import PlannedPicture
from training.restore.saving import (
    NoRoomError,
    OutputFormat,
    StaleParts,
    encode_picture,
    no_room,
    remove,
    write_whole,
)
from training.restore.settings import RestoreSettings

_FAILURES = (ValueError, OSError, RuntimeError, MemoryError)
"""What a picture may be to blame for; all else is a mistake of the program, and ends it."""
_READING_FAILURES = (*METADATA_FAILURES, Image.DecompressionBombError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Work:
    """What every process has to know.

    Args:
        restorer: The restorer file.
        base: The base model that it adapts, or None.
        settings: How pictures are restored.
        dtype: Of the networks, or None for what suits the device.
        format: Of the results.
        device: `auto`, `cpu`, `cuda` or `mps`.
        overwrite: Whether results that are there are made again.
        metadata: Whether EXIF and the like are carried over.
        total: Pictures of all processes, for the report.
    """

    restorer: Path
    base: str | None
    settings: RestoreSettings
    dtype: torch.dtype | None
    format: OutputFormat
    device: str
    overwrite: bool
    metadata: bool
    total: int


@dataclass
class Tally:
    """What came of a share.

    Args:
        done: Pictures that were restored.
        skipped: Pictures whose results were there.
        failed: Name of each other picture, and why it was not restored.
    """

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.done + other.done, self.skipped + other.skipped, self.failed + other.failed)


def choose_device(name: str, worker: int) -> torch.device:
    """The device of a worker of this machine: CUDA devices are given out in turn.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        name = "cpu" if not accelerator_available() else _accelerator()
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in available and not available[name]():
        raise ValueError(f"expected a device {name}, but torch finds none here. Give --device cpu, or leave it out.")
    return torch.device(name, worker % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def _accelerator() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "xpu"


def restore_share(
    work: Work, pictures: Sequence[PlannedPicture], worker: int, go_on: Callable[[], bool] = lambda: True
) -> Iterator[Tally]:
    """Restore pictures one after the other, a line for each; what is there already is left alone.

    Args:
        work: What is the same for all.
        pictures: The share.
        worker: The number of this process on this machine, from 0.
        go_on: Asked before each picture.

    Yields:
        What came of each picture.

    Raises:
        ValueError: The restorer cannot be used.
        NoRoomError: The place of the results is full, or cannot be written to.
    """
    parts, restore = StaleParts(), None
    for picture in pictures:
        if not go_on():
            return
        if picture.target.exists() and not work.overwrite:
            remove(parts.of(picture.target))
            yield Tally(skipped=1)
            continue
        if restore is None:
            loading = Loading(work.settings, choose_device(work.device, worker), work.dtype, work.base)
            restore = load_restorer(read_restorer(work.restorer), loading)
        yield _restore_one(work, picture, restore, parts.of(picture.target))


def _restore_one(work: Work, picture: PlannedPicture, restore: RestorePicture, stale: Sequence[Path]) -> Tally:
    started = time.perf_counter()
    try:
        source = read_source(picture.source, metadata=work.metadata)
    except _READING_FAILURES as error:
        return _failed(work, picture, error)
    try:
        remarks = _restored(work, picture, source, restore, stale)
    except NoRoomError:
        raise
    except _FAILURES as error:
        return _failed(work, picture, error)
    _say(work, picture, f"{'; '.join(remarks)}; {time.perf_counter() - started:.1f} s")
    return Tally(done=1)


def _failed(work: Work, picture: PlannedPicture, error: Exception) -> Tally:
    reason = _reason(error, picture.source.name)
    _say(work, picture, f"not restored: {reason}")
    return Tally(failed=[(picture.name, reason)])


def _reason(error: Exception, name: str) -> str:
    """A failure in one line that does not begin with the name of the file, as the report does already."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"it{text.removeprefix(name)}" if text.startswith(f"{name} ") else text.removeprefix(f"{name}: ")


def _restored(
    work: Work, picture: PlannedPicture, source: SourcePicture, restore: RestorePicture, stale: Sequence[Path]
) -> list[str]:  # fmt: skip
    """Restore and write one picture; returns remarks on it."""
    work.format.check_size(source.pixels.shape[-1], source.pixels.shape[-2])
    restored = restore_source(restore, source, consistency=work.settings.consistency)
    data, notes = encode_picture(restored, work.format, source.carried)
    try:
        write_whole(picture.target, data, stale)
    except OSError as error:
        if (ending := no_room(picture.target.parent, error)) is not None:
            raise ending from error
        raise
    return [source.description, *notes]


def _say(work: Work, picture: PlannedPicture, text: str) -> None:
    print(f"[{picture.number}/{work.total}] {picture.name}: {text}", flush=True)


def restore_in_processes(
    work: Work, pictures: Sequence[PlannedPicture], jobs: int, first: int
) -> Iterator[Tally]:  # fmt: skip
    """Restore a share in several processes on this machine, each with its part of the threads.

    Args:
        work: What is the same for all.
        pictures: The share.
        jobs: How many processes.
        first: The number of the first one on this machine.

    Yields:
        What came of each picture, also of those of a process that was killed.

    Raises:
        ValueError: The restorer cannot be used.
        NoRoomError: The place of the results is full, or cannot be written to.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    running: dict[Any, _Job] = {}
    try:
        for number in range(jobs):
            results, theirs = context.Pipe(duplex=False)
            share = list(pictures[number::jobs])
            process = context.Process(target=_child, args=(work, share, first + number, threads, theirs), daemon=True)
            process.start()
            running[results] = _Job(process, share)
            theirs.close()
        while running:
            for results in wait(list(running)):
                yield _received(work, results, running)
    finally:
        for job in running.values():
            job.process.terminate()


@dataclass(frozen=True)
class _Job:
    """A process, and those of its pictures that it has not told of yet, the next one first."""

    process: BaseProcess
    left: list[PlannedPicture]


def _received(work: Work, results: Any, running: dict[Any, _Job]) -> Tally:
    """The next message of a process, which is forgotten when it has ended."""
    try:
        message = results.recv()
    except (EOFError, OSError):  # OSError where it was killed within a message
        return _of_the_dead(work, running.pop(results))
    if isinstance(message, Exception):
        raise message
    del running[results].left[0]
    return message


def _of_the_dead(work: Work, job: _Job) -> Tally:
    """What came of the pictures that a process has not told of; none are left of one that came to its end."""
    job.process.join()
    status = job.process.exitcode
    reason = f"its process ended with status {status}: repeat the command, with fewer --jobs if memory ran out"
    there = [picture for picture in job.left if picture.target.exists() and not work.overwrite]
    return Tally(skipped=len(there), failed=[(picture.name, reason) for picture in job.left if picture not in there])


def _child(work: Work, pictures: list[PlannedPicture], worker: int, threads: int, results: Connection) -> None:
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    try:
        for tally in restore_share(work, pictures, worker, lambda: parent is None or parent.is_alive()):
            results.send(tally)
    except (ValueError, NoRoomError) as error:
        results.send(error)
    except (KeyboardInterrupt, BrokenPipeError):
        return  # the parent says it


def over_all_ranks(tally: Tally) -> Tally:
    """What all ranks of a torchrun did; waits for them, as torchrun ends all when one ends with a failure."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    tallies: list[Tally | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(tallies, tally)
    distributed.destroy_process_group()
    return sum((each for each in tallies if each is not None), Tally())


def wait_for_all_ranks() -> None:
    """Return when all ranks of a torchrun have come here."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    distributed.barrier()
    distributed.destroy_process_group()


def rank_of(environment: dict[str, str] | os._Environ[str]) -> tuple[int, int, int]:
    """Number of this process, how many there are, and its number on this machine, as torchrun tells them.

    Raises:
        ValueError: RANK and WORLD_SIZE are no such numbers.
    """
    given = [environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    local = environment.get("LOCAL_RANK", "0")
    if not all(value.isdigit() for value in (*given, local)) or not int(given[0]) < int(given[1]):
        raise ValueError(
            f"expected RANK from 0 to WORLD_SIZE - 1 in the environment, got {given[0]!r} of {given[1]!r}. Set both, "
            "or neither."
        )
    return int(given[0]), int(given[1]), int(local)
