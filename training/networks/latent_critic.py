"""A small discriminator on DCT latents, for restorers that are trained from scratch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.networks.dct_codec import CHANNELS
from training.networks.discriminators import draw_layers

_GROUPS = 8
_LAYERS = 3
_SLOPE = 0.2


class DCTCritic(nn.Module):
    """Judges each block of a latent (B, 192, h, w), by the coefficients that JPEGs lose too, and by its surroundings.

    Each block's coefficients are mixed, then three convolutions look at 7x7 blocks around; nothing is told beside.

    Args:
        width: Channels between.
        generator: Draws the weights.
    """

    smallest_latent = 4

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mix = nn.Conv2d(CHANNELS, width, 1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(_LAYERS))
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for _ in range(_LAYERS))
        self.judge = nn.Conv2d(width, 1, 1)
        draw_layers(self, generator)

    def forward(
        self, latents: Tensor, tokens: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:  # fmt: skip
        """Logits (B, 1, h, w), float32, real above 0; tokens and generator are not used."""
        x = F.leaky_relu(self.mix(latents), _SLOPE)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.leaky_relu(norm(layer(x)), _SLOPE)
        return self.judge(x).float()
