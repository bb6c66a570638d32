"""The quantisation cells of a file: projection, whole-cell shift, decode and agreement, against SciPy's DCT."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.fft
import torch
from skimage import data
from torch import Tensor

from restoration.jpeg import (
    JPEGData,
    QuantizationCells,
    apply_orientation,
    decode,
    encode,
    encode_with_pillow,
    jpeg_data_from,
    read_jpeg,
    read_jpeg_and_pixels,
    tables_for_quality,
)
from restoration.jpeg.sampling import component_ratios
from restoration.metrics import psnr

NAMES = ["4:4:4", "4:2:2", "4:4:0", "4:2:0", "4:1:1", "gray", "2x2,2x1,1x2", "1x3,1x1,1x1", "2x2,2x2,2x2"]


def photograph(height: int, width: int) -> Tensor:
    """Part of a photograph, away from pure black and white so that no clip interferes."""
    picture = torch.from_numpy(data.chelsea()[60 : 60 + height, 80 : 80 + width].copy())
    return picture.permute(2, 0, 1)[None].float() / 255 * 0.6 + 0.2


def blurred(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)


def file_of(images: Tensor, name: str, quality: int = 20, color_space: str = "ycbcr") -> JPEGData:
    coefficients = encode(images, tables_for_quality(quality), name, color_space=color_space)
    return jpeg_data_from(coefficients, "a.jpg")


def scipy_blocks(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3)
    return np.asarray(scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho"))


def numpy_components(image: Tensor, halved: bool) -> list[np.ndarray]:
    """JFIF's components of (1, 3, H, W), chroma as means of 2x2 if `halved`, less 128."""
    r, g, b = (image[0].double().numpy() * 255)[:]
    y = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = [(b - y) / 1.772, (r - y) / 1.402]
    if halved:
        chroma = [c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2).mean((1, 3)) for c in chroma]
    return [y - 128, *chroma]


@pytest.mark.parametrize("name", ["4:4:4", "4:2:0"])
def test_projection_is_the_clamp_of_scipys_coefficients(name: str) -> None:
    """Inside of its cell nothing moves; outside it moves to the border, and the pixels by the inverse transform."""
    clean = photograph(64, 96)
    jpeg, estimate = file_of(clean, name), blurred(clean) + torch.tensor([0.05, 0, -0.05])[:, None, None]
    projected = QuantizationCells(jpeg).project(estimate)
    pairs = zip(*(numpy_components(image, name == "4:2:0") for image in (estimate, projected)), strict=True)
    for (before, after), plane, table in zip(pairs, jpeg.coefficients.planes, jpeg.tables, strict=True):
        q, step = plane[0].double().numpy(), table[0].double().numpy()
        expected = np.clip(scipy_blocks(before), (q - 0.5) * step, (q + 0.5) * step)
        assert np.abs(scipy_blocks(after) - expected).max() < 2e-3
        assert np.abs(expected - scipy_blocks(before)).max() > 1, "nothing moved, so this test shows nothing"


def test_chroma_moves_as_a_whole_with_its_box() -> None:
    """The change of a 4:2:0 file's chroma is the same for the four pixels of a sample: their means stay exact."""
    clean = photograph(32, 48)
    tinted = (clean + torch.tensor([0.1, 0.0, -0.1])[:, None, None]).clamp(0, 1)
    change = (QuantizationCells(file_of(clean, "4:2:0")).project(tinted) - tinted)[0]
    chroma = change[0] - change[1]
    assert chroma.abs().max() > 0.05
    assert (chroma[::2, ::2] - chroma[1::2, 1::2]).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(48, 96), (61, 83), (1, 1), (9, 17)])
def test_repeated_projection_reaches_agreement_in_any_size_and_sampling(name: str, height: int, width: int) -> None:
    """Blocks that the picture fills in part converge, others are exact at once."""
    clean = photograph(height, width)
    jpeg, estimate = file_of(clean, name), clean * 0.5 + 0.3
    cells = QuantizationCells(jpeg)
    once = cells.project(estimate)
    assert cells.agreement(once) >= cells.agreement(estimate)
    if (height, width) == (48, 96):
        assert cells.agreement(once) == 1
    for _ in range(60):
        once = cells.project(once)
    assert cells.agreement(once) > 0.995


@pytest.mark.parametrize("name", NAMES)
def test_shift_moves_by_whole_cells_to_the_files_coefficients(name: str) -> None:
    """As DDRM-JPEG's x - Dec(Enc(x)) + Dec(y): encoded again it is the file, its place inside of the cells is kept."""
    clean = photograph(48, 96)
    jpeg, estimate = file_of(clean, name, 40), blurred(clean)
    cells = QuantizationCells(jpeg)
    shifted = cells.shift(estimate)
    assert cells.agreement(shifted) == 1 and cells.agreement(estimate) < 0.99
    own = file_of_float(estimate, jpeg)
    expected = estimate[0].numpy() - linear_decode(own) + linear_decode(jpeg)
    near = np.abs(shifted[0].numpy() - expected) < 1e-4
    assert near.mean() > 0.9  # on the border of two cells either may be taken


def linear_decode(jpeg: JPEGData) -> np.ndarray:
    """SciPy's decode of whole blocks (3, H, W), each sample repeated over its pixels, nothing rounded or clipped."""
    planes = []
    pairs = zip(jpeg.coefficients.planes, jpeg.tables, component_ratios(jpeg.coefficients.sampling), strict=True)
    for plane, table, (across, down) in pairs:
        blocks = np.asarray(
            scipy.fft.idctn(plane[0].double().numpy() * table[0].double().numpy(), axes=(2, 3), norm="ortho")
        )
        rows, columns = blocks.shape[:2]
        samples = blocks.transpose(0, 2, 1, 3).reshape(8 * rows, 8 * columns)
        planes.append(samples.repeat(down, 0).repeat(across, 1))
    y, cb, cr = planes if len(planes) == 3 else (planes[0], 0, 0)
    red, blue = y + 1.402 * cr, y + 1.772 * cb
    return (np.stack([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue]) + 128) / 255


def file_of_float(images: Tensor, like: JPEGData) -> JPEGData:
    return jpeg_data_from(encode(images, like.tables, like.subsampling, round_to_8bit=False), "own.jpg")


def test_shift_is_not_clipped() -> None:
    clean = photograph(32, 32)
    cells = QuantizationCells(file_of(clean, "4:4:4"))
    assert (cells.shift(clean + 1.5) - clean).abs().max() < 1, "out of range before, near the file after"
    white = torch.ones(1, 3, 16, 16)
    beyond = QuantizationCells(file_of(white, "gray", 10)).shift(white + 0.02 * torch.ones(16).cumsum(0))
    assert beyond.max() > 1


def test_decode_is_the_codecs() -> None:
    jpeg = file_of(photograph(61, 83), "4:2:0")
    assert torch.equal(QuantizationCells(jpeg).decoded(), decode(jpeg.coefficients, round_to_8bit=False))


@pytest.mark.parametrize("name", NAMES)
def test_in_the_files_own_components_no_coefficient_moves_away_from_the_original(name: str) -> None:
    """Whole blocks, an original that the file was made from: each coefficient stays or comes nearer."""
    clean = photograph(48, 96)
    jpeg = jpeg_data_from(encode(clean, tables_for_quality(20), name, round_to_8bit=False), "a.jpg")
    cells, estimate = QuantizationCells(jpeg), blurred(clean) * 0.9
    truth, before, after = (cells.layout.coefficients(x * 255) for x in (clean, estimate, cells.project(estimate)))
    for t, b, a in zip(truth, before, after, strict=True):
        assert ((a - t).abs() <= (b - t).abs() + 2e-3).all() and (a - b).abs().max() > 1


@pytest.mark.parametrize("quality", [5, 10, 20, 50])
def test_psnr_of_these_photographs_rises_or_stays(quality: int) -> None:
    """What is true on average, not for every picture: see the next test."""
    clean = photograph(120, 176)
    jpeg, decoded = read_jpeg_and_pixels(encode_with_pillow(clean[0], quality))
    cells = QuantizationCells(jpeg)
    for estimate in (blurred(clean), blurred(decoded[None]), decoded[None].flip(1)):
        assert psnr(cells.project(estimate), clean) >= psnr(estimate, clean) - 1e-3


def test_a_picture_that_the_file_could_have_come_from_is_not_changed() -> None:
    clean = (photograph(64, 80) * 255).round() / 255
    cells = QuantizationCells(read_jpeg(encode_with_pillow(clean[0], 10)))
    assert (cells.project(clean) - clean).abs().max() < 2 / 255  # libjpeg rounds YCbCr before its DCT


def test_psnr_of_rgb_can_fall() -> None:
    """Errors of luma and chroma that cancel in RGB: only those of chroma leave their cells, and are taken away."""
    luma, cb = torch.ones(3)[:, None, None] / 255, torch.tensor([0, -0.344136, 1.772])[:, None, None] / 255
    clean = torch.zeros(1, 3, 16, 16) + 128 * luma - cb
    coefficients = encode(clean, tables_for_quality(50), "4:4:4", round_to_8bit=False)
    estimate = clean + 0.9 * luma - 0.4 * cb
    held = QuantizationCells(jpeg_data_from(coefficients, "a.jpg")).project(estimate)
    assert psnr(held, clean) < psnr(estimate, clean) - 0.5


def test_rgb_files_are_held_in_their_own_planes() -> None:
    clean = photograph(32, 48)
    jpeg = file_of(clean, "4:4:4", color_space="rgb")
    cells = QuantizationCells(jpeg)
    assert jpeg.color_space == "rgb" and cells.agreement(blurred(clean)) < 0.99
    assert cells.agreement(cells.project(blurred(clean))) == 1


def test_gray_files_move_all_channels_alike() -> None:
    clean = photograph(32, 48)
    estimate = blurred(clean)
    change = QuantizationCells(file_of(clean, "gray")).project(estimate) - estimate
    assert (change[:, 0] - change[:, 2]).abs().max() < 1e-6 and change.abs().max() > 0.01


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone_first_and_applied_again(orientation: int) -> None:
    clean = photograph(40, 72)
    jpeg = file_of(clean, "4:2:0")
    turned = QuantizationCells(dataclasses.replace(jpeg, orientation=orientation))
    straight = QuantizationCells(jpeg)
    upright = apply_orientation(blurred(clean), orientation)
    assert torch.equal(turned.project(upright), apply_orientation(straight.project(blurred(clean)), orientation))
    assert torch.equal(turned.decoded(), apply_orientation(straight.decoded(), orientation))
    assert turned.agreement(upright) == straight.agreement(blurred(clean))


def test_an_image_does_not_depend_on_its_batch() -> None:
    clean = photograph(40, 72)
    cells = QuantizationCells(file_of(clean, "4:2:0"))
    batch = torch.cat([blurred(clean), clean * 0.9, clean.flip(1)])
    together = cells.project(batch)
    for index in range(3):
        assert (cells.project(batch[index : index + 1]) - together[index]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["4:4:4", "4:2:0", "gray", "1x3,1x1,1x1"])
@pytest.mark.parametrize("method", ["project", "shift"])
def test_strips_give_what_the_whole_picture_gives(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are worked on strip by strip, to bound memory."""
    clean = photograph(121, 83)
    cells = QuantizationCells(file_of(clean, name))
    whole, share = getattr(cells, method)(blurred(clean)), cells.agreement(blurred(clean))
    monkeypatch.setattr("restoration.jpeg.cells._PIXELS_AT_ONCE", 83 * 32)
    assert len(list(cells.strips())) > 3
    assert (getattr(cells, method)(blurred(clean)) - whole).abs().max() < 1e-5
    assert cells.agreement(blurred(clean)) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("name", ["4:2:0", "4:4:4"])
def test_enlarged_images_are_held_in_their_box_means(scale: int, name: str) -> None:
    clean = photograph(32, 48)
    cells = QuantizationCells(file_of(clean, name))
    noise = torch.rand(1, 3, 32 * scale, 48 * scale, generator=torch.Generator().manual_seed(0)) / 50
    large = torch.nn.functional.interpolate(blurred(clean), scale_factor=scale, mode="bilinear") + noise
    projected = cells.project(large)
    means = torch.nn.functional.avg_pool2d(large, scale)
    assert (torch.nn.functional.avg_pool2d(projected, scale) - cells.project(means)).abs().max() < 1e-5
    assert cells.agreement(projected) == 1 and cells.agreement(large) < 0.99


def test_strength_blends_linearly() -> None:
    clean = photograph(32, 48)
    cells, estimate = QuantizationCells(file_of(clean, "4:2:0")), blurred(clean)
    full = cells.project(estimate)
    for strength in (0.0, 0.3, 1.0):
        expected = estimate + strength * (full - estimate)
        assert (cells.project(estimate, strength=strength) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 0.2), (torch.bfloat16, 1.0)])
def test_half_precision_comes_back_as_it_came_and_is_worked_on_in_single(dtype: torch.dtype, levels: float) -> None:
    clean = photograph(32, 48)
    cells, estimate = QuantizationCells(file_of(clean, "4:2:0")), blurred(clean).to(dtype)
    projected = cells.project(estimate)
    assert projected.dtype == dtype
    assert (projected.float() - cells.project(estimate.float())).abs().max() * 255 < levels


def test_agreement_counts_coefficients_and_widens_by_its_tolerance() -> None:
    flat = torch.full((1, 3, 8, 8), 0.5)
    jpeg = read_jpeg(encode_with_pillow(flat[0], 50, "gray"))
    cells = QuantizationCells(jpeg)  # half a cell is 8 levels of the DC, which is 8 times the mean less 128
    assert cells.agreement(flat) == 1
    brighter = flat + 2 / 255
    assert cells.agreement(brighter) == pytest.approx(63 / 64)
    assert cells.agreement(brighter, tolerance=5.0) == 1


def test_other_sizes_are_refused_and_a_turned_picture_is_named() -> None:
    cells = QuantizationCells(read_jpeg(encode_with_pillow(photograph(64, 96)[0], 20), name="cat.jpg"))
    with pytest.raises(ValueError, match=r"JPEG's size, 96x64, got 32x32\. Connect .* belongs to cat\.jpg"):
        cells.project(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"got 64x96\. The picture looks turned: turn it back"):
        cells.shift(torch.zeros(1, 3, 96, 64))
    turned = QuantizationCells(dataclasses.replace(cells.jpeg, orientation=6))
    with pytest.raises(
        ValueError, match=r"size, 64x96, got 96x64\. .*apply the EXIF orientation of cat\.jpg \(6\) once"
    ):
        turned.shift(torch.zeros(1, 3, 64, 96))
    with pytest.raises(ValueError, match="got 192x64"):
        cells.agreement(torch.zeros(1, 3, 64, 192))
    with pytest.raises(ValueError, match=r"expected float images \(B, 3, H, W\)"):
        cells.project(torch.zeros(3, 64, 96))
