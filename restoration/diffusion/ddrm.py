"""DDRM-JPEG: restoration by an unconditional diffusion prior whose data predictions are brought to what is known.

Kawar, Song, Ermon, Elad, "JPEG artifact correction using denoising diffusion restoration models" (2022), in the order
of operations of the authors' code. Pictures are in [-1, 1] here, as the prior takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Protocol

import numpy as np
from torch import Tensor

from ..noise import Noise
from .samplers import Callback, SamplerStep

DenoiseEps = Callable[[Tensor, int], Tensor]
"""(x_t, t) -> the predicted noise, both (B, C, H, W); t is a timestep of the prior's schedule."""

DEFAULT_ETA_B: dict[str, float] = {"soft": 1.0, "projection": 1.0, "shift": 0.4}
"""The corrections and the weight that each gets where none is asked for."""


class Correction(Protocol):
    """How data predictions are brought to a measurement; images are (B, 3, H, W) in [0, 1], not clipped."""

    def shift(self, images: Tensor) -> Tensor:
        """x - Dec(Enc(x)) + Dec(y), the paper's."""
        ...

    def project(self, images: Tensor) -> Tensor:
        """The nearest image that agrees with the measurement."""
        ...

    def expect(self, images: Tensor, spread: float) -> Tensor:
        """What is expected of images that agree, if these are off by normal errors of that standard deviation."""
        ...


def ddrm_timesteps(steps: int, start: int) -> list[int]:
    """`steps` timesteps, evenly from just below `start` down to 0: 285, 270, ..., 0 for 20 and 300.

    Those of the authors where `steps` divides `start`; elsewhere theirs are more than were asked for.

    Raises:
        ValueError: There are not as many timesteps below `start`.
    """
    if not 1 <= steps <= start:
        raise ValueError(
            f"expected 1 to {start} steps, as many as there are timesteps below start {start}, got {steps}. Lower "
            "steps, or raise start."
        )
    return [number * start // steps for number in reversed(range(steps))]


def sample_ddrm(
    denoise_eps: DenoiseEps, alphas_cumprod: np.ndarray, observed: Tensor, measurement: Correction, noise: Noise, *,
    steps: int = 20, start: int = 300, eta: float = 1.0, eta_b: float | None = None, mode: str = "projection",
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Sample pictures that a prior finds likely and that agree with a measurement.

    Each step predicts the noise, from it the clean picture x0, corrects that to x', and goes on from
    sqrt(abar) (eta_b x' + (1 - eta_b) x0) + sqrt(1 - abar) (eta z + (1 - eta) eps) at the next timestep; the last one's
    abar is 1. The formula is the authors'. With eta between 0 and 1 its noise is weaker than the timestep says.

    Args:
        denoise_eps: The prior.
        alphas_cumprod: abar of each of the prior's timesteps.
        observed: The decoded measurement, (B, C, H, W) in [-1, 1]; the batch holds independent samples.
        measurement: What the pictures have to agree with; it is given pictures in [0, 1].
        noise: Of the start and of each step.
        steps: Evaluations of the prior.
        start: The first timestep lies just below this one.
        eta: Share of fresh noise in [0, 1].
        eta_b: Weight of the correction in [0, 1]; None for that of the mode, `DEFAULT_ETA_B`.
        mode: `shift` corrects by whole quantisation steps, as the paper; `projection` no further than is needed; `soft`
            to what is expected of a picture that agrees, if the prediction is off by the noise of the timestep.
        callback: Called after each evaluation, with the data prediction after its correction, in [-1, 1].

    Returns:
        (B, C, H, W) in [-1, 1], not clipped.

    Raises:
        ValueError: More steps than timesteps, a timestep that the schedule lacks, a weight outside [0, 1], or an
            unknown mode.
    """
    eta_b = _weights(eta, eta_b, mode)
    times = ddrm_timesteps(steps, start)
    if times[0] >= len(alphas_cumprod):
        raise ValueError(f"expected a start of at most {len(alphas_cumprod)}, the prior's timesteps, got {start}.")
    levels = [*(float(alphas_cumprod[t]) for t in times), 1.0]
    x = sqrt(levels[0]) * observed + sqrt(1 - levels[0]) * noise.normal(observed)
    for index, (t, abar, abar_next) in enumerate(zip(times, levels, levels[1:], strict=False)):
        eps = denoise_eps(x, t)
        x0 = (x - sqrt(1 - abar) * eps) / sqrt(abar)
        corrected = _corrected(measurement, mode, (x0 + 1) / 2, sqrt((1 - abar) / abar) / 2)
        predicted = eta_b * (2 * corrected - 1) + (1 - eta_b) * x0
        if callback is not None:
            callback(SamplerStep(index + 1, steps, float(t), predicted))
        x = sqrt(abar_next) * predicted
        if abar_next < 1:
            x = x + sqrt(1 - abar_next) * (eta * noise.normal(x) + (1 - eta) * eps)
    return x


def _corrected(measurement: Correction, mode: str, images: Tensor, spread: float) -> Tensor:
    if mode == "soft":
        return measurement.expect(images, spread)
    return measurement.project(images) if mode == "projection" else measurement.shift(images)


def _weights(eta: float, eta_b: float | None, mode: str) -> float:
    if mode not in DEFAULT_ETA_B:
        raise ValueError(f"expected a mode of {', '.join(DEFAULT_ETA_B)}, got {mode!r}.")
    eta_b = DEFAULT_ETA_B[mode] if eta_b is None else eta_b
    for name, value in (("eta", eta), ("eta_b", eta_b)):
        if not 0 <= value <= 1:
            raise ValueError(f"expected {name} between 0 and 1, got {value:g}.")
    return eta_b
