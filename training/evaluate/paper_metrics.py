"""Measures as tables of other papers have them, where they differ from `restoration.metrics`."""

from __future__ import annotations

import torch
from torch import Tensor

from restoration.metrics import blockiness, studio_luma

WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def gaussian_ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), (B,), mean over channels, of (B,C,H,W) in [0,1]: FBCNN's.

    Gaussian window of 11 pixels, sigma 1.5, covariances not corrected for bias; windows that would reach over the
    border are left out. `restoration.metrics.ssim` has uniform windows.

    Raises:
        ValueError: Shapes differ, or a side is shorter than the window.
    """
    if images.ndim != 4 or images.shape != reference.shape or min(images.shape[-2:]) < WINDOW:
        shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"expected two batches of equal shape (B,C,H,W), sides >= {WINDOW}, got {shapes}")
    # Covariances do not change with a common shift; small means keep float32 exact enough.
    shift = reference.float().mean(dim=(2, 3), keepdim=True)
    x, y = images.float() - shift, reference.float() - shift
    mean_x, mean_y, xx, yy, xy = (_gaussian_mean(t) for t in (x, y, x * x, y * y, x * y))
    covariance, variances = xy - mean_x * mean_y, xx - mean_x**2 + yy - mean_y**2
    mean_x, mean_y = mean_x + shift, mean_y + shift
    numerator = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return (numerator / ((mean_x**2 + mean_y**2 + _C1) * (variances + _C2))).mean(dim=(1, 2, 3))


def luma_psnr_b(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR-B in dB, (B,), of RGB pictures (B,3,H,W) in [0,1] as in FBCNN's tables: its blocking is that of luma.

    The squared error of all channels, plus the blocking effect factor of the `studio_luma` in whole levels.
    `restoration.metrics.psnr_b` takes error and blocking of each channel.

    Raises:
        ValueError: Shapes differ, or are none of RGB pictures with sides above 8 pixels.
    """
    if images.shape != reference.shape:
        shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"expected two batches of equal shape (B,3,H,W), got {shapes}")
    blocking = blockiness((255 * studio_luma(images.float())).round() / 255)
    return -10 * torch.log10((images.float() - reference.float()).square().mean(dim=(1, 2, 3)) + blocking)


def _gaussian_mean(images: Tensor) -> Tensor:
    """Weighted means over all windows, rows and columns in turn, as sums of shifted pictures (faster than conv2d)."""
    places = torch.arange(WINDOW) - WINDOW // 2
    weights = (-places.square() / (2 * SIGMA**2)).exp()
    weights = (weights / weights.sum()).tolist()
    for axis in (2, 3):
        length = images.shape[axis] - WINDOW + 1
        total = images.narrow(axis, 0, length) * weights[0]
        for place in range(1, WINDOW):
            total.add_(images.narrow(axis, place, length), alpha=weights[place])
        images = total
    return images
