"""What a JPEG says for certain: every DCT coefficient lies in its quantisation cell, [(q - 1/2) Q, (q + 1/2) Q]."""

from __future__ import annotations

from torch import Tensor

from .cells import QuantizationCells
from .file import JPEGData


def clamp_to_cells(images: Tensor, jpeg: JPEGData, strength: float = 1.0) -> Tensor:
    """`QuantizationCells(jpeg, images.device).project(images, strength=strength)`, for a single use."""
    return QuantizationCells(jpeg, images.device).project(images, strength=strength)
