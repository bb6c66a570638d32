"""Discriminators that look at latents with a pretrained diffusion model, and their losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from restoration.diffusion.one_step import TIMESTEPS, alphas_cumprod_sd
from training.networks.half_unet import SIZES, HalfUNet, draw_layers

PROMPT_TOKENS = 77
_PROMPT_WIDTH = 512


class LatentDiscriminator(HalfUNet):
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
            draw_layers(self.head, generator)
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
        self.check_size(latents)
        timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_backbone):
            features = self.features(latents, timesteps, self.prompt.expand(len(latents), -1, -1))
        return self.judge(features)


class PromptedDiscriminator(HalfUNet):
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
            draw_layers(self.prompt, generator)
            draw_layers(self.head, generator)
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
        self.check_size(latents)
        if tokens.shape != (len(latents), *self._tokens_shape):
            raise ValueError(
                f"expected a prompt for each latent, {(len(latents), *self._tokens_shape)}, got {tuple(tokens.shape)}."
            )
        noisy, timesteps = self.diffuse(latents, generator)
        prompt, pooled = self.prompt(tokens.detach())
        return self.judge(self.features(noisy, timesteps, prompt, pooled))

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
    return config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim


def generator_loss(logits: Tensor) -> Tensor:
    """softplus(-D), the mean over all logits of restored latents: small where they are taken for real ones."""
    return F.softplus(-logits).mean()


def discriminator_loss(*, real: Tensor, fake: Tensor) -> Tensor:
    """Half the binary cross-entropy of the logits of clean latents and half that of restored ones.

    The authors multiply it with 0.01, which AdamW undoes.
    """
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
