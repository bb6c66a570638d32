"""Core's MODEL and VAE as what one-step restoration asks for: encode, denoise, decode."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management as mm
from torch import Tensor

from ..restoration.compute import Compute
from ..restoration.tiling import Tiler
from .adapters import adapted_by
from .dct_latent import plain
from .runtime import fitting_tile, is_out_of_memory
from .types import Restorer
from .unet import Tiling, denoise_once

_OWN_TILE = 1024
_SD_TILE, _SD_OVERLAP = 768, 256
"""Pixels, as CODiff was published."""
_SD_MULTIPLE = 64
"""Pixels that the sides of what Stable Diffusion's UNet sees are multiples of: 8 of its VAE times 8 of its levels."""
_JPEG_GRID = 16
_LATENT_PIXEL = 8


class CoreLatentModel:
    """What VAE Encode, One-Step Denoise and VAE Decode do, without their widgets; core's managers mind the memory.

    Args:
        model: Core's MODEL with the restorer's weights.
        vae: Core's VAE with the restorer's weights.
        multiple: Pixels that the sides of images have to be multiples of.
        tile: Usual side of tiles, pixels.
        overlap: What tiles of the usual side share at least, pixels.
    """

    def __init__(self, model: Any, vae: Any, multiple: int, tile: int = _OWN_TILE, overlap: int = 0) -> None:
        self.model, self.vae, self.multiple, self.tile, self.overlap = model, vae, multiple, tile, overlap
        self.network = model.model.diffusion_model if hasattr(model.model, "backbone") else None  # docs/tiling.md

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, H/8, W/8) of images (B, 3, H, W) in [0, 1]."""
        return plain(self.vae.encode(images.movedim(1, -1).contiguous())).float()

    def denoise(self, latents: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents, from compressed ones, tokens (B, K, context) and timesteps (B,)."""
        return denoise_once(self.model, [[tokens, {}]], latents, timesteps, Tiling("never"), previews=False)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]."""
        return self.vae.decode(plain(latents)).movedim(-1, 1)

    def memory_required(self, height: int, width: int) -> int:
        """What core expects that one image of that size takes, bytes: the largest of the three steps."""
        latent = (1, self.vae.latent_channels, height // _LATENT_PIXEL, width // _LATENT_PIXEL)
        steps = (
            self.vae.memory_used_encode((1, 3, height, width), self.vae.vae_dtype),
            self.model.model.memory_required(list(latent)),
            self.vae.memory_used_decode(latent, self.vae.vae_dtype),
        )
        return int(max(steps))

    def compute(self, size: tuple[int, int], tile: int, overlap: int) -> Compute:
        """How images of that (height, width) are split; `tile` 0 for the usual side, halved when memory runs out."""
        device = self.model.load_device
        overlap = overlap if tile else max(overlap, self.overlap)
        tile = fitting_tile(self.memory_required, device, size, tile or self.tile)
        align = math.lcm(_JPEG_GRID, self.multiple)
        tiler = Tiler(tile, overlap, align, is_out_of_memory=is_out_of_memory, release=mm.soft_empty_cache)
        return Compute(device, tiler, mm.throw_exception_if_processing_interrupted)


def latent_model_of(restorer: Restorer, model: Any = None, vae: Any = None) -> CoreLatentModel:
    """The MODEL and VAE that a one-step restorer runs with: those that are given, or its own.

    Args:
        restorer: Of the family codiff or sodiff.
        model: From Load JPEG Restorer; not needed by a restorer with a backbone of its own.
        vae: As well.

    Raises:
        ValueError: There is none, or they are not this restorer's; the message says what to connect.
    """
    own = restorer.backbone
    if own is not None:
        model, vae = own.model if model is None else model, own.vae if vae is None else vae
    missing = " and ".join(name for name, value in (("MODEL", model), ("VAE", vae)) if value is None)
    if missing:
        raise ValueError(
            f"{restorer.name} adapts Stable Diffusion 2.1-base and needs its {missing}. Connect MODEL and VAE of Load "
            "JPEG Restorer to model and vae here, and those of Load Checkpoint to Load JPEG Restorer."
        )
    _check(restorer, model, vae)
    if own is None:
        return CoreLatentModel(model, vae, _SD_MULTIPLE, _SD_TILE, _SD_OVERLAP)
    return CoreLatentModel(model, vae, model.model.backbone.size_multiple)


def _check(restorer: Restorer, model: Any, vae: Any) -> None:
    remedy = "Connect MODEL and VAE of the Load JPEG Restorer that this restorer comes from"
    remedy += "." if restorer.backbone else ", and those of Load Checkpoint to that one."
    context, expected = model.model.model_config.unet_config.get("context_dim"), restorer.metadata.config["context_dim"]
    if context != expected:
        raise ValueError(f"{restorer.name} expected a MODEL for prompts {expected} wide, got {context}. {remedy}")
    channels = model.get_model_object("latent_format").latent_channels
    if getattr(vae, "latent_channels", None) != channels:
        raise ValueError(
            f"{restorer.name} expected a VAE of {channels} latent channels, as its MODEL has, got "
            f"{getattr(vae, 'latent_channels', 'none')}. {remedy}"
        )
    foreign = " and the ".join(_foreign(restorer, model, vae))
    if foreign:
        raise ValueError(
            f"{restorer.name} expected the {foreign} with its own weights and no other restorer's, got another. "
            f"{remedy} LoRAs of yours may be added to that MODEL."
        )


def _foreign(restorer: Restorer, model: Any, vae: Any) -> list[str]:
    """Which of MODEL and VAE are not the restorer's; clones and what is patched on top of them are."""
    own = restorer.backbone
    if own is not None:
        fits = {"MODEL": model.is_clone(own.model), "VAE": vae.first_stage_model is own.vae.first_stage_model}
    else:
        adapted = () if restorer.metadata.family == "sodiff" else (restorer.source,)  # it leaves the VAE as it is
        fits = {"MODEL": adapted_by(model) == (restorer.source,), "VAE": adapted_by(vae.patcher) == adapted}
    return [name for name, fit in fits.items() if not fit]
