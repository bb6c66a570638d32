"""CODiff's second stage: Stable Diffusion 2.1-base turns a JPEG into a clean picture in one step, guided by CaVE."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from restoration.diffusion.one_step import interpolate_alphas_cumprod, predict_x0
from restoration.networks.cave import CaVEConfig
from restoration.prompts import CaVEPrompt
from restoration.restorer_file import RestorerFileError, RestorerMetadata, load_part, read_metadata, read_restorer
from training import base_models
from training.base_models import BaseModel, lora_tensors
from training.codiff_configs import CoDiffConfig
from training.discriminators import LatentDiscriminator, discriminator_loss, generator_loss
from training.losses import make_perceptual
from training.trainers.task import TaskDefaults

_VAE_STRIDE = 8


class CoDiffModel(nn.Module):
    """The restorer: the JPEG's latent, read as a noisy one, is denoised once under CaVE's prompt and decoded.

    Trained are the adapters of the UNet and of the VAE's encoder, the UNet's first convolution and the projection of
    the prompt; CaVE, the VAE's decoder and all that is adapted are frozen.

    Args:
        base: The frozen base model; it is changed in place.
        prompt: CaVE, trained, and the projection of its features.
        config: Adapters, types, what the losses see.
        generator: Draws the adapters.
    """

    def __init__(self, base: BaseModel, prompt: CaVEPrompt, config: CoDiffConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.prompt, self.unet, self.vae = prompt, base.unet, base.vae
        self.timestep, self.clamp_gradient = config.timestep, config.loss.clamp_gradient
        self.dtype = base_models.DTYPES[config.base.dtype]
        self.prompt.network.requires_grad_(False).eval()
        for network, targets, lora in (
            (self.unet, base_models.unet_targets(self.unet), config.unet_lora),
            (self.vae, base_models.vae_targets(self.vae), config.vae_lora),
        ):
            base_models.add_lora(network, targets, lora.rank, lora.alpha, generator)
        self.conv_in.requires_grad_(True)
        for network in (self.unet, self.vae):
            base_models.store_frozen(network, self.dtype)
        if self.dtype != torch.float32:
            base_models.compute_in_float32(self.unet.conv_in, self.dtype)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()

    @property
    def conv_in(self) -> nn.Conv2d:
        """The UNet's first convolution, without its adapter."""
        return self.unet.conv_in.base_layer  # type: ignore[return-value]

    def train(self, mode: bool = True) -> CoDiffModel:
        """As of any module, but CaVE stays in evaluation mode: its batch norms keep the statistics of its training."""
        super().train(mode)
        self.prompt.network.eval()
        return self

    def forward(self, degraded: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Restore pictures.

        Args:
            degraded: (B, 3, H, W) in [0, 1], any size; sides grow to multiples of 8 by repetition and are cut again.
            generator: Draws latents from the VAE's posterior; None takes its mode.

        Returns:
            The restored pictures (B, 3, H, W) in [0, 1], and their latents x0 (B, 4, H/8, W/8), scaled, float32.
        """
        height, width = degraded.shape[-2:]
        padded = F.pad(degraded, (0, -width % _VAE_STRIDE, 0, -height % _VAE_STRIDE), mode="replicate")
        latent = self.encode(padded, generator)
        timestep = torch.full((len(latent),), self.timestep, device=latent.device)
        eps = self.unet(latent.to(self.dtype), timestep, self.tokens(degraded).to(self.dtype), return_dict=False)[0]
        x0 = predict_x0(latent, eps, interpolate_alphas_cumprod(self.timestep))
        return self.decode(x0)[..., :height, :width], x0

    def tokens(self, degraded: Tensor) -> Tensor:
        """CaVE's prompt (B, K, context), float32 whatever the precision of the rest."""
        with torch.autocast(degraded.device.type, enabled=False):
            with torch.no_grad():
                features = self.prompt.network.encode(degraded.float())
            return self.prompt(features)

    def encode(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, 4, H/8, W/8), scaled, float32, of pictures (B, 3, H, W) in [0, 1] with sides divisible by 8."""
        posterior = self.vae.encode((2 * pictures - 1).to(self.dtype)).latent_dist  # type: ignore[union-attr]
        latent = posterior.mean.float()
        if generator is not None:
            noise = torch.randn(latent.shape, generator=generator, device=generator.device)
            latent = latent + posterior.std.float() * noise.to(latent.device)
        return latent * self.vae.config.scaling_factor  # type: ignore[attr-defined]

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of scaled latents (B, 4, H/8, W/8)."""
        scaled = latent / self.vae.config.scaling_factor  # type: ignore[attr-defined]
        decoded = self.vae.decode(scaled.to(self.dtype), return_dict=False)[0].float() / 2 + 0.5
        clamped = decoded.clamp(0, 1)
        return decoded + (clamped - decoded).detach() if self.clamp_gradient else clamped


class CoDiffTask(TaskDefaults):
    """Error, perceptual distance and a discriminator on the latents (Guo et al. 2025, section 3.3).

    Raises:
        ValueError: CaVE, the base model or the perceptual weights are missing or unfit, or the crops are too small.
    """

    size_multiple = 32  # of CaVE's cells; the UNet and the VAE make do with 8

    def __init__(self, config: CoDiffConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.run.seed)
        prompt = load_prompt(config.cave, config.timestep, generator)
        self.perceptual = make_perceptual(config.loss.perceptual)
        base = base_models.load_base(config.base.path)
        self.critic = _make_critic(base.unet, config, generator)
        self.critic_optimizer = config.critic_optimizer
        self.model = CoDiffModel(base, prompt, config, generator)
        self._restored_latents: Tensor | None = None

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        clean, weights = batch["clean"], self.config.loss
        restored, x0 = model(batch["degraded"], self._posterior(generator))
        total = weights.mse * F.mse_loss(restored, clean)
        if self.perceptual is not None:
            total = total + weights.perceptual.weight * self.perceptual.to(clean.device)(restored, clean).mean()
        if self.critic is not None:
            total = total + weights.adversarial.weight * generator_loss(self.critic(x0))
            self._restored_latents = x0.detach()
        return total

    def critic_loss(self, critic: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Restored latents against those of the clean pictures, which the VAE gives as it was before its training."""
        restored, self._restored_latents = self._restored_latents, None
        if restored is None:
            raise RuntimeError("critic_loss needs what loss left of the same batch: call loss first")
        with base_models.without_lora(self.model.vae), self._autocast(restored.device):
            clean = self.model.encode(batch["clean"], self._posterior(generator))
        fake, real = critic(torch.cat([restored, clean])).chunk(2)
        return discriminator_loss(real=real, fake=fake)

    def _posterior(self, generator: torch.Generator) -> torch.Generator | None:
        return generator if self.config.latents == "sample" else None

    def _autocast(self, device: torch.device) -> torch.autocast:
        precision = self.config.run.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """Deterministic: the posterior's mode, as ComfyUI encodes."""
        return self.model(degraded)[0].clamp(0, 1)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {
            "cave": self.model.prompt.network.config.to_dict(),
            "context_dim": self.model.prompt.projection.out_features,
            "timestep": float(self.config.timestep),
            "unet_lora": asdict(self.config.unet_lora),
            "vae_lora": asdict(self.config.vae_lora),
        }
        return RestorerMetadata("codiff", config, base="sd2.1-base", training=training, license=license)

    def tensors(self) -> dict[str, Tensor]:
        parts = {
            "prompt": self.model.prompt.network.state_dict(),
            "projection": self.model.prompt.projection.state_dict(),
            "unet_lora": lora_tensors(self.model.unet),
            "unet.conv_in": self.model.conv_in.state_dict(),
            "vae_lora": lora_tensors(self.model.vae),
        }
        return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a CODiff file whose CaVE is this one.

        Raises:
            RestorerFileError: It has other adapters, or another CaVE than `cave`.
        """
        own = self.tensors()
        differing = {key for key in own.keys() | tensors.keys()
                     if key not in own or key not in tensors or own[key].shape != tensors[key].shape}  # fmt: skip
        if differing:
            raise RestorerFileError(
                f"the file to start from is no CODiff of this base model and these ranks: {min(differing)} is missing "
                "in one of the two, or of another shape. Start from another file, or from none."
            )
        if self.config.run.init_from is not None:
            self._check_scales(self.config.run.init_from)
        if any(not torch.equal(own[key].half(), tensors[key].half()) for key in own if key.startswith("prompt.")):
            raise RestorerFileError("the file to start from was trained with another CaVE. Give it as --cave as well.")
        for key, value in own.items():
            value.copy_(tensors[key])

    def _check_scales(self, path: Path) -> None:
        theirs, ours = read_metadata(path).config, self.metadata({}, "").config
        for part in ("unet_lora", "vae_lora"):
            if theirs.get(part) != ours[part]:
                raise RestorerFileError(
                    f"{path.name} has {part} {theirs.get(part)}, not {ours[part]}. Give --{part.replace('_', '-')} the "
                    "same rank and alpha."
                )


def _make_critic(
    unet: UNet2DConditionModel, config: CoDiffConfig, generator: torch.Generator
) -> LatentDiscriminator | None:
    adversarial = config.loss.adversarial
    if adversarial.discriminator == "none":
        return None
    critic = LatentDiscriminator(
        unet, rank=adversarial.rank, alpha=adversarial.alpha, timestep=adversarial.timestep, generator=generator,
        frozen_backbone=adversarial.frozen_backbone, dtype=base_models.DTYPES[config.base.dtype],
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    smallest = critic.smallest_latent * _VAE_STRIDE
    if config.data.crop < smallest:
        raise ValueError(
            f"data.crop: the discriminator needs crops of at least {smallest} pixels, got {config.data.crop}. Give "
            "larger ones, or --loss.adversarial.discriminator none."
        )
    return critic


def load_prompt(path: Path | None, timestep: float, generator: torch.Generator) -> CaVEPrompt:
    """CaVE from a file of the family `cave` or `codiff`, and a new projection of its features to a prompt.

    Raises:
        ValueError: No file is given, or one without CaVE.
    """
    if path is None:
        raise ValueError(
            "cave: CODiff's second stage needs the first. Give --cave a restorer file that `python -m training cave` "
            "wrote, or a CODiff file."
        )
    file = read_restorer(path)
    if file.metadata.family not in ("cave", "codiff"):
        raise RestorerFileError(
            f"{file.name} holds no CaVE: it is of the family {file.metadata.family!r}. Give --cave a file of the "
            "family cave or codiff."
        )
    try:
        config = CaVEConfig(**file.metadata.config["cave"])
    except (KeyError, TypeError, ValueError) as error:
        raise RestorerFileError(
            f"{file.name}: its description of CaVE is not valid ({error}). Export it again."
        ) from error
    prompt = CaVEPrompt(config, base_models.CONTEXT_DIM, timestep)
    needed = {f"prompt.{key}" for key in prompt.network.state_dict()}  # a first stage has the decoder as well
    encoder = {key: value for key, value in file.tensors.items() if key in needed}
    load_part(prompt.network, replace(file, tensors=encoder), "prompt")
    bound = 1 / math.sqrt(prompt.projection.in_features)  # as torch draws linear layers
    for parameter in prompt.projection.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return prompt
