"""Quantization tables of the Independent JPEG Group (IJG) and the quality they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STANDARD_LUMA: Tensor = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
"""Luminance base table, ITU-T T.81 table K.1, (8, 8) int64 in natural order: row is the vertical frequency."""

STANDARD_CHROMA: Tensor = torch.tensor(
    [
        [17, 18, 24, 47, 99, 99, 99, 99],
        [18, 21, 26, 66, 99, 99, 99, 99],
        [24, 26, 56, 99, 99, 99, 99, 99],
        [47, 66, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
    ]
)
"""Chrominance base table, ITU-T T.81 table K.2, (8, 8) int64 in natural order."""


@dataclass(frozen=True)
class QualityEstimate:
    """The IJG quality of a file's tables: `quality` in 1..100, `exact` where the tables are that quality's own."""

    quality: float
    exact: bool


def tables_for_quality(quality: int | Tensor) -> tuple[Tensor, Tensor]:
    """Luma and chroma quantization tables that libjpeg writes at a quality.

    `quality` is an int in 0..100 (0 acts as 1, as in Pillow) and gives two (8, 8) int64 tensors, or an integer tensor
    (B,) and gives two (B, 8, 8) on its device. Values are in 1..255. Raises ValueError outside the range.
    Source: jpeg_quality_scaling and jpeg_add_quant_table of libjpeg, integer arithmetic, baseline tables.
    """
    scale = _percent(torch.as_tensor(quality))[..., None, None]
    luma, chroma = (_scaled(table.to(scale.device), scale) for table in (STANDARD_LUMA, STANDARD_CHROMA))
    return luma, chroma


def estimate_quality(tables: Sequence[Tensor]) -> QualityEstimate:
    """The IJG quality of a file's tables, luma first; each (8, 8) or (1, 8, 8), as many as the file has components.

    Exact where every table is the IJG's of one quality (a grayscale file needs its luma table only). Otherwise the
    quality, with a fraction, whose luma table has the same mean logarithm: larger steps never give a higher quality,
    whatever their shape (Photoshop, cameras, 16-bit), and steps beyond the IJG's range give 1 or 100. Raises ValueError
    for an empty list.
    """
    if not tables:
        raise ValueError("estimate_quality expected at least a luma table, got none: pass the tables of the file")
    given = [table.detach().cpu().reshape(8, 8).to(torch.int64) for table in tables]
    luma, chroma = tables_for_quality(torch.arange(1, 101))
    matches = (luma == given[0]).flatten(1).all(1)
    for table in given[1:]:
        matches &= (chroma == table).flatten(1).all(1)
    if matches.any():
        return QualityEstimate(float(matches.nonzero()[0, 0] + 1), exact=True)
    return QualityEstimate(_quality_of_mean_step(_mean_log(given[0]), _mean_log(luma)), exact=False)


def _percent(quality: Tensor) -> Tensor:
    if quality.is_floating_point() or quality.is_complex() or quality.dtype == torch.bool:
        raise ValueError(f"quality expected whole numbers 0 to 100, got {quality.dtype}: round to integers first")
    if quality.numel() and (int(quality.min()) < 0 or int(quality.max()) > 100):
        raise ValueError(f"quality expected 0 to 100, got {quality.tolist()}: choose a value inside that range")
    quality = quality.long().clamp(min=1)
    return torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)


def _scaled(base: Tensor, percent: Tensor) -> Tensor:
    return ((base * percent + 50) // 100).clamp(1, 255)


def _mean_log(table: Tensor) -> Tensor:
    return table.clamp(min=1).double().log().mean((-2, -1))


def _quality_of_mean_step(mean_log: Tensor, reference: Tensor) -> float:
    """Place of `mean_log` on the falling curve `reference` (100,), linear between its points, in 1..100."""
    above = int((reference >= mean_log).sum())
    if above in (0, 100):
        return 1.0 if above == 0 else 100.0
    left, right = reference[above - 1], reference[above]
    return float(above + (left - mean_log) / (left - right))
