"""8-bit results that are one of the pictures the file came from: judged by libjpeg, through Pillow, and by jpeglib."""

from __future__ import annotations

import dataclasses
import gc
import io
import weakref
from collections.abc import Sequence
from pathlib import Path

import jpeglib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from skimage import data
from torch import Tensor

from restoration.jpeg import (
    JPEGConstraint,
    JPEGData,
    JPEGError,
    QuantizationCells,
    apply_orientation,
    encode,
    encode_with_pillow,
    make_consistent,
    read_jpeg,
    read_jpeg_and_pixels,
    tables_for_quality,
)
from restoration.jpeg.sampling import Sampling, sampling_factors
from restoration.metrics import psnr
from tests.shared import shared_path

SIZES = [(120, 176), (61, 83)]


def photograph(height: int, width: int, name: str = "chelsea") -> Tensor:
    """Part of a photograph, in whole levels."""
    picture = torch.from_numpy(getattr(data, name)()[20 : 20 + height, 80 : 80 + width].copy())
    return picture.permute(2, 0, 1)[None].float() / 255


def blurred(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def written_by_pillow(image: Tensor, jpeg: JPEGData) -> bytes:
    """An 8-bit picture as a JPEG with the tables and the sampling of another."""
    levels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    picture, buffer = Image.fromarray(levels), io.BytesIO()
    tables = [table.flatten().tolist() for table in jpeg.tables[:2]]
    if jpeg.subsampling == "gray":
        picture.convert("L").save(buffer, "JPEG", qtables=tables)
    else:
        picture.save(buffer, "JPEG", qtables=tables, subsampling=jpeg.subsampling)
    return buffer.getvalue()


def planes_by_jpeglib(path: Path, content: bytes) -> list[np.ndarray]:
    path.write_bytes(content)
    jpeg = jpeglib.read_dct(str(path))
    return [jpeg.Y, *([jpeg.Cb, jpeg.Cr] if jpeg.has_chrominance else [])]


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "gray"])
@pytest.mark.parametrize("quality", [5, 20, 50])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_libjpeg_writes_the_very_same_coefficients(
    tmp_path: Path, subsampling: str, quality: int, height: int, width: int
) -> None:
    """The proof by others: Pillow writes the restored picture with the file's tables, jpeglib reads both files."""
    clean = photograph(height, width)
    original = encode_with_pillow(clean[0], quality, subsampling)
    jpeg, decoded = read_jpeg_and_pixels(original)
    estimate = blurred(decoded[None])
    result = make_consistent(estimate, [jpeg])
    levels = result.images * 255
    assert torch.equal(levels.round(), levels.round().clamp(0, 255)) and (levels - levels.round()).abs().max() < 1e-4
    before = planes_by_jpeglib(tmp_path / "estimate.jpg", written_by_pillow(estimate, jpeg))
    again = planes_by_jpeglib(tmp_path / "again.jpg", written_by_pillow(result.images, jpeg))
    file = planes_by_jpeglib(tmp_path / "file.jpg", original)
    assert not all(np.array_equal(a, b) for a, b in zip(before, file, strict=True)), "the estimate agrees already"
    assert all(np.array_equal(a, b) for a, b in zip(again, file, strict=True))
    assert result.fraction == 1 and 1 <= result.rounds <= 12


def line_art(ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Tensor:
    """Strokes, a circle and letters, 96x128: whole blocks of every sampling."""
    picture = Image.new("RGB", (128, 96), paper)
    draw, random = ImageDraw.Draw(picture), np.random.default_rng(0)
    for _ in range(10):
        ends = random.integers(0, (128, 96), (2, 2)).flatten().tolist()
        draw.line(ends, fill=ink, width=int(random.integers(1, 4)))
    draw.ellipse((32, 24, 64, 48), outline=ink, width=2)
    draw.text((3, 60), "Hamburgefonts", fill=ink)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255


LINE_ART = {
    "black on white": line_art((0, 0, 0), (255, 255, 255)),
    "white on black": line_art((255, 255, 255), (0, 0, 0)),
    "red on yellow": line_art((120, 0, 0), (250, 220, 40)),
    "white on blue": line_art((255, 255, 255), (20, 60, 150)),
}


@pytest.mark.parametrize("drawing", LINE_ART)
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "gray"])
@pytest.mark.parametrize("quality", [10, 20, 30, 50, 75])
def test_line_art_agrees_as_well(drawing: str, subsampling: str, quality: int) -> None:
    """Where pixels are black or white, cells and the range of levels pull in different directions."""
    original = encode_with_pillow(LINE_ART[drawing][0], quality, subsampling)
    jpeg, decoded = read_jpeg_and_pixels(original)
    result = make_consistent(blurred(decoded[None]), [jpeg])
    again = read_jpeg(written_by_pillow(result.images, jpeg)).coefficients.planes
    assert all(torch.equal(a, b) for a, b in zip(again, jpeg.coefficients.planes, strict=True))
    assert result.fraction == 1


@pytest.mark.parametrize("quality", [90, 95, 100])
def test_above_quality_80_the_fraction_says_what_libjpeg_finds(tmp_path: Path, quality: int) -> None:
    """Cells are narrower than the rounding to levels there; the number is honest, and near 1."""
    jpeg, decoded = read_jpeg_and_pixels(encode_with_pillow(photograph(61, 83)[0], quality))
    result = make_consistent(blurred(decoded[None]), [jpeg])
    again = read_jpeg(written_by_pillow(result.images, jpeg)).coefficients.planes
    pairs = list(zip(again, jpeg.coefficients.planes, strict=True))
    wrong, total = sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)
    assert result.fraction == pytest.approx(1 - wrong / total, abs=1e-12)
    assert result.fraction > {90: 0.999, 95: 0.98, 100: 0.8}[quality]


def written_by_jpeglib(path: Path, image: Tensor, tables: Sequence[Tensor], sampling: Sampling) -> JPEGData:
    """An 8-bit picture as a JPEG that libjpeg 6b writes, with any sampling."""
    picture = jpeglib.from_spatial((image[0] * 255).round().byte().permute(1, 2, 0).numpy().copy())
    if len(set(sampling)) == 1:
        sampling = ((1, 1),) * 3  # the same file, but one that may be interleaved
    picture.samp_factor = np.array([(vertical, horizontal) for horizontal, vertical in sampling])
    steps = np.stack([table.reshape(8, 8).numpy().astype(np.uint16) for table in tables])
    picture.write_spatial(str(path), qt=steps, quant_tbl_no=np.arange(3))
    return read_jpeg(path)


@pytest.mark.parametrize("name", ["4:4:0", "4:1:1", "2x2,2x1,1x2", "1x3,1x1,1x1", "2x2,2x2,2x2"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_samplings_that_pillow_does_not_write(tmp_path: Path, name: str, height: int, width: int) -> None:
    """libjpeg 6b, through jpeglib, writes the file and the result."""
    clean, sampling = photograph(height, width), sampling_factors(name)
    luma, chroma = tables_for_quality(20)
    file = written_by_jpeglib(tmp_path / "file.jpg", clean, (luma, chroma, chroma), sampling)
    assert name == "2x2,2x2,2x2" or file.coefficients.sampling == sampling
    jpeg = dataclasses.replace(file, coefficients=dataclasses.replace(file.coefficients, sampling=sampling))
    result = make_consistent(blurred(clean), [jpeg])
    again = written_by_jpeglib(tmp_path / "again.jpg", result.images, jpeg.tables, sampling).coefficients
    assert all(torch.equal(a, b) for a, b in zip(again.planes, jpeg.coefficients.planes, strict=True))
    assert result.fraction == 1


def test_rgb_files_agree_as_well() -> None:
    """Pillow writes the file and the result without a change of colours."""
    clean = photograph(48, 50)

    def written(image: Tensor) -> JPEGData:
        buffer = io.BytesIO()
        levels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(buffer, "JPEG", quality=20, subsampling=0, keep_rgb=True)
        return read_jpeg(buffer.getvalue())

    jpeg = written(clean)
    assert jpeg.color_space == "rgb"
    result = make_consistent(blurred(clean), [jpeg])
    again = written(result.images).coefficients.planes
    assert all(torch.equal(a, b) for a, b in zip(again, jpeg.coefficients.planes, strict=True))
    assert result.fraction == 1


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "gray"])
@pytest.mark.parametrize("quality", [3, 50, 97, 100])
def test_the_codec_encodes_bit_for_bit_as_libjpeg(subsampling: str, quality: int) -> None:
    """What the closed loop checks itself with: every coefficient equals that of Pillow's file."""
    for height, width in ((61, 83), (1, 40), (16, 16)):
        clean = photograph(height, width, "astronaut")
        file = read_jpeg(encode_with_pillow(clean[0], quality, subsampling)).coefficients
        ours = encode(clean, tables_for_quality(quality), subsampling)
        assert all(torch.equal(a.short(), b) for a, b in zip(ours.planes, file.planes, strict=True))


def test_a_picture_that_agrees_is_returned_as_it_is() -> None:
    clean = photograph(61, 83)
    for quality in (10, 60, 95):
        result = make_consistent(clean, [read_jpeg(encode_with_pillow(clean[0], quality))])
        assert torch.equal((result.images * 255).round(), (clean * 255).round())
        assert (result.fraction, result.rounds) == (1, 0)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [5, 10, 20, 40, 75, 90])
def test_psnr_of_these_photographs_rises_or_stays(quality: int, subsampling: str) -> None:
    """What is true on average; `test_psnr_of_rgb_can_fall` shows that it is not for every picture."""
    for height, width in SIZES:
        clean = photograph(height, width)
        jpeg, decoded = read_jpeg_and_pixels(encode_with_pillow(clean[0], quality, subsampling))
        tinted = (decoded[None] + torch.tensor([0.05, 0, -0.05])[:, None, None]).clamp(0, 1)
        for estimate in (blurred(decoded[None]), blurred(clean), tinted):
            rounded = (estimate * 255).round() / 255
            for closed_loop in (True, False):
                result = make_consistent(rounded, [jpeg], closed_loop=closed_loop)
                assert psnr(result.images, clean) >= psnr(rounded, clean)


def test_images_of_a_batch_have_a_file_each_or_share_one() -> None:
    first, second = photograph(40, 56), photograph(40, 56, "astronaut")
    jpegs = [read_jpeg(encode_with_pillow(image[0], 20)) for image in (first, second)]
    batch = blurred(torch.cat([first, second]))
    together = make_consistent(batch, jpegs)
    alone = [make_consistent(image, [jpeg]) for image, jpeg in zip(batch.split(1), jpegs, strict=True)]
    assert torch.equal(together.images, torch.cat([one.images for one in alone]))
    assert together.rounds == max(one.rounds for one in alone)
    shared = make_consistent(batch, jpegs[:1])
    assert torch.equal(shared.images[:1], alone[0].images) and shared.fraction > 0.99
    with pytest.raises(ValueError, match="one JPEG for each of the 2 images, or one for all, got 3"):
        make_consistent(batch, [*jpegs, jpegs[0]])


@pytest.mark.parametrize("orientation", [2, 5, 6, 8])
def test_turned_files(orientation: int) -> None:
    clean = photograph(40, 72)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20))
    turned = make_consistent(
        apply_orientation(blurred(clean), orientation), [dataclasses.replace(jpeg, orientation=orientation)]
    )
    straight = make_consistent(blurred(clean), [jpeg])
    assert torch.equal(turned.images, apply_orientation(straight.images, orientation))
    assert turned.fraction == straight.fraction == 1


def test_strength_mixes_and_the_fraction_is_that_of_the_mixture() -> None:
    clean = photograph(61, 83)
    jpeg, decoded = read_jpeg_and_pixels(encode_with_pillow(clean[0], 30))
    estimate = (blurred(decoded[None]) * 255).round() / 255
    full = make_consistent(estimate, [jpeg])
    half = make_consistent(estimate, [jpeg], strength=0.5)
    assert ((half.images - (estimate + full.images) / 2) * 255).abs().max() < 0.51
    none = make_consistent(estimate, [jpeg], strength=0.0)
    assert torch.equal(none.images, estimate) and none.rounds == 0
    assert none.fraction < half.fraction < full.fraction
    with pytest.raises(ValueError, match="strength of 0 to 1"):
        make_consistent(estimate, [jpeg], strength=1.5)


def test_without_the_loop_the_result_is_the_continuous_projection() -> None:
    clean = photograph(48, 64)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 30))
    cells = QuantizationCells(jpeg)
    result = make_consistent(blurred(clean), [jpeg], closed_loop=False)
    assert torch.equal(result.images, cells.project(blurred(clean)))
    assert result.fraction == cells.agreement(result.images) and result.rounds == 0


@pytest.mark.parametrize("scale", [2, 3])
def test_enlarged_pictures_agree_once_their_box_means_are_taken(scale: int) -> None:
    clean = photograph(45, 62)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20))
    large = torch.nn.functional.interpolate(blurred(clean), scale_factor=scale, mode="bicubic").clamp(0, 1)
    result = make_consistent(large, [jpeg])
    means = torch.nn.functional.avg_pool2d((result.images * 255).round(), scale).round() / 255
    again = read_jpeg(written_by_pillow(means, jpeg)).coefficients.planes
    assert all(torch.equal(a, b) for a, b in zip(again, jpeg.coefficients.planes, strict=True))
    assert result.fraction == 1 and result.images.shape == large.shape


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4", "gray"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_enlarged_line_art_agrees_once_its_box_means_are_taken(scale: int, subsampling: str) -> None:
    """Black and white pixels can not take their part of a change; the others of their box take it over."""
    clean = LINE_ART["black on white"]
    jpeg, decoded = read_jpeg_and_pixels(encode_with_pillow(clean[0], 50, subsampling))
    large = torch.nn.functional.interpolate(blurred(decoded[None]), scale_factor=scale, mode="bicubic").clamp(0, 1)
    result = make_consistent(large, [jpeg])
    means = torch.nn.functional.avg_pool2d((result.images * 255).round(), scale)
    assert (means - means.round()).abs().max() < 1e-3 and result.fraction == 1
    again = read_jpeg(written_by_pillow(means / 255, jpeg)).coefficients.planes
    assert all(torch.equal(a, b) for a, b in zip(again, jpeg.coefficients.planes, strict=True))


def test_strength_zero_returns_the_images_and_runs_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fraction is that of the rounded images; a sampler's result is rounded all the same."""
    clean = photograph(40, 56)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20))
    expected = make_consistent((blurred(clean) * 255).round() / 255, [jpeg], strength=0.0)

    def never(*arguments: object) -> None:
        raise AssertionError("the loop ran")

    monkeypatch.setattr("restoration.jpeg.consistency.agreeing_levels", never)
    result = make_consistent(blurred(clean), [jpeg], strength=0.0)
    assert torch.equal(result.images, blurred(clean)) and result.fraction == expected.fraction < 1
    finished = JPEGConstraint(jpeg, strength=0.0).finish(blurred(clean)) * 255
    assert torch.equal(finished.round(), (blurred(clean) * 255).round()) and (finished % 1 - 0.5).abs().min() > 0.49


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("closed_loop", [True, False])
def test_what_is_no_number_is_refused_and_the_picture_named(value: float, closed_loop: bool) -> None:
    clean = photograph(40, 56)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20), name="cat.jpg")
    images = torch.cat([clean, clean])
    images[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match=r"image 2 holds something that is no number .* in 1 of .*cat\.jpg\. Look at"):
        make_consistent(images, [jpeg], closed_loop=closed_loop)
    with pytest.raises(ValueError, match="image 1 holds something that is no number"):
        JPEGConstraint(jpeg, closed_loop=closed_loop).finish(images[1:])


def test_large_pictures_are_worked_on_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = photograph(121, 83)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20))
    whole = make_consistent(blurred(clean), [jpeg])
    monkeypatch.setattr("restoration.jpeg.closed_loop._PIXELS_AT_ONCE", 83 * 16)
    parts = make_consistent(blurred(clean), [jpeg])
    assert parts.fraction == whole.fraction == 1
    assert ((parts.images - whole.images) * 255).abs().max() <= 1.01  # sums in another order round otherwise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_give_whole_levels_in_single(dtype: torch.dtype) -> None:
    clean = photograph(48, 64)
    result = make_consistent(blurred(clean).to(dtype), [read_jpeg(encode_with_pillow(clean[0], 20))])
    assert result.images.dtype == torch.float32 and result.fraction == 1


def test_progress_reaches_one_and_an_interruption_comes_through() -> None:
    class StopError(Exception):
        pass

    def stop(done: float) -> None:
        raise StopError

    clean = photograph(61, 83)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20))
    seen: list[float] = []
    make_consistent(blurred(torch.cat([clean, clean])), [jpeg], check=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1 and len(set(seen)) > 6
    with pytest.raises(StopError):
        make_consistent(blurred(clean), [jpeg], check=stop)


def test_the_constraint_of_the_samplers() -> None:
    """`project` is the continuous clamp, `finish` the closed loop; without the loop whole levels all the same."""
    clean = photograph(61, 83)
    jpeg = read_jpeg(encode_with_pillow(clean[0], 20))
    constraint = JPEGConstraint(jpeg, strength=0.5)
    expected = QuantizationCells(jpeg).project(blurred(clean), strength=0.5)
    assert torch.equal(constraint.project(blurred(clean)), expected)
    assert torch.equal(JPEGConstraint(jpeg).finish(blurred(clean)), make_consistent(blurred(clean), [jpeg]).images)
    simple = JPEGConstraint(jpeg, closed_loop=False).finish(blurred(clean)) * 255
    assert (simple - simple.round()).abs().max() < 1e-4


def test_a_finished_constraint_lets_its_cells_go() -> None:
    """Those of all the frames of a film live until its end; cells are as large as several pictures."""
    clean = photograph(61, 83)
    constraint = JPEGConstraint(read_jpeg(encode_with_pillow(clean[0], 20)))
    projected = constraint.project(blurred(clean))
    cells = weakref.ref(constraint._cells)
    assert cells() is not None
    constraint.finish(projected)
    gc.collect()
    assert cells() is None and torch.equal(constraint.project(blurred(clean)), projected)


def test_every_odd_file_works_or_explains_itself() -> None:
    """Files of other programs, broken ones too: read or refused in words, then held to, at least as well as before."""
    folder = shared_path("data", "torture")
    held = refused = 0
    for path in sorted(folder.iterdir()):
        if path.suffix in (".md", ".tsv"):
            continue
        try:
            jpeg, pixels = read_jpeg_and_pixels(path)
        except JPEGError as error:
            assert path.name in str(error)
            refused += 1
            continue
        if jpeg.width * jpeg.height > 3_000_000:
            jpeg, pixels = cropped(jpeg, pixels)
        upright = apply_orientation(pixels, jpeg.orientation)[None]
        estimate = (blurred(upright) * 255).round() / 255
        before = make_consistent(estimate, [jpeg], strength=0.0, max_rounds=1).fraction
        result = make_consistent(estimate, [jpeg])
        assert result.images.shape == estimate.shape and bool(result.images.isfinite().all()), path.name
        assert before <= result.fraction <= 1, path.name
        held += 1
    assert held >= 55 and refused >= 25


def cropped(jpeg: JPEGData, pixels: Tensor) -> tuple[JPEGData, Tensor]:
    """The upper 512 rows, to save time."""
    whole = jpeg.coefficients
    cuts = zip(whole.planes, whole.sampling, strict=True)
    tallest = max(vertical for _, vertical in whole.sampling)
    planes = tuple(plane[:, : 64 * vertical // tallest] for plane, (_, vertical) in cuts)
    return dataclasses.replace(jpeg, coefficients=dataclasses.replace(whole, planes=planes, height=512)), pixels[
        :, :512
    ]
