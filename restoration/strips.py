"""Large pictures a few rows at a time, so that arithmetic on them needs no whole copies beside them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_VALUES_AT_ONCE = 4_000_000


def row_strips(height: int, values_in_a_row: int, values: int = _VALUES_AT_ONCE) -> Iterator[slice]:
    """Rows of a picture, from the top, about `values` values and at least one row at a time."""
    rows = max(1, values // max(values_in_a_row, 1))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def strips_of(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a tensor (..., H, W), strip by strip; all of it at once where it has fewer dimensions."""
    if tensor.ndim < 2 or not tensor.numel():
        yield tensor
        return
    for rows in row_strips(tensor.shape[-2], tensor.numel() // tensor.shape[-2]):
        yield tensor[..., rows, :]


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a number."""
    return all(bool(strip.isfinite().all()) for strip in strips_of(tensor))


def round_to_8bit_(images: Tensor) -> Tensor:
    """Images in [0, 1], rounded to whole 8-bit levels and clipped in place."""
    for strip in strips_of(images):
        strip.mul_(255).round_().clamp_(0, 255).div_(255)
    return images


def blend_(images: Tensor, other: Tensor, weight: float) -> Tensor:
    """other + weight (images - other), in the place of the images."""
    for own, given in zip(strips_of(images), strips_of(other), strict=True):
        own.copy_(torch.lerp(given.to(own), own, weight))
    return images


def own(result: Tensor, *given: Tensor) -> Tensor:
    """A result that may be overwritten: itself, or a copy where it lies in the memory of what was given."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    return result.clone() if result.untyped_storage().data_ptr() in memory else result
