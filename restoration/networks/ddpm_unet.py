"""The UNet of DDPM (Ho et al. 2020, "Denoising Diffusion Probabilistic Models") under the names of its PyTorch port.

SDEdit, DDIM and DDRM share that port: `celeba_hq.ckpt` and the converted LSUN checkpoints load as they are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32
"""Groups of each normalisation, which must divide the channels of every level."""
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DDPMUNetConfig:
    """Shape of the network; the defaults are those of `celeba_hq.ckpt`: 113,673,219 parameters.

    Args:
        in_channels: Of the image.
        out_channels: Of the predicted noise.
        width: Base number of channels; the embedding is four times as wide.
        channel_multipliers: Width of each level in units of `width`; each level after the first halves the image.
        res_blocks: Residual blocks a level on the way down; one more on the way up.
        attention_levels: Levels with self-attention; the middle always has it.
        image_size: Side of the images that it was trained on; None where any size will do.
        dropout: Dropout inside the residual blocks, in training only.
    """

    in_channels: int = 3
    out_channels: int = 3
    width: int = 128
    channel_multipliers: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    image_size: int | None = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        if not self.channel_multipliers or min(self.res_blocks, self.width) < 1:
            raise ValueError(f"DDPM UNet: expected a level, a residual block and a positive width, got {self}.")
        uneven = [channels for channels in (self.width, *self.level_channels) if channels % NORM_GROUPS or channels < 1]
        if uneven:
            raise ValueError(f"DDPM UNet: expected channels that {NORM_GROUPS} groups divide, got {uneven[0]}.")
        levels = len(self.channel_multipliers)
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"DDPM UNet: expected attention at levels 0 to {levels - 1}, got {self.attention_levels}.")

    @property
    def classes(self) -> int:
        """Classes that the network is told: none."""
        return 0

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(self.width * multiplier) for multiplier in self.channel_multipliers)

    @property
    def size_multiple(self) -> int:
        """Sides of the images are multiples of this."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class DDPMUNet(nn.Module):
    """The network.

    Args:
        config: Its shape.
        operations: Namespace with Linear, Conv2d and GroupNorm: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where the weights are made.
    """

    def __init__(
        self, config: DDPMUNetConfig, *, operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        make = _Maker(config, operations, dtype, device)
        channels = config.level_channels
        first = config.width
        self.temb = nn.ModuleDict(
            {"dense": nn.ModuleList([make.linear(first, 4 * first), make.linear(4 * first, 4 * first)])}
        )
        self.conv_in = make.conv(config.in_channels, first)
        inputs = (first, *channels[:-1])
        self.down = nn.ModuleList(_down(level, inputs[level], make) for level in range(len(channels)))
        self.mid = nn.ModuleDict({
            "block_1": ResidualBlock(channels[-1], channels[-1], make),
            "attn_1": AttentionBlock(channels[-1], make),
            "block_2": ResidualBlock(channels[-1], channels[-1], make),
        })  # fmt: skip
        self.up = nn.ModuleList(_up(level, inputs[level], make) for level in range(len(channels)))
        self.norm_out = make.norm(channels[0])
        self.conv_out = make.conv(channels[0], config.out_channels)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: Noisy images (B, 3, H, W), the clean ones in [-1, 1]; both sides multiples of `config.size_multiple`.
            timesteps: (B,), 0 to 999.
            labels: None; the network is told no class.

        Returns:
            The predicted noise (B, out_channels, H, W).

        Raises:
            ValueError: There are labels, or the sides are no multiples.
        """
        if labels is not None:
            raise ValueError(f"DDPM UNet: this network is not told a class, got labels {labels}.")
        multiple = self.config.size_multiple
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise ValueError(f"DDPM UNet: expected sides that are multiples of {multiple}, got {tuple(x.shape[-2:])}.")
        first, second = self.temb["dense"]
        embedding = second(F.silu(first(timestep_embedding(timesteps, self.config.width).to(x.dtype))))
        h, skips = self._way_down(self.conv_in(x), embedding)
        h = self.mid["attn_1"](self.mid["block_1"](h, embedding))
        h = self._way_up(self.mid["block_2"](h, embedding), skips, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _way_down(self, h: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = [h]
        for level in self.down:
            for index, block in enumerate(level["block"]):
                h = block(h, embedding)
                h = level["attn"][index](h) if level["attn"] else h
                skips.append(h)
            if "downsample" in level:
                h = level["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        return h, skips

    def _way_up(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        for level in reversed(self.up):
            for index, block in enumerate(level["block"]):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
                h = level["attn"][index](h) if level["attn"] else h
            if "upsample" in level:
                h = level["upsample"]["conv"](F.interpolate(h, scale_factor=2, mode="nearest"))
        return h

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """About how much memory one evaluation takes besides the weights, for one image of that size.

        What the way down keeps for the way up, and the widest place on it.
        """
        channels = self.config.level_channels
        below = (*channels[1:], 0)
        kept = sum((self.config.res_blocks + 1) * own / 4**level for level, own in enumerate(channels))
        working = max(
            max(6 * own, 3 * own + 4 * wider) / 4**level
            for level, (own, wider) in enumerate(zip(channels, below, strict=True))
        )
        return int((kept + working) * height * width * dtype.itemsize)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[sin, cos] of the timesteps (B,) at frequencies 10000^(-i / (half - 1)) -> (B, width) float32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - 1)
    phases = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None]
    return F.pad(torch.cat([phases.sin(), phases.cos()], dim=1), (0, width % 2))


class _Maker:
    """Layers of one `operations` namespace, type and device."""

    def __init__(
        self, config: DDPMUNetConfig, operations: Any, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.config, self.operations = config, operations
        self.factory = {"dtype": dtype, "device": device}

    def conv(self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1) -> nn.Module:
        padding = kernel // 2 if stride == 1 else 0
        return self.operations.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, **self.factory)

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Linear(inputs, outputs, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return self.operations.GroupNorm(NORM_GROUPS, channels, eps=_NORM_EPS, **self.factory)


class ResidualBlock(nn.Module):
    """Two convolutions; the timestep is added between them."""

    def __init__(self, inputs: int, outputs: int, make: _Maker) -> None:
        super().__init__()
        self.dropout = make.config.dropout
        self.norm1 = make.norm(inputs)
        self.conv1 = make.conv(inputs, outputs)
        self.temb_proj = make.linear(4 * make.config.width, outputs)
        self.norm2 = make.norm(outputs)
        self.conv2 = make.conv(outputs, outputs)
        self.nin_shortcut = make.conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), self.dropout, self.training))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, with one head."""

    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.norm = make.norm(channels)
        self.q, self.k, self.v, self.proj_out = (make.conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


def _down(level: int, inputs: int, make: _Maker) -> nn.ModuleDict:
    config, channels = make.config, make.config.level_channels[level]
    blocks = [ResidualBlock(inputs if block == 0 else channels, channels, make) for block in range(config.res_blocks)]
    stage = nn.ModuleDict({"block": nn.ModuleList(blocks), "attn": _attention(level, config.res_blocks, make)})
    if level < len(config.level_channels) - 1:
        stage["downsample"] = nn.ModuleDict({"conv": make.conv(channels, channels, stride=2)})
    return stage


def _up(level: int, last_skip: int, make: _Maker) -> nn.ModuleDict:
    """The way up's blocks take a skip each: those of the level's own blocks, then what entered the level."""
    config, channels = make.config, make.config.level_channels[level]
    below = config.level_channels[min(level + 1, len(config.level_channels) - 1)]
    blocks = [
        ResidualBlock(
            (below if block == 0 else channels) + (last_skip if block == config.res_blocks else channels),
            channels,
            make,
        )
        for block in range(config.res_blocks + 1)
    ]
    stage = nn.ModuleDict({"block": nn.ModuleList(blocks), "attn": _attention(level, config.res_blocks + 1, make)})
    if level:
        stage["upsample"] = nn.ModuleDict({"conv": make.conv(channels, channels)})
    return stage


def _attention(level: int, count: int, make: _Maker) -> nn.ModuleList:
    channels = make.config.level_channels[level]
    present = level in make.config.attention_levels
    return nn.ModuleList(AttentionBlock(channels, make) for _ in range(count if present else 0))
