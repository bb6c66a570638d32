"""Latents of DCT coefficients, which refuse what only makes sense for pictures in small, and know their picture's size.

Positions of other latents stand for pixels, and core's nodes interpolate between them. Positions of these are blocks of
a JPEG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_RESIZING = {F.interpolate, F.grid_sample, torch.gather, Tensor.gather}
_TURNING = {torch.rot90, Tensor.rot90, torch.flip, Tensor.flip}


class DCTLatent(Tensor):
    """A latent (B, 192, h, w) whose positions are 8x8 blocks; results of operations on it are such latents, too.

    What core's latent nodes use to resize, rotate or flip raises ValueError. Otherwise it is a tensor like any other.
    """

    picture_size: tuple[int, int] | None = None
    """Height and width of the pictures before they were extended to whole blocks; None when h or w have changed."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func in _RESIZING or func in _TURNING:
            what = "resized" if func in _RESIZING else "rotated or flipped"
            raise ValueError(
                f"this latent holds the DCT coefficients of 8x8 blocks and cannot be {what}. Do that to the image: "
                "after VAE Decode, or before VAE Encode."
            )
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.as_subclass:
                return func(*args)
            result = super().__torch_function__(func, types, args, kwargs or {})
            if isinstance(result, DCTLatent):
                result.picture_size = _common_size(result, args)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return guarded(plain(self).clone(), self.picture_size)


def guarded(latent: Tensor, picture_size: tuple[int, int] | None = None) -> Tensor:
    """The same numbers as a `DCTLatent`, of pictures (height, width)."""
    found = latent.as_subclass(DCTLatent)
    found.picture_size = picture_size
    return found


def plain(latent: Tensor) -> Tensor:
    """The same numbers as an ordinary tensor, for networks."""
    return latent.as_subclass(Tensor) if isinstance(latent, DCTLatent) else latent


def _common_size(result: Tensor, args: tuple[Any, ...]) -> tuple[int, int] | None:
    """The one that all operands with the result's height and width have."""
    operands = [item for value in args for item in (value if isinstance(value, list | tuple) else [value])]
    sizes = {
        value.picture_size
        for value in operands
        if isinstance(value, DCTLatent) and value.dim() == 4 and value.shape[-2:] == result.shape[-2:]
    }
    return sizes.pop() if len(sizes) == 1 else None
