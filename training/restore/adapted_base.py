"""Stable Diffusion 2.1-base with the changes of a CODiff or SODiff restorer in its weights, as diffusers runs it."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from restoration.adapters import read_lora
from restoration.diffusion.one_step import interpolate_alphas_cumprod, predict_x0
from restoration.restorer_file import RestorerFile, RestorerFileError
from training.networks.base_models import BaseModelError, load_base
from training.trainers.one_step import VAE_STRIDE

_CONV_IN = "conv_in"


class AdaptedBase:
    """A `LatentModel` (restoration.one_step_pipeline) on the latents of Stable Diffusion's VAE, scaled.

    Args:
        unet: Predicts noise.
        vae: Encodes and decodes.
        device: Of both.
        dtype: Of both.
    """

    size_multiple = VAE_STRIDE

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self.unet, self.vae = (network.to(device, dtype).eval().requires_grad_(False) for network in (unet, vae))  # type: ignore[arg-type]
        self._scale = float(vae.config.scaling_factor)  # type: ignore[attr-defined]

    def encode(self, images: Tensor) -> Tensor:
        """The mode of the posterior, (B, 4, H/8, W/8) float32, of images (B, 3, H, W) in [0, 1]."""
        inputs = (2 * images - 1).to(self.device, self.dtype)
        return self.vae.encode(inputs).latent_dist.mode().float() * self._scale  # type: ignore[union-attr]

    def denoise(self, latents: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents, float32, from latents (B, 4, h, w), tokens (B, K, 1024) and timesteps (B,)."""
        context = tokens.to(self.device, self.dtype)
        noise = self.unet(latents.to(self.dtype), timesteps.to(self.device), context, return_dict=False)[0]
        return predict_x0(latents, noise, interpolate_alphas_cumprod(timesteps.cpu()))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8 h, 8 w) in [0, 1] of latents (B, 4, h, w)."""
        decoded = self.vae.decode((latents / self._scale).to(self.dtype), return_dict=False)[0]  # type: ignore[arg-type]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


def load_adapted_base(file: RestorerFile, path: str, device: torch.device, dtype: torch.dtype) -> AdaptedBase:
    """The base model with a restorer's changes added to its weights, in single precision, before they get `dtype`.

    Args:
        file: A restorer of the family codiff or sodiff that adapts SD 2.1-base.
        path: Of the base model: a folder in diffusers' layout, or a name on the Hugging Face hub.
        device: Where it runs.
        dtype: In which it runs.

    Raises:
        RestorerFileError: The restorer's changes are incomplete, or do not fit the base model.
        BaseModelError: The base model is missing, incomplete or another.
    """
    try:
        base = load_base(path)
    except BaseModelError as error:
        raise BaseModelError(str(error).replace("--base.path", "--base")) from error
    if file.metadata.family == "codiff":
        _replace_first(base.unet.conv_in, file)
        _add(base.vae, file, "vae_lora")
    _add(base.unet, file, "unet_lora")
    return AdaptedBase(base.unet, base.vae, device, dtype)


@torch.no_grad()
def _add(network: nn.Module, file: RestorerFile, part: str) -> None:
    """Add low-rank changes to the weights of a network's layers."""
    lora, layers = read_lora(file, part), dict(network.named_modules())
    for name in lora.layers:
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != lora.shape(name):
            found = None if weight is None else tuple(weight.shape)
            raise RestorerFileError(
                f"{file.name}: expected {name} of the base model to have the shape {lora.shape(name)}, got {found}. "
                "Give --base SD 2.1-base."
            )
        weight += lora.delta(name)


@torch.no_grad()
def _replace_first(conv_in: nn.Conv2d, file: RestorerFile) -> None:
    """Put a restorer's first convolution into the UNet, before its low-rank change is added."""
    replaced = file.part("unet")
    for name, parameter in conv_in.named_parameters():
        value = replaced.get(f"{_CONV_IN}.{name}")
        if value is None or value.shape != parameter.shape:
            raise RestorerFileError(
                f"{file.name}: expected unet.{_CONV_IN}.{name} of the shape {tuple(parameter.shape)}, got "
                f"{'none' if value is None else tuple(value.shape)}. Export or download the file again."
            )
        parameter.copy_(value)
