"""The mean of a normal distribution inside an interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FARTHEST = 3.0


def mean_inside(mean: Tensor, half: Tensor | float, spread: float) -> Tensor:
    """The mean of normal distributions of `mean` and standard deviation `spread` inside [-half, half].

    A small spread clamps, a large one gives the middle, 0. A mean more than three spreads outside counts as three: of
    what lies farther away little is left in single precision. Returns a tensor like `mean`.

    Source: Johnson, Kotz, Balakrishnan, Continuous Univariate Distributions 1 (1994), 13.10.
    """
    spread = max(spread, 1e-6)
    half = torch.as_tensor(half, dtype=mean.dtype, device=mean.device)
    away = mean.abs().minimum(half + _FARTHEST * spread)
    near, far = (half - away) / spread, (half + away) / spread
    mass = (torch.erf(near / math.sqrt(2)) + torch.erf(far / math.sqrt(2))) / 2
    density = torch.exp(-near.square() / 2) * -torch.expm1(-2 * (half / spread) * (away / spread))
    inside = away - spread / math.sqrt(2 * math.pi) * density / mass
    return torch.clamp(inside, -half, half) * mean.sign()
