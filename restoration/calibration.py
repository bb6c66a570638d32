"""How a timestep predictor relates JPEG quality and timestep, as a table: what a quality override moves along."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LAST_TIMESTEP = 999.0
_MOST_POINTS = 1000


@dataclass(frozen=True)
class Calibration:
    """A monotone, piecewise linear table of the mean timestep against the quality.

    Args:
        qualities: 0 to 100, increasing; at least one.
        timesteps: 0 to 999, one for each quality, never rising or never falling.

    Raises:
        ValueError: The numbers are not such a table.
    """

    qualities: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "qualities", _numbers("qualities", self.qualities, 100.0))
        object.__setattr__(self, "timesteps", _numbers("timesteps", self.timesteps, _LAST_TIMESTEP))
        if not 0 < len(self.qualities) == len(self.timesteps):
            raise ValueError(
                f"calibration: expected as many timesteps as qualities, one at least, got {len(self.timesteps)} "
                f"and {len(self.qualities)}."
            )
        single = np.asarray(self.qualities, np.float32)  # the precision that it is used in
        if any(second <= first for first, second in itertools.pairwise(single)):
            raise ValueError(f"calibration: expected increasing qualities, got {_shown(self.qualities)}.")
        steps = [second - first for first, second in itertools.pairwise(self.timesteps)]
        if min(steps, default=0.0) < 0 < max(steps, default=0.0):
            raise ValueError(f"calibration: expected timesteps that rise or fall, got {_shown(self.timesteps)}.")

    @classmethod
    def fit(cls, qualities: Sequence[float], timesteps: Sequence[float]) -> Calibration:
        """The table of least squares: the mean timestep at each quality, then made monotone, rising or falling,
        whichever is nearer, by pooling adjacent violators (Barlow et al. 1972) weighted with the number of samples.

        Args:
            qualities: 0 to 100, in any order, repeated where there are several samples.
            timesteps: 0 to 999, one for each.

        Raises:
            ValueError: There are no samples, or not as many timesteps as qualities, or values out of range.
        """
        given, wanted = np.asarray(qualities, np.float64), np.asarray(timesteps, np.float64)
        if given.ndim != 1 or given.shape != wanted.shape or not given.size:
            raise ValueError(
                f"calibration: expected two lists of one length, got shapes {given.shape} and {wanted.shape}."
            )
        levels, place, counts = np.unique(given, return_inverse=True, return_counts=True)
        means = np.bincount(place, weights=wanted) / counts
        rising = isotonic(means, counts)
        falling = -isotonic(-means, counts)
        errors = [float((counts * (fitted - means) ** 2).sum()) for fitted in (rising, falling)]
        fitted = rising if errors[0] <= errors[1] else falling
        return cls(tuple(levels.tolist()), tuple(fitted.tolist()))

    def timestep(self, quality: Tensor) -> Tensor:
        """The timesteps of qualities of any shape, linear between the table's points and held beyond its ends.

        Returns:
            The same shape in single precision.
        """
        x = torch.tensor(self.qualities, dtype=torch.float32, device=quality.device)
        y = torch.tensor(self.timesteps, dtype=torch.float32, device=quality.device)
        given = quality.float().clamp(x[0], x[-1])
        if len(x) == 1:
            return y[0].expand_as(given).clone()
        right = torch.searchsorted(x, given.contiguous()).clamp(1, len(x) - 1)
        left = right - 1
        return torch.lerp(y[left], y[right], (given - x[left]) / (x[right] - x[left]))

    def shifted(self, timestep: Tensor, predicted_quality: Tensor, quality: Tensor) -> Tensor:
        """A predicted timestep, moved along the table to another quality than the predicted one.

        It stays where the two qualities agree, and moves one way only as `quality` grows.

        Args:
            timestep: What the predictor gave, (B,).
            predicted_quality: Its quality, (B,).
            quality: The one to assume, (B,) or a single number.

        Returns:
            timestep + table(quality) - table(predicted_quality), within 0..999, (B,) in single precision.
        """
        return (timestep.float() + (self.timestep(quality) - self.timestep(predicted_quality))).clamp(0, _LAST_TIMESTEP)

    def to_dict(self) -> dict[str, list[float]]:
        """The table as JSON knows it."""
        return {"qualities": list(self.qualities), "timesteps": list(self.timesteps)}


def isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sequence that never falls and is nearest to `values` (n,) in weighted least squares."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, length = value, float(weight), 1
        while pools and pools[-1][0] > mean:
            before, its_weight, its_length = pools.pop()
            mean = (mean * total + before * its_weight) / (total + its_weight)
            total, length = total + its_weight, length + its_length
        pools.append((mean, total, length))
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])


def _numbers(name: str, values: Iterable[float], largest: float) -> tuple[float, ...]:
    """Numbers of a file or a fit, from 0 to `largest`; rounding beyond by a thousandth is taken back."""
    given = tuple(itertools.islice(values, _MOST_POINTS + 1))
    if len(given) > _MOST_POINTS:
        raise ValueError(f"calibration: expected at most {_MOST_POINTS} {name}, got more.")
    for value in given:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not -1e-3 <= value <= largest + 1e-3:
            raise ValueError(f"calibration: expected {name} from 0 to {largest:g}, got {value!r}.")
    return tuple(min(max(float(value), 0.0), largest) for value in given)


def _shown(values: Sequence[float]) -> str:
    more = ", ..." if len(values) > 6 else ""
    return ", ".join(f"{value:g}" for value in values[:6]) + more
