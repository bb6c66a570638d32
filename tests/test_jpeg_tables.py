"""The tables are those that libjpeg writes, and their quality is found again."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from restoration.jpeg import STANDARD_CHROMA, STANDARD_LUMA, QualityEstimate, estimate_quality, tables_for_quality

# Equal steps are no multiple of the IJG table; they stand for the tables of Photoshop and of cameras.
FLAT = torch.full((8, 8), 10)


def pillow_tables(quality: int) -> list[torch.Tensor]:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality)
    tables = Image.open(buffer).quantization
    return [torch.from_numpy(np.array(tables[i])).reshape(8, 8) for i in (0, 1)]


@pytest.mark.parametrize("quality", [0, 1, 2, 10, 15, 30, 35, 45, 49, 50, 51, 75, 99, 100])
def test_tables_are_those_pillow_writes(quality: int) -> None:
    for ours, theirs in zip(tables_for_quality(quality), pillow_tables(quality), strict=True):
        assert torch.equal(ours, theirs)


def test_a_tensor_of_qualities_gives_a_table_each() -> None:
    luma, chroma = tables_for_quality(torch.tensor([5, 50, 95]))
    for i, quality in enumerate((5, 50, 95)):
        assert torch.equal(luma[i], pillow_tables(quality)[0]) and torch.equal(chroma[i], pillow_tables(quality)[1])


@pytest.mark.parametrize("quality", [-1, 101, torch.tensor([50, 120]), torch.tensor(50.0)])
def test_impossible_qualities_are_refused(quality: int | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="quality expected"):
        tables_for_quality(quality)


def test_every_quality_is_found_again_exactly_also_from_luma_alone() -> None:
    for quality in range(1, 101):
        luma, chroma = tables_for_quality(quality)
        for tables in ([luma, chroma], [luma], [luma[None], chroma[None], chroma[None]]):
            assert estimate_quality(tables) == QualityEstimate(float(quality), exact=True)


def test_mixed_qualities_are_not_called_exact() -> None:
    estimate = estimate_quality([tables_for_quality(30)[0], tables_for_quality(60)[1]])
    assert not estimate.exact and estimate.quality == pytest.approx(30)


def test_other_tables_get_a_quality_that_falls_with_their_steps() -> None:
    scales = [0.05, 0.3, 1.0, 3.0, 10.0, 300.0]
    qualities = [estimate_quality([(FLAT * scale).ceil().long()]).quality for scale in scales]
    assert qualities == sorted(qualities, reverse=True)
    assert 85 < estimate_quality([FLAT]).quality < 93  # IJG 89 has luma steps 2..27, geometric mean 10


@pytest.mark.parametrize(("factor", "quality"), [(1.05, 47.6), (0.95, 52.5), (2.02, 24.8)])
def test_scaled_tables_lie_between_their_neighbours(factor: float, quality: float) -> None:
    """The scale s of the base table stands for quality 50 / s below 50 and 100 - 50 s above."""
    estimate = estimate_quality([(STANDARD_LUMA * factor).round().long(), (STANDARD_CHROMA * factor).round().long()])
    assert not estimate.exact and estimate.quality == pytest.approx(quality, abs=0.3)


def test_tables_beyond_the_scale_and_broken_ones_get_its_ends() -> None:
    assert estimate_quality([torch.full((8, 8), 60000)]) == QualityEstimate(1.0, exact=False)
    assert estimate_quality([torch.zeros(8, 8, dtype=torch.long)]) == QualityEstimate(100.0, exact=False)
    with pytest.raises(ValueError, match="luma table"):
        estimate_quality([])
