"""What diffusers' UNet2DModel calls the layers of the two networks that a prior can be, and how it shapes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..networks.adm_unet import ADMUNet, ADMUNetConfig
from ..networks.ddpm_unet import DDPMUNet, DDPMUNetConfig

PriorConfig = ADMUNetConfig | DDPMUNetConfig
Shapes = dict[str, tuple[int, ...]]

_ADM_RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_DDPM_RESIDUAL = {
    "norm1": "norm1", "conv1": "conv1", "time_emb_proj": "temb_proj", "norm2": "norm2", "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}  # fmt: skip
_ADM_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_DDPM_ENDS = {
    "time_embedding.linear_1": "temb.dense.0", "time_embedding.linear_2": "temb.dense.1", "conv_in": "conv_in",
    "conv_norm_out": "norm_out", "conv_out": "conv_out",
}  # fmt: skip
_PROJECTIONS = ("to_q", "to_k", "to_v")
_EARLIER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class DiffusersNames:
    """Layers of a network by diffusers' names.

    Args:
        config: The network.
        shapes: Its tensors by our names.
        layers: Convolutions, linear layers, norms and embeddings, each with our name.
        attentions: Blocks of self-attention, each with our name.
    """

    config: PriorConfig
    shapes: Shapes
    layers: dict[str, str]
    attentions: dict[str, str]

    @classmethod
    def of(cls, config: PriorConfig) -> DiffusersNames:
        """The names for a network of that shape."""
        shapes = network_shapes(config)
        adm = isinstance(config, ADMUNetConfig)
        residual, ends = (_ADM_RESIDUAL, _ADM_ENDS) if adm else (_DDPM_RESIDUAL, _DDPM_ENDS)
        layers, attentions = dict(ends), {}
        for theirs, ours in _adm_blocks(config) if adm else _ddpm_blocks(config):
            if ".attentions." in theirs:
                attentions[theirs] = ours
            elif f"{ours}.weight" in shapes:
                layers[theirs] = ours
            else:
                layers |= {f"{theirs}.{key}": f"{ours}.{value}" for key, value in residual.items()}
        layers = {theirs: ours for theirs, ours in layers.items() if f"{ours}.weight" in shapes}
        attentions = {theirs: ours for theirs, ours in attentions.items() if f"{ours}.norm.weight" in shapes}
        return cls(config, shapes, layers, attentions)

    def expected(self) -> Shapes:
        """The shapes that diffusers' tensors have, in its present layout."""
        shapes = {
            f"{theirs}.{leaf}": shape for theirs, ours in self.layers.items() for leaf, shape in self._leaves(ours)
        }
        for theirs, ours in self.attentions.items():
            (channels,) = self.shapes[f"{ours}.norm.weight"]
            for layer in ("group_norm", *_PROJECTIONS, "to_out.0"):
                matrix = (channels,) if layer == "group_norm" else (channels, channels)
                shapes |= {f"{theirs}.{layer}.weight": matrix, f"{theirs}.{layer}.bias": (channels,)}
        return shapes

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as `expected` describes them, under our names and in our shapes."""
        tensors = {
            f"{ours}.{leaf}": state[f"{theirs}.{leaf}"]
            for theirs, ours in self.layers.items()
            for leaf, _ in self._leaves(ours)
        }
        for theirs, ours in self.attentions.items():
            for leaf in ("weight", "bias"):
                values = {layer: state[f"{theirs}.{layer}.{leaf}"] for layer in (*_PROJECTIONS, "to_out.0")}
                tensors[f"{ours}.norm.{leaf}"] = state[f"{theirs}.group_norm.{leaf}"]
                tensors |= {f"{ours}.{name}.{leaf}": value for name, value in self._attention(values)}
        return {key: value.reshape(self.shapes[key]) for key, value in tensors.items()}

    def _attention(self, values: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.config, ADMUNetConfig):
            heads = [values[layer].unflatten(0, (-1, self.config.head_channels)) for layer in _PROJECTIONS]
            yield "qkv", torch.stack(heads, dim=1).flatten(0, 2)  # head, then query, key, value, then channel
        else:
            yield from ((layer[-1], values[layer]) for layer in _PROJECTIONS)
        yield "proj_out", values["to_out.0"]

    def _leaves(self, ours: str) -> list[tuple[str, tuple[int, ...]]]:
        keys = ((leaf, f"{ours}.{leaf}") for leaf in ("weight", "bias"))
        return [(leaf, self.shapes[key]) for leaf, key in keys if key in self.shapes]


def network_shapes(config: PriorConfig) -> Shapes:
    """The tensors of a network of that shape, without making any."""
    network = (ADMUNet if isinstance(config, ADMUNetConfig) else DDPMUNet)(config, device="meta")  # type: ignore[arg-type]
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def modernised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention as diffusers writes it today: its earlier names replaced, its 1x1 convolutions made matrices."""
    renamed = {}
    for key, value in state.items():
        if (match := _ATTENTION.fullmatch(key)) is not None:
            block, layer, leaf = match.groups()
            key = f"{block}.{_EARLIER_NAMES.get(layer, layer)}.{leaf}"
            is_pointwise = value.dim() > 2 and all(side == 1 for side in value.shape[2:])
            value = value.flatten(1) if is_pointwise else value
        renamed[key] = value
    return renamed


def _adm_blocks(config: PriorConfig) -> Iterator[tuple[str, str]]:
    """Residual and attention blocks: diffusers' name, and that of guided diffusion, which counts them through."""
    last, blocks = len(config.channel_multipliers) - 1, config.res_blocks
    for level in range(last + 1):
        for block in range(blocks):
            ours = f"input_blocks.{1 + level * (blocks + 1) + block}"
            yield f"down_blocks.{level}.resnets.{block}", f"{ours}.0"
            yield f"down_blocks.{level}.attentions.{block}", f"{ours}.1"
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{(level + 1) * (blocks + 1)}.0"
    yield from _middle("middle_block.0", "middle_block.1", "middle_block.2")
    for step in range(last + 1):
        for block in range(blocks + 1):
            ours = f"output_blocks.{step * (blocks + 1) + block}"
            yield f"up_blocks.{step}.resnets.{block}", f"{ours}.0"
            yield f"up_blocks.{step}.attentions.{block}", f"{ours}.1"
        if step < last:
            place = 2 if last - step in config.attention_levels else 1
            yield f"up_blocks.{step}.upsamplers.0", f"output_blocks.{(step + 1) * (blocks + 1) - 1}.{place}"


def _ddpm_blocks(config: PriorConfig) -> Iterator[tuple[str, str]]:
    last, blocks = len(config.channel_multipliers) - 1, config.res_blocks
    yield from _middle("mid.block_1", "mid.attn_1", "mid.block_2")
    for way, side, count in (("down", "down", blocks), ("up", "up", blocks + 1)):
        for level in range(last + 1):
            theirs = f"{side}_blocks.{level if way == 'down' else last - level}"
            for block in range(count):
                yield f"{theirs}.resnets.{block}", f"{way}.{level}.block.{block}"
                yield f"{theirs}.attentions.{block}", f"{way}.{level}.attn.{block}"
            yield f"{theirs}.{side}samplers.0.conv", f"{way}.{level}.{side}sample.conv"


def _middle(first: str, attention: str, second: str) -> Iterator[tuple[str, str]]:
    yield "mid_block.resnets.0", first
    yield "mid_block.attentions.0", attention
    yield "mid_block.resnets.1", second
