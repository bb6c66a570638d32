"""What a JPEG says for certain: every DCT coefficient lies in its quantisation cell, [(q - 1/2) Q, (q + 1/2) Q]."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .codec import Coefficients, image_to_dct, inverse_dct, rgb_to_ycbcr, ycbcr_to_rgb
from .file import JPEGData, apply_orientation, undo_orientation
from .sampling import component_ratios

_PIXELS_AT_ONCE = 1_000_000


def clamp_to_cells(images: Tensor, jpeg: JPEGData) -> Tensor:
    """Project images onto the quantisation cells of a JPEG, in continuous levels.

    Each component is sampled down as the file's encoder does, its DCT coefficients are clamped, and the difference is
    added back (repeated where chroma is subsampled, which keeps the box mean exact). The final clip to [0, 1] can move
    some coefficients out of their cells again by a little.

    Args:
        images: (B, 3, H, W) in [0, 1], upright: the file's EXIF orientation has been applied.
        jpeg: The file.

    Returns:
        The projected images, of the same shape, type and device.

    Raises:
        ValueError: The images are not of the file's size.
    """
    stored = undo_orientation(images, jpeg.orientation)
    if stored.shape[-2:] != (jpeg.height, jpeg.width):
        raise ValueError(
            f"expected images of the JPEG's size, {jpeg.upright_width}x{jpeg.upright_height}, "
            f"got {images.shape[-1]}x{images.shape[-2]}. "
            f"Connect the picture that was restored from {jpeg.name}, without resizing it."
        )
    projected = torch.empty_like(stored)
    tallest = max(vertical for _, vertical in component_ratios(jpeg.coefficients.sampling))
    rows = max(1, _PIXELS_AT_ONCE // (jpeg.width * 8 * tallest)) * 8 * tallest
    for top in range(0, jpeg.height, rows):
        strip = slice(top, min(top + rows, jpeg.height))
        projected[..., strip, :] = _clamp_strip(stored[..., strip, :], _strip_of(jpeg.coefficients, strip))
    return apply_orientation(projected, jpeg.orientation)


def _strip_of(coefficients: Coefficients, strip: slice) -> Coefficients:
    """The coefficients of some rows of pixels, from a block boundary of every component on."""
    planes = []
    for plane, (_, vertical) in zip(coefficients.planes, component_ratios(coefficients.sampling), strict=True):
        first, after = strip.start // (8 * vertical), -(-strip.stop // (8 * vertical))
        planes.append(plane[:, first:after])
    return replace(coefficients, planes=tuple(planes), height=strip.stop - strip.start)


def _clamp_strip(images: Tensor, coefficients: Coefficients) -> Tensor:
    coefficients = coefficients.to(images.device)
    space = coefficients.color_space
    blocks = image_to_dct(images, coefficients.sampling, color_space=space, round_to_8bit=False)
    corrections = []
    parts = zip(blocks, coefficients.planes, coefficients.tables, component_ratios(coefficients.sampling), strict=True)
    for block, plane, table, (horizontal, vertical) in parts:
        step = table.float()[:, None, None]
        low, high = (plane.float() - 0.5) * step, (plane.float() + 0.5) * step
        correction = inverse_dct(torch.clamp(block, low, high) - block)
        wide = correction.repeat_interleave(vertical, -2).repeat_interleave(horizontal, -1)
        corrections.append(wide[..., : images.shape[-2], : images.shape[-1]])
    return (_add(images.float() * 255, corrections, space) / 255).clamp(0, 1).to(images.dtype)


def _add(levels: Tensor, corrections: list[Tensor], color_space: str) -> Tensor:
    if color_space == "gray":
        return levels + corrections[0][:, None]
    stacked = torch.stack(corrections, dim=1)
    if color_space == "rgb":
        return levels + stacked
    return ycbcr_to_rgb(rgb_to_ycbcr(levels, round_to_8bit=False) + stacked, round_to_8bit=False)
