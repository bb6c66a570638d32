"""The DCT codec of a restorer's own backbone as a VAE of ComfyUI's: lossless, and never more than a strip at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ..restoration.networks.dct_codec import BLOCK, CHANNELS, DCTCodec
from ..restoration.restorer_file import RestorerFile
from ..restoration.restorers import codec_of
from ..restoration.tiling import pad_to_multiple
from .dct_latent import guarded, plain
from .images import split_image

_STRIP = 1 << 20
"""Pixels that are transformed at once."""
_BYTES_FOR_EACH = 120


def make_vae(file: RestorerFile) -> Any:
    """The codec of a restorer of the family codiff or sodiff with a backbone of its own, as core's VAE.

    Raises:
        RestorerFileError: It is missing, or not valid.
    """
    return DCTVAE(codec_of(file))


class DCTVAE(comfy.sd.VAE):
    """Encodes and decodes without loss, in single precision; tiled or not, the result and the memory are the same.

    Images whose sides are no multiples of 8 are extended at the bottom and right, so that the blocks of a JPEG stay
    where they are and nothing is cut. The latent remembers their size, and decoding gives it back. Alpha is left out.
    """

    def __init__(self, codec: DCTCodec) -> None:
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = codec
        self.patcher = comfy.model_patcher.ModelPatcher(
            codec, load_device=self.device, offload_device=mm.vae_offload_device()
        )
        self.downscale_ratio = self.upscale_ratio = BLOCK
        self.latent_channels, self.latent_dim, self.output_channels = CHANNELS, 2, 3
        self.crop_input, self.size = False, None
        self.process_input = lambda image: image
        self.process_output = lambda image: image.clamp_(0, 1)
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: _STRIP * _BYTES_FOR_EACH

    def vae_output_dtype(self) -> torch.dtype:
        return torch.float32

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Images (B, H', W', 3) in colour, their sides multiples of 8."""
        return pad_to_multiple(split_image(pixels)[0], BLOCK)[0].movedim(1, -1)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Latents (B, 192, ceil(H/8), ceil(W/8)) of an IMAGE (B, H, W, C)."""
        pictures = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        count, _, height, width = pictures.shape
        latents = torch.empty(count, CHANNELS, height // BLOCK, width // BLOCK, device=self.output_device)
        for item, row, strip in self._strips(self.first_stage_model.encode, pictures, BLOCK, width):
            latents[item, :, row : row + strip.shape[1]] = strip
        return guarded(latents, tuple(pixel_samples.shape[1:3]))

    def encode_tiled(self, pixel_samples: Tensor, *_: Any, **__: Any) -> Tensor:
        """As `encode`, which needs no tiles."""
        return self.encode(pixel_samples)

    def decode(self, samples_in: Tensor, *_: Any, **__: Any) -> Tensor:
        """An IMAGE (B, H, W, 3) of latents (B, 192, h, w), of their pictures' size, or (8 h, 8 w) where none is known.

        Raises:
            ValueError: They are no such latents.
        """
        if samples_in.dim() != 4 or samples_in.shape[1] != CHANNELS or 0 in samples_in.shape:
            raise ValueError(
                f"expected a latent of this VAE, (batch, {CHANNELS}, height, width), got {tuple(samples_in.shape)}. "
                "Decode it with the VAE that it was encoded with."
            )
        count, _channels, rows, columns = samples_in.shape
        height, width = getattr(samples_in, "picture_size", None) or (BLOCK * rows, BLOCK * columns)
        image = torch.empty(count, height, width, 3, device=self.output_device)
        for item, row, strip in self._strips(self.first_stage_model.decode, plain(samples_in), 1, BLOCK * columns):
            window = image[item, BLOCK * row : BLOCK * row + strip.shape[1]]
            window.copy_(strip[:, : len(window), :width].clamp_(0, 1).movedim(0, -1))
        return image

    def decode_tiled(self, samples: Tensor, *_: Any, **__: Any) -> Tensor:
        """As `decode`, which needs no tiles."""
        return self.decode(samples)

    def _strips(
        self, transform: Callable[[Tensor], Tensor], samples: Tensor, block: int, width: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Each item, the number of its first row of blocks, and the transform (C, h, w) of so many as fit at once.

        Args:
            transform: Of the codec.
            samples: Pictures or latents, (B, C, H, W).
            block: Rows of samples that make a row of blocks.
            width: Of the pictures, pixels.
        """
        mm.load_models_gpu([self.patcher], memory_required=_STRIP * _BYTES_FOR_EACH)
        fitting = max(1, _STRIP // (BLOCK * width))
        for item, sample in enumerate(samples.split(1)):
            for number, strip in enumerate(sample.split(fitting * block, dim=2)):
                mm.throw_exception_if_processing_interrupted()
                yield item, number * fitting, transform(strip.to(self.device, torch.float32))[0]
