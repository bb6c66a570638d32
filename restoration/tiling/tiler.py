"""Restoring a picture tile by tile: aligned to the JPEG grid, blended without seams, smaller when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .grid import TileGrid, crop_to, padded_window
from .statistics import SharedStatistics, sample_of

MINIMUM_TILE = 128

Function = Callable[..., Tensor]


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
        self, function: Function, *tensors: Tensor, on_tile: Callable[[int, int], None] | None = None,
        network: nn.Module | None = None, multiple: int = 1, even: bool = True,
    ) -> Tensor:  # fmt: skip
        """`function(*tiles)` over all tiles of `tensors`, blended.

        What is read and written is a tile at a time: of the whole, only the result is made, laid out in memory as the
        first of the tensors is.

        Args:
            function: Must return tensors (B,C',h,w) of its tile's size; may run again on tiles it has already seen.
            tensors: (B,C,H,W) of one H and W, from 1x1 on; at the border tiles are filled up as `pad_to_multiple` does.
            on_tile: Called with (done, total) after each tile, and after the sample.
            network: What `function` evaluates. Where there are several tiles, its group norms take mean and variance
                from a sample of the whole (`SharedStatistics`), which costs one tile more; None lets each tile have
                its own.
            multiple: Sides of tiles are multiples of this, too.
            even: Whether tiles may be smaller than `tile` where as many would do; not for networks that were trained on
                one size.

        Returns:
            (B,C',H,W). Where the whole is one tile, just what the function returns, cut to that size.

        Raises:
            Exception: The last out-of-memory error, as it came, once the tile is at its minimum.
        """
        align = math.lcm(self.align, multiple)
        size = _common_size(tensors)
        height, width = (length + -length % align for length in size)
        while True:
            overlap = min(self.overlap, self.tile // 2) if self.tile else self.overlap
            grid = TileGrid(height, width, self.tile, overlap, align, even=even)
            work = _Work(function, tensors, grid, align, on_tile)
            try:
                return work.result(network)
            except Exception as error:
                smaller = self._smaller(grid, align)
                if not self.is_out_of_memory(error) or smaller is None:
                    raise
            # Outside the handler the traceback, which keeps the failed attempt's tensors alive, is gone.
            self.tile = smaller
            if self.release is not None:
                self.release()

    def _smaller(self, grid: TileGrid, align: int) -> int | None:
        current = max(grid.tile_height, grid.tile_width)
        halved = max(math.ceil(current / 2 / align) * align, self.minimum)
        return halved if halved < current else None


class _Work:
    """One attempt with one size of tiles."""

    def __init__(
        self, function: Function, tensors: Sequence[Tensor], grid: TileGrid, align: int,
        on_tile: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.function, self.tensors, self.grid, self.align = function, tensors, grid, align
        self.size = (tensors[0].shape[-2], tensors[0].shape[-1])
        self.on_tile = on_tile
        self.done, self.total = 0, len(grid)

    def result(self, network: nn.Module | None) -> Tensor:
        """All tiles, blended."""
        if len(self.grid) == 1:
            rows, columns, _ = next(iter(self.grid))
            whole = self.function(*self._tiles(rows, columns))
            self._count()
            return whole if whole.shape[-2:] == self.size else crop_to(whole, self.size)
        statistics = None if network is None else SharedStatistics(network)
        if statistics is None or not statistics.norms:
            return self._blended(self.function)
        self.total += 1
        samples = [sample_of(tensor, self.grid.largest, self.align) for tensor in self.tensors]
        statistics.measure(self.function, *samples)
        del samples
        self._count()
        return self._blended(lambda *tiles: statistics.apply(self.function, *tiles))

    def _blended(self, function: Function) -> Tensor:
        blended: Tensor | None = None
        dtype = torch.float32
        for rows, columns, weights in self.grid:
            result = function(*self._tiles(rows, columns))
            if result.shape[-2:] != weights.shape:
                raise ValueError(
                    f"a tiled function must keep the tile's size {tuple(weights.shape)}, it gave {tuple(result.shape)}"
                )
            if blended is None:
                dtype = result.dtype
                blended = _zeros_like(self.tensors[0], result)
            here = blended[..., rows, columns]
            seen = (*result.shape[:2], *here.shape[-2:])
            here += (result.float() * weights.to(result.device))[tuple(slice(0, length) for length in seen)]
            del result  # or it would lie beside the next tile's activations
            self._count()
        assert blended is not None
        return blended.to(dtype)

    def _tiles(self, rows: slice, columns: slice) -> list[Tensor]:
        return [padded_window(tensor, rows, columns, self.align).contiguous() for tensor in self.tensors]

    def _count(self) -> None:
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, self.total)


def _zeros_like(whole: Tensor, result: Tensor) -> Tensor:
    """Zeros, float32 on the device of the tile's result, of the whole's size and memory format."""
    last = whole.is_contiguous(memory_format=torch.channels_last) and not whole.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    size = (*result.shape[:2], *whole.shape[-2:])
    return torch.empty(size, dtype=torch.float32, device=result.device, memory_format=layout).zero_()


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


def _common_size(tensors: Sequence[Tensor]) -> tuple[int, int]:
    sizes = {(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"tiling needs tensors of one height and width, got {sorted(sizes)}")
    return sizes.pop()
