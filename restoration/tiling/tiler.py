"""Restoring a picture tile by tile: aligned to the JPEG grid, blended without seams, smaller when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MINIMUM_TILE = 128


class TileGrid:
    """Where the tiles of a picture start, and how they are blended.

    `height` and `width` must be multiples of `align` (see `pad_to_multiple`); `tile` is rounded down and `overlap` up
    to multiples of it, `tile` 0 means whole. All starts are multiples of `align` and all tiles have one size
    (`tile_height`, `tile_width`): the last of an axis is moved back to end at the border. Neighbours share at least
    `overlap` pixels.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: int, align: int = 16) -> None:
        if height % align or width % align or min(height, width) < 1:
            raise ValueError(f"a grid aligned to {align} needs sides that are multiples of it, got {height}x{width}")
        if tile < 0 or overlap < 0:
            raise ValueError(f"tile and overlap must not be negative, got {tile} and {overlap}")
        tile = max(tile // align, 1) * align if tile else max(height, width)
        if overlap > tile // 2 and tile < max(height, width):
            raise ValueError(f"overlap must be at most half the tile ({tile}), got {overlap}")
        overlap = min(-(-overlap // align), tile // 2 // align) * align
        self.tile_height, self.tile_width = min(tile, height), min(tile, width)
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


class Tiler:
    """Applies functions tile by tile and remembers the tile size that fits the device's memory.

    `tile` (pixels, 0 for whole pictures) is halved whenever a call runs out of memory, down to `minimum`; the call then
    starts again, and later calls begin with the smaller size. `release` is called before each new attempt, e.g. to
    empty the device's cache.
    """

    def __init__(
        self,
        tile: int = 0,
        overlap: int = 32,
        align: int = 16,
        *,
        minimum: int = MINIMUM_TILE,
        is_out_of_memory: Callable[[Exception], bool] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.tile = tile
        self.overlap = overlap
        self.align = align
        self.minimum = minimum
        self.is_out_of_memory = is_out_of_memory or is_out_of_memory_error
        self.release = release

    def __call__(
        self,
        function: Callable[..., Tensor],
        *tensors: Tensor,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """`function(*tiles)` over all tiles of `tensors`, blended: (B,C,H,W) of one H and W, multiples of `align`.

        `function` must return tensors (B,C',h,w) of its tile's size; it may run again on tiles it has already seen.
        `on_tile(done, total)` is called after each tile. The last out-of-memory error is raised as it came once the
        tile is at its minimum.
        """
        height, width = _common_size(tensors)
        while True:
            overlap = min(self.overlap, self.tile // 2) if self.tile else self.overlap
            grid = TileGrid(height, width, self.tile, overlap, self.align)
            try:
                return _apply(function, tensors, grid, on_tile)
            except Exception as error:
                smaller = self._smaller(grid)
                if not self.is_out_of_memory(error) or smaller is None:
                    raise
            # Outside the handler the traceback, which keeps the failed attempt's tensors alive, is gone.
            self.tile = smaller
            if self.release is not None:
                self.release()

    def _smaller(self, grid: TileGrid) -> int | None:
        current = max(grid.tile_height, grid.tile_width)
        halved = max(math.ceil(current / 2 / self.align) * self.align, self.minimum)
        return halved if halved < current else None


def tiled(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    *,
    tile: int,
    overlap: int,
    align: int = 16,
    on_tile: Callable[[int, int], None] | None = None,
    is_out_of_memory: Callable[[Exception], bool] | None = None,
) -> Tensor:
    """One call of a `Tiler` that is not kept: `function(*tiles)` over all tiles of `tensors`, blended."""
    return Tiler(tile, overlap, align, is_out_of_memory=is_out_of_memory)(function, *tensors, on_tile=on_tile)


def is_out_of_memory_error(error: Exception) -> bool:
    """Whether `error` is a device's or the host's way to say that memory ran out."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in message for sign in signs)


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


def crop_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The top left (H, W) of (B,C,H',W'): undoes `pad_to_multiple`."""
    return images[..., : size[0], : size[1]]


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


def _apply(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    grid: TileGrid,
    on_tile: Callable[[int, int], None] | None,
) -> Tensor:
    if len(grid) == 1:
        result = function(*tensors)
        if on_tile is not None:
            on_tile(1, 1)
        return result
    blended: Tensor | None = None
    dtype = torch.float32
    for done, (rows, columns, weights) in enumerate(grid, start=1):
        result = function(*(tensor[..., rows, columns] for tensor in tensors))
        if result.shape[-2:] != weights.shape:
            expected = tuple(weights.shape)
            raise ValueError(f"a tiled function must keep the tile's size {expected}, it gave {tuple(result.shape)}")
        if blended is None:
            dtype = result.dtype
            size = tensors[0].shape[-2:]
            blended = torch.zeros((*result.shape[:2], *size), dtype=torch.float32, device=result.device)
        blended[..., rows, columns] += result.float() * weights.to(result.device)
        if on_tile is not None:
            on_tile(done, len(grid))
    assert blended is not None
    return blended.to(dtype)


def _common_size(tensors: Sequence[Tensor]) -> tuple[int, int]:
    sizes = {(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"tiling needs tensors of one height and width, got {sorted(sizes)}")
    return sizes.pop()
