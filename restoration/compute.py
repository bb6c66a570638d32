"""Where networks run, how far they are, and whether what they return is a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .strips import is_finite
from .tiling import Tiler


@dataclass(frozen=True)
class Compute:
    """Where and how the networks run; the images themselves stay where they are.

    Args:
        device: Device of the network.
        tiler: Splits images that are too large for it.
        check: Called after every tile; raises to interrupt.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tiler: Tiler = field(default_factory=Tiler)
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Progress:
    """How far a restoration is.

    Args:
        fraction: Done, from 0 to 1.
        preview: The present prediction of the image at work, (1, 3, H, W); None between two of its tiles.
    """

    fraction: float
    preview: Tensor | None


OnProgress = Callable[[Progress], None]
Report = Callable[[float, Tensor | None], None]


def part_of(on_progress: OnProgress | None, index: int, images: int) -> Report:
    """Reports the progress of one image of a batch as that of the batch."""

    def report(done: float, preview: Tensor | None) -> None:
        if on_progress is not None:
            on_progress(Progress((index + done) / images, preview))

    return report


class NotFiniteError(ValueError):
    """A network returned something that is no number."""


def finite(tensor: Tensor) -> Tensor:
    """A result as it is.

    Raises:
        NotFiniteError: It holds something that is no number.
    """
    if not is_finite(tensor):
        raise NotFiniteError("the network returned something that is no number. Load the restorer as bf16 or fp32.")
    return tensor
