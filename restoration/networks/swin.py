"""Residual Swin transformer blocks of SwinIR (Liang et al. 2021, "SwinIR: Image Restoration Using Swin Transformer").

Maps are (B, H, W, C). Any size will do: a map is extended to whole windows inside of the attention, and nothing attends
to the extension.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_WINDOWS_AT_ONCE = 4096
"""In one call of the attention: GPUs run at most 65,535 pairs of window and head at once."""


class RSTB(nn.Module):
    """A residual Swin transformer block: layers, every second one with shifted windows, a 3x3 convolution, a skip.

    Args:
        dim: Channels.
        heads: Attention heads, which divide `dim`.
        window: Positions along each side of a window.
        mlp_ratio: Width of the feed-forward layers in units of `dim`.
        drop_paths: For each layer, how often training leaves out its two branches.
        make: The maker of its layers.
    """

    def __init__(
        self, dim: int, heads: int, window: int, mlp_ratio: float, drop_paths: list[float], make: LayerMaker
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            SwinLayer(dim, heads, window, index % 2 * (window // 2), mlp_ratio, drop_path, make)
            for index, drop_path in enumerate(drop_paths)
        )
        self.conv = make.conv(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = layer(h)
        return x + self.conv(h.movedim(-1, 1)).movedim(1, -1)


class SwinLayer(nn.Module):
    """x + attention(norm(x)) within windows, then x + feed_forward(norm(x)).

    In training each branch is left out at random, picture by picture (stochastic depth), by torch's own random state.
    """

    def __init__(
        self, dim: int, heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float, make: LayerMaker
    ) -> None:
        super().__init__()
        self.drop_path, self.recompute = drop_path, make.recompute
        hidden = round(dim * mlp_ratio)
        self.norm1 = make.norm(dim)
        self.attention = WindowAttention(dim, heads, window, shift, make)
        self.norm2 = make.norm(dim)
        self.mlp = nn.Sequential(make.linear(dim, hidden), nn.GELU(), make.linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._run, x) if self.recompute and torch.is_grad_enabled() else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attention(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
        return x * (kept / (1 - self.drop_path)).to(x)


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each relative position.

    Shifted windows reach around the border of the map; what is on its other side is masked. A map that fits into one
    window along an axis is not shifted along it.

    Args:
        dim: Channels.
        heads: Attention heads, which divide `dim`.
        window: Positions along each side of a window.
        shift: Of the windows, in positions, less than `window`.
        make: The maker of its layers.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int, make: LayerMaker) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads, **make.factory))
        self.qkv = make.linear(dim, 3 * dim)
        self.projection = make.linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = (-(-side // self.window) for side in (height, width))
        shifts = [self.shift if count > 1 else 0 for count in (rows, columns)]
        windows = self._cut(x, rows, columns, shifts)
        same = None
        if any(shifts) or windows.shape[1] * windows.shape[2] != height * width:
            same = self._same_region((height, width), (rows, columns), shifts, x.device)
        bias, mixed = self._bias(x), []
        for start in range(0, rows * columns, _WINDOWS_AT_ONCE):
            part = slice(start, start + _WINDOWS_AT_ONCE)
            visible = bias if same is None else bias.where(same[part, None], -torch.inf)
            mixed.append(self._attend(windows[:, part], visible))
        out = torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0]
        out = rearrange(out, "b (r c) (i j) d -> b (r i) (c j) d", r=rows, i=self.window)
        if any(shifts):
            out = out.roll(shifts, dims=(1, 2))
        return out[:, :height, :width]

    def _cut(self, x: Tensor, rows: int, columns: int, shifts: list[int]) -> Tensor:
        """Windows (B, rows * columns, window^2, C)."""
        below, right = rows * self.window - x.shape[1], columns * self.window - x.shape[2]
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        if any(shifts):
            x = x.roll([-shift for shift in shifts], dims=(1, 2))
        return rearrange(x, "b (r i) (c j) d -> b (r c) (i j) d", i=self.window, j=self.window)

    def _attend(self, windows: Tensor, bias: Tensor) -> Tensor:
        """Attention within windows (B, n, window^2, C), with biases (n or 1, heads, window^2, window^2)."""
        count = windows.shape[1]
        query, key, value = rearrange(self.qkv(windows), "b n p (k h d) -> k b (n h) p d", k=3, h=self.heads).unbind()
        mask = bias.expand(count, -1, -1, -1).flatten(0, 1)[None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.projection(rearrange(mixed, "b (n h) p d -> b n p (h d)", n=count))

    def _bias(self, x: Tensor) -> Tensor:
        """(1, heads, window^2, window^2), in the type and on the device of x."""
        places = torch.arange(self.window, device=x.device)
        apart = places[:, None] - places[None] + self.window - 1
        index = apart[:, None, :, None] * (2 * self.window - 1) + apart[None, :, None, :]
        bias = self.bias_table.to(x)[index.flatten()]
        return rearrange(bias, "(p q) h -> 1 h p q", p=self.window**2)

    def _same_region(
        self, size: tuple[int, int], counts: tuple[int, int], shifts: list[int], device: torch.device
    ) -> Tensor:
        """Which positions of a window may see each other, (windows, window^2, window^2)."""
        labels = []
        for length, count, shift in zip(size, counts, shifts, strict=True):
            extended = count * self.window
            places = torch.arange(extended, device=device)
            label = (places >= extended - shift).long()
            labels.append(label.masked_fill((places + shift) % extended >= length, 2))
        regions = 3 * labels[0][:, None] + labels[1][None]
        regions = rearrange(regions, "(r i) (c j) -> (r c) (i j)", i=self.window, j=self.window)
        return regions[:, :, None] == regions[:, None, :]


class NearestUpsampler(nn.Module):
    """SwinIR's "nearest+conv": maps (B, dim, h, w) to images (B, 3, 4h, 4w), twice by repetition and a convolution."""

    def __init__(self, dim: int, make: LayerMaker) -> None:
        super().__init__()
        self.before = nn.Sequential(make.conv(dim, dim, 3), make.conv(dim, dim, 3), nn.LeakyReLU(inplace=True))
        self.up = nn.ModuleList(make.conv(dim, dim, 3) for _ in range(2))
        self.last = nn.Sequential(make.conv(dim, dim, 3), make.conv(dim, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for conv in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.leaky_relu_(conv(x), 0.2)
        return self.last(x)


class LayerMaker:
    """Layers of one `operations` namespace, type and device.

    Args:
        operations: Namespace with Conv2d, LayerNorm and Linear.
        dtype: Type of the weights.
        device: Where they are made.
        recompute: Whether transformer layers are computed again in the backward pass instead of being kept.
    """

    def __init__(
        self, operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None, *, recompute: bool = False,
    ) -> None:  # fmt: skip
        self.operations: Any = operations
        self.factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.recompute = recompute

    def conv(self, inputs: int, outputs: int, size: int, stride: int = 1, *, padded: bool = True) -> nn.Module:
        padding = size // 2 if padded else 0
        return self.operations.Conv2d(inputs, outputs, size, stride, padding, **self.factory)

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
        return self.operations.Linear(inputs, outputs, bias=bias, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return self.operations.LayerNorm(channels, **self.factory)


def recomputed(function: Any, *arguments: Tensor) -> Tensor:
    """`function(*arguments)`, which the backward pass computes again, with the same random numbers."""
    return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[return-value]


def window_bytes(height: int, width: int, dim: int, heads: int, window: int, size: int) -> int:
    """Bytes that a `SwinLayer` holds for one map of this size, without gradients, in numbers of `size` bytes each."""
    count = math.ceil(height / window) * math.ceil(width / window)
    return (10 * count * window**2 * dim + 2 * min(count, _WINDOWS_AT_ONCE) * heads * window**4) * size


def rising_drop_paths(depths: tuple[int, ...], last: float) -> list[list[float]]:
    """For blocks of such depths, the drop rate of each layer, rising from 0 to `last` over all of them."""
    rates = iter(torch.linspace(0, last, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def fitted_positions(positions: Tensor, like: Tensor) -> Tensor:
    """Learned positions (S, S, C), interpolated bicubically where the map (B, h, w, C) has another size."""
    positions = positions.to(like.device)
    if positions.shape[:2] != like.shape[1:3]:
        planes = positions.movedim(-1, 0)[None].float()
        size = (like.shape[1], like.shape[2])
        positions = F.interpolate(planes, size=size, mode="bicubic", align_corners=False)[0].movedim(0, -1)
    return positions.to(like.dtype)
