"""NCSN++ (Song et al. 2021, "Score-Based Generative Modeling through SDEs") in the configuration of DriftRec.

BigGAN residual blocks with FIR resampling, an input pyramid that is added at every level ("input skip") and an output
pyramid that is summed from every level ("output skip"). Modules are numbered as in the published code, so that its
checkpoints fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SQRT_HALF = 1 / math.sqrt(2)
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class NCSNppConfig:
    """Everything that is needed to rebuild the network. The defaults are the paper's: 65,623,359 parameters.

    Args:
        in_channels: Channels of the input; 6 for an image and its condition, 3 for the regression baseline.
        out_channels: Channels of the output.
        width: Channels of the first level; the noise embedding is four times as wide.
        channel_multipliers: Width of each level in units of `width`; each level after the first halves the image.
        res_blocks: Residual blocks a level on the way down; one more on the way up.
        attention_levels: Levels with self-attention (the middle always has it); 4 is 1/16 of the image's size.
        conditional: Whether the network is told the noise level.
        patch_size: Pixels along each side that are folded into channels before the first level; 1 in the paper. 2 makes
            an evaluation four times cheaper at the same width.
        fourier_scale: Spread of the random frequencies with which ln(sigma) is embedded. At the paper's 16 noise levels
            that differ by 1% look unrelated, which takes long to learn; 1 suits short trainings.
        dropout: Dropout inside the residual blocks, in training only.
    """

    in_channels: int = 6
    out_channels: int = 3
    width: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 2, 2, 2)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    conditional: bool = True
    patch_size: int = 1
    fourier_scale: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        if self.width < 4 or self.width % 4 or min(self.channel_multipliers, default=0) < 1 or self.res_blocks < 1:
            raise ValueError(
                f"NCSN++: expected a width that is a multiple of 4, a level and a residual block, got {self}."
            )
        if min(self.in_channels, self.out_channels, self.patch_size) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"NCSN++: expected channels and a patch size of at least 1 and a dropout from 0 to 1, got {self}."
            )

    @property
    def size_multiple(self) -> int:
        """Image sides that are a multiple of this pass through without cropping; smaller sides do not pass at all."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class NCSNpp(nn.Module):
    """The network.

    Args:
        config: Its shape.
        operations: Namespace with Linear, Conv2d and GroupNorm: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where the weights are made.
    """

    def __init__(
        self, config: NCSNppConfig, *, operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        make = _Maker(config, operations, dtype, device)
        self.all_modules = nn.ModuleList(_modules(config, make))
        self.output_layer = make.conv(
            config.in_channels * config.patch_size**2, config.out_channels * config.patch_size**2, 1
        )

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: (B, in_channels, H, W); both sides at least `config.size_multiple`.
            noise_level: (B,), the standard deviation sigma(t); None where the network is unconditional.

        Returns:
            (B, out_channels, H, W).
        """
        modules: Iterator[nn.Module] = iter(self.all_modules)
        embedding = self._embed(modules, noise_level, x.dtype)
        h, skips = self._down(modules, F.pixel_unshuffle(x, self.config.patch_size), embedding)
        for _ in range(3):  # residual block, attention, residual block
            h = _call(next(modules), h, embedding)
        out = self.output_layer(self._up(modules, h, skips, embedding))
        return F.pixel_shuffle(out, self.config.patch_size)

    def _embed(self, modules: Iterator[nn.Module], noise_level: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if not self.config.conditional:
            return None
        if noise_level is None:
            raise ValueError("NCSN++: this network is conditional, expected the noise level of each image.")
        fourier, first, second = next(modules), next(modules), next(modules)
        return second(F.silu(first(fourier(torch.log(noise_level.float())).to(dtype))))

    def _down(self, modules: Iterator[nn.Module], x: Tensor, embedding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        pyramid, skips = x, [next(modules)(x)]
        levels = len(self.config.channel_multipliers)
        for level in range(levels):
            for _ in range(self.config.res_blocks):
                h = _call(next(modules), skips[-1], embedding)
                skips.append(next(modules)(h) if level in self.config.attention_levels else h)
            if level < levels - 1:
                h = _call(next(modules), skips[-1], embedding)
                pyramid = fir_downsample(pyramid)
                skips.append(next(modules)(pyramid, h))
        return skips[-1], skips

    def _up(self, modules: Iterator[nn.Module], h: Tensor, skips: list[Tensor], embedding: Tensor | None) -> Tensor:
        pyramid: Tensor | None = None
        for level in reversed(range(len(self.config.channel_multipliers))):
            for _ in range(self.config.res_blocks + 1):
                skip = skips.pop()
                h = _call(next(modules), torch.cat([_fit(h, skip), skip], dim=1), embedding)
            if level in self.config.attention_levels:
                h = next(modules)(h)
            norm, conv = next(modules), next(modules)
            out = conv(F.silu(norm(h)))
            pyramid = out if pyramid is None else _fit(fir_upsample(pyramid), out) + out
            if level > 0:
                h = _call(next(modules), h, embedding)
        assert pyramid is not None
        return pyramid

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights as the published code does: uniform with unit gain over the mean of both fans, zero biases.

        Layers that end a residual branch or feed the output pyramid start at (almost) zero. The output layer is an
        ordinary one there; the pyramids are zero, so the network starts at zero all the same.
        """
        for name, parameter in self.named_parameters():
            module, _, leaf = name.rpartition(".")
            owner = self.get_submodule(module)
            if isinstance(owner, FourierEmbedding):
                parameter.normal_(generator=generator).mul_(self.config.fourier_scale)
            elif parameter.dim() == 1:
                parameter.fill_(1.0 if leaf == "weight" else 0.0)
            else:
                receptive = parameter[0, 0].numel()
                fan = 0.5 * (parameter.shape[0] + parameter.shape[1]) * receptive
                gain = 1e-10 if self._starts_at_zero(module) else 0.1 if isinstance(owner, NIN) else 1.0
                bound = math.sqrt(3 * gain / fan)
                parameter.uniform_(-bound, bound, generator=generator)

    def _starts_at_zero(self, module: str) -> bool:
        parent = module.removeprefix("all_modules.")
        is_pyramid_conv = parent.isdigit() and int(parent) > len(self.all_modules) // 3 and module != "output_layer"
        return module.endswith((".Conv_1", ".NIN_3")) or is_pyramid_conv


class _Maker:
    """Layers of one `operations` namespace, type and device."""

    def __init__(
        self, config: NCSNppConfig, operations: Any, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.config, self.operations = config, operations
        self.factory = {"dtype": dtype, "device": device}
        self.embedding_channels = 4 * config.width if config.conditional else 0

    def conv(self, inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
        return self.operations.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **self.factory)

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Linear(inputs, outputs, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return self.operations.GroupNorm(_groups(channels), channels, eps=_NORM_EPS, **self.factory)


def _modules(config: NCSNppConfig, make: _Maker) -> list[nn.Module]:
    """The modules in the published order: embedding, way down, middle, way up."""
    width, pyramid = config.width, config.in_channels * config.patch_size**2
    modules: list[nn.Module] = []
    if config.conditional:
        modules += [FourierEmbedding(width, make), make.linear(2 * width, 4 * width), make.linear(4 * width, 4 * width)]
    modules.append(make.conv(pyramid, width))
    skips, channels = [width], width
    levels = len(config.channel_multipliers)
    for level, multiplier in enumerate(config.channel_multipliers):
        for _ in range(config.res_blocks):
            modules.append(ResidualBlock(channels, width * multiplier, make))
            channels = width * multiplier
            if level in config.attention_levels:
                modules.append(Attention(channels, make))
            skips.append(channels)
        if level < levels - 1:
            modules += [ResidualBlock(channels, channels, make, resample="down"), Combine(pyramid, channels, make)]
            skips.append(channels)
    modules += [
        ResidualBlock(channels, channels, make),
        Attention(channels, make),
        ResidualBlock(channels, channels, make),
    ]
    for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
        for _ in range(config.res_blocks + 1):
            modules.append(ResidualBlock(channels + skips.pop(), width * multiplier, make))
            channels = width * multiplier
        if level in config.attention_levels:
            modules.append(Attention(channels, make))
        modules += [make.norm(channels), make.conv(channels, pyramid)]
        if level > 0:
            modules.append(ResidualBlock(channels, channels, make, resample="up"))
    return modules


class FourierEmbedding(nn.Module):
    """Random Fourier features [sin, cos] of ln(sigma), always in single precision; the frequencies are not trained."""

    def __init__(self, features: int, make: _Maker) -> None:
        super().__init__()
        self.W = nn.Parameter(
            torch.empty(features, dtype=torch.float32, device=make.factory["device"]), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x[:, None] * self.W.to(device=x.device, dtype=torch.float32)[None]
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class Combine(nn.Module):
    """Adds the downsampled input, through a 1x1 convolution, to the features."""

    def __init__(self, inputs: int, channels: int, make: _Maker) -> None:
        super().__init__()
        self.Conv_0 = make.conv(inputs, channels, 1)

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        return self.Conv_0(pyramid) + h


class NIN(nn.Module):
    """A 1x1 convolution that keeps its weight as (in, out), the published layout."""

    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(channels, channels, **make.factory))
        self.b = nn.Parameter(torch.empty(channels, **make.factory))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.W.to(tokens).t(), self.b.to(tokens))


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a residual scaled by 1/sqrt(2)."""

    def __init__(self, channels: int, make: _Maker) -> None:
        super().__init__()
        self.GroupNorm_0 = make.norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, make) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.GroupNorm_0(x).flatten(2).transpose(1, 2)
        query, key, value = self.NIN_0(tokens), self.NIN_1(tokens), self.NIN_2(tokens)
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return (x + self.NIN_3(mixed).transpose(1, 2).reshape(x.shape)) * _SQRT_HALF


class ResidualBlock(nn.Module):
    """The BigGAN residual block; resamples both branches by FIR filters where asked to."""

    def __init__(self, inputs: int, outputs: int, make: _Maker, resample: str | None = None) -> None:
        super().__init__()
        self.resample = {None: None, "down": fir_downsample, "up": fir_upsample}[resample]
        self.dropout = make.config.dropout
        self.GroupNorm_0 = make.norm(inputs)
        self.Conv_0 = make.conv(inputs, outputs)
        self.Dense_0 = make.linear(make.embedding_channels, outputs) if make.embedding_channels else None
        self.GroupNorm_1 = make.norm(outputs)
        self.Conv_1 = make.conv(outputs, outputs)
        self.Conv_2 = make.conv(inputs, outputs, 1) if inputs != outputs or resample else None

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        h = F.silu(self.GroupNorm_0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.Conv_0(h)
        if self.Dense_0 is not None and embedding is not None:
            h = h + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = F.dropout(F.silu(self.GroupNorm_1(h)), self.dropout, self.training)
        h = self.Conv_1(h)
        return ((x if self.Conv_2 is None else self.Conv_2(x)) + h) * _SQRT_HALF


def fir_downsample(x: Tensor) -> Tensor:
    """Halve (B, C, H, W) with the binomial filter [1, 3, 3, 1] in both directions; odd sides are rounded down."""
    return F.conv2d(x, _fir_kernel(x), stride=2, padding=1, groups=x.shape[1])


def fir_upsample(x: Tensor) -> Tensor:
    """Double (B, C, H, W) with the binomial filter [1, 3, 3, 1] in both directions."""
    return F.conv_transpose2d(x, 4 * _fir_kernel(x), stride=2, padding=1, groups=x.shape[1])


def _fir_kernel(x: Tensor) -> Tensor:
    index = torch.arange(4, device=x.device, dtype=x.dtype)  # made on the device: copying to it would wait for it
    taps = (index * (3 - index) + 1) / 8  # 1, 3, 3, 1
    return torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)


def _call(module: nn.Module, h: Tensor, embedding: Tensor | None) -> Tensor:
    return module(h, embedding) if isinstance(module, ResidualBlock) else module(h)


def _fit(h: Tensor, like: Tensor) -> Tensor:
    """Repeat the last row and column where an odd size was rounded down on the way."""
    missing_rows, missing_columns = like.shape[-2] - h.shape[-2], like.shape[-1] - h.shape[-1]
    return F.pad(h, (0, missing_columns, 0, missing_rows), mode="replicate") if missing_rows or missing_columns else h


def _groups(channels: int) -> int:
    """The published min(C / 4, 32), or the next smaller number that divides the channels."""
    return next(groups for groups in range(min(channels // 4, 32), 0, -1) if channels % groups == 0)
