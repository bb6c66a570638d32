"""Convolutional networks in windows, with the very result of the whole picture: bounded memory, no seams, no blending.

A window is read with a halo at least as wide as the network's receptive radius and written without it. Where a window
touches the border of the picture it has no halo, so the zeros that convolutions pad with stay where they belong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Span:
    """One window along one axis: what is read, what is written, and where that lies in the window's result."""

    read: slice
    write: slice
    keep: slice


def tiled_exactly(
    function: Callable[[Tensor], Tensor], x: Tensor, *, stride: int, halo: int, tile: int,
    device: torch.device | str | None = None, on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """`function(x)`, computed window by window.

    Exact (up to rounding) for every function whose results depend on positions relative to the borders and to the grid
    of `stride` only, at most `halo` away: convolutions, activations and norms with fixed statistics, in any order.

    Args:
        function: Maps windows (B, C, h, w) to (B, C', floor(h / stride), floor(w / stride)).
        x: (B, C, H, W), sides of at least `stride`, otherwise any.
        stride: Positions of `x` along each side that make one of the result.
        halo: A multiple of `stride`, at least as far as a result reaches beyond its own `stride` positions.
        tile: Side of a window without its halo, rounded down to a multiple of `stride` (but at least one); 0 for whole.
        device: Where `function` runs; None for the device of `x`.
        on_tile: Called with (done, total) after every window; what it raises ends the work.

    Returns:
        (B, C', floor(H / stride), floor(W / stride)) on the device of `x`, in the type that `function` returns.

    Raises:
        ValueError: The numbers do not fit each other, or `function` does not return that size.
    """
    rows, columns = (_spans(length, stride, halo, tile) for length in x.shape[-2:])
    size = (x.shape[-2] // stride, x.shape[-1] // stride)
    total, done = len(rows) * len(columns), 0
    result: Tensor | None = None
    for row in rows:
        for column in columns:
            window = x[..., row.read, column.read]
            shape = (window.shape[-2] // stride, window.shape[-1] // stride)
            part = _checked(function(window if device is None else window.to(device)), shape)
            if result is None:
                result = torch.empty((*part.shape[:2], *size), dtype=part.dtype, device=x.device)
            result[..., row.write, column.write] = part[..., row.keep, column.keep].to(x.device)
            del part  # or it would lie beside the next window's activations
            done += 1
            if on_tile is not None:
                on_tile(done, total)
    assert result is not None
    return result


def tile_count(height: int, width: int, *, stride: int, tile: int) -> int:
    """How many windows `tiled_exactly` makes of (.., height, width)."""
    return math.prod(len(_spans(length, stride, 0, tile)) for length in (height, width))


def _spans(length: int, stride: int, halo: int, tile: int) -> list[_Span]:
    """Windows of almost one size, none larger than `tile`."""
    if stride < 1 or halo < 0 or halo % stride or tile < 0:
        raise ValueError(
            f"expected a stride of at least 1, a halo that is a multiple of it and a tile that is not negative, got "
            f"{stride}, {halo} and {tile}."
        )
    cells = length // stride
    if cells < 1:
        raise ValueError(f"expected sides of at least the stride, {stride}, got {length}.")
    count = math.ceil(cells / max(tile // stride, 1)) if tile else 1
    bounds = [cells * index // count for index in range(count + 1)]
    return [_span(start, stop, length, stride, halo) for start, stop in itertools.pairwise(bounds)]


def _span(start: int, stop: int, length: int, stride: int, halo: int) -> _Span:
    first = max(start * stride - halo, 0)
    last = min(stop * stride + halo, length)
    offset = first // stride
    return _Span(slice(first, last), slice(start, stop), slice(start - offset, stop - offset))


def _checked(part: Tensor, shape: tuple[int, int]) -> Tensor:
    if part.shape[-2:] != shape:
        raise ValueError(f"expected the function to return a window of {shape}, got {tuple(part.shape[-2:])}.")
    return part
