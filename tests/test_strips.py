"""Large pictures strip by strip: the same numbers as at once, nothing of the caller's overwritten, turned files too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from restoration.compute import Compute
from restoration.jpeg.file import apply_orientation
from restoration.jpeg.stored import StoredPicture
from restoration.one_step_pipeline import OneStepSettings, SeenImages, restore_one_step
from restoration.strips import blend_, is_finite, round_to_8bit_, row_strips
from restoration.tiling import Tiler


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.1


def test_strips_cover_all_rows_once() -> None:
    rows = [row for strip in row_strips(1000, 30_000) for row in range(strip.start, strip.stop)]
    assert rows == list(range(1000)) and len(list(row_strips(1000, 30_000))) > 5
    assert [strip.stop - strip.start for strip in row_strips(3, 10**9)] == [1, 1, 1]


def test_rounding_and_blending_are_those_of_the_whole() -> None:
    """More than a strip: 6 million values."""
    first, second = noise(1, 3, 1000, 2000), noise(1, 3, 1000, 2000, seed=1)
    assert torch.equal(round_to_8bit_(first.clone()), (first * 255).round().clamp(0, 255) / 255)
    assert torch.equal(blend_(first.clone(), second, 0.3), torch.lerp(second, first, 0.3))
    assert is_finite(first)
    first[0, 2, 999, 1999] = torch.inf
    assert not is_finite(first)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_windows_of_turned_pictures(orientation: int) -> None:
    stored = noise(1, 3, 20, 33)
    picture = StoredPicture(apply_orientation(stored, orientation).contiguous(), orientation)
    rows, columns = slice(3, 11), slice(5, 30)
    assert torch.equal(picture.read(rows, columns), stored[..., rows, columns])
    assert torch.equal(picture.read(rows), stored[..., rows, :])
    new = noise(1, 3, 8, 25, seed=2)
    picture.write(new, rows, columns)
    stored[..., rows, columns] = new
    assert torch.equal(picture.upright, apply_orientation(stored, orientation))


class Nothing:
    """A model that gives back the very memory that it was given."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def denoise(self, latents: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_was_given_is_not_overwritten(batch: int, strength: float) -> None:
    """Results are rounded and blended in place; where a result is the input itself, it must be copied first."""
    images = noise(batch, 3, 32, 48).clamp(0, 1)
    given, seen = images.clone(), SeenImages(torch.zeros(batch, 1, 4), torch.zeros(batch))
    restored = restore_one_step(Nothing(), images, seen, OneStepSettings(strength=strength))
    assert torch.equal(images, given)
    assert torch.equal(restored, (given * 255).round() / 255)


def test_pictures_laid_out_as_an_image_are_restored_so() -> None:
    """ComfyUI's IMAGE is made of the result in tiles without a copy."""
    image = noise(1, 150, 170, 3).clamp(0, 1)
    seen = SeenImages(torch.zeros(1, 1, 4), torch.zeros(1))
    compute = Compute(tiler=Tiler(128, 32))
    restored = restore_one_step(Nothing(), image.movedim(-1, 1), seen, OneStepSettings(), compute=compute)
    assert restored.movedim(1, -1).is_contiguous()
