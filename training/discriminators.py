"""Discriminators that look at latents with a pretrained diffusion model, and their losses."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from training.base_models import add_lora, store_frozen

PROMPT_TOKENS = 77
_GROUPS = 32
_SMALLEST_MAP = 3  # each of the head's two convolutions takes one off a side
_VAE_STRIDE = 8


class LatentDiscriminator(nn.Module):
    """CODiff's discriminator (Guo et al. 2025, section 3.3, and their code): half a diffusion UNet and a small head.

    The UNet's first convolution, down blocks and middle block see a latent at one fixed timestep, without noise, under
    a prompt that is learned; two convolutions turn the middle feature into a map of logits, real above 0. Trained are
    the adapters (LoRA) on every convolution and linear layer of the blocks, the prompt and the head, all float32.

    The authors run the UNet under `torch.no_grad`. Then their adapters and prompt never learn, and the generator is
    taught nothing; here gradients flow, and `frozen_backbone` brings their behaviour back.

    Args:
        unet: A whole diffusers UNet; what is needed of it is copied, it stays as it is.
        rank: Of the adapters.
        alpha: Of the adapters: they count alpha/rank.
        timestep: What the UNet is told, 0 to 999.
        generator: Draws adapters, prompt and head.
        frozen_backbone: Whether to let no gradient through the UNet; only the head learns then.
        dtype: Type of the frozen weights and of the computation in the UNet; None for that of `unet`.
        gradient_checkpointing: Whether to compute the UNet's activations twice, to keep fewer of them.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, rank: int, alpha: float, timestep: float = 199.0,
        generator: torch.Generator, frozen_backbone: bool = False, dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.timestep, self.frozen_backbone = timestep, frozen_backbone
        self.backbone = _first_half(unet)
        add_lora(self.backbone, backbone_targets(self.backbone), rank, alpha, generator)
        store_frozen(self.backbone, dtype or unet.dtype)
        if gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        prompt = torch.empty(1, PROMPT_TOKENS, unet.config.cross_attention_dim, device=unet.device)  # type: ignore[attr-defined]
        self.prompt = nn.Parameter(prompt)
        self.head = _head(unet.config.block_out_channels[-1], unet.device)  # type: ignore[attr-defined]
        if not prompt.is_meta:
            self._draw(generator)
        if frozen_backbone:
            self.backbone.requires_grad_(False)
            self.prompt.requires_grad_(False)

    @property
    def smallest_latent(self) -> int:
        """The smallest side of a latent that leaves the head at least one logit, 17 for SD 2.1-base."""
        scale = 2 ** sum(block.downsamplers is not None for block in self.backbone.down_blocks)
        return (_SMALLEST_MAP - 1) * scale + 1

    def forward(self, latents: Tensor) -> Tensor:
        """Judge latents.

        Args:
            latents: (B, C, H, W), scaled as the diffusion model takes them.

        Returns:
            Logits (B, 1, h, w), float32; for SD 2.1-base h = ceil(H / 8) - 2, and w alike.

        Raises:
            ValueError: The latents are too small.
        """
        smallest = self.smallest_latent
        if min(latents.shape[-2:]) < smallest:
            raise ValueError(
                f"the discriminator needs latents of at least {smallest}x{smallest}, that is crops of "
                f"{smallest * _VAE_STRIDE} pixels, got {tuple(latents.shape)}. Give larger crops, or train without it."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_backbone):
            features = self._features(latents)
        return self.head(features.float()).float()

    def _features(self, latents: Tensor) -> Tensor:
        """The middle feature (B, C, H/8, W/8)."""
        unet = self.backbone
        dtype = unet.time_embedding.linear_1.weight.dtype  # unet.dtype could be that of an adapter
        timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(dtype))
        prompt = self.prompt.to(dtype).expand(len(latents), -1, -1)
        x = unet.conv_in(latents.to(dtype))
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, _ = block(x, embedding, encoder_hidden_states=prompt)
            else:
                x, _ = block(x, embedding)
        return unet.mid_block(x, embedding, encoder_hidden_states=prompt)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """The prompt from N(0, 1), as the authors do; the head as torch draws convolutions."""
        nn.init.normal_(self.prompt, generator=generator)
        for layer in self.head:
            if isinstance(layer, nn.Conv2d):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _first_half(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A frozen copy of everything up to the middle block; the other half is never copied."""
    left_out: dict[int, object] = {id(unet.up_blocks): nn.ModuleList(), id(unet.conv_norm_out): None}
    left_out[id(unet.conv_out)] = None
    return copy.deepcopy(unet, left_out).requires_grad_(False)


def _head(channels: int, device: torch.device) -> nn.Sequential:
    """Two convolutions of 4x4; their weights are not drawn yet."""
    return nn.Sequential(
        nn.utils.skip_init(nn.Conv2d, channels, 2 * channels, 4, padding=1, device=device),
        nn.GroupNorm(_GROUPS, 2 * channels, device=device),
        nn.SiLU(),
        nn.utils.skip_init(nn.Conv2d, 2 * channels, 1, 4, padding=1, device=device),
    )


def backbone_targets(unet: nn.Module) -> list[str]:
    """What CODiff adapts in its discriminator: every convolution and linear layer of the blocks, also those that take
    the time embedding, but neither the first convolution nor the embedding itself."""
    return [
        name
        for name, module in unet.named_modules()
        if name.startswith(("down_blocks.", "mid_block.")) and isinstance(module, (nn.Conv2d, nn.Linear))
    ]


def generator_loss(logits: Tensor) -> Tensor:
    """softplus(-D), the mean over all logits of restored latents: small where they are taken for real ones."""
    return F.softplus(-logits).mean()


def discriminator_loss(*, real: Tensor, fake: Tensor) -> Tensor:
    """Half the binary cross-entropy of the logits of clean latents and half that of restored ones.

    The authors multiply it with 0.01, which AdamW undoes.
    """
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
