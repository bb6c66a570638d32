"""How large the numbers of a configuration may be: checked where it is made, told in its files, and in its schema."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """What a number, or each of a list, may be.

    Args:
        least: The smallest that is allowed.
        most: The largest.
        open: Whether the largest itself is not allowed.
    """

    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, number: float) -> bool:
        return self.least <= number and (number < self.most if self.open else number <= self.most)

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"at least {self.least:g}"
        return f"at least {self.least:g} and below {self.most:g}" if self.open else f"{self.least:g} to {self.most:g}"


_ANY, _SOME, _SHARE, _QUALITY = Range(0), Range(1), Range(0, 1), Range(0, 100)
RANGES: dict[str, dict[str, Range]] = {
    "DataConfig": {"crop": _SOME, "downscale": _SOME, "workers": _ANY, "cache_mb": _ANY, "shuffle_shards": _SOME},
    "OptimizerConfig": {
        "learning_rate": _ANY, "warmup_images": _ANY, "weight_decay": _ANY, "gradient_clip": _ANY, "ema_decay": _SHARE,
        "betas": Range(0, 1, open=True),
    },
    "ValidationConfig": {"every": _SOME, "images": _SOME, "crop": _SOME, "qualities": _QUALITY, "shown": _SOME},
    "RunConfig": {
        "images": _SOME, "batch": _SOME, "accumulate": _SOME, "seed": _ANY, "checkpoint_every": _SOME,
        "checkpoint_minutes": _ANY, "keep_every": _ANY, "keep": _ANY,
    },
    "SDEConfig": {"t_eps": Range(0, 1, open=True)},
    "CoDiffConfig": {"most_tokens": _SOME},
    "Degradation": {
        "quality_min": _QUALITY, "quality_max": _QUALITY, "double_quality_min": _QUALITY,
        "double_quality_max": _QUALITY, "webp_quality_min": _QUALITY, "webp_quality_max": _QUALITY,
        "double_probability": _SHARE, "ffmpeg_probability": _SHARE, "grayscale_probability": _SHARE,
        "choice_probability": _SHARE, "misaligned_probability": _SHARE, "resize_probability": _SHARE,
        "webp_probability": _SHARE, "quality_choices": _QUALITY, "misaligned_max": _ANY,
    },
}  # fmt: skip
"""Dataclass -> field -> what it may be. Dataclasses with checks of their own have ranges here for files and schema."""


def range_of(config: Any, field: str) -> Range | None:
    """What a field of a dataclass may be, where that is limited."""
    return RANGES.get(type(config).__name__, {}).get(field)


def check_ranges(config: Any) -> None:
    """Refuse numbers of a dataclass that lie out of their range.

    Raises:
        ValueError: One does; it is named with what is allowed.
    """
    for field, allowed in RANGES[type(config).__name__].items():
        value = getattr(config, field)
        if any(number not in allowed for number in (value if isinstance(value, tuple) else (value,))):
            got = " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else f"{value:g}"
            raise ValueError(f"{field}: expected {allowed}, got {got}.")
