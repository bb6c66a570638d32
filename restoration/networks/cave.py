"""CaVE, CODiff's compression-aware visual embedder (Guo et al. 2025, "Compression-Aware One-Step Diffusion Model for
JPEG Artifact Removal", section 3.2).

An autoencoder that learns to restore (implicitly) and to tell the JPEG quality (explicitly); the features in its middle
become the prompt of the diffusion model. It is FBCNN (Jiang et al. 2021) without its quality input and with strides of
2, 4 and 4, so a feature stands for 32x32 pixels. Modules are named as in the published code, so that its weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tiling import tile_count, tiled_exactly

STRIDE = 32
"""Pixels along each side of a feature."""
_PADDING = 8
_NORM_EPS, _NORM_MOMENTUM = 1e-4, 0.9


@dataclass(frozen=True)
class CaVEConfig:
    """Everything that is needed to rebuild the network. The defaults are the paper's.

    Args:
        widths: Channels at 1, 1/2, 1/8 and 1/32 of the image's size; the last is the width of the features.
        blocks: Residual blocks at each size, in each direction.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) != 4 or min(self.widths) < 1 or self.blocks < 1:
            raise ValueError(f"CaVE: expected four widths and a number of blocks, all at least 1, got {self}.")

    @property
    def halo(self) -> int:
        """Pixels that `CaVE.encode_tiled` reads around each window of its first pass, 32 in the paper's network."""
        return math.ceil((1 + 6 * self.blocks) / _PADDING) * _PADDING

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class CaVE(nn.Module):
    """The network; images are in [0, 1].

    Args:
        config: Its shape.
        decoder: Whether to build the half that reconstructs the image, which only its training needs.
        operations: Namespace with Conv2d, ConvTranspose2d, BatchNorm2d and Linear: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where the weights are made.
    """

    def __init__(
        self, config: CaVEConfig, *, decoder: bool = True, operations: ModuleType | type = nn,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.has_decoder = config, decoder
        make = _Maker(config.blocks, operations, dtype, device)
        width, half, eighth, last = config.widths
        self.m_head = make.conv(3, width)
        self.m_down1 = nn.Sequential(*make.residuals(width), make.down(width, half, 2))
        self.m_down2 = nn.Sequential(*make.residuals(half), make.down(half, eighth, 4))
        self.m_down3 = nn.Sequential(*make.residuals(eighth), make.down(eighth, last, 4))
        self.m_body_encoder = nn.Sequential(*make.residuals(last))
        if decoder:
            self.m_body_decoder = nn.Sequential(*make.residuals(last))
            self.m_up3 = nn.Sequential(make.up(last, eighth, 4), *make.residuals(eighth, offset=1))
            self.m_up2 = nn.Sequential(make.up(eighth, half, 4), *make.residuals(half, offset=1))
            self.m_up1 = nn.Sequential(make.up(half, width, 2), *make.residuals(width, offset=1))
            self.m_tail = make.conv(width, 3)
        self.qf_pred = nn.Sequential(
            *make.residuals(last), nn.AdaptiveAvgPool2d(1), nn.Flatten(), make.linear(last, last),
            nn.ReLU(inplace=True), make.linear(last, last), nn.ReLU(inplace=True), make.linear(last, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images and estimate how strongly they are compressed, as training needs it.

        Sides are extended to multiples of 32 by repetition and cut again (the published code fails on other sizes).

        Args:
            images: (B, 3, H, W) in [0, 1], any size.

        Returns:
            The reconstruction, (B, 3, H, W), and (100 - quality) / 100, (B,), in [0, 1].

        Raises:
            ValueError: The images have another shape, or the network was built without its decoder.
        """
        if not self.has_decoder:
            raise ValueError("CaVE: this network was built without its decoder. Build it with decoder=True.")
        head = self.m_head(_padded(images, STRIDE))
        half = self.m_down1(head)
        eighth = self.m_down2(half)
        coarse = self.m_down3(eighth)
        features = self.m_body_encoder(coarse)
        x = self.m_body_decoder(features) + coarse
        x = self.m_up3(x) + eighth
        x = self.m_up2(x) + half
        x = self.m_tail(self.m_up1(x) + head)
        return x[..., : images.shape[-2], : images.shape[-1]], self.qf_pred(features)[:, 0]

    def encode(self, images: Tensor) -> Tensor:
        """The features c_L of images, extended by repetition to multiples of 8 and to 32 pixels at least.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.

        Returns:
            (B, C, h, w) with (h, w) = `cells(H, W)` and C the last width.

        Raises:
            ValueError: The images have another shape.
        """
        return self._coarsen(self._shrink(_padded(images)))

    def encode_tiled(
        self, images: Tensor, tile: int, *, device: torch.device | str | None = None,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """`encode`, window by window with the very same result; see `activation_bytes` for what a window takes.

        Three passes over the picture, each with windows that take at most the memory of the first one's: to 1/8 of
        the size, to 1/32, and the blocks there. What passes between them stays on the device of `images`.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.
            tile: Pixels along each side of a window, without the `config.halo` around it; 0 for the whole picture.
            device: Where the network is and runs; None for the device of `images`.
            on_tile: Called with (done, total) after every window, counted over all passes; may raise to end the work.

        Returns:
            (B, C, h, w) on the device of `images`.

        Raises:
            ValueError: The images have another shape, or the network is in training mode, where its batch norms would
                see one window instead of the picture.
        """
        if self.training:
            raise ValueError("CaVE: windows need the fixed statistics of its batch norms. Call eval() first.")
        x = _padded(images)
        reach = 2 * self.config.blocks
        passes = (
            (self._shrink, 8, self.config.halo, tile),
            (partial(_run, self.m_down3), 4, math.ceil(reach / 4) * 4, tile // 2 or tile),
            (partial(_run, self.m_body_encoder), 1, reach, tile // 4 or tile),
        )
        report = _CountedOver(_pass_sizes(x, passes), on_tile)
        for function, stride, halo, size in passes:
            x = tiled_exactly(function, x, stride=stride, halo=halo, tile=size, device=device, on_tile=report)
        return x

    def quality(self, features: Tensor) -> Tensor:
        """The JPEG quality, 0 to 100, (B,) in single precision, that the features (B, C, h, w) of images tell."""
        return 100 * (1 - self.qf_pred(features)[:, 0].float())

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that `encode` of one image of this size takes beside the weights and the workspace of the kernels.

        At the widest size a residual block holds its input and two more of it, and the image is there as well, twice
        where it has to be extended. A window of `encode_tiled` counts with `config.halo` on each side.
        """
        rows, columns = (_extended(side) for side in (height, width))
        areas = (rows * columns, rows * columns // 4, rows * columns // 64, math.prod(cells(height, width)))
        widest = max(3 * channels * area for channels, area in zip(self.config.widths, areas, strict=True))
        given = height * width if (rows, columns) != (height, width) else 0
        return (widest + 3 * (rows * columns + given)) * dtype.itemsize

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights as the published training does: orthogonal with gain 0.2, biases 0, norms from U(0.1, 1)."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.uniform_(0.1, 1.0, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.orthogonal_(module.weight, gain=0.2, generator=generator)
                assert module.bias is not None
                module.bias.zero_()

    def _shrink(self, x: Tensor) -> Tensor:
        """Images to 1/8 of their size."""
        return _run([self.m_head, *self.m_down1, *self.m_down2], x)

    def _coarsen(self, x: Tensor) -> Tensor:
        """From 1/8 of the size to the features."""
        return _run([*self.m_down3, *self.m_body_encoder], x)


def cells(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of `CaVE.encode` of an image: the published floor(ceil8(side) / 32), and 1 at least."""
    return _extended(height) // STRIDE, _extended(width) // STRIDE


def cave_tokens(features: Tensor) -> Tensor:
    """Features (B, C, h, w) as a prompt (B, h*w, C), row by row."""
    return features.flatten(2).transpose(1, 2)


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))) + `offset`.

    The published decoder adds 1 in every block, what is left of FBCNN's quality attention; its weights expect that.
    """

    def __init__(self, channels: int, make: _Maker, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.res = nn.Sequential(
            make.conv(channels, channels), make.norm(channels), nn.ReLU(inplace=True), make.conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.res(x) + x
        return out + self.offset if self.offset else out


class _Maker:
    """Layers of one `operations` namespace, type and device."""

    def __init__(
        self, blocks: int, operations: Any, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        self.blocks, self.operations = blocks, operations
        self.factory = {"dtype": dtype, "device": device}

    def conv(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Conv2d(inputs, outputs, 3, padding=1, **self.factory)

    def down(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        return self.operations.Conv2d(inputs, outputs, stride, stride=stride, **self.factory)

    def up(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        return self.operations.ConvTranspose2d(inputs, outputs, stride, stride=stride, **self.factory)

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Linear(inputs, outputs, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return self.operations.BatchNorm2d(channels, eps=_NORM_EPS, momentum=_NORM_MOMENTUM, **self.factory)

    def residuals(self, channels: int, offset: float = 0.0) -> list[nn.Module]:
        return [ResidualBlock(channels, self, offset) for _ in range(self.blocks)]


class _CountedOver:
    """Reports the windows of several passes as one count."""

    def __init__(self, totals: list[int], on_tile: Callable[[int, int], None] | None) -> None:
        self.total, self.done, self.on_tile = sum(totals), 0, on_tile

    def __call__(self, done: int, total: int) -> None:
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, self.total)


def _pass_sizes(x: Tensor, passes: Iterable[tuple[Callable[[Tensor], Tensor], int, int, int]]) -> list[int]:
    height, width = x.shape[-2:]
    counts = []
    for _, stride, _, tile in passes:
        counts.append(tile_count(height, width, stride=stride, tile=tile))
        height, width = height // stride, width // stride
    return counts


def _run(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """One after the other, not as a Sequential, which would keep its input alive to the end."""
    for layer in layers:
        x = layer(x)
    return x


def _extended(side: int) -> int:
    return max(math.ceil(side / _PADDING) * _PADDING, STRIDE)


def _padded(images: Tensor, multiple: int = _PADDING) -> Tensor:
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"CaVE: expected images (B, 3, H, W), got {tuple(images.shape)}.")
    missing = [-_extended(side) % multiple + _extended(side) - side for side in images.shape[-2:]]
    return F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else images
