"""One-step restorers from scratch: a small UNet on DCT latents and what it is prompted by, trained together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from restoration.networks.dct_codec import DCTCodec
from restoration.networks.small_unet import SmallUNetConfig
from restoration.restorer_file import RestorerFileError, load_part
from restoration.restorers import DCT_SMALL
from restoration.tiling import crop_to, pad_to_multiple
from training.given_files import read_given
from training.losses import make_perceptual, pixel_loss
from training.networks.backbone import DCTModel, make_unet
from training.networks.discriminators import discriminator_loss, generator_loss
from training.networks.latent_critic import DCTCritic
from training.trainers.one_step import Restored, Seen, check_crop, quality_error
from training.trainers.task import TaskDefaults


class SmallModel(nn.Module):
    """The restorer: a JPEG's DCT coefficients, and what compression did to them taken away at once.

    Args:
        prompt: What sees the prompt; trained like everything else.
        unet: The UNet's shape.
        generator: Draws its weights.
    """

    def __init__(self, prompt: nn.Module, unet: SmallUNetConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.prompt = prompt
        self.backbone = DCTModel(make_unet(unet, generator), DCTCodec(), unet.size_multiple)

    def see(self, degraded: Tensor, noise: torch.Generator | None) -> Seen:
        """Prompt and timestep of pictures (B, 3, H, W) in [0, 1]; what is random in them comes from `noise`."""
        raise NotImplementedError

    def forward(self, degraded: Tensor, noise: torch.Generator | None = None) -> Restored:
        """Restore pictures (B, 3, H, W) in [0, 1] of any size; the result is not clamped."""
        with torch.autocast(degraded.device.type, enabled=False):
            seen = self.see(degraded.float(), noise)
        padded, size = pad_to_multiple(degraded, self.backbone.size_multiple)
        latents = self.backbone.denoise(self.backbone.encode(padded), seen.tokens, seen.timestep)
        pictures = crop_to(self.backbone.decode(latents), size)
        return Restored(pictures, latents, seen.tokens, seen.quality, seen.reconstruction)


ModelT = TypeVar("ModelT", bound=SmallModel)


class SmallTask(TaskDefaults, Generic[ModelT]):
    """Trains a `SmallModel` by errors, a perceptual distance and a discriminator on the latents.

    The configuration has the fields `unet`, `loss` (with those of `PixelWeights`, `embedder`, `perceptual` and
    `adversarial`) and `run`.
    """

    stores_frozen = True  # the codec's scale
    judged_by = ("lpips", "psnr")
    config: Any
    model: ModelT

    def __init__(self, config: Any, generator: torch.Generator) -> None:
        self.config, self.size_multiple = config, config.unet.size_multiple
        self.perceptual = make_perceptual(config.loss.perceptual)
        self.critic_optimizer = config.critic_optimizer
        if config.loss.adversarial.discriminator == "dct":
            self.critic = DCTCritic(config.loss.adversarial.width, generator)
            check_crop(self.critic, config.data.crop)
        self._kept: Tensor | None = None

    @torch.no_grad()
    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """Measure the codec's scale on the crops as they were before their compression."""
        self.model.backbone.codec.measure(clean)

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        clean, weights = batch["clean"], self.config.loss
        restored: Restored = model(batch["degraded"], generator)
        total = pixel_loss(restored.pictures, clean, weights)
        parts = {"loss/pixels": total}
        if self.perceptual is not None:
            parts["loss/perceptual"] = self.perceptual.to(clean.device)(restored.pictures.clamp(0, 1), clean).mean()
            total = total + weights.perceptual.weight * parts["loss/perceptual"]
        if self.critic is not None:
            parts["loss/adversarial"] = generator_loss(self.critic(restored.latents))
            total = total + weights.adversarial.weight * parts["loss/adversarial"]
            self._kept = restored.latents.detach()
        self.note({**parts, **quality_error(restored, batch)})
        return total + self.auxiliary(restored, batch)

    def auxiliary(self, restored: Restored, batch: dict[str, Any]) -> Tensor | float:
        """What the prompt's own networks learn."""
        return 0.0

    def critic_loss(self, critic: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Restored latents against those of the clean pictures."""
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError("critic_loss needs what loss left of the same batch: call loss first")
        clean = self.model.backbone.encode(batch["clean"])
        fake, real = critic(torch.cat([kept, clean])).chunk(2)
        return discriminator_loss(real=real, fake=fake)

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """Nothing is random."""
        return self.model(degraded).pictures.clamp(0, 1)

    def described_backbone(self) -> dict[str, Any]:
        """The UNet as the file's description has it."""
        return {"kind": DCT_SMALL, **self.config.unet.to_dict()}

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """What is exported, by part of the file."""
        backbone = self.model.backbone
        return {"unet": backbone.network.state_dict(), "codec": backbone.codec.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{part}.{key}": value for part, values in self.parts().items() for key, value in values.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a file of the very same shape.

        Raises:
            RestorerFileError: It is another network's.
        """
        own = self.tensors()
        differing = {key for key in own.keys() | tensors.keys()
                     if key not in own or key not in tensors or own[key].shape != tensors[key].shape}  # fmt: skip
        if differing:
            raise RestorerFileError(
                f"the file to start from is of another shape: {min(differing)} is missing in one of the two, or "
                "differs. Give --unet and --embedder the same shape, or start from none."
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors[key])


def take_backbone(backbone: DCTModel, path: Path) -> None:
    """Start with the UNet and the codec of another small restorer, of whatever family.

    Raises:
        RestorerFileError: It has none of this shape.
    """
    file = read_given(path, "--unet-from")
    load_part(backbone.network, file, "unet")
    load_part(backbone.codec, file, "codec")
