"""Samplers of DriftRec's reverse process, each a pure function from a compressed image to a restored one.

A sampler asks a denoiser for data predictions D(x_t, y, t), the network's estimate of the clean image. What it needs
besides follows from D: the score is (y + a (D - y) - x) / sigma^2.

The multistep samplers use that the residual u = x - y follows a standard linear diffusion, u_t = a(t) u_0 + sigma(t) z,
so that every formula of DPM-Solver++ (Lu et al. 2022) holds with (x, alpha, x0) replaced by (u, a, D - y).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, sqrt

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from .sde import SDE

Denoiser = Callable[[Tensor, Tensor, float], Tensor]
"""(x_t, y, t) -> the predicted clean image, all of shape (B, C, H, W)."""


@dataclass(frozen=True)
class SamplerStep:
    """What a callback learns after each evaluation of the denoiser.

    Args:
        index: Evaluations done, from 1.
        total: Evaluations planned; 0 where the sampler decides as it goes.
        t: The time of the evaluation.
        denoised: The data prediction.
    """

    index: int
    total: int
    t: float
    denoised: Tensor


Callback = Callable[[SamplerStep], None]


@dataclass(frozen=True)
class NoiseSource:
    """Normal noise from one explicit generator, the same for every image of a batch.

    The noise of one image therefore depends neither on its place in a batch nor on the batch's size.

    Args:
        generator: Where the random numbers come from; its device is where they are drawn.
    """

    generator: torch.Generator

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, device and dtype of `like`."""
        shape = (1, *like.shape[1:])
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return noise.to(like).expand_as(like)

    def sign(self) -> float:
        """-1 or +1, equally likely."""
        return 2.0 * float(torch.randint(2, (), generator=self.generator, device=self.generator.device)) - 1.0


def uniform_times(sde: SDE, steps: int, t_eps: float) -> list[float]:
    """`steps` times from 1 to `t_eps`, uniform in the half-log-SNR."""
    ends = sde.half_log_snr(np.array([1.0, t_eps]))
    times = sde.time_at(np.linspace(ends[0], ends[1], steps))
    return [1.0, *(float(t) for t in times[1:-1]), t_eps] if steps > 1 else [1.0]


def prior_sample(sde: SDE, degraded: Tensor, noise: NoiseSource) -> Tensor:
    """x_1 = y + sigma(1) z, where the reverse process starts."""
    return degraded + float(sde.std(1.0)) * noise.normal(degraded)


def score_from_denoised(sde: SDE, x: Tensor, degraded: Tensor, denoised: Tensor, t: float) -> Tensor:
    """The score of x_t that belongs to a data prediction (Tweedie's formula)."""
    mean = degraded + float(sde.mean_coefficient(t)) * (denoised - degraded)
    return (mean - x) / float(sde.variance(t))


class _Evaluations:
    """A denoiser that counts, and tells the callback."""

    def __init__(self, denoise: Denoiser, degraded: Tensor, total: int, callback: Callback | None) -> None:
        self.denoise, self.degraded, self.total, self.callback = denoise, degraded, total, callback
        self.index = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        denoised = self.denoise(x, self.degraded, t)
        self.index += 1
        if self.callback is not None:
            self.callback(SamplerStep(self.index, self.total, t, denoised))
        return denoised


def sample_multistep(
    denoise: Denoiser, sde: SDE, degraded: Tensor, noise: NoiseSource, *, steps: int = 10, t_eps: float = 0.03,
    eta: float = 0.0, order: int = 2, callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Multistep sampling in residual space: DPM-Solver++(2M) for eta = 0, its SDE form for eta = 1.

    Args:
        denoise: The denoiser.
        sde: The SDE that the denoiser was trained on.
        degraded: y, (B, C, H, W).
        noise: Source of the starting noise and, for eta above 0, of the noise of each step.
        steps: Evaluations of the denoiser, at times uniform in the half-log-SNR; the last one is the result.
        t_eps: The last time, in (0, 1).
        eta: Stochasticity in [0, 1]: 0 follows the probability-flow ODE, 1 the reverse SDE.
        order: 1 uses the present data prediction (DDIM; the posterior sampling of IR-SDE for eta = 1), 2 also the one
            before.
        callback: Called after each evaluation.
    """
    evaluate = _Evaluations(denoise, degraded, steps, callback)
    times = uniform_times(sde, steps, t_eps)
    x = prior_sample(sde, degraded, noise)
    denoised = evaluate(x, times[0])
    before, h_before = denoised, 1.0
    for t, t_next in pairwise(times):
        h = float(sde.half_log_snr(t_next) - sde.half_log_snr(t))
        ratio = float(sde.std(t_next) / sde.std(t))
        a_next, sigma_next = float(sde.mean_coefficient(t_next)), float(sde.std(t_next))
        ahead = denoised + (h / (2 * h_before)) * (denoised - before) if order == 2 else denoised
        x = degraded + ratio * exp(-eta * h) * (x - degraded) - a_next * expm1(-(1 + eta) * h) * (ahead - degraded)
        if eta > 0:
            x = x + sigma_next * sqrt(-expm1(-2 * eta * h)) * noise.normal(x)
        before, h_before = denoised, h
        denoised = evaluate(x, t_next)
    return denoised


def sample_euler_maruyama(
    denoise: Denoiser, sde: SDE, degraded: Tensor, noise: NoiseSource, *, steps: int = 100, t_eps: float = 0.03,
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Euler-Maruyama on the reverse SDE, as the authors of DriftRec coded it.

    The times run from 1 to t_eps inclusive, but every step has the length 1 / steps; the last one, taken at t_eps, goes
    beyond it without noise. That extra step matters: with exact step lengths the result is worse.
    """
    evaluate = _Evaluations(denoise, degraded, steps, callback)
    x = prior_sample(sde, degraded, noise)
    mean = x
    for t in np.linspace(1.0, t_eps, steps):
        mean = x - _reverse_drift(evaluate, sde, x, degraded, float(t)) / steps
        x = mean + float(sde.diffusion(t)) / steps**0.5 * noise.normal(x)
    return mean


def sample_euler_heun(
    denoise: Denoiser, sde: SDE, degraded: Tensor, noise: NoiseSource, *, steps: int = 100, t_eps: float = 0.03,
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """The stochastic Heun scheme of Roberts (arXiv 1210.0933) as the authors of DriftRec coded it.

    It takes two evaluations a step. Where the second would lie at or before t = 0, the step is one of Euler-Maruyama.
    """
    h = 1.0 / steps
    times = [float(t) for t in np.linspace(1.0, t_eps, steps)]
    evaluate = _Evaluations(denoise, degraded, steps + sum(t > h for t in times), callback)
    x = prior_sample(sde, degraded, noise)
    mean = x
    for t in times:
        drift = _reverse_drift(evaluate, sde, x, degraded, t)
        dw = h**0.5 * noise.normal(x)
        if t - h <= 0:
            mean = x - h * drift
            x = mean + float(sde.diffusion(t)) * dw
            continue
        kick = noise.sign() * h**0.5
        first = -h * drift + float(sde.diffusion(t)) * (dw + kick)
        second_drift = _reverse_drift(evaluate, sde, x + first, degraded, t - h)
        mean = x - 0.5 * h * (drift + second_drift)
        x = mean + 0.5 * (float(sde.diffusion(t)) * (dw + kick) + float(sde.diffusion(t - h)) * (dw - kick))
    return mean


def sample_rk45(
    denoise: Denoiser, sde: SDE, degraded: Tensor, noise: NoiseSource, *, tolerance: float = 1e-3, t_eps: float = 0.03,
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """The probability-flow ODE by an adaptive Runge-Kutta method (Dormand-Prince), then one full denoising at t_eps.

    Args:
        tolerance: Relative and absolute tolerance of SciPy's solver; its error norm is taken over the whole batch, so
            run images one by one where the result must not depend on the batch.
    """
    evaluate = _Evaluations(denoise, degraded, 0, callback)
    start = prior_sample(sde, degraded, noise)

    def to_host(x: Tensor) -> np.ndarray:
        return x.cpu().double().numpy().ravel()  # in this order: not every device knows double precision

    def to_device(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).to(start.dtype).to(start.device).reshape(start.shape)

    def field(t: float, flat: np.ndarray) -> np.ndarray:
        return to_host(_reverse_drift(evaluate, sde, to_device(flat), degraded, t, score_weight=0.5))

    solution = solve_ivp(
        field, (1.0, t_eps), to_host(start), method="RK45", rtol=tolerance, atol=tolerance, t_eval=[t_eps]
    )
    if not solution.success:
        raise ValueError(f"rk45: the solver gave up ({solution.message}). Raise the tolerance from {tolerance:g}.")
    return evaluate(to_device(solution.y[:, -1]), t_eps)


def _reverse_drift(
    evaluate: _Evaluations, sde: SDE, x: Tensor, degraded: Tensor, t: float, score_weight: float = 1.0
) -> Tensor:
    """f(x, t) - w g(t)^2 score: the drift of the reverse SDE for w = 1, of the probability-flow ODE for w = 1/2."""
    score = score_from_denoised(sde, x, degraded, evaluate(x, t), t)
    return float(sde.drift(t)) * (degraded - x) - score_weight * float(sde.diffusion(t)) ** 2 * score


@dataclass(frozen=True)
class SamplerKind:
    """A row of the table of samplers.

    Args:
        run: The sampler.
        settings: Fixed arguments of this row.
        by_tolerance: The sampler takes a tolerance, not a number of steps.
        evaluations_per_step: Evaluations of the network in each step.
    """

    run: Callable[..., Tensor]
    settings: dict[str, float]
    by_tolerance: bool = False
    evaluations_per_step: int = 1

    def evaluations(self, steps: int) -> int:
        """How often the network is evaluated at most; 0 where that is not known before."""
        return 0 if self.by_tolerance else steps * self.evaluations_per_step


SAMPLERS: dict[str, SamplerKind] = {
    "ode_2m": SamplerKind(sample_multistep, {"eta": 0.0, "order": 2}),
    "sde_2m": SamplerKind(sample_multistep, {"eta": 1.0, "order": 2}),
    "ode_1": SamplerKind(sample_multistep, {"eta": 0.0, "order": 1}),
    "sde_1": SamplerKind(sample_multistep, {"eta": 1.0, "order": 1}),
    "euler_maruyama": SamplerKind(sample_euler_maruyama, {}),
    "euler_heun": SamplerKind(sample_euler_heun, {}, evaluations_per_step=2),
    "rk45": SamplerKind(sample_rk45, {}, by_tolerance=True),
}


def sample(
    name: str, denoise: Denoiser, sde: SDE, degraded: Tensor, noise: NoiseSource, *, steps: int = 10,
    tolerance: float = 1e-3, t_eps: float = 0.03, callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Run the sampler of that name; `steps` or `tolerance` is used, whichever the sampler takes.

    Raises:
        ValueError: An unknown name, no step, or a t_eps outside (0, 1).
    """
    if name not in SAMPLERS:
        raise ValueError(f"Sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}.")
    if steps < 1:
        raise ValueError(f"Sampler: expected at least 1 step, got {steps}.")
    if not 0 < t_eps < 1:
        raise ValueError(f"Sampler: expected t_eps between 0 and 1, got {t_eps}.")
    kind = SAMPLERS[name]
    budget: dict[str, float] = {"tolerance": tolerance} if kind.by_tolerance else {"steps": steps}
    return kind.run(denoise, sde, degraded, noise, t_eps=t_eps, callback=callback, **budget, **kind.settings)
