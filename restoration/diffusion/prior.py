"""A diffusion prior: a network that predicts the noise in a picture, and the schedule that it was trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NoiseSchedule:
    """The variance-preserving schedule x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z of DDPM (Ho et al. 2020, Eq. 4).

    Args:
        kind: `linear`, the only one: betas rise evenly.
        beta_start: The first beta.
        beta_end: The last one.
        steps: How many there are.
    """

    kind: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.kind != "linear":
            raise ValueError(f"expected a schedule of the kind linear, got {self.kind!r}.")
        if not 0 < self.beta_start <= self.beta_end < 1 or not 2 <= self.steps <= 100_000:
            raise ValueError(f"expected betas between 0 and 1 in rising order and 2 to 100000 steps, got {self}.")

    def alphas_cumprod(self) -> np.ndarray:
        """abar_t for t = 0 ... steps - 1: the products of the first t + 1 alphas, float64."""
        return np.cumprod(1 - np.linspace(self.beta_start, self.beta_end, self.steps, dtype=np.float64))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)


class PriorNetworkConfig(Protocol):
    """What a prior asks of the shape of its network."""

    @property
    def classes(self) -> int:
        """Classes that the network is told; 0 for none."""
        ...

    @property
    def size_multiple(self) -> int:
        """Sides of the images are multiples of this."""
        ...

    @property
    def out_channels(self) -> int:
        """3, or 6 where the variance is predicted as well."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        ...


class DiffusionPrior(nn.Module):
    """A network that predicts noise, with its schedule.

    Args:
        network: Takes x_t (B, 3, H, W), timesteps (B,) and labels (B,) or None; the first three channels of what it
            returns are the noise. Has a `config` and `activation_bytes`.
        schedule: What it was trained on.
        max_timestep: The largest timestep that it was trained at.
        tile: Side of the images that it was trained on, where it should see no other; 0 where any size will do.
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, max_timestep: int | None = None, tile: int = 0
    ) -> None:
        super().__init__()
        last = schedule.steps - 1
        self.network, self.schedule, self.tile = network, schedule, tile
        self.max_timestep = last if max_timestep is None else max_timestep
        if not 0 < self.max_timestep <= last or tile < 0:
            raise ValueError(f"expected a largest timestep of 1 to {last} and no negative tile, got {max_timestep}.")
        self.alphas_cumprod = schedule.alphas_cumprod()
        self.compute_dtype = torch.float32

    @property
    def classes(self) -> int:
        """Classes that have to be told; 0 for an unconditional prior."""
        return int(self.network.config.classes)  # type: ignore[union-attr]

    def forward(self, x: Tensor, timestep: int | Tensor, label: int | None = None) -> Tensor:
        """Predict the noise; the network itself runs in `compute_dtype`, everything around it in float32.

        Args:
            x: x_t, (B, 3, H, W), of clean images in [-1, 1].
            timestep: One for all, or (B,).
            label: The class of all, where the network is told one.

        Returns:
            (B, 3, H, W) float32.

        Raises:
            ValueError: A class is missing, or one that the network does not know.
        """
        timesteps = torch.as_tensor(timestep, device=x.device).float().expand(len(x))
        raw = self.network(x.to(self.compute_dtype), timesteps, self._labels(x, label))
        return raw[:, :3].float()

    def _labels(self, x: Tensor, label: int | None) -> Tensor | None:
        if not self.classes:
            return None
        if label is None or not 0 <= label < self.classes:
            raise ValueError(f"expected a class from 0 to {self.classes - 1} for this prior, got {label}.")
        return torch.full((len(x),), label, device=x.device, dtype=torch.long)
