"""The projection onto a JPEG's quantisation cells."""

from __future__ import annotations

import pytest
import torch
from skimage import data
from torch import Tensor

from restoration.jpeg import apply_orientation, encode_with_pillow, image_to_dct, read_jpeg, read_jpeg_and_pixels
from restoration.jpeg.consistency import clamp_to_cells
from restoration.jpeg.sampling import component_ratios
from restoration.metrics import psnr


def photograph(height: int, width: int) -> Tensor:
    """Part of a photograph, away from pure black and white so that no clip interferes."""
    picture = torch.from_numpy(data.chelsea()[60 : 60 + height, 80 : 80 + width].copy())
    return picture.permute(2, 0, 1)[None].float() / 255 * 0.8 + 0.1


def blurred(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "gray"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 83)])
def test_one_clamp_brings_every_coefficient_of_whole_blocks_into_its_cell(
    subsampling: str, height: int, width: int
) -> None:
    clean = photograph(height, width)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20, subsampling), name="a.jpg")
    projected = clamp_to_cells(blurred(clean), jpeg)
    blocks = image_to_dct(projected, jpeg.coefficients.sampling, color_space=jpeg.color_space, round_to_8bit=False)
    for component, (block, plane, table) in enumerate(zip(blocks, jpeg.coefficients.planes, jpeg.tables, strict=True)):
        across, down = component_ratios(jpeg.coefficients.sampling)[component]
        rows, columns = height // (8 * down), width // (8 * across)  # blocks that no padding reaches
        distance = (block / table[:, None, None].float() - plane.float()).abs()[:, :rows, :columns]
        assert distance.max() <= 0.5 + 2e-3


def test_a_picture_that_the_file_could_have_come_from_is_not_changed() -> None:
    clean = photograph(64, 80)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 10), name="a.jpg")
    rounded = (clean * 255).round() / 255
    assert (clamp_to_cells(rounded, jpeg) - rounded).abs().max() < 2 / 255  # libjpeg rounds YCbCr before its DCT


@pytest.mark.parametrize("quality", [5, 10, 20, 50])
def test_it_never_lowers_psnr(quality: int) -> None:
    clean = photograph(120, 176)
    jpeg, decoded = read_jpeg_and_pixels(encode_with_pillow(clean[0], quality), name="a.jpg")
    for estimate in (blurred(clean), blurred(decoded[None]), decoded[None].flip(1)):
        assert psnr(clamp_to_cells(estimate, jpeg), clean) >= psnr(estimate, clean) - 1e-3


def test_orientation_is_undone_first_and_applied_again() -> None:
    import dataclasses

    clean = photograph(64, 96)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20), name="a.jpg")
    turned = dataclasses.replace(jpeg, orientation=6)
    upright = apply_orientation(blurred(clean), 6)
    assert torch.equal(clamp_to_cells(upright, turned), apply_orientation(clamp_to_cells(blurred(clean), jpeg), 6))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "gray"])
def test_strips_give_what_the_whole_picture_gives(subsampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are clamped strip by strip, to bound memory."""
    clean = photograph(121, 83)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20, subsampling), name="a.jpg")
    whole = clamp_to_cells(blurred(clean), jpeg)
    monkeypatch.setattr("restoration.jpeg.cells._PIXELS_AT_ONCE", 83 * 32)
    assert (clamp_to_cells(blurred(clean), jpeg) - whole).abs().max() < 1e-6


def test_another_size_is_refused_in_one_sentence() -> None:
    jpeg = read_jpeg(encode_with_pillow(photograph(64, 96)[0], 20), name="cat.jpg")
    with pytest.raises(ValueError, match=r"expected images of the JPEG's size, 96x64, got 32x32.*cat\.jpg"):
        clamp_to_cells(torch.zeros(1, 3, 32, 32), jpeg)
