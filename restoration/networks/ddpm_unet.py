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
        entering = (config.width, *channels[:-1])
        self.temb = _TimeEmbedding(config.width, make)
        self.conv_in = make.conv(config.in_channels, config.width)
        self.down = nn.ModuleList(_Down(level, inputs, make) for level, inputs in enumerate(entering))
        self.mid = _Middle(channels[-1], make)
        self.up = nn.ModuleList(_Up(level, inputs, make) for level, inputs in enumerate(entering))
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
        embedding = self.temb(timesteps, x.dtype)
        skips = [self.conv_in(x)]
        for level in self.down:
            level(skips, embedding)
        h = self.mid(skips[-1], embedding)
        for level in reversed(self.up):
            h = level(h, skips, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """About how much memory one evaluation takes besides the weights, for one image of that size.

        The widest place is a level's first block on the way up: it holds what comes from below, its concatenation with
        a skip, that normalised and activated, and the skips that are left. Attention counts as kernels have it that do
        not store the matrix of all pairs of pixels.
        """
        channels, blocks = self.config.level_channels, self.config.res_blocks
        peak = kept = 0.0
        for level, own in enumerate(channels):
            below = channels[min(level + 1, len(channels) - 1)]
            peak = max(peak, kept + (3 * (below + own) + below + blocks * own) / 4**level)
            kept += (blocks + 1) * own / 4**level
        return int(1.02 * peak * height * width * dtype.itemsize)


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
        query, key, value = (_tokens(layer(normed)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H * W, C), contiguous: attention on strided channels stores the matrix of all pairs."""
    return x.flatten(2).transpose(1, 2).contiguous()[:, None]


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int, make: _Maker) -> None:
        super().__init__()
        self.width = width
        self.dense = nn.ModuleList([make.linear(width, 4 * width), make.linear(4 * width, 4 * width)])

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return self.dense[1](F.silu(self.dense[0](timestep_embedding(timesteps, self.width).to(dtype))))


class _Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it."""

    def __init__(self, level: int, inputs: list[int], make: _Maker) -> None:
        super().__init__()
        channels, attends = make.config.level_channels[level], level in make.config.attention_levels
        self.block = nn.ModuleList(ResidualBlock(own, channels, make) for own in inputs)
        self.attn = nn.ModuleList(AttentionBlock(channels, make) for _ in (inputs if attends else []))

    def step(self, index: int, h: Tensor, embedding: Tensor) -> Tensor:
        """One block, and its attention."""
        h = self.block[index](h, embedding)
        return self.attn[index](h) if len(self.attn) else h


class _Down(_Level):
    """A level of the way down: adds what it makes to the skips."""

    def __init__(self, level: int, inputs: int, make: _Maker) -> None:
        channels, blocks = make.config.level_channels, make.config.res_blocks
        super().__init__(level, [inputs, *[channels[level]] * (blocks - 1)], make)
        self.downsample = _Downsample(channels[level], make) if level < len(channels) - 1 else None

    def forward(self, skips: list[Tensor], embedding: Tensor) -> None:
        for index in range(len(self.block)):
            skips.append(self.step(index, skips[-1], embedding))
        if self.downsample is not None:
            skips.append(self.downsample(skips[-1]))


class _Middle(nn.Module):
    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, make)
        self.attn_1 = AttentionBlock(channels, make)
        self.block_2 = ResidualBlock(channels, channels, make)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, embedding)), embedding)


class _Up(_Level):
    """A level of the way up: its blocks take the skips of the level's own, the last one what entered the level."""

    def __init__(self, level: int, entering: int, make: _Maker) -> None:
        channels, blocks = make.config.level_channels, make.config.res_blocks
        own, below = channels[level], channels[min(level + 1, len(channels) - 1)]
        super().__init__(level, [below + own, *[2 * own] * (blocks - 1), own + entering], make)
        self.upsample = _Upsample(own, make) if level else None

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        for index in range(len(self.block)):
            h = self.step(index, torch.cat([h, skips.pop()], dim=1), embedding)
        return h if self.upsample is None else self.upsample(h)


class _Downsample(nn.Module):
    """A convolution with stride 2 that is padded at the right and at the bottom only."""

    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.conv = make.conv(channels, channels, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.conv = make.conv(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))
