"""Tiles of a latent as the one-step restorers were published with: flush with the border, blended by Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_VARIANCE = 0.01


@dataclass(frozen=True)
class LatentTile:
    """A window of a latent, in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.left + self.width)


def latent_tiles(height: int, width: int, tile: int, overlap: int, align: int = 1) -> list[LatentTile]:
    """The windows of a latent (height, width), row by row; one if it is no larger than a tile.

    As few as reach the border with this overlap; the last of an axis ends there (CODiff, OSEDiff). The tile is cut to
    each side on its own, where the authors cut it to the shorter of both.

    Args:
        height: Of the latent.
        width: Of the latent.
        tile: Side of the tiles.
        overlap: What neighbours share at least.
        align: Starts are multiples of this; the last tile of an axis then is up to `align` - 1 larger.

    Raises:
        ValueError: The overlap is negative or more than half a tile, or the tile no multiple of `align`.
    """
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise ValueError(f"expected an overlap from 0 to half the tile, {tile // 2}, got {overlap}. Lower the overlap.")
    if (tile - overlap) % align:
        raise ValueError(f"expected tile - overlap to be a multiple of {align}, got {tile} - {overlap}.")
    rows, columns = _spans(height, tile, overlap, align), _spans(width, tile, overlap, align)
    return [LatentTile(top, left, down, across) for top, down in rows for left, across in columns]


def gaussian_weights(height: int, width: int) -> Tensor:
    """The published blending weights of a tile, float32 (height, width), largest 1.

    exp(-d^2 / (2 * 0.01)) with d the distance from the centre in tile sides; the vertical centre lies half a pixel
    lower than the middle, as the authors have it.
    """
    rows = _gaussian(height, height / 2)
    columns = _gaussian(width, (width - 1) / 2)
    weights = torch.outer(rows, columns)
    return (weights / weights.max()).float()


def _gaussian(length: int, centre: float) -> Tensor:
    distance = (torch.arange(length, dtype=torch.float64) - centre) / length
    return torch.exp(-(distance**2) / (2 * _VARIANCE))


def _spans(side: int, tile: int, overlap: int, align: int) -> list[tuple[int, int]]:
    """Start and length of each tile along one axis."""
    if side <= tile:
        return [(0, side)]
    step = tile - overlap
    count = math.ceil((side - tile) / step) + 1
    last = (side - tile) // align * align
    return [(min(number * step, last), tile) for number in range(count - 1)] + [(last, side - last)]
