"""The SDE family of DriftRec (Welker et al., "DriftRec", IEEE TIP 2024, section III).

All three drift a clean image x0 towards its compressed version y while noise grows:

    dx = gamma F(t) (y - x) dt + g(t) dw,    g(t) = nu sigma_min (sigma_max / sigma_min)^t,    t in [0, 1]

(the exponent 2t in the paper's Eq. 3 belongs to g^2). In the residual u = x - y each of them is a standard linear
diffusion u_t = a(t) u_0 + sigma(t) z, so a(t) and sigma(t) are all that the fast samplers need.

Times are numbers or NumPy arrays in double precision: schedules are computed on the host, whatever device the images
are on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import dawsn

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SDE(ABC):
    """One SDE of the family.

    Args:
        sigma_min: Standard deviation at which the noise starts, in units of the image range [0, 1].
        sigma_max: Standard deviation at t = 1.
        gamma: Stiffness of the drift towards the compressed image.
    """

    sigma_min: float = 0.01
    sigma_max: float = 1.0
    gamma: float = 1.0

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"SDE: expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}.")
        if self.gamma <= 0:
            raise ValueError(f"SDE: expected gamma above 0, got {self.gamma}.")

    @property
    def log_ratio(self) -> float:
        """ln(sigma_max / sigma_min)."""
        return float(np.log(self.sigma_max / self.sigma_min))

    @property
    @abstractmethod
    def normalization(self) -> float:
        """The factor nu of g that makes sigma(1) = sigma_max (up to 1e-5 for OUVE, as the authors have it)."""

    @abstractmethod
    def drift_rate(self, t: ArrayLike) -> Array:
        """F(t), the drift's dependence on time."""

    @abstractmethod
    def drift_integral(self, t: ArrayLike) -> Array:
        """The integral of F from 0 to t."""

    @abstractmethod
    def variance(self, t: ArrayLike) -> Array:
        """sigma(t)^2, the variance of x_t given x_0 and y."""

    def drift(self, t: ArrayLike) -> Array:
        """gamma F(t), the factor of (y - x) in the forward drift."""
        return self.gamma * self.drift_rate(t)

    def diffusion(self, t: ArrayLike) -> Array:
        """g(t), the factor of the Wiener process."""
        return self.normalization * self.sigma_min * np.exp(self.log_ratio * np.asarray(t, dtype=np.float64))

    def mean_coefficient(self, t: ArrayLike) -> Array:
        """a(t) in E[x_t] = y + a(t) (x_0 - y)."""
        return np.exp(-self.gamma * self.drift_integral(t))

    def std(self, t: ArrayLike) -> Array:
        """sigma(t)."""
        return np.sqrt(self.variance(t))

    def half_log_snr(self, t: ArrayLike) -> Array:
        """lambda(t) = ln(a(t) / sigma(t)), falling in t."""
        return -self.gamma * self.drift_integral(t) - 0.5 * np.log(self.variance(t))

    def time_at(self, half_log_snr: ArrayLike) -> Array:
        """The inverse of `half_log_snr`, by bisection on (0, 1]."""
        wanted = np.asarray(half_log_snr, dtype=np.float64)
        low, high = np.full_like(wanted, 1e-9), np.ones_like(wanted)
        for _ in range(60):
            middle = 0.5 * (low + high)
            too_clean = self.half_log_snr(middle) > wanted
            low, high = np.where(too_clean, middle, low), np.where(too_clean, high, middle)
        return 0.5 * (low + high)


@dataclass(frozen=True)
class OUVE(SDE):
    """Ornstein-Uhlenbeck drift with exploding variance: F(t) = 1."""

    name: ClassVar[str] = "ouve"

    @property
    def normalization(self) -> float:
        return float(np.sqrt(2 * (self.gamma + self.log_ratio)))

    def drift_rate(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def drift_integral(self, t: ArrayLike) -> Array:
        return np.asarray(t, dtype=np.float64)

    def variance(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return self.sigma_min**2 * (np.exp(2 * self.log_ratio * t) - np.exp(-2 * self.gamma * t))

    def time_at(self, half_log_snr: ArrayLike) -> Array:
        wanted = np.asarray(half_log_snr, dtype=np.float64)
        return np.log1p(np.exp(-2 * wanted) / self.sigma_min**2) / (2 * (self.gamma + self.log_ratio))


@dataclass(frozen=True)
class TSDVE(SDE):
    """Drift that grows with time, F(t) = t; the variance in closed form by Dawson's function."""

    gamma: float = 2.0

    name: ClassVar[str] = "tsdve"

    def _unit_variance(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        root = np.sqrt(self.gamma)
        start = dawsn(self.log_ratio / root)
        end = dawsn((self.gamma * t + self.log_ratio) / root)
        return self.sigma_min**2 / root * (np.exp(2 * self.log_ratio * t) * end - np.exp(-self.gamma * t**2) * start)

    @property
    def normalization(self) -> float:
        return float(self.sigma_max / np.sqrt(self._unit_variance(1.0)))

    def drift_rate(self, t: ArrayLike) -> Array:
        return np.asarray(t, dtype=np.float64)

    def drift_integral(self, t: ArrayLike) -> Array:
        return 0.5 * np.asarray(t, dtype=np.float64) ** 2

    def variance(self, t: ArrayLike) -> Array:
        return self.normalization**2 * self._unit_variance(t)


@dataclass(frozen=True)
class CosVE(SDE):
    """Drift that starts and ends smoothly, F(t) = 1 - cos(pi t); the variance by Gauss-Legendre quadrature."""

    name: ClassVar[str] = "cosve"

    _NODES: ClassVar[tuple[Array, Array]] = np.polynomial.legendre.leggauss(48)

    def _unit_variance(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        nodes, weights = self._NODES
        u = 0.5 * t[..., None] * (nodes + 1)
        decay = 2 * self.gamma * (self.drift_integral(u) - self.drift_integral(t)[..., None])
        integrand = np.exp(decay + 2 * self.log_ratio * u)
        return self.sigma_min**2 * 0.5 * t * (integrand @ weights)

    @property
    def normalization(self) -> float:
        return float(self.sigma_max / np.sqrt(self._unit_variance(1.0)))

    def drift_rate(self, t: ArrayLike) -> Array:
        return 1 - np.cos(np.pi * np.asarray(t, dtype=np.float64))

    def drift_integral(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return t - np.sin(np.pi * t) / np.pi

    def variance(self, t: ArrayLike) -> Array:
        return self.normalization**2 * self._unit_variance(t)


SDES: dict[str, type[SDE]] = {kind.name: kind for kind in (OUVE, TSDVE, CosVE)}


def make_sde(name: str, **parameters: float) -> SDE:
    """The SDE of that name (`ouve`, `tsdve`, `cosve`) with `sigma_min`, `sigma_max` and `gamma` as given.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in SDES:
        raise ValueError(f"SDE: expected one of {', '.join(SDES)}, got {name!r}.")
    return SDES[name](**parameters)
