"""Where the tiles of a picture lie, aligned to the JPEG grid, how they are blended, and how pictures are filled up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class TileGrid:
    """Where the tiles of a picture start, and how they are blended.

    `height` and `width` must be multiples of `align` (see `pad_to_multiple`); `tile` is rounded down and `overlap` up
    to multiples of it, `tile` 0 means whole. All starts are multiples of `align` and all tiles have one size
    (`tile_height`, `tile_width`): of what `tile` allows (`largest`) the smallest with which as many tiles still cover
    the picture, for what overlaps is computed twice; or, unless `even`, `tile` itself. The last of an axis is moved
    back to end at the border. Neighbours share at least `overlap` pixels.
    """

    def __init__(
        self, height: int, width: int, tile: int, overlap: int, align: int = 16, *, even: bool = True
    ) -> None:  # fmt: skip
        if height % align or width % align or min(height, width) < 1:
            raise ValueError(f"a grid aligned to {align} needs sides that are multiples of it, got {height}x{width}")
        if tile < 0 or overlap < 0:
            raise ValueError(f"tile and overlap must not be negative, got {tile} and {overlap}")
        tile = max(tile // align, 1) * align if tile else max(height, width)
        if overlap > tile // 2 and tile < max(height, width):
            raise ValueError(f"overlap must be at most half the tile ({tile}), got {overlap}")
        overlap = min(-(-overlap // align), tile // 2 // align) * align
        self.largest = (min(tile, height), min(tile, width))
        self.tile_height, self.tile_width = self.largest
        if even:
            self.tile_height, self.tile_width = (_even(length, tile, overlap, align) for length in (height, width))
        self.tops = _starts(height, self.tile_height, overlap)
        self.lefts = _starts(width, self.tile_width, overlap)
        self._row_weights = _partition(self.tops, self.tile_height, height, overlap)
        self._column_weights = _partition(self.lefts, self.tile_width, width, overlap)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and blending weights (tile_height, tile_width) of each tile, row by row.

        At every pixel the weights of all tiles add up to one, and none is zero.
        """
        for top, rows in zip(self.tops, self._row_weights, strict=True):
            for left, columns in zip(self.lefts, self._column_weights, strict=True):
                weights = torch.outer(rows, columns)
                yield slice(top, top + self.tile_height), slice(left, left + self.tile_width), weights


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Extends (B,C,H,W) at the bottom and right to multiples of `multiple`; returns it with the original (H, W).

    Pixels are mirrored where the side is longer than what is missing, and repeated otherwise (works from 1x1 on). The
    block grid of a JPEG, which starts at the top left, stays in place.
    """
    height, width = images.shape[-2:]
    below, beside = -height % multiple, -width % multiple
    if beside:
        images = F.pad(images, (0, beside, 0, 0), mode="reflect" if beside < width else "replicate")
    if below:
        images = F.pad(images, (0, 0, 0, below), mode="reflect" if below < height else "replicate")
    return images, (height, width)


def padded_window(images: Tensor, rows: slice, columns: slice, multiple: int) -> Tensor:
    """A window of what `pad_to_multiple` gives, without the whole of it; inside of the picture a view."""
    height, width = images.shape[-2:]
    if rows.stop <= height and columns.stop <= width:
        return images if (rows, columns) == (slice(0, height), slice(0, width)) else images[..., rows, columns]
    down, across = _mirrored(rows, height, multiple), _mirrored(columns, width, multiple)
    return images[..., down.to(images.device)[:, None], across.to(images.device)]


def crop_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The top left (H, W) of (B,C,H',W'): undoes `pad_to_multiple`."""
    return images[..., : size[0], : size[1]]


def _mirrored(span: slice, length: int, multiple: int) -> Tensor:
    """Which position of a side of `length` is seen at each of a span that may reach beyond its end."""
    positions = torch.arange(span.start, span.stop)
    if -length % multiple < length:
        return torch.where(positions < length, positions, 2 * (length - 1) - positions)
    return positions.clamp(max=length - 1)


def _even(length: int, tile: int, overlap: int, align: int) -> int:
    """The smallest tile of which no more are needed than of `tile`."""
    if tile >= length:
        return length
    count = math.ceil((length - overlap) / (tile - overlap))
    return math.ceil((length + (count - 1) * overlap) / count / align) * align


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    return [0] if tile == length else [*range(0, length - tile, tile - overlap), length - tile]


def _partition(starts: list[int], tile: int, length: int, overlap: int) -> list[Tensor]:
    """Each tile's weights along one axis: squared-cosine ramps where tiles meet, divided by the sum of all."""
    ramp = torch.sin((torch.arange(overlap) + 0.5) * (math.pi / 2 / max(overlap, 1))).square()
    weights = []
    for start in starts:
        weight = torch.ones(tile)
        if start > 0:
            weight[:overlap] *= ramp
        if start + tile < length:
            weight[tile - overlap :] *= ramp.flip(0)
        weights.append(weight)
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return [weight / total[start : start + tile] for start, weight in zip(starts, weights, strict=True)]
