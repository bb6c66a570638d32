"""One-step restoration: the compressed latent is read as a noisy one; predicting its noise once gives the clean one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TIMESTEPS = 1000
_BETA_START, _BETA_END = 0.00085, 0.012


@lru_cache(maxsize=1)
def _schedule() -> Tensor:
    betas = torch.linspace(_BETA_START**0.5, _BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def alphas_cumprod_sd() -> Tensor:
    """Stable Diffusion's cumulative products of 1 - beta, float64 (1000,): `scaled_linear` from 0.00085 to 0.012."""
    return _schedule().clone()


def interpolate_alphas_cumprod(timestep: Tensor | float, alphas_cumprod: Tensor | None = None) -> Tensor:
    """The cumulative product at timesteps between the integers, linear in the log signal-to-noise ratio.

    Args:
        timestep: Of any shape, from 0 to the last of the schedule.
        alphas_cumprod: The schedule, (T,); Stable Diffusion's by default.

    Returns:
        float64, of the shape of `timestep`, differentiable in it.

    Raises:
        ValueError: A timestep lies outside of the schedule.
    """
    schedule = _schedule() if alphas_cumprod is None else alphas_cumprod.double()
    t = torch.as_tensor(timestep, dtype=torch.float64)
    last = len(schedule) - 1
    if not bool(((t >= 0) & (t <= last)).all()):
        raise ValueError(f"expected timesteps from 0 to {last}, got {t.tolist()}.")
    log_snr = torch.logit(schedule.to(t.device))
    low = t.detach().floor().clamp(max=last - 1).long()
    return torch.sigmoid(torch.lerp(log_snr[low], log_snr[low + 1], t - low))


def predict_x0(latent: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x0 = (z - sqrt(1 - abar) eps) / sqrt(abar), for `alphas_cumprod` a scalar or one for each item of the batch.

    Computed in float32 at least and returned so (CODiff Eq. 3; Guo et al. 2025).
    """
    dtype = torch.promote_types(latent.dtype, torch.float32)
    abar = alphas_cumprod.reshape(-1, *(1,) * (latent.dim() - 1))
    # Cast before they move: not every device has float64.
    signal, noise = (value.sqrt().to(dtype).to(latent.device) for value in (abar, 1 - abar))
    return (latent.to(dtype) - noise * eps.to(dtype)) / signal


def remove_residual(latent: Tensor, residual: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x0 = z - sqrt(1 - abar) F, for `alphas_cumprod` a scalar or one for each item of the batch; float32 at least.

    How the small restorers read a network's output F (docs/starter.md): what compression did to the latent z is
    taken away, the more of it the later the timestep, and the signal keeps its size. With `predict_x0` a network would
    have to learn first how to undo the division by sqrt(abar).
    """
    dtype = torch.promote_types(latent.dtype, torch.float32)
    abar = alphas_cumprod.reshape(-1, *(1,) * (latent.dim() - 1))
    noise = (1 - abar).sqrt().to(dtype).to(latent.device)
    return latent.to(dtype) - noise * residual.to(dtype)
