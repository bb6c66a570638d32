"""The latent that JPEG itself works in: every 8x8 block of a picture as the 192 DCT coefficients of its Y, Cb and Cr.

In place of a VAE's: lossless, a fixed linear map of each block on its own, eight times smaller along each side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..jpeg.codec import Coefficients, decode, forward_dct, inverse_dct, rgb_to_ycbcr, ycbcr_to_rgb
from ..jpeg.file import JPEGData, apply_orientation
from ..jpeg.sampling import component_ratios, upsample
from ..tiling import pad_to_multiple

BLOCK = 8
"""Pixels along each side of a position of the latent."""
CHANNELS = 3 * BLOCK * BLOCK
"""Channel 64 c + 8 v + u holds component c (Y, Cb, Cr) at vertical frequency v and horizontal frequency u."""
_SMALLEST_SCALE = 1e-4


class DCTCodec(nn.Module):
    """Pictures to latents and back, exact to rounding; always in single precision.

    The DCT is orthonormal; what makes the latent one for a network is `scale`, by which each coefficient is divided:
    its standard deviation in photographs, with the range of pixels as the unit.

    Args:
        device: Where the scale is kept.
    """

    scale: Tensor

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(CHANNELS, dtype=torch.float32, device=device))

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, 192, H/8, W/8) of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: The images have another shape, or sides that are no multiples of 8.
        """
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[-1] % BLOCK or images.shape[-2] % BLOCK:
            raise ValueError(
                f"expected images (B, 3, H, W) whose sides are multiples of {BLOCK}, got {tuple(images.shape)}. Extend "
                "them first."
            )
        levels = rgb_to_ycbcr(images.float() * 255, round_to_8bit=False) - 128
        return self._scaled(torch.stack([forward_dct(plane) for plane in levels.unbind(1)], dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8 h, 8 w), not clamped, of latents (B, 192, h, w).

        Raises:
            ValueError: The latents have another number of channels.
        """
        if latents.dim() != 4 or latents.shape[1] != CHANNELS:
            raise ValueError(f"expected latents (B, {CHANNELS}, h, w), got {tuple(latents.shape)}.")
        blocks = (latents.float() * self._divisors(latents)).unflatten(1, (3, BLOCK, BLOCK)).permute(0, 1, 4, 5, 2, 3)
        planes = [inverse_dct(component.contiguous()) for component in blocks.unbind(1)]
        return ycbcr_to_rgb(torch.stack(planes, dim=1) * 255 + 128, round_to_8bit=False) / 255

    def encode_jpeg(self, jpeg: JPEGData) -> Tensor:
        """The latent (1, 192, ceil(H/8), ceil(W/8)) of a JPEG's own coefficients, with nothing rounded or clipped.

        Components of full resolution go from block to block without ever being pixels. Subsampled ones are spread in
        between, as decoders do, so what lies outside of a picture's border comes from the file, too. Files in RGB, or
        that are to be turned upright, take the way over the decoded picture, not rounded.

        Raises:
            ValueError: Its sampling ratios are not whole.
        """
        coefficients = jpeg.coefficients
        if jpeg.orientation != 1 or coefficients.color_space == "rgb":
            upright = apply_orientation(decode(coefficients, round_to_8bit=False), jpeg.orientation)
            return self.encode(pad_to_multiple(upright, BLOCK)[0].to(self.scale.device))
        rows, columns = -(-coefficients.height // BLOCK), -(-coefficients.width // BLOCK)
        components = [blocks[:, :rows, :columns] for blocks in _full_resolution(coefficients)]
        components += [torch.zeros_like(components[0])] * (3 - len(components))
        return self._scaled(torch.stack(components, dim=1).to(self.scale.device))

    def measure(self, images: Tensor) -> None:
        """Set the scale to the standard deviations around 0 in photographs (N, 3, H, W) in [0, 1]."""
        self.scale.fill_(1.0)
        latents = self.encode(images)
        self.scale.copy_(latents.square().mean(dim=(0, 2, 3)).sqrt().clamp(min=_SMALLEST_SCALE))

    def _scaled(self, blocks: Tensor) -> Tensor:
        """Latents of coefficients (B, 3, Hb, Wb, 8, 8) in levels."""
        latents = blocks.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        return (latents / (255 * self._divisors(latents))).contiguous()

    def _divisors(self, latents: Tensor) -> Tensor:
        return self.scale.to(latents.device).view(1, -1, 1, 1)


def _full_resolution(coefficients: Coefficients) -> list[Tensor]:
    """Dequantized blocks of each component (1, Hb, Wb, 8, 8); of subsampled ones those of their samples spread out."""
    found = []
    pairs = zip(coefficients.planes, coefficients.tables, component_ratios(coefficients.sampling), strict=True)
    for plane, table, ratio in pairs:
        blocks = plane.float() * table.to(plane.device).float()[:, None, None]
        if ratio != (1, 1):
            spread = upsample(inverse_dct(blocks), ratio, round_to_8bit=False)
            height, width = (side // BLOCK * BLOCK for side in spread.shape[-2:])
            blocks = forward_dct(spread[..., :height, :width])
        found.append(blocks)
    return found
