"""What a JPEG says for certain: every DCT coefficient lies in its quantisation cell, [(q - 1/2) Q, (q + 1/2) Q]."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import image_to_dct, inverse_dct, rgb_to_ycbcr, ycbcr_to_rgb
from .file import JPEGData, apply_orientation, undo_orientation
from .sampling import component_ratios


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
        upright = (jpeg.height, jpeg.width) if jpeg.orientation < 5 else (jpeg.width, jpeg.height)
        raise ValueError(
            f"expected images of the JPEG's size, {upright[1]}x{upright[0]}, "
            f"got {images.shape[-1]}x{images.shape[-2]}. "
            f"Connect the picture that was restored from {jpeg.name}, without resizing it."
        )
    coefficients = jpeg.coefficients.to(images.device)
    blocks = image_to_dct(stored, coefficients.sampling, color_space=coefficients.color_space, round_to_8bit=False)
    corrections = []
    parts = zip(blocks, coefficients.planes, coefficients.tables, component_ratios(coefficients.sampling), strict=True)
    for block, plane, table, (horizontal, vertical) in parts:
        step = table.float()[:, None, None]
        low, high = (plane.float() - 0.5) * step, (plane.float() + 0.5) * step
        correction = inverse_dct(torch.clamp(block, low, high) - block)
        wide = correction.repeat_interleave(vertical, -2).repeat_interleave(horizontal, -1)
        corrections.append(wide[..., : jpeg.height, : jpeg.width])
    restored = _add(stored.float() * 255, corrections, coefficients.color_space) / 255
    return apply_orientation(restored.clamp(0, 1), jpeg.orientation).to(images.dtype)


def _add(levels: Tensor, corrections: list[Tensor], color_space: str) -> Tensor:
    if color_space == "gray":
        return levels + corrections[0][:, None]
    stacked = torch.stack(corrections, dim=1)
    if color_space == "rgb":
        return levels + stacked
    return ycbcr_to_rgb(rgb_to_ycbcr(levels, round_to_8bit=False) + stacked, round_to_8bit=False)
