"""Full-reference and blockiness measures on batches of pictures, one value per picture.

Every function takes (B,C,H,W) tensors in [0,1] (any C, usually RGB), computes in float32 and uses the whole picture
unless its docstring says otherwise. Pixels are taken as they are: round to 8 bits first to compare with published
tables.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of the error over all channels and pixels; inf for equal pictures."""
    _check_pair(images, reference)
    return -10.0 * torch.log10((images.float() - reference.float()).square().mean(dim=(1, 2, 3)))


def ssim(images: Tensor, reference: Tensor, win_size: int = 7) -> Tensor:
    """Structural similarity (Wang et al. 2004), (B,), mean over channels.

    As `skimage.metrics.structural_similarity(data_range=1)`: uniform window of `win_size` (odd), unbiased covariances,
    K1 = 0.01, K2 = 0.03; windows that would reach over the border are left out. DriftRec's tables use win_size 9.
    """
    _check_pair(images, reference)
    if win_size < 3 or win_size % 2 == 0 or win_size > min(images.shape[-2:]):
        sides = tuple(images.shape[-2:])
        raise ValueError(f"win_size must be odd, at least 3 and no larger than the picture {sides}, got {win_size}")
    # Covariances do not change with a common shift; small means keep float32 exact enough.
    shift = reference.float().mean(dim=(2, 3), keepdim=True)
    x, y = images.float() - shift, reference.float() - shift
    pixels = win_size**2
    mean_x, mean_y, xx, yy, xy = (_box_mean(t, win_size) for t in (x, y, x * x, y * y, x * y))
    unbiased = pixels / (pixels - 1)
    var_x, var_y = unbiased * (xx - mean_x**2), unbiased * (yy - mean_y**2)
    covariance = unbiased * (xy - mean_x * mean_y)
    mean_x, mean_y = mean_x + shift, mean_y + shift
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3))


def blockiness(images: Tensor, block: int = 8) -> Tensor:
    """Blocking effect factor of Yim and Bovik (2011, eq. 8-11), (B,), mean over channels, >= 0.

    The mean squared difference of neighbours across the block grid (which starts at the picture's corner) less that of
    all other neighbours, times log2(block)/log2(shorter side); zero where it is not positive. Both sides must be longer
    than a block. DriftRec's Table III has the sum over the channels, as torchjpeg has it, times 1e4: of RGB three times
    this mean, times 1e4.
    """
    return _blocking_effect(images, block).mean(dim=1)


def psnr_b(images: Tensor, reference: Tensor, block: int = 8) -> Tensor:
    """PSNR-B (Yim and Bovik 2011) in dB, (B,): a channel's squared error plus its blocking effect factor.

    Colour pictures: the dB values of the channels are averaged, as torchjpeg does for DriftRec's tables. FBCNN's take
    the blocking of luma alone.
    """
    _check_pair(images, reference)
    error = (images.float() - reference.float()).square().mean(dim=(2, 3))
    return (-10.0 * torch.log10(error + _blocking_effect(images, block))).mean(dim=1)


def rgb_to_luma(images: Tensor) -> Tensor:
    """Full-range luma of RGB pictures, (B,3,H,W) to (B,1,H,W), with the weights of ITU-R BT.601 as JFIF uses them."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected RGB pictures (B,3,H,W), got {tuple(images.shape)}")
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def studio_luma(images: Tensor) -> Tensor:
    """BT.601 luma in studio range, as MATLAB's `rgb2ycbcr` has it, (B,3,H,W) to (B,1,H,W), 16/255 to 235/255.

    (16 + 65.481 R + 128.553 G + 24.966 B) / 255, not rounded; MATLAB rounds it for pictures of type uint8.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected RGB pictures (B,3,H,W), got {tuple(images.shape)}")
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return (16 + (images * weights).sum(dim=1, keepdim=True)) / 255


def psnr_y(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB, (B,), of the `studio_luma` of RGB pictures, peak 1, as restorers of luma are compared.

    The range is 219/255 of the full one, so that values are about 1.3 dB above those of full-range luma.
    """
    _check_pair(images, reference)
    return psnr(studio_luma(images.float()), studio_luma(reference.float()))


def _box_mean(images: Tensor, size: int) -> Tensor:
    """Means over all `size` x `size` windows, rows and columns in turn (a fraction of the work of one 2-D pooling)."""
    return F.avg_pool2d(F.avg_pool2d(images.contiguous(), (size, 1), stride=1), (1, size), stride=1)


def _blocking_effect(images: Tensor, block: int) -> Tensor:
    """The blocking effect factor of each channel, (B,C)."""
    if images.ndim != 4 or min(images.shape[-2:]) <= block:
        raise ValueError(f"blockiness needs (B,C,H,W) with sides above {block} pixels, got {tuple(images.shape)}")
    images = images.float()
    edge_sum, edges = images.new_zeros(images.shape[:2]), 0
    total_sum, pairs = images.new_zeros(images.shape[:2]), 0
    for axis in (2, 3):
        squares = images.diff(dim=axis).square().mean(dim=5 - axis)
        across = images.shape[5 - axis]
        at_edges = squares[..., block - 1 :: block]
        edge_sum, edges = edge_sum + at_edges.sum(-1) * across, edges + at_edges.shape[-1] * across
        total_sum, pairs = total_sum + squares.sum(-1) * across, pairs + squares.shape[-1] * across
    difference = edge_sum / edges - (total_sum - edge_sum) / (pairs - edges)
    return difference.clamp(min=0) * (math.log2(block) / math.log2(min(images.shape[-2:])))


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.ndim != 4 or images.shape != reference.shape:
        shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"expected two batches of equal shape (B,C,H,W), got {shapes}")
