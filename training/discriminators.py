"""Discriminators that look at latents with a pretrained diffusion model, and their losses."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from restoration.diffusion.one_step import TIMESTEPS, alphas_cumprod_sd
from training.base_models import add_lora

PROMPT_TOKENS = 77
_GROUPS = 32
_SMALLEST_MAP = 3  # each of the head's two convolutions takes one off a side
_VAE_STRIDE = 8
_PROMPT_WIDTH = 512
_SIZES = 6
"""Numbers that SDXL is told: height and width of the original, top and left of the crop, height and width wanted."""


class _HalfUNet(nn.Module):
    """What the discriminators share: the first half of a diffusion UNet with adapters, and a head on its middle map.

    The adapters (LoRA) are on every convolution and linear layer of the blocks and learn, float32; so does the head,
    which subclasses draw with `_draw_layers`.

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

    def _check_size(self, latents: Tensor) -> None:
        smallest = self.smallest_latent
        if min(latents.shape[-2:]) < smallest:
            raise ValueError(
                f"the discriminator needs latents of at least {smallest}x{smallest}, that is crops of "
                f"{smallest * _VAE_STRIDE} pixels, got {tuple(latents.shape)}. Give larger crops, or train without it."
            )

    def _features(
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

    def _judge(self, features: Tensor) -> Tensor:
        return self.head(features.float()).float()


class LatentDiscriminator(_HalfUNet):
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
        super().__init__(
            unet, rank=rank, alpha=alpha, generator=generator, dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        self.timestep, self.frozen_backbone = timestep, frozen_backbone
        prompt = torch.empty(1, PROMPT_TOKENS, unet.config.cross_attention_dim, device=unet.device)  # type: ignore[attr-defined]
        self.prompt = nn.Parameter(prompt)
        if not prompt.is_meta:
            nn.init.normal_(self.prompt, generator=generator)  # as the authors do
            _draw_layers(self.head, generator)
        if frozen_backbone:
            self.backbone.requires_grad_(False)
            self.prompt.requires_grad_(False)

    def forward(
        self, latents: Tensor, tokens: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:  # fmt: skip
        """Judge latents.

        Args:
            latents: (B, C, H, W), scaled as the diffusion model takes them.
            tokens: Not looked at, as its prompt is its own; for `PromptedDiscriminator`.
            generator: Not used, as nothing is random.

        Returns:
            Logits (B, 1, h, w), float32; for SD 2.1-base h = ceil(H / 8) - 2, and w alike.

        Raises:
            ValueError: The latents are too small.
        """
        self._check_size(latents)
        timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_backbone):
            features = self._features(latents, timesteps, self.prompt.expand(len(latents), -1, -1))
        return self._judge(features)


class PromptedDiscriminator(_HalfUNet):
    """SODiff's discriminator (section 3.4): half of SDXL's UNet, or of SD 2.1's, looks at latents with noise.

    Noise is added at a timestep drawn for each latent, which the UNet is told; its prompt is a picture's, seen by
    SAIPE and mapped by layers that are trained here (`_PromptMapper`). SDXL is also told that the crop is a whole
    picture of its size in pixels. Of a UNet's kind its description decides. The latents are SD 2.1's, scaled by its
    factor; that SDXL's own are smaller is left to the adapters, as in the authors' other work. Trained are adapters,
    head and mapping, float32.

    Args:
        unet: A whole diffusers UNet, SDXL's (`addition_embed_type` is `text_time`) or SD 2.1's.
        rank: Of the adapters.
        alpha: Of the adapters: they count alpha/rank.
        context_dim: Width of SAIPE's tokens.
        tokens: Their number.
        generator: Draws adapters, mapping and head.
        dtype: Type of the frozen weights and of the computation in the UNet; None for that of `unet`.
        gradient_checkpointing: Whether to compute the UNet's activations twice, to keep fewer of them.
        timesteps: The first and the last timestep that noise is added at; the paper has the whole range.
        take: Whether to strip `unet` itself, of which nothing is copied then; it is of no other use afterwards.

    Raises:
        ValueError: The UNet is of another kind, or there are no such timesteps.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, rank: int, alpha: float, context_dim: int = 1024,
        tokens: int = PROMPT_TOKENS, generator: torch.Generator, dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False, timesteps: tuple[int, int] = (0, TIMESTEPS - 1), take: bool = False,
    ) -> None:  # fmt: skip
        pooled_width = _pooled_width(unet)
        if not 0 <= timesteps[0] <= timesteps[1] < TIMESTEPS:
            raise ValueError(f"expected a first and a last timestep from 0 to {TIMESTEPS - 1}, got {timesteps}.")
        super().__init__(
            unet, rank=rank, alpha=alpha, generator=generator, dtype=dtype,
            gradient_checkpointing=gradient_checkpointing, take=take,
        )  # fmt: skip
        self.timesteps, self._tokens_shape = timesteps, (tokens, context_dim)
        context = unet.config.cross_attention_dim  # type: ignore[attr-defined]
        self.prompt = _PromptMapper(tokens, context_dim, context, pooled_width, unet.device)
        if unet.device.type != "meta":
            _draw_layers(self.prompt, generator)
            _draw_layers(self.head, generator)
        schedule = alphas_cumprod_sd()
        self.register_buffer("signal", schedule.sqrt().float().to(unet.device), persistent=False)
        self.register_buffer("noise", (1 - schedule).sqrt().float().to(unet.device), persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Judge latents, each with noise of its own at a timestep of its own.

        Args:
            latents: (B, 4, H, W), scaled as SD 2.1 takes them.
            tokens: SAIPE's prompts (B, `tokens`, `context_dim`) of the JPEGs; they get no gradient.
            generator: Draws timesteps and noise, on its own device.

        Returns:
            Logits (B, 1, h, w), float32; for SDXL h = ceil(H / 4) - 2, for SD 2.1-base h = ceil(H / 8) - 2.

        Raises:
            ValueError: The latents are too small, or the tokens are not theirs.
        """
        self._check_size(latents)
        if tokens.shape != (len(latents), *self._tokens_shape):
            raise ValueError(
                f"expected a prompt for each latent, {(len(latents), *self._tokens_shape)}, got {tuple(tokens.shape)}."
            )
        noisy, timesteps = self.diffuse(latents, generator)
        prompt, pooled = self.prompt(tokens.detach())
        return self._judge(self._features(noisy, timesteps, prompt, pooled))

    def diffuse(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents z with noise, sqrt(abar_t) z + sqrt(1 - abar_t) n on Stable Diffusion's schedule.

        Args:
            latents: (B, ...).
            generator: Draws t for all, then n, on its own device.

        Returns:
            The noised latents, float32, and the timesteps (B,), integers.
        """
        first, last = self.timesteps
        where = generator.device
        timesteps = torch.randint(first, last + 1, latents.shape[:1], generator=generator, device=where)
        noise = torch.randn(latents.shape, generator=generator, device=where).to(latents.device)
        timesteps = timesteps.to(latents.device)
        shape = (-1, *(1,) * (latents.ndim - 1))
        signal, sigma = (self.get_buffer(name)[timesteps].view(shape) for name in ("signal", "noise"))
        return signal * latents.float() + sigma * noise, timesteps


class _PromptMapper(nn.Module):
    """SAIPE's tokens as the prompt of another model; SODiff shows no layers (Fig. 4), these are HAODiff's.

    The pooled prompt's layer sees all tokens at once: 101 million weights for 77 tokens of 1024 and SDXL.

    Args:
        tokens: Number of tokens.
        context_dim: Their width.
        width: Of the other model's prompt, as long as the first.
        pooled: Width of its pooled prompt; None for none.
        device: Where the weights are, which are not drawn yet.
    """

    def __init__(self, tokens: int, context_dim: int, width: int, pooled: int | None, device: torch.device) -> None:
        super().__init__()

        def linear(into: int, out: int, bias: bool = True) -> nn.Linear:
            return nn.utils.skip_init(nn.Linear, into, out, bias=bias, device=device)  # type: ignore[return-value]

        self.hidden = nn.Sequential(
            linear(context_dim, _PROMPT_WIDTH), nn.SiLU(), linear(_PROMPT_WIDTH, width), nn.SiLU()
        )  # fmt: skip
        self.pooled = None
        if pooled is not None:
            self.pooled = nn.Sequential(nn.Flatten(), linear(tokens * context_dim, pooled, bias=False), nn.SiLU())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prompts (B, K, width) and pooled prompts (B, pooled) or None, of tokens (B, K, context_dim)."""
        tokens = tokens.float()
        return self.hidden(tokens), None if self.pooled is None else self.pooled(tokens)


def _pooled_width(unet: UNet2DConditionModel) -> int | None:
    """Width of the pooled prompt that a UNet wants, 1280 for SDXL; None for SD 2.1's, which wants none."""
    config: Any = unet.config
    if config.addition_embed_type is None:
        return None
    if config.addition_embed_type != "text_time":
        raise ValueError(
            "the discriminator is made of SDXL's UNet, whose addition_embed_type is 'text_time', or of SD 2.1's, which "
            f"has none, not of one with {config.addition_embed_type!r}."
        )
    return config.projection_class_embeddings_input_dim - _SIZES * config.addition_time_embed_dim


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
def _draw_layers(network: nn.Module, generator: torch.Generator) -> None:
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


def generator_loss(logits: Tensor) -> Tensor:
    """softplus(-D), the mean over all logits of restored latents: small where they are taken for real ones."""
    return F.softplus(-logits).mean()


def discriminator_loss(*, real: Tensor, fake: Tensor) -> Tensor:
    """Half the binary cross-entropy of the logits of clean latents and half that of restored ones.

    The authors multiply it with 0.01, which AdamW undoes.
    """
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
