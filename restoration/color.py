"""Corrections that give a restored picture the colours of its JPEG: (B,C,H,W) in [0,1] to the same, clamped."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ADAIN_EPS = 1e-5
WAVELET_LEVELS = 5


def match_mean(images: Tensor, reference: Tensor) -> Tensor:
    """Shifts each channel of each picture to the reference's mean (DriftRec's colour correction, not rounded)."""
    _check_pair(images, reference)
    shift = reference.mean(dim=(2, 3), keepdim=True) - images.mean(dim=(2, 3), keepdim=True)
    return (images + shift).clamp_(0, 1)


def match_adain(images: Tensor, reference: Tensor) -> Tensor:
    """Gives each channel of each picture the reference's mean and standard deviation (CODiff's default).

    The deviations are square roots of the unbiased variance plus 1e-5.
    """
    _check_pair(images, reference)
    mean, std = _mean_and_std(images)
    reference_mean, reference_std = _mean_and_std(reference)
    return (images - mean).div_(std).mul_(reference_std).add_(reference_mean).clamp_(0, 1)


def match_wavelet(images: Tensor, reference: Tensor) -> Tensor:
    """Keeps the pictures' high frequencies and takes the low ones from the reference (CODiff's "wavelet").

    The split is an a-trous decomposition of five levels: a 3x3 binomial kernel dilated by 1, 2, 4, 8, 16, borders
    repeated.
    """
    _check_pair(images, reference)
    return (images + _low_frequencies(reference - images)).clamp(0, 1)


COLOR_CORRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda images, reference: images,
    "mean": match_mean,
    "adain": match_adain,
    "wavelet": match_wavelet,
}
"""Name to function of (images, reference)."""


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    unbiased = min(1, images.shape[2] * images.shape[3] - 1)
    variance, mean = torch.var_mean(images, dim=(2, 3), correction=unbiased, keepdim=True)
    return mean, (variance + ADAIN_EPS).sqrt()


def _low_frequencies(images: Tensor) -> Tensor:
    """What is left after the five high-frequency bands are taken away; linear in `images`."""
    channels = images.shape[1]
    taps = images.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).expand(channels, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        reach = 2**level
        padded = F.pad(images, (reach,) * 4, mode="replicate")
        images = F.conv2d(padded, kernel, dilation=reach, groups=channels)
    return images


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.ndim != 4 or images.shape != reference.shape:
        shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"colour correction expects two batches of equal shape (B,C,H,W), got {shapes}")
