"""What the output of a DriftRec network means: from the raw output to a prediction of the clean image.

`noise` is the paper's: the network sees [x_t, y] and returns about -z, the noise with its sign turned.

`residual` preconditions the network in residual space as EDM does in image space (Karras et al. 2022, Eq. 7 and Table
1, with u = x - y in the place of the image). At high noise the paper's form multiplies the network's error by
sigma / a = 2.7; this one starts from D = y there, and input, target and loss have unit variance at every noise level.
See docs/driftrec.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..networks.ncsnpp import NCSNpp
from .sde import SDE

PREDICTIONS = ("noise", "residual")


@dataclass(frozen=True)
class Prediction:
    """The meaning of a network's output.

    Args:
        kind: `noise` or `residual`.
        sigma_data: Standard deviation of clean minus compressed pixels, for `residual`.
    """

    kind: str = "noise"
    sigma_data: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in PREDICTIONS:
            raise ValueError(f"DriftRec: expected a prediction of {' or '.join(PREDICTIONS)}, got {self.kind!r}.")
        if self.kind == "residual" and not self.sigma_data > 0:
            raise ValueError(f"DriftRec: expected a sigma_data above 0, got {self.sigma_data:g}.")

    def network_input(self, x: Tensor, degraded: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """The (B, 6, H, W) input for x_t and y, with a(t) and sigma(t) of shape (B, 1, 1, 1)."""
        if self.kind == "noise":
            return torch.cat([x, degraded], dim=1)
        scale = torch.rsqrt((a * self.sigma_data) ** 2 + sigma**2)
        return torch.cat([scale * (x - degraded), 2 * degraded - 1], dim=1)

    def denoised(self, raw: Tensor, x: Tensor, degraded: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """The predicted clean image."""
        residual = x - degraded
        if self.kind == "noise":
            return degraded + (residual + sigma * raw) / a
        total = (a * self.sigma_data) ** 2 + sigma**2
        skip = a * self.sigma_data**2 / total
        return degraded + skip * residual + self.sigma_data * sigma * torch.rsqrt(total) * raw

    def loss_weight(self, a: Tensor, sigma: Tensor) -> Tensor:
        """The weight that turns a squared error of the predicted image into one of the network's raw output."""
        if self.kind == "noise":
            return (a / sigma) ** 2
        return ((a * self.sigma_data) ** 2 + sigma**2) / (self.sigma_data * sigma) ** 2


class ScoreDenoiser(nn.Module):
    """A network with its SDE and the meaning of its output: a denoiser that the samplers take.

    Args:
        network: Takes (B, 6, H, W) and the noise levels (B,), returns (B, 3, H, W).
        sde: The SDE it was trained on.
        prediction: What its output means.
        smallest_time: The smallest time it was trained at.
    """

    def __init__(self, network: NCSNpp, sde: SDE, prediction: Prediction, smallest_time: float = 0.0) -> None:
        super().__init__()
        self.smallest_time = smallest_time
        self.network, self.sde, self.prediction = network, sde, prediction
        self.compute_dtype = torch.float32

    def forward(self, x: Tensor, degraded: Tensor, t: ArrayLike) -> Tensor:
        """Predict the clean images; the network itself runs in `compute_dtype`, everything around it in float32.

        Args:
            x: x_t, (B, 3, H, W).
            degraded: y, (B, 3, H, W).
            t: One time for all, or one for each image.
        """
        a, sigma = self.coefficients(t, x)
        network_input = self.prediction.network_input(x, degraded, a, sigma).to(self.compute_dtype)
        raw = self.network(network_input, sigma.flatten()).float()
        return self.prediction.denoised(raw, x, degraded, a, sigma)

    def coefficients(self, t: ArrayLike, like: Tensor) -> tuple[Tensor, Tensor]:
        """a(t) and sigma(t) as (B, 1, 1, 1) float32 on the device of `like`."""
        times = np.broadcast_to(np.asarray(t, dtype=np.float64), (like.shape[0],))

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None, None]

        return column(self.sde.mean_coefficient(times)), column(self.sde.std(times))


class RegressionRestorer(nn.Module):
    """The paper's baseline: the same network, evaluated once on the compressed image at t = 1.

    Args:
        network: Takes (B, 3, H, W) and, where it is conditional, noise levels (B,); returns (B, 3, H, W).
        residual_scale: 0 where the output is the image itself (the paper); else the factor of the output before it is
            added to the input.
        noise_level: The constant that a conditional network is given.
    """

    def __init__(self, network: NCSNpp, residual_scale: float = 0.0, noise_level: float | None = None) -> None:
        super().__init__()
        self.network, self.residual_scale, self.noise_level = network, residual_scale, noise_level
        self.compute_dtype = torch.float32

    def forward(self, degraded: Tensor) -> Tensor:
        """Restore (B, 3, H, W) float32; the network itself runs in `compute_dtype`."""
        level = None if self.noise_level is None else degraded.new_full((degraded.shape[0],), self.noise_level)
        if not self.residual_scale:
            return self.network(degraded.to(self.compute_dtype), level).float()
        raw = self.network((2 * degraded - 1).to(self.compute_dtype), level).float()
        return degraded + self.residual_scale * raw


def constrained(denoise: Callable[[Tensor, Tensor, float], Tensor], project: Callable[[Tensor], Tensor]) -> Callable[
    [Tensor, Tensor, float], Tensor
]:  # fmt: skip
    """A denoiser whose data predictions are projected, onto a JPEG's quantisation cells for example."""
    return lambda x, degraded, t: project(denoise(x, degraded, t))
