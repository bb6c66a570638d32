"""NIQE, how unnatural a picture looks without its original beside it (Mittal et al. 2013), from one array file."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dists import read_tensors
from .metrics import studio_luma

BLOCK = 96
"""Side of the blocks that are described, pixels; half of it at the second scale."""
LEAST_BLOCKS = 4
"""Below, the covariance over the blocks says nothing."""
FEATURES = 36
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
_SHAPES = (0.2, 10.0, 9801)
_FLAT = 1e-8
"""Difference of levels that is none, only a rounding error of the mean."""
_NAMES = {"mean": "mu_pris_param", "covariance": "cov_pris_param", "window": "gaussian_window"}
_EXPECTED = {"mean": (FEATURES,), "covariance": (FEATURES, FEATURES), "window": (7, 7)}


class NIQE(nn.Module):
    """Distance of a picture's statistics from those of pristine photographs: about 2 to 4 for good ones, more for bad.

    Computed in float64 on the device of the module, without gradients. A value rests on a covariance over the blocks of
    one picture: those of small pictures are rough, and not to be compared with those of large ones.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, shape in _EXPECTED.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        shapes = torch.linspace(*_SHAPES, dtype=torch.float64)
        logarithm = 2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)
        self.register_buffer("shapes", shapes, persistent=False)
        self.register_buffer("ratios", logarithm.exp(), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """NIQE (B,), float64, of pictures (B,3,H,W) in [0,1], or of luma (B,1,H,W), 16/255 to 235/255.

        Colours become luma by `studio_luma`; luma is rounded to whole levels, as MATLAB has it. What does not fill a
        block of 96 pixels at the right and at the bottom is left out. Features that a flat block has not got are left
        out of the mean, the whole block out of the covariance, as by the authors.

        Raises:
            ValueError: Another shape, or fewer than 4 blocks that are not flat.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"NIQE: expected pictures (B,3,H,W) or luma (B,1,H,W), got {tuple(images.shape)}.")
        rows, columns = (side // BLOCK for side in images.shape[-2:])
        if rows * columns < LEAST_BLOCKS:
            raise ValueError(
                f"NIQE: expected at least {LEAST_BLOCKS} blocks of {BLOCK}x{BLOCK} pixels, got a picture of "
                f"{images.shape[-1]}x{images.shape[-2]}, which holds {rows * columns}. Give larger pictures."
            )
        images = images.to(self.get_buffer("mean").device, torch.float64)
        levels = (255 * (studio_luma(images) if images.shape[1] == 3 else images)).round()
        return torch.stack([self._distance(one[..., : rows * BLOCK, : columns * BLOCK]) for one in levels.split(1)])

    def _distance(self, luma: Tensor) -> Tensor:
        """The square root of the Mahalanobis distance (paper, eq. 10) of levels (1,1,H,W), whole blocks."""
        scales = ((luma, BLOCK), (halved(luma), BLOCK // 2))
        features = torch.cat([self.describe(_blocks(self.normalized(x), side)) for x, side in scales], dim=1)
        textured = features[~features.isnan().any(dim=1)]
        if len(textured) < LEAST_BLOCKS:
            raise ValueError(
                f"NIQE: expected at least {LEAST_BLOCKS} blocks of {BLOCK}x{BLOCK} pixels with some texture, got "
                f"{len(textured)}: the rest is flat. Give other pictures."
            )
        pooled = (self.get_buffer("covariance") + textured.T.cov()) / 2
        difference = self.get_buffer("mean") - features.nanmean(dim=0)
        return (difference @ torch.linalg.pinv(pooled, rtol=1e-15) @ difference).sqrt()

    def normalized(self, luma: Tensor) -> Tensor:
        """Levels (1,1,H,W) less their local mean, over one plus their local deviation; borders are repeated.

        Flat surroundings give 0 exactly, so that no rounding error is taken for a side of a distribution.
        """
        padded = F.pad(luma, (3,) * 4, mode="replicate")
        window = self.get_buffer("window")[None, None]
        mean, square = F.conv2d(padded, window), F.conv2d(padded.square(), window)
        difference = luma - mean
        difference = difference.where(difference.abs() > _FLAT, 0)
        return difference / ((square - mean.square()).abs().sqrt() + 1)

    def describe(self, blocks: Tensor) -> Tensor:
        """The 18 features (N,18) of normalized blocks (N,h,w) at one scale; not finite for flat ones."""
        alpha, left, right = self.fit(blocks)
        features = [alpha, (left + right) / 2]
        for shift in _NEIGHBOURS:
            alpha, left, right = self.fit(blocks * blocks.roll(shift, dims=(1, 2)))
            mean = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
            features += [alpha, mean, left, right]
        return torch.stack(features, dim=1)

    def fit(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shape, left and right scale (N,) of asymmetric generalised Gaussians, by moments, to samples (N,...)."""
        samples = samples.flatten(1)
        left, right = (_deviation(samples, samples < 0), _deviation(samples, samples > 0))
        skew = left / right
        ratio = samples.abs().mean(dim=1).square() / samples.square().mean(dim=1)
        ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew.square() + 1).square()
        nearest = (self.get_buffer("ratios") - ratio[:, None]).abs().argmin(dim=1)
        alpha = self.get_buffer("shapes")[nearest]
        scale = (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)).exp().sqrt()
        return alpha, left * scale, right * scale


def halved(images: Tensor) -> Tensor:
    """Half the size as MATLAB's `imresize(images, 0.5)`, antialiased bicubic, of (B,1,H,W) with even sides.

    Borders are mirrored.
    """
    distances = torch.tensor([0.25, 0.75, 1.25, 1.75], dtype=images.dtype, device=images.device)
    near = 1.5 * distances**3 - 2.5 * distances**2 + 1
    far = -0.5 * distances**3 + 2.5 * distances**2 - 4 * distances + 2
    half = torch.where(distances < 1, near, far) / 2
    kernel = torch.cat([half.flip(0), half])
    for axis, shape in ((2, (8, 1)), (3, (1, 8))):
        first, last = images.narrow(axis, 0, 3), images.narrow(axis, images.shape[axis] - 3, 3)
        padded = torch.cat([first.flip(axis), images, last.flip(axis)], dim=axis)
        stride = (2, 1) if axis == 2 else (1, 2)
        images = F.conv2d(padded, kernel.view(1, 1, *shape), stride=stride)
    return images


def load_niqe(path: str | Path) -> NIQE:
    """Build NIQE from the model of pristine photographs.

    Args:
        path: A `.npz` with the arrays `mu_pris_param` (1x36), `cov_pris_param` (36x36) and `gaussian_window` (7x7), as
            BasicSR ships the authors' numbers.

    Raises:
        ValueError: It cannot be read, or arrays are missing or of another shape; nothing pickled is read.
    """
    tensors, model = read_tensors(path), NIQE()
    for name, key in _NAMES.items():
        buffer = model.get_buffer(name)
        if key not in tensors or tensors[key].numel() != buffer.numel() or not tensors[key].isfinite().all():
            found = tuple(tensors[key].shape) if key in tensors else "none"
            expected = "x".join(map(str, buffer.shape))
            raise ValueError(
                f"{path}: expected {key} of {expected} numbers, got {found}. Give BasicSR's niqe_pris_params.npz."
            )
        buffer.copy_(tensors[key].reshape(buffer.shape))
    return model


def _blocks(image: Tensor, side: int) -> Tensor:
    """The blocks (N, side, side) of (1,1,H,W)."""
    return image[0, 0].unfold(0, side, side).unfold(1, side, side).flatten(0, 1)


def _deviation(samples: Tensor, chosen: Tensor) -> Tensor:
    """The root mean square of the chosen samples of each row; NaN where there are none."""
    return ((samples.square() * chosen).sum(dim=1) / chosen.sum(dim=1)).sqrt()
