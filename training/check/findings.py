"""What a check finds: one line each, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["problem", "warning", "note"]
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        level: A `problem` stops the training, or makes its result worthless; a `warning` makes it worse than it could
            be; a `note` is good to know.
        text: What was found, and what to do.
        pictures: All pictures that it is about; the line names the first ones.
    """

    level: Level
    text: str
    pictures: tuple[str, ...] = ()

    def line(self) -> str:
        """As it is printed."""
        return f"{self.level}: {self.text}"


def named(names: Sequence[object]) -> str:
    """The first of some names in parentheses, e.g. "(a.png, b.png and 7 more)"."""
    shown = ", ".join(str(name) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"({shown}{more})"


def of(count: int, total: int) -> str:
    """A count in a sentence, e.g. "3 of 200 pictures"."""
    return f"{count} of {total} pictures"


def amount(count: float) -> str:
    """Bytes as people say them, e.g. "1.5 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
