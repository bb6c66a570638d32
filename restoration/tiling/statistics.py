"""The mean and variance of group norms from a whole picture, where a network sees one tile of it at a time.

A group norm takes them over all positions, so that the same pixels come out otherwise in a bright tile than in a dark
one: tones drift from tile to tile. Here the network first runs on a sample of the whole, windows from everywhere put
together to about a tile; what its norms measured there, they are given in every tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .grid import padded_window

_WINDOW = 128  # pixels; larger ones show fewer places, smaller ones have more borders

_Moments = tuple[Tensor, Tensor]
"""Mean and variance, float32 (B, groups)."""


class SharedStatistics:
    """What the group norms of a network measured in one evaluation, for them to use in others.

    Whatever a norm does besides stays its own: ComfyUI's layers, which bring their weights to the device and type of
    the input first, are served as torch.nn.GroupNorm is.

    Args:
        network: Holds the norms; every `torch.nn.GroupNorm` in it counts.
    """

    def __init__(self, network: nn.Module) -> None:
        self.norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
        self._measured: list[list[_Moments]] = [[] for _ in self.norms]

    def measure(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        """Run `function` and keep the mean and variance of every call of every norm."""
        self._measured = [[] for _ in self.norms]
        with self._around(lambda index: _Measuring(self._measured[index])):
            function(*tensors)

    def apply(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """What `function` returns where each call of a norm uses what the same call measured.

        Raises:
            ValueError: The function does not evaluate the network as it did when it was measured.
        """
        calls = [iter(moments) for moments in self._measured]
        with self._around(lambda index: _Using(calls[index])):
            return function(*tensors)

    @contextmanager
    def _around(self, mode: Callable[[int], TorchFunctionMode]) -> Iterator[None]:
        """Every norm's forward runs in a mode of its own."""
        own = [vars(norm).get("forward") for norm in self.norms]  # ComfyUI and accelerate may have put one there
        try:
            for index, norm in enumerate(self.norms):
                norm.forward = _within(norm.forward, mode(index))
            yield
        finally:
            for norm, forward in zip(self.norms, own, strict=True):
                if forward is not None:
                    norm.forward = forward
                else:
                    vars(norm).pop("forward", None)


def _within(forward: Callable[..., Tensor], mode: TorchFunctionMode) -> Callable[..., Tensor]:
    def within(*args: Any, **kwargs: Any) -> Tensor:
        with mode:
            return forward(*args, **kwargs)

    return within


class _GroupNorms(TorchFunctionMode):
    """Sees the calls of group_norm, with the weights as the layer hands them over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.normalized if func is F.group_norm else func
        return call(*args, **(kwargs or {}))

    def normalized(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        raise NotImplementedError


class _Measuring(_GroupNorms):
    def __init__(self, moments: list[_Moments]) -> None:
        super().__init__()
        self.moments = moments

    def normalized(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        variance, mean = torch.var_mean(x.float().reshape(len(x), num_groups, -1), dim=2, correction=0)
        self.moments.append((mean, variance))
        return F.group_norm(x, num_groups, weight, bias, eps)


class _Using(_GroupNorms):
    def __init__(self, moments: Iterator[_Moments]) -> None:
        super().__init__()
        self.moments = moments

    def normalized(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        mean, variance = next(self.moments, (None, None))
        if mean is None or variance is None or mean.shape != (len(x), num_groups):
            found = None if mean is None else tuple(mean.shape)
            raise ValueError(
                f"expected the network to evaluate every tile as it did the sample, where this norm measured {found}, "
                f"got {(len(x), num_groups)}."
            )
        return _normalized(x, mean, variance, weight, bias, eps)


def _normalized(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """A group norm with given statistics: a batch norm over the channels of all pictures, float32 inside."""
    channels = x.shape[1]
    mean, variance = (
        moments.repeat_interleave(channels // moments.shape[1], 1).flatten() for moments in (mean, variance)
    )
    weight, bias = (None if each is None else each.float().repeat(len(x)) for each in (weight, bias))
    flat = x.reshape(1, -1, *x.shape[2:])
    mixed = x.device.type in ("cpu", "cuda")  # these take half precision with statistics in single
    normalized = F.batch_norm(flat if mixed else flat.float(), mean, variance, weight, bias, eps=eps)
    return normalized.to(x.dtype).reshape(x.shape)


def sample_of(tensor: Tensor, size: tuple[int, int], align: int = 16, window: int = _WINDOW) -> Tensor:
    """A sample of a picture: windows from the middle of equal parts of it, put together in order.

    Windows of zeros around them would be the simpler way to keep them apart, but norms see the zeros (docs/tiling.md).

    Args:
        tensor: (B, C, H, W).
        size: Height and width of a tile, multiples of `align`; along a side that is no longer, all of it is taken,
            filled up to a multiple as `pad_to_multiple` does.
        align: Windows start and end at multiples of this, the JPEG grid.
        window: About their side.

    Returns:
        (B, C, h, w) of at most that size, and of more than half of it along each side.
    """
    pairs = zip(tensor.shape[-2:], size, strict=True)
    rows, columns = (_windows(length, tile, align, window) for length, tile in pairs)
    strips = [torch.cat([padded_window(tensor, row, column, align) for column in columns], dim=-1) for row in rows]
    return torch.cat(strips, dim=-2)


def _windows(length: int, tile: int, align: int, window: int) -> list[slice]:
    if length <= tile:
        return [slice(0, length + -length % align)]
    side = min(window, tile // 2)
    count = tile // max(side // align * align, align)
    side = tile // count // align * align
    centres = (length * (number + 0.5) / count for number in range(count))
    starts = (min(round((centre - side / 2) / align), (length - side) // align) * align for centre in centres)
    return [slice(start, start + side) for start in starts]
