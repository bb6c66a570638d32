"""What the second stages of CODiff and SODiff share: Stable Diffusion 2.1-base turns a JPEG into a clean picture in one
step, guided by what a first stage sees in it, against an error, a perceptual distance and a discriminator on latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.diffusion.one_step import interpolate_alphas_cumprod, predict_x0
from restoration.restorer_file import RestorerFileError, read_metadata
from training.configs.one_step import LoRAConfig
from training.losses import pixel_loss
from training.networks import base_models
from training.networks.base_models import BaseModel
from training.networks.discriminators import discriminator_loss, generator_loss
from training.trainers.task import TaskDefaults

VAE_STRIDE = 8


class Seen(NamedTuple):
    """What a first stage sees in pictures: tokens (B, K, context), float32; timesteps (B,) from 0 to 999, which may
    have a gradient; where it is told, the JPEG quality (B,) from 0 to 100; and its own reconstruction, if it makes one.
    """

    tokens: Tensor
    timestep: Tensor
    quality: Tensor | None = None
    reconstruction: Tensor | None = None


class Restored(NamedTuple):
    """Pictures (B, 3, H, W) in [0, 1]; their latents x0 (B, C, H/8, W/8), scaled, float32; and what was seen."""

    pictures: Tensor
    latents: Tensor
    tokens: Tensor
    quality: Tensor | None
    reconstruction: Tensor | None = None


class OneStepModel(nn.Module):
    """The restorer: the JPEG's latent, read as a noisy one, is denoised once under a visual prompt and decoded.

    Subclasses adapt the base model and then call `freeze`; the VAE's decoder and all that is adapted are frozen, and so
    is `prompt.network`, the first stage.

    Args:
        base: The frozen base model; it is changed in place.
        prompt: A module whose `network` is the first stage, trained.
        dtype: Of the frozen weights, `fp32`, `bf16` or `fp16`.
        clamp_gradient: Whether a value outside of [0, 1] gets the gradient of the clamped one.
    """

    def __init__(self, base: BaseModel, prompt: nn.Module, dtype: str, *, clamp_gradient: bool) -> None:
        super().__init__()
        self.prompt, self.unet, self.vae = prompt, base.unet, base.vae
        self.dtype, self.clamp_gradient = base_models.DTYPES[dtype], clamp_gradient
        self.first_stage.requires_grad_(False).eval()

    @property
    def first_stage(self) -> nn.Module:
        """What the prompt is seen with; it stays as its own training left it."""
        return self.prompt.network  # type: ignore[return-value]

    def freeze(self, *, gradient_checkpointing: bool) -> None:
        """Keep what is not trained in `dtype`, and say how activations are kept."""
        for network in (self.unet, self.vae):
            base_models.store_frozen(network, self.dtype)
            if gradient_checkpointing:
                network.enable_gradient_checkpointing()

    def train(self, mode: bool = True) -> OneStepModel:
        """As of any module, but the first stage stays in evaluation mode: its norms keep what its training gave."""
        super().train(mode)
        self.first_stage.eval()
        return self

    def see(self, degraded: Tensor, noise: torch.Generator | None) -> Seen:
        """Prompt and timestep of pictures (B, 3, H, W) in [0, 1]; what is random in them comes from `noise`."""
        raise NotImplementedError

    def forward(
        self, degraded: Tensor, posterior: torch.Generator | None = None, noise: torch.Generator | None = None
    ) -> Restored:
        """Restore pictures.

        Args:
            degraded: (B, 3, H, W) in [0, 1], any size; sides grow to multiples of 8 by repetition and are cut again.
            posterior: Draws latents from the VAE's posterior; None takes its mode.
            noise: Draws what is random in the timestep; None for nothing.
        """
        height, width = degraded.shape[-2:]
        padded = F.pad(degraded, (0, -width % VAE_STRIDE, 0, -height % VAE_STRIDE), mode="replicate")
        latent = self.encode(padded, posterior)
        with torch.autocast(degraded.device.type, enabled=False):
            seen = self.see(degraded.float(), noise)
        eps = self.unet(latent.to(self.dtype), seen.timestep, seen.tokens.to(self.dtype), return_dict=False)[0]
        x0 = predict_x0(latent, eps, interpolate_alphas_cumprod(seen.timestep.cpu()))
        return Restored(self.decode(x0)[..., :height, :width], x0, seen.tokens, seen.quality)

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


ModelT = TypeVar("ModelT", bound=OneStepModel)


class OneStepTask(TaskDefaults, Generic[ModelT]):
    """Trains a `OneStepModel`. Subclasses set what is annotated here, and say what their files hold.

    The configuration has the fields `loss` (with those of `PixelWeights`, `perceptual` and `adversarial.weight`),
    `latents`, `run` and one for each adapter that `lora` names.
    """

    config: Any
    first_stage: str
    """The option that names its file."""
    model: ModelT
    perceptual: nn.Module | None
    kept: tuple[Tensor, Tensor] | None = None
    """Restored latents and tokens of the present batch, for the discriminator's turn."""
    judged_by = ("lpips", "psnr")

    def frozen_blocks(self) -> list[nn.Module]:
        """The residual and the attention blocks of the UNet, the VAE and the discriminator."""
        networks = [self.model.unet, self.model.vae, *([] if self.critic is None else [self.critic])]
        return [block for network in networks for block in base_models.blocks(network)]

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        clean, weights = batch["clean"], self.config.loss
        restored: Restored = model(batch["degraded"], self._posterior(generator), generator)
        total = pixel_loss(restored.pictures, clean, weights)
        parts = {"loss/pixels": total}
        if self.perceptual is not None:
            parts["loss/perceptual"] = self.perceptual.to(clean.device)(restored.pictures, clean).mean()
            total = total + weights.perceptual.weight * parts["loss/perceptual"]
        if self.critic is not None:
            parts["loss/adversarial"] = generator_loss(self.critic(restored.latents, restored.tokens, generator))
            total = total + weights.adversarial.weight * parts["loss/adversarial"]
            self.kept = restored.latents.detach(), restored.tokens.detach()
        self.note({**parts, **quality_error(restored, batch)})
        return total + self.auxiliary(restored, batch)

    def auxiliary(self, restored: Restored, batch: dict[str, Any]) -> Tensor | float:
        """What else there is to learn."""
        return 0.0

    def critic_loss(self, critic: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Restored latents against those of the clean pictures, which the VAE gives as it was before its training."""
        kept, self.kept = self.kept, None
        if kept is None:
            raise RuntimeError("critic_loss needs what loss left of the same batch: call loss first")
        latents, tokens = kept
        with base_models.without_lora(self.model.vae), self._autocast(latents.device):
            clean = self.model.encode(batch["clean"], self._posterior(generator))
        logits = critic(torch.cat([latents, clean]), torch.cat([tokens, tokens]), generator)
        fake, real = logits.chunk(2)
        return discriminator_loss(real=real, fake=fake)

    def _posterior(self, generator: torch.Generator) -> torch.Generator | None:
        return generator if self.config.latents == "sample" else None

    def _autocast(self, device: torch.device) -> torch.autocast:
        precision = self.config.run.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """Deterministic: the posterior's mode, as ComfyUI encodes, and no noise."""
        return self.model(degraded).pictures.clamp(0, 1)

    def lora(self) -> dict[str, LoRAConfig]:
        """The adapters by the part of the file that holds them."""
        raise NotImplementedError

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """What is exported, by part of the file."""
        raise NotImplementedError

    def described_lora(self) -> dict[str, Any]:
        """Rank and alpha of every adapter, as the file's description has them."""
        return {part: asdict(lora) for part, lora in self.lora().items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{part}.{key}": value for part, values in self.parts().items() for key, value in values.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a file of this family whose first stage is this one.

        Raises:
            RestorerFileError: It has other adapters, or another first stage.
        """
        own = self.tensors()
        differing = {key for key in own.keys() | tensors.keys()
                     if key not in own or key not in tensors or own[key].shape != tensors[key].shape}  # fmt: skip
        if differing:
            raise RestorerFileError(
                "the file to start from does not have this first stage, base model and these ranks: "
                f"{min(differing)} is missing in one of the two, or of another shape. Start from another file, or from "
                "none."
            )
        if self.config.run.init_from is not None:
            self._check_scales(self.config.run.init_from)
        if any(not torch.equal(own[key].half(), tensors[key].half()) for key in own if key.startswith("prompt.")):
            raise RestorerFileError(
                f"the file to start from was trained with another first stage. Give it as {self.first_stage} as well."
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors[key])

    def _check_scales(self, path: Path) -> None:
        theirs = read_metadata(path).config
        for part, ours in self.described_lora().items():
            if theirs.get(part) != ours:
                raise RestorerFileError(
                    f"{path.name} has {part} {theirs.get(part)}, not {ours}. Give --{part.replace('_', '-')} the same "
                    "rank and alpha."
                )


def quality_error(restored: Restored, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The mean absolute error of the quality, 0 to 100, by the name that logs have for it, where one is told."""
    if restored.quality is None or "quality" not in batch:
        return {}
    return {"quality_error": (restored.quality.detach() - batch["quality"]).abs().mean()}


def check_crop(critic: Any, crop: int) -> None:
    """Refuse crops on which a discriminator would have nothing to say.

    Raises:
        ValueError: They are too small.
    """
    smallest = critic.smallest_latent * VAE_STRIDE
    if crop < smallest:
        raise ValueError(
            f"data.crop: the discriminator needs crops of at least {smallest} pixels, got {crop}. Give larger ones, or "
            "--loss.adversarial.discriminator none."
        )
