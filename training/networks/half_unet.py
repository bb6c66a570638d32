"""The first half of a diffusion UNet with adapters and a head: what the discriminators are made of."""

from __future__ import annotations

import copy
import math

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from training.networks.base_models import add_lora

SIZES = 6
"""Numbers that SDXL is told: height and width of the original, top and left of the crop, height and width wanted."""
_GROUPS = 32
_SMALLEST_MAP = 3  # each of the head's two convolutions takes one off a side
_VAE_STRIDE = 8


class HalfUNet(nn.Module):
    """What the discriminators share: the first half of a diffusion UNet with adapters, and a head on its middle map.

    The adapters (LoRA) are on every convolution and linear layer of the blocks and learn, float32; so does the head,
    which subclasses draw with `draw_layers`.

    Args:
        unet: A whole diffusers UNet.
        rank: Of the adapters.
        alpha: Of the adapters: they count alpha/rank.
        generator: Draws the adapters.
        dtype: Type of the frozen weights and of the computation in the UNet; None for that of `unet`.
        gradient_checkpointing: Whether to compute the UNet's activations twice, to keep fewer of them.
        take: Whether to strip `unet` itself, of which nothing is copied then, instead of copying what is needed.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, rank: int, alpha: float, generator: torch.Generator,
        dtype: torch.dtype | None, gradient_checkpointing: bool, take: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        dtype = dtype or unet.dtype
        self.backbone = _take_first_half(unet) if take else _copy_first_half(unet)
        add_lora(self.backbone, backbone_targets(self.backbone), rank, alpha, generator)
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        if gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        self.head = _head(unet.config.block_out_channels[-1], unet.device)  # type: ignore[attr-defined]

    @property
    def smallest_latent(self) -> int:
        """The smallest side of a latent that leaves the head at least one logit: 17 for SD 2.1-base, 9 for SDXL."""
        scale = 2 ** sum(block.downsamplers is not None for block in self.backbone.down_blocks)
        return (_SMALLEST_MAP - 1) * scale + 1

    def check_size(self, latents: Tensor) -> None:
        """Refuse latents on which the head has nothing to say.

        Raises:
            ValueError: They are smaller than `smallest_latent`.
        """
        smallest = self.smallest_latent
        if min(latents.shape[-2:]) < smallest:
            raise ValueError(
                f"the discriminator needs latents of at least {smallest}x{smallest}, that is crops of "
                f"{smallest * _VAE_STRIDE} pixels, got {tuple(latents.shape)}. Give larger crops, or train without it."
            )

    def features(
        self, latents: Tensor, timesteps: Tensor, prompt: Tensor, pooled: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """The middle feature (B, C, h, w) of latents (B, 4, H, W), which timesteps (B,), prompts (B, K, context) and,
        for SDXL, pooled prompts (B, P) belong to."""
        unet = self.backbone
        dtype = unet.time_embedding.linear_1.weight.dtype  # unet.dtype could be that of an adapter
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(dtype))
        if pooled is not None:
            embedding = embedding + unet.add_embedding(self._pooled_with_sizes(pooled, latents).to(dtype))
        prompt = prompt.to(dtype)
        x = unet.conv_in(latents.to(dtype))
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, _ = block(x, embedding, encoder_hidden_states=prompt)
            else:
                x, _ = block(x, embedding)
        return unet.mid_block(x, embedding, encoder_hidden_states=prompt)

    def _pooled_with_sizes(self, pooled: Tensor, latents: Tensor) -> Tensor:
        """Pooled prompts and, embedded, the size in pixels as that of an original that was not cropped."""
        height, width = (float(side * _VAE_STRIDE) for side in latents.shape[-2:])
        sizes = pooled.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        embedded = self.backbone.add_time_proj(sizes).flatten()
        return torch.cat([pooled, embedded.expand(len(pooled), -1)], dim=1)

    def judge(self, features: Tensor) -> Tensor:
        """The head's logits (B, 1, h - 2, w - 2), float32, of middle features (B, C, h, w)."""
        return self.head(features.float()).float()


def _copy_first_half(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A frozen copy of everything up to the middle block; the other half is never copied."""
    left_out: dict[int, object] = {id(unet.up_blocks): nn.ModuleList(), id(unet.conv_norm_out): None}
    left_out[id(unet.conv_out)] = None
    return copy.deepcopy(unet, left_out).requires_grad_(False)


def _take_first_half(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet itself, frozen, without what comes after the middle block."""
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None  # type: ignore[assignment]
    return unet.requires_grad_(False)


def _head(channels: int, device: torch.device) -> nn.Sequential:
    """Two convolutions of 4x4; their weights are not drawn yet."""
    return nn.Sequential(
        nn.utils.skip_init(nn.Conv2d, channels, 2 * channels, 4, padding=1, device=device),
        nn.GroupNorm(_GROUPS, 2 * channels, device=device),
        nn.SiLU(),
        nn.utils.skip_init(nn.Conv2d, 2 * channels, 1, 4, padding=1, device=device),
    )


@torch.no_grad()
def draw_layers(network: nn.Module, generator: torch.Generator) -> None:
    """Convolutions and linear layers as torch draws them."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def backbone_targets(unet: nn.Module) -> list[str]:
    """What CODiff adapts in its discriminator: every convolution and linear layer of the blocks, also those that take
    the time embedding, but neither the first convolution nor the embedding itself."""
    return [
        name
        for name, module in unet.named_modules()
        if name.startswith(("down_blocks.", "mid_block.")) and isinstance(module, (nn.Conv2d, nn.Linear))
    ]
