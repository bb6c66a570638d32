"""How a JPEG's components lie over its pixels: from pixels to coefficients as encoders go, and changes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Coefficients, forward_dct, inverse_dct, rgb_to_ycbcr
from .integer_dct import integer_forward_dct, integer_quantize
from .sampling import Sampling, box_downsample, component_ratios

_RELAXATION = 1.8**0.5  # of cautious steps, for each direction; both together stay below 2


@dataclass(frozen=True)
class Group:
    """Components of equal sampling: their places in the file, and the pixels a sample spans, (horizontal, vertical)."""

    places: tuple[int, ...]
    ratio: tuple[int, int]


class Layout:
    """The linear part of a file's encoder, for images of any size; lists have an entry for each of its `groups`.

    Levels are RGB (B, 3, h, w) in 0..255 as the file stores them, from a corner of whole units on. Coefficients are
    (B, C, Hb, Wb, 8, 8), in memory row by row of samples.
    """

    def __init__(self, sampling: Sampling, color_space: str) -> None:
        ratios = component_ratios(sampling)
        self.color_space = color_space
        self.groups = [
            Group(tuple(place for place, other in enumerate(ratios) if other == ratio), ratio)
            for ratio in dict.fromkeys(ratios)
        ]
        self.tallest = max(vertical for _, vertical in sampling)
        self.unit = 8 * max(vertical for _, vertical in ratios), 8 * max(horizontal for horizontal, _ in ratios)
        """Height and width of the smallest piece of the picture that holds whole blocks of every component."""

    def planes(self, coefficients: Coefficients) -> list[Tensor]:
        """The coefficients of a file, (1, C, Hb, Wb, 8, 8)."""
        return [_rows(torch.stack([coefficients.planes[place] for place in group.places], 1)) for group in self.groups]

    def steps(self, coefficients: Coefficients) -> list[Tensor]:
        """The steps of a file, float32 (C, 1, 1, 8, 8)."""
        tables = [table.float().reshape(1, 1, 8, 8) for table in coefficients.tables]
        return [torch.stack([tables[place] for place in group.places]) for group in self.groups]

    def coefficients(self, levels: Tensor, *, rounded: bool = False) -> list[Tensor]:
        """Coefficients, not quantised; with `rounded`, of whole levels, colours and chroma rounded as libjpeg does."""
        return [
            forward_dct(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
            for samples in self._samples(levels, rounded)
        ]

    def encode(self, levels: Tensor, steps: list[Tensor]) -> list[Tensor]:
        """The coefficients that libjpeg-turbo writes of whole levels, as multiples of the steps, float32."""
        encoded = []
        for samples, step in zip(self._samples(levels, rounded=True), steps, strict=True):
            eighths = integer_forward_dct(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
            encoded.append(integer_quantize(eighths, step))
        return encoded

    def spread(self, changes: list[Tensor], height: int, width: int, *, cautious: bool = False) -> Tensor:
        """RGB changes (B, 3, height, width), in levels, that changes of coefficients make.

        A change of a sample is repeated over the pixels that it spans, which keeps box means exact; where the encoder
        repeats the last row or column to fill a block, the mean of the changes there is taken. That can be too much
        for the other rows and columns of such a block: with `cautious` they take the step of the transpose (Landweber
        1951), which is slower, but never leads away from any picture that the coefficients allow.
        """
        wide: dict[int, Tensor] = {}
        for group, change in zip(self.groups, changes, strict=True):
            samples = inverse_dct(change.flatten(0, 1))
            pixels = self._over_pixels(samples, group.ratio, height, width)
            if cautious:
                _shorten(pixels, -1, 8 * group.ratio[0])
                _shorten(pixels, -2, 8 * group.ratio[1])
            wide |= dict(zip(group.places, pixels.unflatten(0, change.shape[:2]).unbind(1), strict=True))
        return _rgb_change([wide[place] for place in sorted(wide)], self.color_space)

    def _samples(self, levels: Tensor, rounded: bool) -> list[Tensor]:
        """Samples (B, C, 8 Hb, 8 Wb) less 128."""
        planes = levels
        if self.color_space != "rgb":
            planes = rgb_to_ycbcr(levels, round_to_8bit=rounded)
        samples = []
        for group in self.groups:
            chosen = planes if len(group.places) == planes.shape[1] else planes[:, list(group.places)]
            boxes = box_downsample(chosen.flatten(0, 1), group.ratio, self.tallest, round_to_8bit=rounded)
            samples.append((boxes - 128).unflatten(0, chosen.shape[:2]))
        return samples

    def _over_pixels(self, samples: Tensor, ratio: tuple[int, int], height: int, width: int) -> Tensor:
        across, down = ratio
        rows = min(-(-height // self.tallest) * self.tallest // down, samples.shape[-2])
        samples = _fold(samples, -2, rows)
        if down > 1:
            samples = samples.repeat_interleave(down, -2)
        if across > 1:
            samples = samples.repeat_interleave(across, -1)
        return _fold(_fold(samples, -2, height), -1, width)


def _rows(planes: Tensor) -> Tensor:
    """The same coefficients, in memory as `forward_dct` gives them."""
    return planes.transpose(-3, -2).contiguous().transpose(-3, -2)


def _fold(samples: Tensor, dim: int, length: int) -> Tensor:
    """Replace what lies from `length - 1` on by its mean: the transpose, scaled, of repeating the last sample."""
    surplus = samples.shape[dim] - length
    if not surplus:
        return samples
    last = samples.narrow(dim, length - 1, surplus + 1).mean(dim, keepdim=True)
    return torch.cat([samples.narrow(dim, 0, length - 1), last], dim)


def _shorten(changes: Tensor, dim: int, span: int) -> None:
    """Scale, in place, the changes of pixels in a last block of `span` pixels that the picture fills in part."""
    surplus = -changes.shape[dim] % span
    filled = span - surplus
    if surplus and filled > 1:  # the mean is exact for a single row or column
        last = changes.narrow(dim, changes.shape[dim] - filled, filled).mul_(_RELAXATION)
        last.narrow(dim, 0, filled - 1).div_(surplus + 1)


def _rgb_change(planes: list[Tensor], color_space: str) -> Tensor:
    if color_space == "gray":
        return torch.stack(planes * 3, 1)
    if color_space == "rgb":
        return torch.stack(planes, 1)
    luma, cb, cr = planes
    red, blue = luma.add(cr, alpha=1.402), luma.add(cb, alpha=1.772)
    green = luma.add(cb, alpha=-0.114 * 1.772 / 0.587).add_(cr, alpha=-0.299 * 1.402 / 0.587)
    return torch.stack([red, green, blue], 1)
