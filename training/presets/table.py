"""All presets of all commands as a table for a terminal."""

from __future__ import annotations

from typing import Any

from training.commands import COMMANDS
from training.presets.figures import KNOWN, NOTES, Known

_HEAD = ("command", "preset", "images", "batch", "memory", "time", "for")
_RIGHT = ("images", "batch", "memory", "time")
_UNKNOWN = "-"


def make_table() -> str:
    """One row a preset, and where its numbers come from; a dash is a number that nobody counted or measured."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for command, row in COMMANDS.items():
        for number, (preset, config) in enumerate(row.presets().items()):
            rows.append(("" if number else command, preset, *_cells(config, KNOWN.get((command, preset), Known("")))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(_aligned(*cell) for cell in zip(row, widths, _HEAD, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes()])


def _cells(config: Any, known: Known) -> tuple[str, ...]:
    run = config.run
    memory = f"{_rounded(known.memory)} GiB {known.memory_from}" if known.memory is not None else _UNKNOWN
    time = f"{in_hours(run.images / known.rate)} {known.rate_from}" if known.rate is not None else _UNKNOWN
    return f"{run.images:,}", str(run.batch), memory, time, known.purpose


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def in_hours(seconds: float) -> str:
    """A time, roughly."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def _aligned(cell: str, width: int, column: str) -> str:
    return cell.rjust(width) if column in _RIGHT else cell.ljust(width)


def _notes() -> list[str]:
    return [
        "images, batch: what is trained on in all, and in each step over all processes.",
        "memory: of one device that takes the whole batch. Several processes, or --run.accumulate, divide most of it.",
        f"{_UNKNOWN}: neither counted nor measured.",
        *(f"{mark}: {said}." for mark, said in NOTES.items()),
        "",
        "python -m training COMMAND --preset PRESET                     trains it as it is",
        "python -m training presets show COMMAND PRESET > my.yaml       writes it as a file to edit",
        "python -m training COMMAND --preset PRESET --config my.yaml    trains what is in the file",
    ]
