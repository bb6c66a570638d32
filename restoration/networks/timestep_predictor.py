"""SODiff's predictor of JPEG quality and diffusion timestep ("SODiff: Semantic-Oriented Diffusion Model for JPEG
Compression Artifacts Removal", 2025, section on the quality-factor-aware time predictor, Eq. 11).

Four residual blocks, one average pool that both branches share, a quality and the logits of T timesteps. What tells the
quality is how 8x8 blocks are quantised, so the picture is never resized: the first convolution cuts it into the blocks
of JPEG's grid. It starts as their cosine transform, cut off at several heights; averaged over the picture that is a
histogram of each coefficient, in which the steps of the quantisation show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tiling import tiled_exactly

_LARGEST = {"timesteps": 10_000, "patch": 32, "stem": 4096, "width": 1024, "blocks": 16, "hidden": 4096}
"""Bounds of a configuration, which may come from a file of anybody's."""
_MOST_WEIGHTS = 50_000_000
_LUMA = (0.299, 0.587, 0.114)
_LIMIT = 6.0
"""Where the stem's activation, ReLU6, ends."""
_LOWEST_CUT, _HIGHEST_CUT = 1.0, 16.0
"""Coefficients, in 8-bit levels of an orthonormal transform, at which the stem's channels start to be cut off."""
_START_OF_BLOCKS = 0.1
_START_OF_BRANCHES = 0.01


@dataclass(frozen=True)
class TimestepPredictorConfig:
    """Everything that is needed to rebuild the network; the paper gives the number of blocks alone.

    Args:
        timesteps: Logits of the timestep branch, T_max; 0 leaves the branch out.
        patch: Pixels along each side of what becomes one position; 8 is JPEG's block.
        stem: Channels of the first convolution, between the residual blocks, and of the pooled features.
        width: Channels inside the residual blocks.
        blocks: Residual blocks.
        hidden: Width inside the branches.
    """

    timesteps: int = 1000
    patch: int = 8
    stem: int = 256
    width: int = 32
    blocks: int = 4
    hidden: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), {"timesteps": 0, "patch": 2}.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST[field.name]:
                raise ValueError(
                    f"timestep predictor: expected {field.name} from {least} to {_LARGEST[field.name]}, got {value!r}."
                )
        if self._weights() > _MOST_WEIGHTS:
            raise ValueError(f"timestep predictor: expected at most {_MOST_WEIGHTS:,} weights, got {self}.")

    def _weights(self) -> int:
        """About how many there are, by the largest layers."""
        blocks = self.blocks * 10 * self.stem * self.width
        return 3 * self.patch**2 * self.stem + blocks + self.hidden * (2 * self.stem + self.timesteps + 1)

    @property
    def halo(self) -> int:
        """Pixels that `TimestepPredictor.encode_tiled` reads around each window."""
        return self.blocks * self.patch

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)


class TimestepPredictor(nn.Module):
    """The network; images are in [0, 1], of any size.

    Its blocks extend their input by repetition, not by zeros, so that the border of a picture, which is a larger part
    of a small training crop, looks like the rest. Rows and columns beyond the last whole block are left out.

    Args:
        config: Its shape.
        operations: Namespace with Conv2d, BatchNorm2d and Linear: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights. Images in bfloat16 are too coarse to tell high qualities; float16 is fine.
        device: Where the weights are made.
    """

    def __init__(
        self, config: TimestepPredictorConfig, *, operations: ModuleType | type = nn,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        make = _Maker(operations, dtype, device)
        self.stem = nn.Sequential(
            make.conv(3, config.stem, config.patch, stride=config.patch),
            nn.ReLU6(inplace=True),
            make.norm(config.stem),
        )
        self.blocks = nn.Sequential(*(ResidualBlock(config.stem, config.width, make) for _ in range(config.blocks)))
        self.quality_head = make.branch(config.stem, config.hidden, 1)
        self.timestep_head = make.branch(config.stem, config.hidden, config.timesteps) if config.timesteps else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Estimate quality and timestep.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.

        Returns:
            The quality, (B,) in 0..100, and the logits (B, T), or None without that branch; both in single precision.

        Raises:
            ValueError: The images have another shape.
        """
        pooled = self.encode(images)
        return self.quality(pooled), self.logits(pooled)

    def encode(self, images: Tensor) -> Tensor:
        """The pooled features (B, stem), in single precision, of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: The images have another shape.
        """
        return _pooled(self._features(self._extended(images)))

    def encode_tiled(
        self, images: Tensor, tile: int, *, device: torch.device | str | None = None,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """`encode`, window by window, then one mean over all of the picture: the same but for rounding.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.
            tile: Pixels along each side of a window, without the `config.halo` around it; 0 for the whole picture.
            device: Where the network is and runs; None for the device of `images`.
            on_tile: Called with (done, total) after every window; may raise to end the work.

        Returns:
            (B, stem) on `device`, in single precision.

        Raises:
            ValueError: The images have another shape, or the network is in training mode, where its batch norms would
                see one window instead of the picture.
        """
        if self.training:
            raise ValueError("timestep predictor: windows need the fixed statistics of its norms. Call eval() first.")
        features = tiled_exactly(
            self._features, self._extended(images), stride=self.config.patch, halo=self.config.halo, tile=tile,
            device=device, on_tile=on_tile,
        )  # fmt: skip
        return _pooled(features).to(images.device if device is None else device)

    def quality(self, pooled: Tensor) -> Tensor:
        """The JPEG quality, 0 to 100, (B,) in single precision, that pooled features (B, stem) tell."""
        return 100 * torch.sigmoid(_run(self.quality_head, pooled)[:, 0])

    def logits(self, pooled: Tensor) -> Tensor | None:
        """The logits (B, T) of the timesteps in single precision, or None without that branch."""
        return None if self.timestep_head is None else _run(self.timestep_head, pooled)

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that `encode` of one image of this size takes beside the weights and the workspace of the kernels.

        That is the image, and at most the image without means beside the stem's result, or two or three maps of full
        width. A window of `encode_tiled` counts with `config.halo` on each side.
        """
        config = self.config
        rows, columns = (max(side // config.patch, 1) for side in (height, width))
        cells, padded = rows * columns, (rows + 2) * (columns + 2)
        extended = 3 * max(height, config.patch) * max(width, config.patch)
        first = extended + max(config.stem * cells, extended if min(height, width) < config.patch else 0)
        blocks = max(3 * config.stem * cells, config.stem * cells + config.width * cells + config.stem * padded)
        return (3 * height * width + max(first, blocks)) * dtype.itemsize

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights from a generator alone.

        The first convolution starts as the cosine transform of luma, each coefficient again and again, with limits of 1
        to 16 levels. From filters that start without that, whitened or not, the quality is not found in thousands of
        crops; with it, in hundreds. The blocks start close to the identity, the quality near 50, the timesteps almost
        equally likely.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(module.weight, gain=math.sqrt(2), generator=generator)
                assert module.bias is not None
                module.bias.zero_()
        filters = self.stem[0].weight
        assert isinstance(filters, Tensor)
        filters.copy_(cut_cosines(len(filters), self.config.patch, generator))
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                _scale(module.res[-2], _START_OF_BLOCKS)
        for branch in filter(None, (self.quality_head, self.timestep_head)):
            _scale(branch[-1], _START_OF_BRANCHES)

    def _features(self, x: Tensor) -> Tensor:
        """Whole blocks (B, 3, h, w) to the map (B, stem, floor(h / patch), floor(w / patch))."""
        x = _without_means(x, self.config.patch)
        for layer in [*self.stem, *self.blocks]:
            x = layer(x)
        return x

    def _extended(self, images: Tensor) -> Tensor:
        """Images of less than a block, extended to one by repetition; the others as they are."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"timestep predictor: expected images (B, 3, H, W), got {tuple(images.shape)}.")
        missing = [max(self.config.patch - side, 0) for side in images.shape[-2:]]
        return F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else images


class ResidualBlock(nn.Module):
    """x + relu(norm(conv(relu(norm(conv(x)))))), as the paper's figure draws it, the second convolution 1 by 1."""

    def __init__(self, channels: int, width: int, make: _Maker) -> None:
        super().__init__()
        self.res = nn.Sequential(
            make.conv(channels, width, 3, padding=1, padding_mode="replicate"), make.norm(width), nn.ReLU(inplace=True),
            make.conv(width, channels, 1), make.norm(channels), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


def gumbel_noise(
    shape: torch.Size | tuple[int, ...], generator: torch.Generator, device: torch.device | str | None = None
) -> Tensor:
    """Standard Gumbel noise of a shape in single precision, drawn on the generator's device and put on `device`."""
    draws = torch.empty(shape, dtype=torch.float32, device=generator.device).exponential_(generator=generator)
    return -draws.clamp_min(torch.finfo(torch.float32).tiny).log().to(device or generator.device)


def expected_timestep(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """The sum of i softmax(logits + noise)_i over the timesteps i, which has gradients (Eq. 11; no temperature).

    Args:
        logits: (B, T).
        noise: `gumbel_noise` of the same shape, for training; None for the expectation of the logits alone.

    Returns:
        (B,) in 0..T-1, in single precision.
    """
    scores = logits.float() if noise is None else logits.float() + noise
    timesteps = torch.arange(logits.shape[-1], dtype=torch.float32, device=logits.device)
    return (scores.softmax(dim=-1) * timesteps).sum(dim=-1).clamp(max=logits.shape[-1] - 1)  # rounding goes beyond


def cut_cosines(channels: int, side: int, generator: torch.Generator) -> Tensor:
    """Filters (channels, 3, side, side) that take images in [0, 1] to luma's cosine coefficients over their limits.

    Channels go through all coefficients but the mean, row by row, again and again, of either sign; what `_LIMIT` stands
    for grows from one round to the next, from 1 to 16 levels, in equal ratios.
    """
    positions = torch.arange(side, dtype=torch.float64)
    waves = torch.cos((2 * positions[None] + 1) * positions[:, None] * math.pi / (2 * side)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    blocks = torch.einsum("uy,vx->uvyx", waves, waves).flatten(0, 1)
    filters = blocks[:, None] * torch.tensor(_LUMA, dtype=torch.float64)[:, None, None]
    distinct = side**2 - 1
    rounds = math.ceil(channels / distinct)
    number = torch.arange(channels)
    cuts = _LOWEST_CUT * (_HIGHEST_CUT / _LOWEST_CUT) ** (number // distinct / max(rounds - 1, 1))
    signs = torch.randint(0, 2, (channels,), generator=generator, device=generator.device).cpu() * 2 - 1
    scale = 255 * _LIMIT * signs / cuts
    return (filters[1 + number % distinct] * scale[:, None, None, None]).float()


class _Maker:
    """Layers of one `operations` namespace, type and device."""

    def __init__(self, operations: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.operations, self.factory = operations, {"dtype": dtype, "device": device}

    def conv(self, inputs: int, outputs: int, size: int, **options: Any) -> nn.Module:
        return self.operations.Conv2d(inputs, outputs, size, **options, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return self.operations.BatchNorm2d(channels, **self.factory)

    def branch(self, inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        first = self.operations.Linear(inputs, hidden, **self.factory)
        return nn.Sequential(first, nn.ReLU(inplace=True), self.operations.Linear(hidden, outputs, **self.factory))


def _without_means(x: Tensor, side: int) -> Tensor:
    """Whole blocks of images (B, 3, H, W) without their means, so that rounded filters leave flat blocks at zero."""
    means = F.avg_pool2d(x, side)[:, :, :, None, :, None]
    rows, columns = means.shape[2], means.shape[4]
    blocks = x[..., : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
    return (blocks - means).flatten(4, 5).flatten(2, 3)


def _scale(layer: nn.Module, factor: float) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.mul_(factor)


def _pooled(features: Tensor) -> Tensor:
    """The mean over all positions, summed in single precision whatever the features' type."""
    return features.mean(dim=(2, 3), dtype=torch.float32)


def _run(branch: nn.Sequential, pooled: Tensor) -> Tensor:
    weight = branch[0].weight
    assert isinstance(weight, Tensor)
    return branch(pooled.to(weight.dtype)).float()
