"""The shape of the small UNet that denoises DCT latents, in the words of the two libraries that build it.

It is Stable Diffusion's UNet, only narrow: diffusers' `UNet2DConditionModel` in training, `UNetModel` in ComfyUI. Files
hold its weights by diffusers' names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .dct_codec import BLOCK, CHANNELS

_GROUPS = 32
_MOST_LEVELS, _MOST_LAYERS, _WIDEST, _WIDEST_CONTEXT = 4, 8, 1024, 2048


@dataclass(frozen=True)
class SmallUNetConfig:
    """Everything that is needed to rebuild the network.

    Args:
        widths: Channels at each level, multiples of 32, of `head_dim` and of the first; each level is half the size of
            the one above.
        layers: Residual blocks of each level on the way down; one more on the way up.
        attention: For each level, whether its blocks have a transformer; the middle always has one.
        self_attention: Whether transformers look at the whole latent as well as at the prompt. Without, time and memory
            grow with the number of pixels and not with its square.
        head_dim: Width of an attention head.
        context_dim: Width of the prompt's tokens.
        middle_self_attention: Whether the middle's transformer looks at the whole latent even if no other does.
        norm_eps: What group norms add to the variance. As much as a latent's own (1) lets low contrasts stay low, where
            Stable Diffusion's 1e-5 makes a flat sky as strong as a forest: a residual is no longer in proportion then
            (docs/starter.md).

    Raises:
        ValueError: The numbers are no such network's.
    """

    widths: tuple[int, ...] = (160,)
    layers: int = 2
    attention: tuple[bool, ...] = (False,)
    self_attention: bool = False
    head_dim: int = 32
    context_dim: int = 128
    middle_self_attention: bool = False
    norm_eps: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (("widths", int), ("attention", bool)):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(type(value) is kind for value in values):
                raise ValueError(f"small UNet: expected {name} to be a list of {kind.__name__}, got {values!r}.")
            object.__setattr__(self, name, tuple(values))
        if not 1 <= len(self.widths) <= _MOST_LEVELS or len(self.attention) != len(self.widths):
            raise ValueError(
                f"small UNet: expected 1 to {_MOST_LEVELS} levels, each with or without attention, got {self}."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        bounds = {"layers": _MOST_LAYERS, "head_dim": _WIDEST, "context_dim": _WIDEST_CONTEXT}
        wrong = [
            name
            for name, most in bounds.items()
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= most
        ]
        wrong += [name for name in ("self_attention", "middle_self_attention") if type(getattr(self, name)) is not bool]
        if wrong:
            raise ValueError(f"small UNet: expected {', '.join(wrong)} within bounds, got {self}.")
        if type(self.norm_eps) not in (int, float) or not 0 < self.norm_eps < math.inf:
            raise ValueError(f"small UNet: expected a norm_eps above 0, got {self.norm_eps!r}.")
        unit = math.lcm(_GROUPS, self.head_dim, self.widths[0])
        if any(not 1 <= width <= _WIDEST or width % unit for width in self.widths):
            raise ValueError(
                f"small UNet: expected widths up to {_WIDEST} that are multiples of {_GROUPS}, of head_dim "
                f"({self.head_dim}) and of the first, got {list(self.widths)}."
            )

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of an image are multiples of."""
        return BLOCK * 2 ** (len(self.widths) - 1)

    @property
    def middle_looks_around(self) -> bool:
        """Whether the middle's transformer attends to the latent itself."""
        return self.self_attention or self.middle_self_attention

    def diffusers_arguments(self) -> dict[str, Any]:
        """What `diffusers.UNet2DConditionModel` is made with.

        Its middle attends to the latent whatever it is told: the trainer's `make_unet` changes that afterwards.
        """
        kinds = ["CrossAttn" if attends else "" for attends in self.attention]
        return {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
            "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "cross_attention_dim": self.context_dim,
            "attention_head_dim": tuple(width // self.head_dim for width in self.widths),  # the number of heads
            "use_linear_projection": True,
            "only_cross_attention": not self.self_attention,
            "mid_block_only_cross_attention": not self.middle_looks_around,
        }

    def core_arguments(self) -> dict[str, Any]:
        """What ComfyUI's `UNetModel` is made with, but for its type, device and operations."""
        first = self.widths[0]
        depths = [int(attends) for attends in self.attention]
        return {
            "image_size": 32,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "model_channels": first,
            "channel_mult": [width // first for width in self.widths],
            "num_res_blocks": [self.layers] * len(self.widths),
            "num_heads": -1,
            "num_head_channels": self.head_dim,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "transformer_depth": [depth for depth in depths for _ in range(self.layers)],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [depth for depth in depths for _ in range(self.layers + 1)],
            "context_dim": self.context_dim,
            "disable_self_attentions": [not self.self_attention] * len(self.widths),
            "disable_middle_self_attn": not self.middle_looks_around,
            "legacy": False,
        }

    def set_norms(self, network: nn.Module) -> None:
        """Give the group norms of a network that either library has built their `norm_eps`."""
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = self.norm_eps

    def activation_bytes(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> int:
        """About how many bytes one evaluation for one image of this size takes beside the weights.

        What the way down keeps for the way up, and the widest place: four maps twice as wide in a residual block, or 24
        maps in a transformer (its feed-forward layers). The scores of self-attention are not counted. 0 to 30% above
        the sum of live tensors that was measured for 512x512 pixels (tests/test_small_unet.py).
        """
        positions = math.ceil(height / BLOCK) * math.ceil(width / BLOCK)
        kept = sum((self.layers + 1) * channels / 4**level for level, channels in enumerate(self.widths))
        attends = (*self.attention[:-1], True)  # the middle is as small as the last level
        working = max((24 if attends[level] else 8) * channels / 4**level for level, channels in enumerate(self.widths))
        return int((kept + working + 2 * CHANNELS) * positions * dtype.itemsize)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
