"""SAIPE, SODiff's semantic-aligned image prompt extractor ("SODiff: Semantic-Oriented Diffusion Model for JPEG
Compression Artifacts Removal", 2025, arXiv 2508.07346).

A Swin transformer looks at the picture at a quarter of its size; half of it learns to restore, and a Performer with
attention pooling turns what lies between into a prompt that looks like the text encoder's. Where the paper gives no
number, the values are those of HAODiff (2025), by the same group, which has the same parts.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .performer import AttentionPool, Performer, favor_bytes, orthogonal_features
from .saipe_config import MULTIPLE, PATCH, SHRINK, SAIPEConfig
from .swin import RSTB, LayerMaker, NearestUpsampler, WindowAttention, fitted_positions, rising_drop_paths, window_bytes

_MEAN = (0.4488, 0.4371, 0.4040)
"""Of DIV2K, as in SwinIR."""


class SAIPE(nn.Module):
    """The network; images are in [0, 1], of any size.

    With `resolution="resize"` pictures that are not of `image_side` are stretched to it bilinearly, with a triangle as
    wide as the shrinking demands, since plain interpolation skips pixels there and turns the grid of JPEG's blocks into
    patterns; the reconstruction is stretched back. With "native" they are extended by repetition to multiples of 32.

    In training mode branches are left out at random by torch's own random state, which is to be seeded before every
    step; nothing is random in evaluation mode.

    Args:
        config: Its shape.
        operations: Namespace with Conv2d, LayerNorm and Linear: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where the weights are made.
        recompute: Whether training computes transformer layers again in the backward pass, to save memory.
    """

    def __init__(
        self, config: SAIPEConfig, *, operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None, recompute: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        make = LayerMaker(operations, dtype, device, recompute=recompute)
        rates = rising_drop_paths(config.down_depths + config.up_depths, config.drop_path)
        self.encoder = Encoder(config, rates[: len(config.down_depths)], make)
        self.decoder = Decoder(config, rates[len(config.down_depths) :], make)
        self.embedder = ImageGuidanceEmbedder(config, make)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images and see their prompt.

        Args:
            images: (B, 3, H, W) in [0, 1], any size.

        Returns:
            The reconstruction, (B, 3, H, W), not clamped, and the tokens, (B, tokens, context_dim).

        Raises:
            ValueError: The images have another shape.
        """
        middle = self._middle(images)
        tokens = self.embedder(middle)
        x = self.decoder(middle)
        x = x + _mean(x)
        if self.config.resolution == "resize":
            return _resized(x, images.shape[-2], images.shape[-1]), tokens
        return x[..., : images.shape[-2], : images.shape[-1]], tokens

    def tokens(self, images: Tensor) -> Tensor:
        """The prompt alone, (B, tokens, context_dim), of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: The images have another shape.
        """
        return self.embedder(self._middle(images))

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that `forward` of one image of this size takes beside the weights and the workspace of the kernels.

        That is two maps of `dim` channels at the full size at the end of the decoder, or what the Performer holds.
        """
        config, size = self.config, dtype.itemsize
        if config.resolution == "resize":
            rows = columns = config.image_side
        else:
            rows, columns = (math.ceil(side / MULTIPLE) * MULTIPLE for side in (height, width))
        same = (rows, columns) == (height, width)
        area, given, inner = rows * columns, 3 * height * width, config.performer_heads * config.performer_dim_head
        cells = area // SHRINK**2
        decoder = 2 * config.dim * (area + cells) * size
        attention = (4 * config.dim + 5 * inner) * cells * size
        attention += favor_bytes(cells, config.performer_heads, config.performer_dim_head, config.features)
        feed_forward = (4 + 2 * config.performer_mult) * config.dim * cells * size
        windows = window_bytes(rows // SHRINK, columns // SHRINK, config.dim, config.heads, config.window, size)
        positions = 0 if rows == columns == config.image_side else 6 * self.encoder.positions.numel()
        inside = max(decoder, attention, feed_forward, windows, positions) + 3 * area * size
        stretched = 0 if same or config.resolution == "native" else given * (size if size >= 4 else size + 4)
        return given * size + max(inside, stretched + 3 * area * size)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights from a generator alone.

        Linear layers and the Swin transformer's positions from a normal distribution of width 0.02, as SwinIR does;
        convolutions as torch does; the Performer's positions and the queries standard normal.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                assert module.bias is not None
                module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.bias_table, std=0.02, generator=generator)
        nn.init.trunc_normal_(self.encoder.positions, std=0.02, generator=generator)
        self.embedder.positions.normal_(generator=generator)
        self.embedder.queries.normal_(generator=generator)
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Draw new random features for the Performer, which training does now and then."""
        for own in self.embedder.features:
            own.copy_(orthogonal_features(own.shape[0], own.shape[1], generator))

    def _middle(self, images: Tensor) -> Tensor:
        """F_mid, (B, h, w, dim)."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"SAIPE: expected images (B, 3, H, W), got {tuple(images.shape)}.")
        if self.config.resolution == "resize":
            x = _resized(images, self.config.image_side, self.config.image_side)
        else:
            below, right = (-side % MULTIPLE for side in images.shape[-2:])
            x = F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images
        return self.encoder(x - _mean(x))


class Encoder(nn.Module):
    """E_down: to a quarter of the size by strided convolutions, then residual Swin blocks and a skip around them."""

    def __init__(self, config: SAIPEConfig, drop_paths: list[list[float]], make: LayerMaker) -> None:
        super().__init__()
        dim, side = config.dim, config.image_side // SHRINK
        self.downsampler = nn.Sequential(
            make.conv(3, dim, 3), nn.LeakyReLU(inplace=True), make.conv(dim, dim, 3, 2), make.conv(dim, dim, 3, 2),
            make.conv(dim, dim, 3),
        )  # fmt: skip
        self.norm = make.norm(dim)
        self.positions = nn.Parameter(torch.zeros(side, side, dim, **make.factory))
        self.blocks = _blocks(config, drop_paths, make)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.norm(self.downsampler(x).movedim(1, -1))
        return self.blocks(embedded + fitted_positions(self.positions, embedded)) + embedded


class Decoder(nn.Module):
    """D_up: residual Swin blocks, a norm and a skip around them, then convolutions up to the image's size."""

    def __init__(self, config: SAIPEConfig, drop_paths: list[list[float]], make: LayerMaker) -> None:
        super().__init__()
        self.blocks = _blocks(config, drop_paths, make)
        self.norm = make.norm(config.dim)
        self.upsampler = NearestUpsampler(config.dim, make)

    def forward(self, middle: Tensor) -> Tensor:
        return self.upsampler((self.norm(self.blocks(middle)) + middle).movedim(-1, 1))


class ImageGuidanceEmbedder(nn.Module):
    """T_align: a Performer, convolutions of three sizes beside it, and attention pooling to a fixed number of tokens.

    The three convolutions share out the channels and pass a GELU; the Performer's output is added, and what each 8x8
    positions hold is fused to one key and value.
    """

    features: Tensor

    def __init__(self, config: SAIPEConfig, make: LayerMaker) -> None:
        super().__init__()
        dim, context, side = config.dim, config.context_dim, config.image_side // SHRINK
        self.project = make.linear(dim, dim)
        self.positions = nn.Parameter(torch.zeros(side, side, dim, **make.factory))
        self.performer = Performer(
            dim, config.performer_depth, config.performer_heads, config.performer_dim_head, config.performer_mult, make
        )
        # Beside trainable parameters of this very module, which makes them part of a training's checkpoint.
        shape = (config.performer_depth, config.features, config.performer_dim_head)
        self.register_buffer("features", torch.zeros(shape, dtype=torch.float32, device=make.factory["device"]))
        shares = [dim // 3 + (index < dim % 3) for index in range(3)]
        self.convs = nn.ModuleList(make.conv(dim, share, size) for share, size in zip(shares, (3, 5, 7), strict=True))
        self.fusion = make.conv(dim, context, PATCH, PATCH, padded=False)
        self.queries = nn.Parameter(torch.zeros(config.tokens, context, **make.factory))
        self.pool = AttentionPool(context, config.pool_heads, make)
        self.norm = make.norm(context)

    def forward(self, middle: Tensor) -> Tensor:
        """Tokens (B, tokens, context_dim) of F_mid (B, h, w, dim), whose sides are multiples of 8."""
        x = self.project(middle)
        x = x + fitted_positions(self.positions, x)
        x = self.performer(x.flatten(1, 2), self.features).unflatten(1, x.shape[1:3]).movedim(-1, 1)
        x = x + F.gelu(torch.cat([conv(x) for conv in self.convs], dim=1))
        fused = self.fusion(x).flatten(2).transpose(1, 2)
        queries = self.queries.to(fused).expand(len(fused), -1, -1)
        return self.norm(self.pool(queries, fused))


def _blocks(config: SAIPEConfig, drop_paths: list[list[float]], make: LayerMaker) -> nn.Sequential:
    return nn.Sequential(
        *(RSTB(config.dim, config.heads, config.window, config.mlp_ratio, rates, make) for rates in drop_paths)
    )


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images stretched bilinearly, with antialiasing, in single precision at least; those of that size untouched."""
    if tuple(images.shape[-2:]) == (height, width):
        return images
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    resized = F.interpolate(exact, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return resized.to(images.dtype)


def _mean(like: Tensor) -> Tensor:
    return like.new_tensor(_MEAN)[:, None, None]
