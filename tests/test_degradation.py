"""Degraded crops are what Pillow and ffmpeg make of real JPEG bytes, aligned with the clean crop, and reproducible."""

import io
from dataclasses import replace

import av
import jpeglib
import numpy as np
import pytest
from PIL import Image
from skimage import data

from training.degradation import MAX_SHIFT, PRESETS, Degradation, compress, decode_ffmpeg, degrade, encode


@pytest.fixture(scope="module")
def crop():
    return np.ascontiguousarray(data.astronaut()[60:159, 120:215])


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("quality", [0, 5, 50, 100])
def test_paper_compression_is_plain_pillow(crop, quality):
    """DriftRec saves with Pillow and nothing but a quality: same bytes, hence 4:2:0 at every quality."""
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, format="jpeg", quality=quality)
    assert encode(crop, quality) == buffer.getvalue()
    assert np.array_equal(compress(crop, quality), np.array(Image.open(buffer)))


@pytest.mark.parametrize("name, horizontal, vertical", [("4:4:4", 1, 1), ("4:2:2", 2, 1), ("4:2:0", 2, 2)])
def test_subsampling_names_reach_the_file(crop, tmp_path, name, horizontal, vertical):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(crop, 75, name))
    coefficients = jpeglib.read_dct(str(path))
    luma, chroma = coefficients.Y.shape[:2], coefficients.Cb.shape[:2]
    assert chroma == (-(-luma[0] // vertical), -(-luma[1] // horizontal))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("height, width", [(64, 64), (33, 57), (1, 1)])
def test_ffmpeg_decoder_gives_the_pixels_of_opening_the_file_as_video(crop, subsampling, height, width):
    """ComfyUI's LoadImage opens a JPEG as a one-frame video and converts it to rgb24."""
    encoded = encode(np.ascontiguousarray(crop[:height, :width]), 30, subsampling)
    with av.open(io.BytesIO(encoded)) as container:
        expected = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(decode_ffmpeg(encoded), expected)


def test_decoders_differ_on_subsampled_chroma_yet_show_the_same_picture(crop):
    pillow, ffmpeg = (compress(crop, 40, "4:2:0", decoder).astype(int) for decoder in ("pillow", "ffmpeg"))
    difference = np.abs(pillow - ffmpeg)
    assert difference.max() > 2 and difference.mean() < 4


def test_the_same_generator_gives_the_same_crop_and_another_seed_another(crop):
    first, again, other = (degrade(crop, PRESETS["wide"], generator(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image) and first.description == again.description
    assert not np.array_equal(first.image, other.image)


def test_description_is_enough_to_make_the_crop_again(crop):
    wide = replace(PRESETS["wide"], double_probability=0.0)
    for seed in range(20):
        result = degrade(crop, wide, generator(seed))
        drawn = result.description
        expected = compress(crop, drawn["quality"], drawn["subsampling"], drawn["decoder"])
        assert np.array_equal(result.image, expected) and result.quality == drawn["quality"]
        assert np.array_equal(result.clean, crop)


@pytest.mark.parametrize("margin", [0, MAX_SHIFT])
def test_a_displaced_first_compression_stays_aligned_with_the_clean_crop(crop, margin):
    """At quality 100 both compressions change little, so any misalignment would show as a large error."""
    fine = Degradation(100, 100, {"4:4:4": 1.0}, 1.0, 100, 100, shift=True)
    offsets = set()
    for seed in range(25):
        result = degrade(crop, fine, generator(seed), margin=margin)
        assert result.image.shape == (crop.shape[0] - margin, crop.shape[1] - margin, 3)
        assert np.array_equal(result.clean, crop[margin:, margin:])
        assert np.abs(result.image.astype(int) - result.clean).mean() < 1.5
        offsets.add(result.description["first"]["offset"])
    assert len(offsets) > 15 and all(0 <= value <= MAX_SHIFT for offset in offsets for value in offset)


def test_the_first_grid_lies_where_the_offset_says(crop):
    """After a coarse first and a fine second compression, block steps appear `offset` before multiples of eight."""
    coarse = Degradation(100, 100, {"4:4:4": 1.0}, 1.0, 2, 2, shift=True)
    for seed in range(5):
        result = degrade(crop, coarse, generator(seed), margin=MAX_SHIFT)
        shift = result.description["first"]["offset"][1]
        steps = np.abs(np.diff(result.image[..., 1].astype(float), axis=1)).mean(axis=0)
        by_phase = [steps[phase::8].mean() for phase in range(8)]
        assert int(np.argmax(by_phase)) == (7 - shift) % 8


def test_shares_and_ranges_are_those_asked_for(crop):
    wide = replace(PRESETS["wide"], grayscale_probability=0.5)
    small = np.ascontiguousarray(crop[:8, :8])
    rng = generator()
    drawn = [degrade(small, wide, rng).description for _ in range(1000)]
    qualities = np.array([d["quality"] for d in drawn])
    assert qualities.min() == 5 and qualities.max() == 95 and abs(qualities.mean() - 50) < 3
    assert abs(np.mean([d["decoder"] == "ffmpeg" for d in drawn]) - 0.3) < 0.06
    assert abs(np.mean([d["first"] is not None for d in drawn]) - 0.2) < 0.05
    assert abs(np.mean([d["grayscale"] for d in drawn]) - 0.5) < 0.06
    shares = [np.mean([d["subsampling"] == name for d in drawn]) for name in ("4:2:0", "4:4:4", "4:2:2")]
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.06)


def test_paper_preset_covers_qualities_0_to_100_and_nothing_else(crop):
    rng = generator()
    small = np.ascontiguousarray(crop[:8, :8])
    drawn = [degrade(small, PRESETS["paper"], rng).description for _ in range(1500)]
    assert {d["quality"] for d in drawn} == set(range(101))
    assert {(d["subsampling"], d["decoder"], d["grayscale"], d["first"]) for d in drawn} == {
        ("4:2:0", "pillow", False, None)
    }


def test_codiffs_paper_draws_qualities_8_to_95_alike(crop):
    rng = generator()
    small = np.ascontiguousarray(crop[:8, :8])
    drawn = [degrade(small, PRESETS["codiff_paper"], rng).description for _ in range(1500)]
    assert {d["quality"] for d in drawn} == set(range(8, 96))
    assert {(d["subsampling"], d["decoder"], d["grayscale"], d["first"], d["cut"]) for d in drawn} == {
        ("4:2:0", "pillow", False, None, (0, 0))
    }


def test_codiffs_code_draws_tens_three_times_of_four_and_cuts_half_off_the_grid(crop):
    law = PRESETS["codiff_code"]
    assert law.window == 8
    rng = generator()
    small = np.ascontiguousarray(crop[:16, :16])
    drawn = [degrade(small, law, rng).description for _ in range(6000)]
    qualities = np.array([d["quality"] for d in drawn])
    shares = np.bincount(qualities, minlength=101) / len(qualities)
    np.testing.assert_allclose(shares[[10, 20, 30, 40, 50, 60]], 0.75 / 6 + 0.25 / 89, atol=0.017)
    assert set(qualities) == set(range(8, 97))
    assert abs(shares[8:97].sum() - shares[10:61:10].sum() - 0.25 * 83 / 89) < 0.02
    cuts = np.array([d["cut"] for d in drawn])
    assert abs((cuts == 0).all(axis=1).mean() - (0.5 + 0.5 / 81)) < 0.02
    moved = cuts[(cuts != 0).any(axis=1)]
    assert all(set(moved[:, axis]) == set(range(9)) for axis in (0, 1))
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.1, "rows and columns are drawn apart"


def test_a_crop_is_cut_out_of_the_larger_jpeg_where_the_description_says(crop):
    """264 rows are compressed and 256 kept in CODiff's code; Pillow and slicing alone give the same pixels."""
    law = PRESETS["codiff_code"]
    window = np.ascontiguousarray(crop[:72, :80])
    seen = set()
    for seed in range(30):
        result = degrade(window, law, generator(seed))
        row, column = result.description["cut"]
        seen.add((row, column))
        buffer = io.BytesIO()
        Image.fromarray(window).save(buffer, "JPEG", quality=result.quality)
        expected = np.array(Image.open(buffer))
        assert np.array_equal(result.image, expected[row : row + 64, column : column + 72])
        assert np.array_equal(result.clean, window[row : row + 64, column : column + 72])
    assert len(seen) > 10


def test_cutting_off_the_grid_goes_with_a_displaced_first_compression(crop):
    """At quality 100 little changes, so any misalignment of the two would show as a large error."""
    fine = Degradation(100, 100, {"4:4:4": 1.0}, 1.0, 100, 100, shift=True, misaligned_probability=1, misaligned_max=8)
    assert fine.window == MAX_SHIFT + 8
    for seed in range(10):
        result = degrade(crop, fine, generator(seed), margin=MAX_SHIFT)
        row, column = result.description["cut"]
        height, width = crop.shape[0] - fine.window, crop.shape[1] - fine.window
        start = MAX_SHIFT + row, MAX_SHIFT + column
        assert np.array_equal(result.clean, crop[start[0] : start[0] + height, start[1] : start[1] + width])
        assert np.abs(result.image.astype(int) - result.clean).mean() < 1.5


@pytest.mark.parametrize(
    "name, seed, expected, following",
    [
        ("paper", 0, (31, "4:2:0", "pillow", None), 40973),
        ("paper", 1, (3, "4:2:0", "pillow", None), 144159),
        ("wide", 0, (33, "4:2:0", "pillow", None), 40973),
        ("wide", 31, (66, "4:2:0", "ffmpeg", (57, (10, 5))), 763551),
        ("wide", 43, (58, "4:2:0", "pillow", (57, (0, 7))), 379993),
    ],
)
def test_draws_of_the_first_laws_stay_what_they_were(crop, name, seed, expected, following):
    """Trainings that go on depend on them: the values, and the generator's next number, are the first version's."""
    rng = generator(seed)
    drawn = degrade(crop, PRESETS[name], rng).description
    first = drawn["first"] and (drawn["first"]["quality"], drawn["first"]["offset"])
    assert (drawn["quality"], drawn["subsampling"], drawn["decoder"], first) == expected
    assert int(rng.integers(10**6)) == following


def test_gray_crops_have_a_gray_clean_partner(crop):
    result = degrade(crop, Degradation(grayscale_probability=1.0), generator())
    for image in (result.clean, result.image):
        assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
    assert Image.open(io.BytesIO(encode(crop, 50, grayscale=True))).mode == "L"
    assert np.array_equal(result.clean[..., 0], np.array(Image.fromarray(crop).convert("L")))


def test_wrong_settings_and_pictures_are_refused_in_words(crop):
    with pytest.raises(ValueError, match="quality_min and quality_max"):
        Degradation(quality_min=90, quality_max=10)
    with pytest.raises(ValueError, match="double_probability must lie"):
        Degradation(double_probability=2)
    with pytest.raises(ValueError, match="subsampling names"):
        Degradation(subsampling={"4:1:0": 1.0})
    with pytest.raises(ValueError, match="positive sum"):
        Degradation(subsampling={})
    with pytest.raises(ValueError, match=r"quality_choices must lie in 0\.\.100"):
        Degradation(quality_choices=(10, 101), choice_probability=0.5)
    with pytest.raises(ValueError, match="needs quality_choices"):
        Degradation(choice_probability=0.5)
    with pytest.raises(ValueError, match="misaligned_max must not be negative"):
        Degradation(misaligned_probability=0.5)
    with pytest.raises(ValueError, match="misaligned_max 8"):
        degrade(np.ascontiguousarray(crop[:8, :8]), PRESETS["codiff_code"], generator())
    with pytest.raises(ValueError, match="uint8"):
        degrade(crop / 255, Degradation(), generator())
    with pytest.raises(ValueError, match="decoder must be"):
        compress(crop, 50, decoder="browser")
    with pytest.raises(ValueError, match="larger than its margin"):
        degrade(crop[:10], Degradation(), generator(), margin=15)


def _reference_of_the_earlier(crop, first):
    """The earlier compression from its description, with Pillow alone, where the grid is not displaced."""
    height, width = crop.shape[:2]
    size = (round(width / first["scale"]), round(height / first["scale"]))
    earlier, buffer = Image.fromarray(crop), io.BytesIO()
    if earlier.size != size:
        earlier = earlier.resize(size, Image.Resampling.LANCZOS)
    options = {"subsampling": first["subsampling"]} if first["codec"] == "jpeg" else {}
    earlier.save(buffer, first["codec"], quality=first["quality"], **options)
    decoded = Image.open(buffer).convert("RGB")
    if decoded.size != (width, height):
        decoded = decoded.resize((width, height), Image.Resampling[first["filter"].upper()])
    return np.array(decoded)


def test_resizing_and_webp_are_what_the_description_says(crop):
    law = Degradation(
        30, 90, double_probability=1.0, resize_probability=0.6, resize_range=(0.5, 2.0), webp_probability=0.4,
        resize_filters=("nearest", "box", "bicubic"), webp_quality_min=40, webp_quality_max=60,
    )  # fmt: skip
    seen = []
    for seed in range(40):
        result = degrade(crop, law, generator(seed))
        first = result.description["first"]
        expected = compress(_reference_of_the_earlier(crop, first), result.quality)
        assert np.array_equal(result.image, expected) and np.array_equal(result.clean, crop)
        seen.append(first)
    resized = [first for first in seen if first["filter"]]
    assert {first["filter"] for first in resized} == {"nearest", "box", "bicubic"}
    assert 15 < len(resized) < 33 and all(0.5 <= first["scale"] <= 2 for first in resized)
    assert {first["codec"] for first in seen} == {"jpeg", "webp"}
    assert all(40 <= first["quality"] <= 60 for first in seen if first["codec"] == "webp")


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.3])
def test_what_was_resized_and_displaced_lies_on_the_clean_crop(scale):
    """On a smooth picture at quality 100 the pair differs by little, unless one of the two was moved: half a pixel
    would be seen."""
    rows, columns = np.mgrid[:120, :130]
    waves = 128 + 60 * np.sin(columns / 9) + 50 * np.cos(rows / 7)
    crop = np.repeat(waves[..., None], 3, axis=2).round().astype(np.uint8)
    law = Degradation(
        100, 100, {"4:4:4": 1.0}, 1.0, 100, 100, shift=True, resize_probability=1.0, resize_range=(scale, scale),
        resize_filters=("bicubic",),
    )  # fmt: skip
    moved = np.abs(np.roll(waves, 1, axis=1) - waves)[8:-8, 8:-8].mean() / 2
    for seed in range(5):
        result = degrade(crop, law, generator(seed), margin=MAX_SHIFT)
        error = np.abs(result.image.astype(int) - result.clean)[8:-8, 8:-8].mean()
        assert error < 0.4 * moved


def test_scales_are_uniform_in_their_logarithm(crop):
    law = Degradation(double_probability=1.0, resize_probability=1.0, resize_range=(0.25, 4.0))
    small, rng = np.ascontiguousarray(crop[:8, :8]), generator()
    logs = np.log2([degrade(small, law, rng).description["first"]["scale"] for _ in range(1500)])
    counts, _ = np.histogram(logs, bins=4, range=(-2, 2))
    assert abs(counts - 375).max() < 5 * 375**0.5


def test_a_gray_crop_stays_gray_through_webp(crop):
    law = Degradation(grayscale_probability=1.0, double_probability=1.0, webp_probability=1.0)
    image = degrade(crop, law, generator()).image
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("driftrec", set(range(101))),
        ("codiff_paper", set(range(8, 96))),
        ("codiff_code", set(range(8, 97))),
        ("sodiff", set(range(5, 96))),
        ("ddrm", {5, 10, 30}),
    ],
)
def test_laws_of_the_quality_go_by_the_name_of_the_paper(crop, name, expected):
    law = Degradation(quality_min=50, quality_max=50, quality_law=name)
    small, rng = np.ascontiguousarray(crop[:8, :8]), generator()
    drawn = np.array([degrade(small, law, rng).quality for _ in range(3000)])
    assert set(drawn) == expected
    tens = np.isin(drawn, (10, 20, 30, 40, 50, 60)).mean()
    assert abs(tens - (0.75 + 0.25 * 6 / 89)) < 0.03 if name == "codiff_code" else name == "ddrm" or tens < 0.1


def test_a_law_by_name_draws_what_the_preset_of_that_paper_draws(crop):
    """So that naming the law in a run's file is the same as naming the preset."""
    for name, preset in (("driftrec", "paper"), ("codiff_paper", "codiff_paper"), ("sodiff", "sodiff")):
        for seed in range(5):
            named = degrade(crop, Degradation(quality_law=name), generator(seed))
            assert np.array_equal(named.image, degrade(crop, PRESETS[preset], generator(seed)).image)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"resize_range": (0.0, 1.0)}, "resize_range must be"),
        ({"resize_range": (2.0, 1.0)}, "resize_range must be"),
        ({"resize_filters": ()}, "resize_filters must be some of"),
        ({"resize_filters": ("cubic",)}, "resize_filters must be some of"),
        ({"resize_probability": 2}, "resize_probability must lie"),
        ({"webp_probability": -1}, "webp_probability must lie"),
        ({"webp_quality_min": 96}, "webp_quality_min and webp_quality_max"),
        ({"quality_law": "driftrek"}, "quality_law must be range or one of driftrec"),
    ],
)
def test_wrong_settings_of_resizes_webp_and_laws_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Degradation(**settings)
