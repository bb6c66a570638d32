"""What DDRM is held to: JPEG files of every kind, the authors' simulation of JPEG, few bits a channel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import truncnorm
from skimage import data
from torch import Tensor

from restoration.jpeg import JPEGData, apply_orientation, decode_pixels, image_to_dct, jpeg_data_from, read_jpeg
from restoration.jpeg.cells import QuantizationCells
from restoration.jpeg.codec import Coefficients
from restoration.measurements import BitDepthMeasurement, JPEGMeasurement, PaperJPEGMeasurement, paper_tables
from restoration.truncated_normal import mean_inside


def picture(height: int, width: int) -> Tensor:
    levels = np.ascontiguousarray(data.astronaut()[20 : 20 + height, 150 : 150 + width])
    return torch.from_numpy(levels).movedim(-1, 0)[None].float() / 255


def saved(image: Tensor, quality: int = 10, mode: str = "RGB", orientation: int = 1, **options) -> bytes:
    levels = (image[0].movedim(0, -1) * 255).round().byte().numpy()
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(levels).convert(mode).save(buffer, "JPEG", quality=quality, exif=exif, **options)
    return buffer.getvalue()


def disturbed(image: Tensor, count: int = 2, strength: float = 0.1) -> Tensor:
    noise = torch.randn((count, *image.shape[1:]), generator=torch.Generator().manual_seed(0))
    return image + strength * noise


FILES = {
    "4:2:0": {"height": 48, "width": 64, "subsampling": 2},
    "4:4:4 odd": {"height": 33, "width": 35, "subsampling": 0},
    "4:2:2 odd": {"height": 31, "width": 50, "subsampling": 1},
    "4:2:0 odd": {"height": 21, "width": 37, "subsampling": 2},
    "gray": {"height": 40, "width": 24, "mode": "L"},
    "turned": {"height": 40, "width": 25, "orientation": 6},
    "one pixel": {"height": 1, "width": 1},
}


@pytest.mark.parametrize("name", FILES)
def test_jpeg_measurement_holds_pictures_to_any_file(name):
    """It starts from Pillow's decode, upright; projections agree with the file, shifts keep their place in the cell."""
    options = dict(FILES[name])
    clean = picture(options.pop("height"), options.pop("width"))
    file = saved(clean, **options)
    jpeg, pixels = read_jpeg(file, name="file.jpg"), decode_pixels(file, name="file.jpg")
    measurement = JPEGMeasurement(jpeg)
    upright = apply_orientation(pixels, jpeg.orientation)[None]
    assert measurement.observed.shape == upright.shape
    assert (measurement.observed - upright).abs().max() < 4 / 255
    given = disturbed(upright)
    before = given.clone()
    projected, shifted = measurement.project(given), measurement.shift(given)
    assert torch.equal(given, before) and projected.shape == shifted.shape == given.shape
    cells = QuantizationCells(jpeg)
    assert cells.agreement(projected, tolerance=0.5) > cells.agreement(given.clamp(0, 1), tolerance=0.5)
    if name != "one pixel":  # of which the file says more than it holds
        assert (projected - given).square().mean() < (shifted - given).square().mean()
    if name in ("4:2:0", "gray"):  # whole blocks: nothing is left to move
        torch.testing.assert_close(measurement.shift(shifted), shifted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FILES)
def test_expectations_lie_between_the_projection_and_the_decode(name):
    """No spread clamps, a large one decodes; in between every coefficient stays inside its cell."""
    options = dict(FILES[name])
    file = saved(0.3 + 0.4 * picture(options.pop("height"), options.pop("width")), **options)  # nothing is clipped
    measurement = JPEGMeasurement(read_jpeg(file, name="file.jpg"))
    given = disturbed(measurement.observed, strength=0.05)
    torch.testing.assert_close(measurement.expect(given, 0.0), measurement.project(given), atol=1e-5, rtol=0)
    if name in ("4:2:0", "gray"):  # whole blocks
        middle = measurement.expect(given, 1000.0)
        coefficients = measurement.constraint.jpeg.coefficients
        for found, plane, table in zip(
            image_to_dct(middle, coefficients.sampling, round_to_8bit=False),
            coefficients.planes,
            coefficients.tables,
            strict=True,
        ):
            assert (found - plane * table[:, None, None]).abs().max() < 0.1
        assert measurement.cells.agreement(measurement.expect(given, 0.05)) == 1.0


def test_jpeg_measurement_finishes_with_what_compresses_to_the_file():
    """8-bit levels that libjpeg, with the file's tables, turns into the same coefficients."""
    file = saved(picture(48, 64), subsampling=2)
    jpeg = read_jpeg(file, name="file.jpg")
    finished = JPEGMeasurement(jpeg).finish(disturbed(picture(48, 64), 1, 0.03).clamp(0, 1))
    levels = finished * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    tables = [table.flatten().tolist() for table in jpeg.tables[:2]]
    buffer = io.BytesIO()
    Image.fromarray(levels[0].round().byte().movedim(0, -1).numpy()).save(buffer, "JPEG", qtables=tables, subsampling=2)
    again = read_jpeg(buffer.getvalue(), name="again.jpg")
    for plane, other in zip(jpeg.coefficients.planes, again.coefficients.planes, strict=True):
        assert torch.equal(plane, other)


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0, 40.0, 20_000.0])
def test_means_inside_intervals_are_scipys(spread):
    """In single precision, up to three spreads outside; farther away as there, and always inside."""
    mean, half = torch.linspace(-8, 8, 161), 5.0
    near = mean.double().numpy().clip(-half - 3 * spread, half + 3 * spread)
    expected = truncnorm.mean((-half - near) / spread, (half - near) / spread, loc=near, scale=spread)
    found = mean_inside(mean, half, spread)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    assert found.abs().max() <= half and bool((found.diff() >= -1e-3).all())
    assert mean_inside(torch.tensor([1e9, -1e9, float("inf")]), half, spread).abs().max() <= half
    clamped = mean_inside(torch.tensor([-9.0, 2.0, 7.0]), half, 0.0)
    torch.testing.assert_close(clamped, torch.tensor([-5.0, 2.0, 5.0]), atol=1e-5, rtol=0)


# --- the authors' operator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [5, 10, 20, 25, 40, 50, 75, 100])
def test_paper_tables_are_libjpegs_where_the_scale_is_whole(quality):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        luma, chroma = (np.array(image.quantization[number]).reshape(8, 8) for number in (0, 1))
    found = paper_tables(quality)
    assert np.array_equal(found[0].numpy(), luma) and np.array_equal(found[1].numpy(), chroma)


@pytest.mark.parametrize(("quality", "luma", "chroma"), [(15, 4, 1), (30, 23, 51)])
def test_paper_tables_differ_where_it_is_not(quality, luma, chroma):
    """By one, in as many entries as were counted in the authors' code."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        tables = [np.array(image.quantization[number]).reshape(8, 8) for number in (0, 1)]
    differences = [np.abs(one.numpy() - other) for one, other in zip(paper_tables(quality), tables, strict=True)]
    assert [int(difference.sum()) for difference in differences] == [luma, chroma]
    assert max(difference.max() for difference in differences) == 1


@pytest.mark.parametrize("quality", [0, -3, 101])
def test_paper_tables_of_no_quality(quality):
    with pytest.raises(ValueError, match="quality above 0 and at most 100"):
        paper_tables(quality)


def test_paper_measurement_of_a_file_starts_near_its_decode():
    """Pillow's decode to within what leaving out and repeating chroma changes: 1.3 to 1.6 levels on average."""
    clean = picture(128, 128)
    for quality in (5, 20):
        file = saved(clean, quality, subsampling=2)
        measurement = PaperJPEGMeasurement.of_file(read_jpeg(file, name="file.jpg"))
        error = (measurement.observed[0] - decode_pixels(file, name="file.jpg")).abs().mean() * 255
        assert error < 2.5


def test_paper_measurement_of_a_file_has_the_coefficients_of_the_file():
    jpeg = read_jpeg(saved(picture(64, 64), 20, subsampling=2), name="file.jpg")
    luma, chroma = PaperJPEGMeasurement.of_file(jpeg)._codes
    assert torch.equal(luma[:, 0], jpeg.coefficients.planes[0].float())
    assert torch.equal(chroma, torch.stack([plane.float() for plane in jpeg.coefficients.planes[1:]], 1))


def test_paper_projection_agrees_and_moves_less_than_the_shift():
    measurement = PaperJPEGMeasurement.simulate(picture(64, 64).double(), 10)
    given = disturbed(measurement.observed)
    projected, shifted = measurement.project(given), measurement.shift(given)
    for found, code in zip(measurement._analyse(projected), measurement._codes, strict=True):
        assert (found - code).abs().max() < 0.5 + 1e-9
    assert (projected - given).norm() < 0.7 * (shifted - given).norm()
    torch.testing.assert_close(measurement.expect(given, 0.0), projected, atol=1e-5, rtol=0)
    for found, code in zip(measurement._analyse(measurement.expect(given, 1000.0)), measurement._codes, strict=True):
        assert (found - code).abs().max() < 1e-3
    torch.testing.assert_close(measurement.project(projected), projected, atol=1e-9, rtol=0)
    torch.testing.assert_close(measurement.shift(shifted), shifted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"height": 32, "width": 48, "subsampling": 2}, "squares whose side is a multiple of 16, got 48x32"),
        ({"height": 24, "width": 24, "subsampling": 2}, "multiple of 16, got 24x24"),
        ({"height": 32, "width": 32, "subsampling": 0}, "only 4:2:0.*ycbcr 4:4:4"),
        ({"height": 32, "width": 32, "mode": "L"}, "gray"),
        ({"height": 32, "width": 32, "subsampling": 2, "orientation": 6}, "orientation 6"),
    ],
)
def test_paper_measurement_refuses_other_files_in_words(options, said):
    options = dict(options)
    file = saved(picture(options.pop("height"), options.pop("width")), **options)
    with pytest.raises(ValueError, match=said):
        PaperJPEGMeasurement.of_file(read_jpeg(file, name="file.jpg"))


def test_paper_measurement_refuses_tables_that_are_no_qualitys():
    jpeg = read_jpeg(saved(picture(32, 32), 20, subsampling=2), name="odd.jpg")
    stored: Coefficients = jpeg.coefficients
    tables = tuple(table + 3 for table in stored.tables)
    changed: JPEGData = jpeg_data_from(
        Coefficients(stored.planes, tables, stored.height, stored.width, stored.sampling), "odd.jpg"
    )
    with pytest.raises(ValueError, match=r"odd\.jpg: .*standard tables"):
        PaperJPEGMeasurement.of_file(changed)


# --- few bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 8))
def test_bit_depth_of_every_level(bits):
    """All 256 levels: integer division says what is kept, also after [-1, 1] and back in float32."""
    levels, step = torch.arange(256), 2 ** (8 - bits)
    image = levels.float().div(255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    kept = (levels // step * step).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    there_and_back = ((2 * image - 1) + 1) / 2
    for given in (image, there_and_back):
        assert torch.equal((BitDepthMeasurement(given, bits).observed * 255).round().long(), kept)


def test_bit_depth_is_the_papers_at_three_bits():
    """Their cast to whole numbers and division by 32, in [-1, 1]."""
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = ((image + 1) / 2 * 255).int() // 32 / (255 / 32) * 2 - 1
    ours = 2 * BitDepthMeasurement((image + 1) / 2).observed - 1
    assert ((theirs - ours).abs() > 1e-5).float().mean() < 1e-3  # float32 at the borders of the intervals


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_bit_depth_corrections_agree(bits):
    """Both end in the intervals; the projection leaves what agrees alone, and the shift keeps the place inside."""
    clean = picture(40, 40)
    measurement = BitDepthMeasurement(clean, bits)
    torch.testing.assert_close(measurement.project(clean), clean, atol=1e-6, rtol=0)
    given = disturbed(clean)
    for moved in (measurement.project(given), measurement.finish(given), measurement.expect(given, 0.1)):
        assert torch.allclose(BitDepthMeasurement(moved, bits).observed, measurement.observed.expand_as(moved))
    finished = measurement.finish(given) * 255
    assert (finished - finished.round()).abs().max() < 1e-4
    moved = (measurement.shift(given) - given) * 255 / measurement.step
    assert (moved - moved.round()).abs().max() < 1e-3


@pytest.mark.parametrize("bits", [0, 8, 2.5])
def test_bit_depth_of_no_number_of_bits(bits):
    with pytest.raises(ValueError, match=f"1 to 7 bits a channel, got {bits}"):
        BitDepthMeasurement(torch.zeros(1, 3, 8, 8), bits)
