"""Chroma subsampling of JPEG: names, sizes, libjpeg's box average down and its triangle filter up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Sampling = tuple[tuple[int, int], ...]
"""One (horizontal, vertical) sampling factor in 1..4 per component, as in the file's frame header."""

SUBSAMPLINGS: dict[str, tuple[int, int]] = {
    "4:4:4": (1, 1),
    "4:2:2": (2, 1),
    "4:4:0": (1, 2),
    "4:2:0": (2, 2),
    "4:1:1": (4, 1),
}
"""Luma (horizontal, vertical) sampling factors by name; both chroma components have (1, 1). "gray" is one component."""


def sampling_factors(subsampling: str) -> Sampling:
    """Sampling factors of a name in `SUBSAMPLINGS`, "gray", or a list such as "2x2,2x1,1x2"; ValueError otherwise."""
    if subsampling == "gray":
        return ((1, 1),)
    if subsampling in SUBSAMPLINGS:
        return (SUBSAMPLINGS[subsampling], (1, 1), (1, 1))
    parts = [part.split("x") for part in subsampling.split(",")]
    if all(len(part) == 2 and all(number in ("1", "2", "3", "4") for number in part) for part in parts):
        return tuple((int(h), int(v)) for h, v in parts)
    names = ", ".join(SUBSAMPLINGS)
    raise ValueError(f"subsampling expected one of {names} or gray, got {subsampling!r}: choose one of these")


def subsampling_name(sampling: Sampling) -> str:
    """Name of sampling factors: "4:2:0" and its kin, "gray" for one component, or the list itself: "2x2,2x1,1x2"."""
    if len(sampling) == 1:
        return "gray"
    ratios = component_ratios(sampling)
    names = {ratio: name for name, ratio in SUBSAMPLINGS.items()}
    if len(sampling) == 3 and ratios[0] == (1, 1) and ratios[1] == ratios[2] and ratios[1] in names:
        return names[ratios[1]]
    return ",".join(f"{h}x{v}" for h, v in sampling)


def component_ratios(sampling: Sampling) -> Sampling:
    """Pixels that a sample of each component spans, (horizontal, vertical); ValueError where these are not whole."""
    widest, tallest = max(h for h, _ in sampling), max(v for _, v in sampling)
    if any(widest % h or tallest % v for h, v in sampling):
        raise ValueError(
            f"sampling factors {sampling} have a fractional ratio: save the picture again as 4:4:4 or 4:2:0"
        )
    return tuple((widest // h, tallest // v) for h, v in sampling)


def block_counts(height: int, width: int, ratio: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of 8x8 blocks that cover a component: libjpeg's height_in_blocks and width_in_blocks."""
    return -(-height // (8 * ratio[1])), -(-width // (8 * ratio[0]))


def box_downsample(plane: Tensor, ratio: tuple[int, int], tallest: int, *, round_to_8bit: bool) -> Tensor:
    """Average boxes of ratio (horizontal, vertical) of a (B, H, W) plane and pad to whole blocks -> (B, 8 Hb, 8 Wb).

    Padding repeats the last row and column as libjpeg does: columns before averaging, rows to a full group of `tallest`
    before and to whole blocks after it. With `round_to_8bit` the average is libjpeg's integer one, with its dither of
    rounding by column (jcsample.c).
    """
    across, down = ratio
    rows, columns = block_counts(plane.shape[-2], plane.shape[-1], ratio)
    plane = _pad_edge(plane, 8 * columns * across, -(-plane.shape[-2] // tallest) * tallest)
    if ratio != (1, 1):
        total = sum(plane[..., i::down, j::across] for i in range(down) for j in range(across))
        assert isinstance(total, Tensor)
        plane = _rounded_mean(total, ratio) if round_to_8bit else total / (across * down)
    return _pad_edge(plane[..., : 8 * rows, :], 8 * columns, 8 * rows)


def upsample(plane: Tensor, ratio: tuple[int, int], *, round_to_8bit: bool) -> Tensor:
    """Spread the samples of a component of true size (B, h, w) over its pixels -> (B, h * vertical, w * horizontal).

    Ratios (2, 1), (2, 2) and (1, 2) take libjpeg-turbo's triangle filter (jdsample.c, "fancy upsampling"; the first two
    only where w > 2), all others repeat samples. `round_to_8bit` rounds as libjpeg-turbo does, its bias alternating.
    """
    if ratio == (1, 2):
        return _weave(_triangle(plane, -2), -2, (1, 2), 4, round_to_8bit)
    if plane.shape[-1] > 2 and ratio == (2, 1):
        return _weave(_triangle(plane, -1), -1, (1, 2), 4, round_to_8bit)
    if plane.shape[-1] > 2 and ratio == (2, 2):
        rows = [_weave(_triangle(row, -1), -1, (8, 7), 16, round_to_8bit) for row in _triangle(plane, -2)]
        return torch.stack(rows, -2).flatten(-3, -2)
    return plane.repeat_interleave(ratio[1], -2).repeat_interleave(ratio[0], -1) if ratio != (1, 1) else plane


def _pad_edge(plane: Tensor, width: int, height: int) -> Tensor:
    right, bottom = width - plane.shape[-1], height - plane.shape[-2]
    if right <= 0 and bottom <= 0:
        return plane[..., :width]
    return F.pad(plane[None], (0, max(right, 0), 0, max(bottom, 0)), mode="replicate")[0][..., :width]


def _rounded_mean(total: Tensor, ratio: tuple[int, int]) -> Tensor:
    count = ratio[0] * ratio[1]
    if ratio not in ((2, 1), (2, 2)):
        return ((total + count // 2) / count).floor()
    odd_column = torch.arange(total.shape[-1], device=total.device, dtype=total.dtype) % 2
    return ((total + odd_column + (ratio[1] - 1)) / count).floor()


def _triangle(plane: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three times each sample plus its neighbour before, and plus the one after; ends are their own neighbours."""
    length = plane.shape[dim]
    before = torch.cat((plane.narrow(dim, 0, 1), plane.narrow(dim, 0, length - 1)), dim)
    after = torch.cat((plane.narrow(dim, 1, length - 1), plane.narrow(dim, length - 1, 1)), dim)
    return before.add_(plane, alpha=3), after.add_(plane, alpha=3)


def _weave(pair: tuple[Tensor, Tensor], dim: int, bias: tuple[int, int], divisor: int, round_to_8bit: bool) -> Tensor:
    halves = [
        half.add_(b).div_(divisor).floor_() if round_to_8bit else half / divisor
        for half, b in zip(pair, bias, strict=True)
    ]
    woven = torch.stack(halves, -1 if dim == -1 else -2)
    return woven.flatten(-2) if dim == -1 else woven.flatten(-3, -2)
