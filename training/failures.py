"""What a person is told when a command ends early: one sentence, and the exit status."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path
from typing import NamedTuple

MISTAKE, NO_ROOM = 2, 1
"""Exit statuses: something must be asked for in another way; or the machine has no room left for it."""
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_SAYS_FULL = ("No space left on device", "os error 28", "not enough space on the disk")
_SAYS_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")
_IN_WORKER = "Original Traceback"
_OTHERS = {
    "restore": "Lower --tile (and --jobs).",
    "evaluate": "Lower --tile.",
    "prepare": "Lower --batch.",
}
"""Command -> what takes less memory; the trainings have their own."""


class Ending(NamedTuple):
    """How a command ends."""

    sentence: str
    status: int


def explain(error: BaseException, command: str, *, trains: bool) -> Ending | None:
    """What to tell of an error; None where it is a mistake in this program, whose traceback should be seen.

    Args:
        error: What ended the command.
        command: Its name.
        trains: Whether it trains a network.
    """
    if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _SAYS_FULL):
        return Ending(_disk_full(getattr(error, "filename", None), trains=trains), NO_ROOM)
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return Ending(f"out of memory{_tried(error)}. {_lower(command, trains=trains)}", NO_ROOM)
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error) and _IN_WORKER not in str(error):
        return Ending(
            f"a process that prepares pictures was ended from outside ({_said(error).rstrip('.')}). Most often the "
            "main memory is used up: lower --data.workers or --data.cache-mb.", NO_ROOM,
        )  # fmt: skip
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, OSError) and error.errno is not None and _IN_WORKER not in str(error):
        where = f"{error.filename}: " if error.filename is not None else ""
        return Ending(f"{where}{error.strerror}.", MISTAKE)
    if isinstance(error, (ValueError, OSError)) or type(error).__module__.split(".")[0] in ("training", "restoration"):
        return Ending(_said(error), MISTAKE)
    return None


def _said(error: BaseException) -> str:
    """Its message; of an error in a worker process, which brings a traceback, the message alone."""
    if _IN_WORKER not in str(error):
        return str(error).strip()
    last = str(error).strip().splitlines()[-1]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", last)


def _disk_full(path: object, *, trains: bool) -> str:
    where = f"{path}: " if path else ""
    goes_on = ": it goes on from the last checkpoint, which is whole" if trains else ""
    return f"{where}the disk is full. Free some space and repeat the command{goes_on}."


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises RuntimeError, or a kind of it, for GPUs and for its own share of the main memory."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAYS_OUT_OF_MEMORY)


def _tried(error: BaseException) -> str:
    """What the allocator says: of which memory, and how much was asked for."""
    sentences = re.split(r"\.\s|\n", str(error))
    telling = [text for text in sentences if any(word in text.lower() for word in ("memory", "allocate"))]
    return f" ({'. '.join(telling[:2])})" if telling else ""


def _lower(command: str, *, trains: bool) -> str:
    if not trains:
        return _OTHERS.get(command, "Close other programs, or use a machine with more memory.")
    twice = ", turn on --gradient-checkpointing" if command in ("codiff", "saipe", "sodiff") else ""
    return (
        f"Raise --run.accumulate (the same batch in smaller parts){twice}, lower --run.batch; or, for a new run, "
        "--data.crop or the preset (`python -m training presets`). The last checkpoint is whole."
    )


def _missing_package(error: ImportError) -> Ending | None:
    if (error.name or "").split(".")[0] in ("training", "restoration"):
        return None
    return Ending(f'{error}. Install what the trainer needs: pip install -e ".[training]"{_own_python()}', MISTAKE)


def _own_python() -> str:
    """The Python that `make setup` has made here, if it is another one."""
    names = [Path(".venv") / name for name in ("bin/python", "Scripts/python.exe")]
    there = [name for name in names if name.exists() and Path(sys.prefix).resolve() != Path(".venv").resolve()]
    return f", or use {there[0]}, where it is installed" if there else ""
