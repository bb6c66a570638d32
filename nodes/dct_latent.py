"""Latents of DCT coefficients, which refuse what only makes sense for pictures in small."""

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

    What core's latent nodes use to resize, rotate or flip raises ValueError: between the coefficients of two blocks
    there is no block. Otherwise it is a tensor like any other. `plain` gives one to networks.
    """

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
        if func is Tensor.as_subclass:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        return super().__torch_function__(func, types, args, kwargs or {})


def guarded(latent: Tensor) -> Tensor:
    """The same numbers as a `DCTLatent`."""
    return latent if isinstance(latent, DCTLatent) else latent.as_subclass(DCTLatent)


def plain(latent: Tensor) -> Tensor:
    """The same numbers as an ordinary tensor."""
    return latent.as_subclass(Tensor) if isinstance(latent, DCTLatent) else latent
