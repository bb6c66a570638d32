"""The torch codec is judged by libjpeg: by files that Pillow or jpeglib wrote, and by Pillow's decode of them."""

from __future__ import annotations

import io
from pathlib import Path

import jpeglib
import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

from restoration.jpeg import (
    Coefficients,
    decode,
    encode,
    forward_dct,
    inverse_dct,
    rgb_to_ycbcr,
    round_trip,
    sampling_factors,
    subsampling_name,
    tables_for_quality,
    ycbcr_to_rgb,
)
from tests.shared import shared_path

NAMES = ["4:4:4", "4:2:2", "4:4:0", "4:2:0", "4:1:1", "gray"]


def photograph(height: int = 241, width: int = 317, index: int = 20) -> np.ndarray:
    path = sorted(shared_path("data", "train", "photos").glob("*.jpg"))[index]
    return np.array(Image.open(path).convert("RGB"))[3 : 3 + height, 5 : 5 + width]


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def write(path: Path, pixels: np.ndarray, quality: int, name: str) -> None:
    """A JPEG by Pillow's libjpeg-turbo where it can, else (other samplings) by jpeglib's libjpeg."""
    if name == "gray":
        Image.fromarray(pixels).convert("L").save(path, quality=quality)
    elif name in ("4:4:4", "4:2:2", "4:2:0"):
        Image.fromarray(pixels).save(path, quality=quality, subsampling=name)
    else:
        jpeg = jpeglib.from_spatial(np.ascontiguousarray(pixels))
        jpeg.samp_factor = tuple((v, h) for h, v in sampling_factors(name))
        jpeg.write_spatial(str(path), qt=np.stack([table.numpy() for table in tables_for_quality(quality)]))


def read(path: Path) -> Coefficients:
    jpeg = jpeglib.read_dct(str(path))
    planes = [jpeg.Y] + ([jpeg.Cb, jpeg.Cr] if jpeg.has_chrominance else [])
    tables = [jpeg.get_component_qt(i).astype(np.int64) for i in range(len(planes))]
    return Coefficients(
        tuple(torch.from_numpy(plane)[None] for plane in planes),
        tuple(torch.from_numpy(table)[None] for table in tables),
        int(jpeg.height),
        int(jpeg.width),
        tuple((int(h), int(v)) for v, h in jpeg.samp_factor),
        "ycbcr" if len(planes) == 3 else "gray",
    )


def difference(path: Path, coefficients: Coefficients) -> np.ndarray:
    """Absolute difference, in 8-bit levels, between our decode and Pillow's."""
    ours = (decode(coefficients)[0] * 255).permute(1, 2, 0).numpy()
    return np.abs(ours - np.array(Image.open(path).convert("RGB")).astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quality", [5, 10, 20, 50, 75, 90, 95])
def test_decode_and_encode_agree_with_libjpeg_on_photographs(tmp_path: Path, name: str, quality: int) -> None:
    """Odd sizes too; measured: decode differs by at most 3 levels, .02 on average, encode by .4 % of coefficients."""
    path = tmp_path / "picture.jpg"
    for height, width, index in ((241, 317, 20), (128, 176, 60)):
        pixels = photograph(height, width, index)
        write(path, pixels, quality, name)
        coefficients = read(path)
        assert coefficients.subsampling == name
        error = difference(path, coefficients)
        assert error.max() <= 3 and error.mean() < 0.05
        again = encode(to_tensor(pixels), tables_for_quality(quality), name)
        assert all(torch.equal(a.long(), b) for a, b in zip(again.tables, coefficients.tables, strict=True))
        equal = [(a == b).float().mean() for a, b in zip(again.planes, coefficients.planes, strict=True)]
        assert min(equal) > (0.9998 if quality <= 20 else 0.994)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 5), (8, 8), (9, 17), (15, 31), (18, 6), (33, 4)]
)
def test_tiny_and_odd_sizes_agree_with_libjpeg(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Protects the edge rules: padding before and after averaging, the ends of the triangle filter, narrow chroma."""
    path = tmp_path / "picture.jpg"
    pixels = photograph(*size)
    write(path, pixels, 90, name)
    coefficients = read(path)
    assert difference(path, coefficients).max() <= 3
    again = encode(to_tensor(pixels), tables_for_quality(90), name)
    for ours, theirs in zip(again.planes, coefficients.planes, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 0.05


@pytest.mark.parametrize("name", ["2x2,2x1,1x2", "1x3,1x1,1x1", "4x2,1x1,1x1", "2x2,2x2,1x1", "1x1,2x2,1x1"])
def test_unusual_sampling_factors_agree_with_libjpeg(tmp_path: Path, name: str) -> None:
    """Coefficients of our own, stored by jpeglib, decode in Pillow to what our decoder makes of them."""
    images = to_tensor(photograph(75, 101))
    coefficients = encode(images, tables_for_quality(80), name)
    blank = io.BytesIO()
    Image.new("RGB", (101, 75)).save(blank, "JPEG", subsampling=0)
    (tmp_path / "blank.jpg").write_bytes(blank.getvalue())
    jpeg = jpeglib.read_dct(str(tmp_path / "blank.jpg"))
    jpeg.load()
    jpeg.Y, jpeg.Cb, jpeg.Cr = (plane[0].numpy().astype(np.int16) for plane in coefficients.planes)
    jpeg.qt = np.stack([table.numpy().astype(np.uint16) for table in tables_for_quality(80)])
    jpeg.samp_factor = np.array([(v, h) for h, v in coefficients.sampling])
    jpeg.block_dims = np.array([plane.shape[1:3] for plane in coefficients.planes])
    jpeg.content = None
    jpeg.write_dct(str(tmp_path / "odd.jpg"))
    assert read(tmp_path / "odd.jpg").sampling == coefficients.sampling
    assert difference(tmp_path / "odd.jpg", coefficients).max() <= 3


def test_a_batch_may_mix_qualities() -> None:
    images = torch.cat([to_tensor(photograph(64, 80, index)) for index in (3, 30, 60)])
    qualities = torch.tensor([5, 50, 95])
    together = round_trip(images, qualities, "4:2:0")
    for image, quality, result in zip(images, (5, 50, 95), together, strict=True):
        buffer = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2)
        reference = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
        assert ((result * 255 - reference).abs() > 3).float().mean() < 0.005


def test_dct_is_scipys_orthonormal_one_and_inverts() -> None:
    plane = torch.rand(2, 24, 40, generator=torch.Generator().manual_seed(0)) * 255 - 128
    blocks = forward_dct(plane)
    expected = scipy.fft.dctn(plane[1, 8:16, 16:24].numpy(), norm="ortho")
    assert np.abs(blocks[1, 1, 2].numpy() - expected).max() < 1e-3
    assert (inverse_dct(blocks) - plane).abs().max() < 1e-3


def test_colour_conversion_is_jfifs() -> None:
    """Pillow's own RGB to YCbCr is the same integer conversion; the float one lies within half a level of it."""
    pixels = photograph(64, 64)
    levels = to_tensor(pixels) * 255
    reference = torch.from_numpy(np.array(Image.fromarray(pixels).convert("YCbCr"))).permute(2, 0, 1)[None].float()
    exact = rgb_to_ycbcr(levels, round_to_8bit=False)
    assert (rgb_to_ycbcr(levels.round()) - reference).abs().max() <= 1
    assert (exact - rgb_to_ycbcr(levels.round())).abs().max() <= 0.51
    assert (ycbcr_to_rgb(exact, round_to_8bit=False) - levels).abs().max() < 1e-3


def test_decode_without_rounding_is_continuous_and_close_to_the_rounded_one() -> None:
    coefficients = encode(to_tensor(photograph()), tables_for_quality(40), "4:2:0")
    smooth, rounded = (decode(coefficients, round_to_8bit=choice) * 255 for choice in (False, True))
    assert torch.equal(rounded, rounded.round()) and not torch.equal(smooth, smooth.round())
    assert (smooth - rounded).abs().mean() < 0.6 and (smooth - rounded).abs().max() < 4


def test_rgb_files_keep_their_planes() -> None:
    """A JPEG that stores RGB is not passed through the YCbCr matrix."""
    images = to_tensor(photograph(48, 48))
    fine = [torch.ones(8, 8)] * 3
    result = decode(encode(images, fine, "4:4:4", color_space="rgb"))
    assert ((result - images) * 255).abs().max() <= 1.01


def test_coefficients_move_with_their_tables() -> None:
    coefficients = encode(to_tensor(photograph(16, 16)), tables_for_quality(50), "4:2:0").to("cpu", torch.int16)
    assert all(plane.dtype == torch.int16 for plane in coefficients.planes)
    assert decode(coefficients).shape == (1, 3, 16, 16)
    assert coefficients.to("meta").tables[2].device.type == "meta"


def test_autocast_does_not_coarsen_the_transform() -> None:
    images = to_tensor(photograph(64, 64))
    plain = encode(images, tables_for_quality(90), "4:2:0").planes[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(images, tables_for_quality(90), "4:2:0").planes[0], plain)


def test_names_of_sampling_factors() -> None:
    for name in NAMES:
        assert subsampling_name(sampling_factors(name)) == name
    assert subsampling_name(((2, 2), (2, 2), (2, 2))) == "4:4:4"
    assert subsampling_name(((2, 2), (2, 1), (1, 2))) == "2x2,2x1,1x2"


@pytest.mark.parametrize("bad", ["4:2:1", "5x1,1x1,1x1", "3x1,2x1,1x1", ""])
def test_impossible_samplings_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="sampling"):
        encode(torch.rand(1, 3, 16, 16), tables_for_quality(50), bad)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="images"):
        encode(torch.rand(3, 16, 16), tables_for_quality(50), "4:2:0")
    with pytest.raises(ValueError, match="tables"):
        encode(torch.rand(2, 3, 16, 16), tables_for_quality(torch.tensor([1, 2, 3])), "4:2:0")
    with pytest.raises(ValueError, match="color_space"):
        encode(torch.rand(2, 3, 16, 16), tables_for_quality(50), "4:2:0", color_space="lab")
