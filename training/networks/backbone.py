"""The small one-step restorer as diffusers runs it: its UNet, new or from a file, on the DCT latent."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from restoration.diffusion.one_step import interpolate_alphas_cumprod, remove_residual
from restoration.networks.dct_codec import DCTCodec
from restoration.networks.small_unet import SmallUNetConfig
from restoration.restorer_file import RestorerFile, RestorerFileError, load_part
from restoration.restorers import backbone_of, codec_of
from restoration.tiling import crop_to, pad_to_multiple
from training.networks.discriminators import draw_layers


def make_unet(config: SmallUNetConfig, generator: torch.Generator | None = None) -> UNet2DConditionModel:
    """The UNet, its convolutions laid out as CPUs and GPUs like them best.

    Args:
        config: Its shape.
        generator: Draws its weights, but for the last layer, which is zero, so that it restores nothing yet; None
            leaves them undefined.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config.diffusers_arguments())
        if not config.middle_looks_around:
            _let_middle_see_prompt_alone(unet, config)
        config.set_norms(unet)
    unet = unet.to_empty(device="cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if generator is not None:
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()
        draw_layers(unet, generator)
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
    return unet


def _let_middle_see_prompt_alone(unet: UNet2DConditionModel, config: SmallUNetConfig) -> None:
    """What `only_cross_attention` does in the other blocks; diffusers' middle block does not know it."""
    for block in unet.mid_block.attentions[0].transformer_blocks:  # type: ignore[union-attr, index]
        block.only_cross_attention = True
        for name in ("to_k", "to_v"):
            setattr(block.attn1, name, nn.Linear(config.context_dim, config.widths[-1], bias=False))


class DCTModel(nn.Module):
    """UNet and codec: a `LatentModel` (restoration.one_step_pipeline).

    Args:
        unet: Of `make_unet`.
        codec: Its scale is the restorer's.
        size_multiple: Pixels that sides of images must be multiples of for the UNet.
    """

    def __init__(self, unet: UNet2DConditionModel, codec: DCTCodec, size_multiple: int) -> None:
        super().__init__()
        self.network, self.codec, self.size_multiple = unet, codec, size_multiple

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, 192, H/8, W/8) of images (B, 3, H, W) in [0, 1], on the codec's device."""
        return self.codec.encode(images.to(self.codec.scale.device))

    def denoise(self, latents: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents, float32, from latents (B, 192, h, w), tokens (B, K, context) and timesteps (B,)."""
        device = self.codec.scale.device
        padded, size = pad_to_multiple(latents, self.size_multiple // 8)
        inputs = padded.contiguous(memory_format=torch.channels_last)
        residual = self.network(inputs, timesteps.to(device), tokens.to(device), return_dict=False)[0]
        return remove_residual(latents, crop_to(residual, size), interpolate_alphas_cumprod(timesteps.cpu()))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8 h, 8 w), not clamped, of latents (B, 192, h, w)."""
        return self.codec.decode(latents)


def load_latent_model(file: RestorerFile, device: torch.device | str = "cpu") -> DCTModel:
    """UNet and codec of a restorer file that brings its own, in evaluation mode, frozen, float32.

    Raises:
        RestorerFileError: It has no backbone of its own, or not a whole one.
    """
    config = backbone_of(file.metadata, file.name)
    if config is None:
        raise RestorerFileError(
            f"{file.name}: expected a one-step restorer with a network of its own, got one of the family "
            f"{file.metadata.family} that needs {file.metadata.base or 'none'}. Choose another file."
        )
    model = DCTModel(make_unet(config), codec_of(file), config.size_multiple)
    load_part(model.network, file, "unet")
    return model.to(device).eval().requires_grad_(False)
