"""The convolutions and linear layers of UNets and VAE encoders shaped like Stable Diffusion 2.1's, by diffusers' names.

What a LoRA for such a base may name, and the shape of the weight behind each name, without building the networks.
"""

from __future__ import annotations

from dataclasses import dataclass

Layers = dict[str, tuple[int, ...]]
"""Weight shapes by module name: (out, in) of a linear layer, (out, in, k, k) of a convolution."""


@dataclass(frozen=True)
class UNetLayout:
    """Shape of a `UNet2DConditionModel` with linear projections; the defaults are SD 2.1-base's.

    Args:
        in_channels: Channels of the latent that goes in.
        out_channels: Channels of the prediction.
        block_out_channels: Width of each level.
        layers_per_block: Residual blocks a level on the way down; one more on the way up.
        attention: For each level, whether its blocks have a transformer; the middle always has one.
        cross_attention_dim: Width of the prompt.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    cross_attention_dim: int = 1024

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.block_out_channels) or not self.attention or self.layers_per_block < 1:
            raise ValueError(f"expected a width and an attention flag for each level, and layers, got {self}.")

    @property
    def embedding_channels(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class VAELayout:
    """Shape of the encoder of an `AutoencoderKL`; the defaults are SD 2.1-base's.

    Args:
        in_channels: Channels of the image.
        latent_channels: Channels of the latent.
        block_out_channels: Width of each level.
        layers_per_block: Residual blocks a level.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2

    def __post_init__(self) -> None:
        if not self.block_out_channels or self.layers_per_block < 1:
            raise ValueError(f"expected a width for each level, and layers, got {self}.")


SD21_UNET, SD21_VAE = UNetLayout(), VAELayout()


def unet_layers(layout: UNetLayout = SD21_UNET) -> Layers:
    """Every convolution and linear layer of the UNet."""
    first, last, embedding = layout.block_out_channels[0], layout.block_out_channels[-1], layout.embedding_channels
    down, skips = _way_down(layout)
    return {
        "conv_in": (first, layout.in_channels, 3, 3),
        "time_embedding.linear_1": (embedding, first),
        "time_embedding.linear_2": (embedding, embedding),
        **down,
        **_residual("mid_block.resnets.0", last, last, embedding),
        **_attention("mid_block.attentions.0", last, layout),
        **_residual("mid_block.resnets.1", last, last, embedding),
        **_way_up(layout, skips),
        "conv_out": (layout.out_channels, first, 3, 3),
    }


def vae_encoder_layers(layout: VAELayout = SD21_VAE) -> Layers:
    """Every convolution and linear layer of the VAE's encoder, and `quant_conv`."""
    widths, latent = layout.block_out_channels, 2 * layout.latent_channels
    layers: Layers = {"encoder.conv_in": (widths[0], layout.in_channels, 3, 3)}
    channels = widths[0]
    for level, width in enumerate(widths):
        block = f"encoder.down_blocks.{level}"
        for index in range(layout.layers_per_block):
            layers |= _residual(f"{block}.resnets.{index}", channels, width)
            channels = width
        if level < len(widths) - 1:
            layers[f"{block}.downsamplers.0.conv"] = (width, width, 3, 3)
    for index in range(2):
        layers |= _residual(f"encoder.mid_block.resnets.{index}", channels, channels)
    layers |= _projections("encoder.mid_block.attentions.0", channels, channels)
    return layers | {"encoder.conv_out": (latent, channels, 3, 3), "quant_conv": (latent, latent, 1, 1)}


def codiff_unet_targets(layout: UNetLayout = SD21_UNET) -> Layers:
    """The layers of the UNet that CODiff adapts: all but those of the time embedding; 258 of SD 2.1-base."""
    return {key: shape for key, shape in unet_layers(layout).items() if "time_emb" not in key}


def codiff_vae_targets(layout: VAELayout = SD21_VAE) -> Layers:
    """The layers of the VAE that CODiff adapts: the whole encoder and `quant_conv`; 32 of SD 2.1-base."""
    return vae_encoder_layers(layout)


def lora_shapes(weight: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of peft's `lora_A.weight` and `lora_B.weight` for a layer's weight: A is of its kind, B is 1x1."""
    return (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))


def _way_down(layout: UNetLayout) -> tuple[Layers, list[int]]:
    """The layers, and the widths of what is passed on to the way up."""
    widths, layers = layout.block_out_channels, Layers()
    skips = [widths[0]]
    for level, (width, attends) in enumerate(zip(widths, layout.attention, strict=True)):
        block = f"down_blocks.{level}"
        for index in range(layout.layers_per_block):
            layers |= _residual(f"{block}.resnets.{index}", skips[-1], width, layout.embedding_channels)
            layers |= _attention(f"{block}.attentions.{index}", width, layout) if attends else {}
            skips.append(width)
        if level < len(widths) - 1:
            layers[f"{block}.downsamplers.0.conv"] = (width, width, 3, 3)
            skips.append(width)
    return layers, skips


def _way_up(layout: UNetLayout, skips: list[int]) -> Layers:
    widths, layers = layout.block_out_channels[::-1], Layers()
    channels = widths[0]
    for level, (width, attends) in enumerate(zip(widths, layout.attention[::-1], strict=True)):
        block = f"up_blocks.{level}"
        for index in range(layout.layers_per_block + 1):
            layers |= _residual(f"{block}.resnets.{index}", channels + skips.pop(), width, layout.embedding_channels)
            layers |= _attention(f"{block}.attentions.{index}", width, layout) if attends else {}
            channels = width
        if level < len(widths) - 1:
            layers[f"{block}.upsamplers.0.conv"] = (width, width, 3, 3)
    return layers


def _residual(name: str, inputs: int, outputs: int, embedding: int | None = None) -> Layers:
    layers: Layers = {f"{name}.conv1": (outputs, inputs, 3, 3)}
    if embedding is not None:
        layers[f"{name}.time_emb_proj"] = (outputs, embedding)
    layers[f"{name}.conv2"] = (outputs, outputs, 3, 3)
    if inputs != outputs:
        layers[f"{name}.conv_shortcut"] = (outputs, inputs, 1, 1)
    return layers


def _attention(name: str, channels: int, layout: UNetLayout) -> Layers:
    block = f"{name}.transformer_blocks.0"
    return {
        f"{name}.proj_in": (channels, channels),
        **_projections(f"{block}.attn1", channels, channels),
        **_projections(f"{block}.attn2", channels, layout.cross_attention_dim),
        f"{block}.ff.net.0.proj": (8 * channels, channels),
        f"{block}.ff.net.2": (channels, 4 * channels),
        f"{name}.proj_out": (channels, channels),
    }


def _projections(name: str, channels: int, context: int) -> Layers:
    shapes = {"to_q": (channels, channels), "to_k": (channels, context), "to_v": (channels, context)}
    return {f"{name}.{key}": shape for key, shape in shapes.items()} | {f"{name}.to_out.0": (channels, channels)}
