"""The UNet of guided diffusion (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs"), under its published names.

It loads `256x256_diffusion_uncond.pt` and the class-conditional checkpoints as they are; narrow ones of the same design
are what this pack trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPS = 1e-5
_RESAMPLE = {
    "down": partial(F.avg_pool2d, kernel_size=2),
    "up": partial(F.interpolate, scale_factor=2, mode="nearest"),
}


@dataclass(frozen=True)
class ADMUNetConfig:
    """Shape of the network; the defaults are those of `256x256_diffusion_uncond.pt`.

    Args:
        in_channels: Of the image.
        out_channels: 3 for the noise alone, 6 where the network also predicts its variance.
        width: Base number of channels; the embedding is four times as wide.
        channel_multipliers: Width of each level in units of `width`; each level after the first halves the image.
        res_blocks: Residual blocks a level on the way down; one more on the way up.
        attention_levels: Levels with self-attention; the middle has it where `middle_attention` says so.
        middle_attention: Self-attention in the middle. Without any the network looks at no more than its receptive
            field, and runs at any size alike.
        head_channels: Channels of each attention head.
        classes: Classes that the network is told, 0 for none.
        image_size: Side of the images that it was trained on; None where any size will do.
        patch_size: Pixels along each side that are folded into channels before the first level; 1 as published.
        norm_groups: Groups of each normalisation.
        dropout: Dropout inside the residual blocks, in training only.
    """

    in_channels: int = 3
    out_channels: int = 6
    width: int = 256
    channel_multipliers: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3, 4, 5)
    middle_attention: bool = True
    head_channels: int = 64
    classes: int = 0
    image_size: int | None = 256
    patch_size: int = 1
    norm_groups: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        if not self.channel_multipliers or min(self.res_blocks, self.patch_size, self.width, self.norm_groups) < 1:
            raise ValueError(f"ADM UNet: expected a level, a residual block and a positive width, got {self}.")
        uneven = [channels for channels in self.level_channels if channels < 1 or channels % self.norm_groups]
        if uneven:
            raise ValueError(
                f"ADM UNet: expected channels that {self.norm_groups} groups divide, got {uneven[0]} at a level."
            )
        for level in self._attentive_levels():
            if self.level_channels[level] % self.head_channels:
                raise ValueError(
                    f"ADM UNet: expected attention on channels that heads of {self.head_channels} divide, got "
                    f"{self.level_channels[level]} at level {level}."
                )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(self.width * multiplier) for multiplier in self.channel_multipliers)

    @property
    def size_multiple(self) -> int:
        """Sides of the images are multiples of this."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def _attentive_levels(self) -> set[int]:
        levels = len(self.channel_multipliers)
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"ADM UNet: expected attention at levels 0 to {levels - 1}, got {self.attention_levels}.")
        return {*self.attention_levels, *((levels - 1,) if self.middle_attention else ())}


class ADMUNet(nn.Module):
    """The network.

    Args:
        config: Its shape.
        operations: Namespace with Linear, Conv1d, Conv2d, GroupNorm and Embedding: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where the weights are made.
    """

    def __init__(
        self, config: ADMUNetConfig, *, operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        make = _Maker(config, operations, dtype, device)
        channels = config.level_channels
        self.time_embed = nn.Sequential(
            make.linear(config.width, 4 * config.width), nn.SiLU(), make.linear(4 * config.width, 4 * config.width)
        )
        self.label_emb = make.embedding(config.classes, 4 * config.width) if config.classes else None
        down, skips = _way_down(config, make)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = _Stage(_middle(config, make))
        self.output_blocks = nn.ModuleList(_way_up(config, make, skips))
        self.out = nn.Sequential(
            make.norm(channels[0]), nn.SiLU(), make.conv(channels[0], config.out_channels * config.patch_size**2)
        )

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: Noisy images (B, 3, H, W), the clean ones in [-1, 1]; both sides multiples of `config.size_multiple`.
            timesteps: (B,), 0 to 999.
            labels: (B,) classes, for networks that are told them.

        Returns:
            (B, out_channels, H, W); the first three channels are the predicted noise.
        """
        if (labels is None) != (self.label_emb is None):
            told = "is told" if self.label_emb is not None else "is not told"
            raise ValueError(f"ADM UNet: this network {told} a class, got labels {labels}.")
        embedding = self.time_embed(timestep_embedding(timesteps, self.config.width).to(x.dtype))
        if self.label_emb is not None and labels is not None:
            embedding = embedding + self.label_emb(labels).to(x.dtype)
        h, skips = F.pixel_unshuffle(x, self.config.patch_size), []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.out(h), self.config.patch_size)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights as the published code does: PyTorch's own, and zeros where a residual branch ends."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                last = name.endswith(("out_layers.3", "proj_out")) or name == "out.2"
                bound = 0.0 if last else 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """About how much memory one evaluation takes besides the weights, for one image of that size.

        What the way down keeps for the way up, and the widest place on it: a block that takes the skip beside its own
        input holds both, their concatenation, and what it makes of them.
        """
        channels = self.config.level_channels
        pixels = math.ceil(height / self.config.patch_size) * math.ceil(width / self.config.patch_size)
        kept = sum((self.config.res_blocks + 1) * width / 4**level for level, width in enumerate(channels))
        below = (*channels[1:], 0)
        working = max(
            max(6 * own, 3 * own + 4 * wider) / 4**level
            for level, (own, wider) in enumerate(zip(channels, below, strict=True))
        )
        return int((kept + working) * pixels * dtype.itemsize)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[cos, sin] of the timesteps (B,) at frequencies 10000^(-i / half) -> (B, width) float32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    phases = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None]
    return F.pad(torch.cat([phases.cos(), phases.sin()], dim=1), (0, width % 2))


class _Maker:
    """Layers of one `operations` namespace, type and device."""

    def __init__(
        self, config: ADMUNetConfig, operations: Any, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.config, self.operations = config, operations
        self.factory = {"dtype": dtype, "device": device}

    def conv(self, inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
        return self.operations.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **self.factory)

    def conv1d(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Conv1d(inputs, outputs, 1, **self.factory)

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Linear(inputs, outputs, **self.factory)

    def embedding(self, count: int, width: int) -> nn.Module:
        return self.operations.Embedding(count, width, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return self.operations.GroupNorm(self.config.norm_groups, channels, eps=_NORM_EPS, **self.factory)


class _Stage(nn.ModuleList):
    """Layers in a row, of which some are told the timestep."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions; the timestep scales and shifts between them; resamples both branches where asked to."""

    def __init__(self, inputs: int, outputs: int, make: _Maker, resample: str | None = None) -> None:
        super().__init__()
        self.resample = None if resample is None else _RESAMPLE[resample]
        self.in_layers = nn.Sequential(make.norm(inputs), nn.SiLU(), make.conv(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), make.linear(4 * make.config.width, 2 * outputs))
        self.out_layers = nn.Sequential(
            make.norm(outputs), nn.SiLU(), nn.Dropout(make.config.dropout), make.conv(outputs, outputs)
        )
        self.skip_connection = make.conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = convolution(h)
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        norm, activation, dropout, convolution = self.out_layers
        h = torch.addcmul(shift, norm(h), 1 + scale)
        return self.skip_connection(x) + convolution(dropout(activation(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels; the heads come first in the channels of `qkv`, then query, key and value."""

    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.heads = channels // make.config.head_channels
        self.norm = make.norm(channels)
        self.qkv = make.conv1d(channels, 3 * channels)
        self.proj_out = make.conv1d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous channels: attention on strided ones stores the matrix of all pairs of pixels.
        tokens = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).contiguous()
        query, key, value = tokens.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed.transpose(-2, -1).flatten(1, 2)).view_as(x)


def _way_down(config: ADMUNetConfig, make: _Maker) -> tuple[list[nn.Module], list[int]]:
    """The input blocks, and the channels that each of them leaves for the way up."""
    widths = config.level_channels
    stages: list[nn.Module] = [_Stage([make.conv(config.in_channels * config.patch_size**2, widths[0])])]
    skips, channels = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.res_blocks):
            stages.append(_Stage([ResidualBlock(channels, width, make), *_attention(config, level, make)]))
            channels = width
            skips.append(channels)
        if level < len(widths) - 1:
            stages.append(_Stage([ResidualBlock(channels, channels, make, resample="down")]))
            skips.append(channels)
    return stages, skips


def _middle(config: ADMUNetConfig, make: _Maker) -> Iterator[nn.Module]:
    channels = config.level_channels[-1]
    yield ResidualBlock(channels, channels, make)
    yield AttentionBlock(channels, make) if config.middle_attention else nn.Identity()
    yield ResidualBlock(channels, channels, make)


def _way_up(config: ADMUNetConfig, make: _Maker, skips: list[int]) -> Iterator[nn.Module]:
    widths = config.level_channels
    channels = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for block in range(config.res_blocks + 1):
            layers = [ResidualBlock(channels + skips.pop(), width, make), *_attention(config, level, make)]
            channels = width
            if level and block == config.res_blocks:
                layers.append(ResidualBlock(channels, channels, make, resample="up"))
            yield _Stage(layers)


def _attention(config: ADMUNetConfig, level: int, make: _Maker) -> list[nn.Module]:
    return [AttentionBlock(config.level_channels[level], make)] if level in config.attention_levels else []
