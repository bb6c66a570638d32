"""The configurations of guided diffusion's and DDPM's networks, as far as the shapes of their tensors tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..networks.adm_unet import ADMUNetConfig
from ..networks.ddpm_unet import DDPMUNetConfig
from ._checkpoint import CheckpointError

_HEAD_CHANNELS = 64
_LOWEST_SIDE = 8
_DDPM_ATTENTION_SIDE = 16
_OTHER_DESIGNS = {
    (192, (1, 2, 3, 4), 3): "64x64_diffusion.pt: another order in its attention, and a cosine schedule",
    (256, (1, 1, 2, 3, 4), 2): "128x128_diffusion.pt: four attention heads at each level",
}
"""Published networks that the shapes cannot tell from those that are known, by width, levels and blocks."""


class PublishedShapes:
    """A state dict whose names are those of guided diffusion or of DDPM.

    Args:
        state: Its tensors.
        name: Of the file, for messages.
        error: What is raised.
    """

    def __init__(self, state: Mapping[str, Tensor], name: str, error: type[CheckpointError]) -> None:
        self.state, self.name, self.error = state, name, error

    def adm(self, head_channels: int | None, image_size: int | None) -> tuple[ADMUNetConfig, list[str]]:
        """The configuration of a network of guided diffusion, and what of it was assumed, in words.

        Raises:
            CheckpointError: It is one of its other designs, or lacks tensors that would show its levels.
        """
        self._check_adm_design()
        ups = [stage for stage in self._indices("output_blocks") if self._has_upsampling(stage)]
        levels, blocks = len(ups) + 1, ups[0] if ups else self._count("output_blocks") - 1
        if any(len(self._indices(way)) != levels * (blocks + 1) for way in ("input_blocks", "output_blocks")):
            raise self.error(
                f"{self.name}: expected {levels} levels of {blocks} blocks in its input_blocks and output_blocks, got "
                "another number of them. Download or copy it again."
            )
        firsts = [1 + level * (blocks + 1) for level in range(levels)]
        width = self._shape("time_embed.0.weight", 2)[1]
        channels = [self._shape(f"input_blocks.{first}.0.in_layers.2.weight", 4)[0] for first in firsts]
        attentive = [level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in self.state]
        classes = self._shape("label_emb.weight", 2)[0] if "label_emb.weight" in self.state else 0
        fields = {
            "out_channels": self._shape("out.2.weight", 4)[0], "width": width, "res_blocks": blocks,
            "channel_multipliers": _multipliers(channels, width), "attention_levels": attentive, "classes": classes,
        }  # fmt: skip
        self._check_known(width, fields["channel_multipliers"], blocks, head_channels)
        assumed = [] if head_channels else [f"attention heads of {_HEAD_CHANNELS} channels"]
        size = image_size or _LOWEST_SIDE << (levels - 1)
        assumed += [] if image_size else [f"images of {size}x{size}"]
        head = head_channels or _HEAD_CHANNELS
        return self._made(ADMUNetConfig, {**fields, "head_channels": head, "image_size": size}), assumed

    def ddpm(self, head_channels: int | None, image_size: int | None) -> tuple[DDPMUNetConfig, list[str]]:
        """The configuration of DDPM's network, and what of it was assumed, in words.

        Raises:
            CheckpointError: It has other channels than an image, or lacks tensors that would show its levels.
        """
        if head_channels is not None:
            raise self.error(f"{self.name}: expected no head_channels for DDPM, whose attention has one head. Omit it.")
        self._check_channels("conv_in.weight", "conv_out.weight", (3,))
        width, levels = self._shape("temb.dense.0.weight", 2)[1], self._count("down")
        channels = [self._shape(f"down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
        attentive = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in self.state]
        blocks = self._count("down.0.block")
        usual = _DDPM_ATTENTION_SIDE << attentive[-1] if attentive else _LOWEST_SIDE << max(levels - 1, 0)
        fields = {
            "width": width, "channel_multipliers": _multipliers(channels, width), "res_blocks": blocks,
            "attention_levels": attentive, "image_size": image_size or usual,
        }  # fmt: skip
        return self._made(DDPMUNetConfig, fields), [] if image_size else [f"images of {usual}x{usual}"]

    def _check_adm_design(self) -> None:
        if "output_blocks.0.0.in_layers.0.weight" not in self.state:
            raise self.error(
                f"{self.name}: expected a diffusion model, got a network without a way up, e.g. a classifier. "
                "Choose the file of the diffusion model beside it."
            )
        self._check_channels("input_blocks.0.0.weight", "out.2.weight", (3, 6))
        if any(key.endswith((".op.weight", ".conv.weight")) for key in self.state):
            raise self._other_design("resamples by convolutions, not by residual blocks (resblock_updown False)")
        block = "input_blocks.1.0"
        told, out = self._shape(f"{block}.emb_layers.1.weight", 2)[0], self._shape(f"{block}.in_layers.2.weight", 4)[0]
        if told != 2 * out:
            raise self._other_design("adds its timestep instead of scaling by it (use_scale_shift_norm False)")

    def _check_channels(self, first: str, last: str, outputs: tuple[int, ...]) -> None:
        given, made = self._shape(first, 4)[1], self._shape(last, 4)[0]
        if given != 3 or made not in outputs:
            raise self.error(
                f"{self.name}: expected a network of 3 input and {' or '.join(map(str, outputs))} output channels, "
                f"got {given} and {made}. Upsamplers, latent and gray models cannot be priors."
            )

    def _check_known(self, width: int, multipliers: Any, blocks: int, head_channels: int | None) -> None:
        other = _OTHER_DESIGNS.get((width, tuple(multipliers), blocks))
        if other is not None and head_channels is None:
            raise self._other_design(f"is of the shape of {other}")

    def _other_design(self, what: str) -> CheckpointError:
        return self.error(
            f"{self.name}: expected a network as 256x256_diffusion_uncond.pt is built, got one that {what}. "
            "Choose a file of 256 or 512 pixels, or another of their design."
        )

    def _made(self, config: Any, fields: dict[str, Any]) -> Any:
        try:
            return config(**fields)
        except ValueError as reason:
            raise self.error(f"{self.name}: its tensors describe no network that is known here ({reason})") from reason

    def _has_upsampling(self, stage: int) -> bool:
        return any(f"output_blocks.{stage}.{place}.in_layers.0.weight" in self.state for place in (1, 2))

    def _shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        value = self.state.get(key)
        if value is None or value.dim() != dimensions:
            found = "none" if value is None else f"one of {value.dim()}"
            raise self.error(
                f"{self.name}: expected a tensor {key} of {dimensions} dimensions, got {found}. Download it again."
            )
        return tuple(value.shape)

    def _indices(self, stem: str) -> list[int]:
        start = f"{stem}."
        heads = {key.removeprefix(start).split(".")[0] for key in self.state if key.startswith(start)}
        return sorted(int(head) for head in heads if head.isdecimal())

    def _count(self, stem: str) -> int:
        return len(self._indices(stem))


def _multipliers(channels: list[int], width: int) -> tuple[float, ...]:
    return tuple(own // width if width and own % width == 0 else own / max(width, 1) for own in channels)
