"""The block-DCT latent: against SciPy's DCT and Pillow's YCbCr, lossless, and straight from a JPEG's coefficients."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.fft import dctn
from skimage import data

from restoration.jpeg import read_jpeg
from restoration.networks.dct_codec import CHANNELS, DCTCodec

LEVEL = 1 / 255
JFIF = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])


def picture(height: int, width: int, low: int = 0, high: int = 255) -> np.ndarray:
    """A part of a photograph, uint8 (H, W, 3), its levels brought between two."""
    part = data.astronaut()[40 : 40 + height, 120 : 120 + width].astype(float)
    return np.round(low + part / 255 * (high - low)).astype(np.uint8)


def as_tensor(levels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(levels.astype(np.float32)).movedim(-1, 0)[None] / 255


def block_dct(planes: np.ndarray) -> np.ndarray:
    """SciPy's orthonormal DCT of each whole 8x8 block of planes (H, W, C) in [-0.5, 0.5]: (64 C, H // 8, W // 8)."""
    rows, columns = planes.shape[0] // 8, planes.shape[1] // 8
    blocks = planes[: 8 * rows, : 8 * columns].reshape(rows, 8, columns, 8, -1).transpose(4, 0, 2, 1, 3)
    return dctn(blocks, axes=(-2, -1), norm="ortho").transpose(0, 3, 4, 1, 2).reshape(-1, rows, columns)


def saved(levels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pillow_ycbcr(jpeg: bytes) -> np.ndarray:
    """What Pillow decodes without turning it into RGB: (H, W, 1 or 3) in [-0.5, 0.5], each rounded to a level."""
    image = Image.open(io.BytesIO(jpeg))
    image.draft("L" if image.mode == "L" else "YCbCr", image.size)
    levels = np.asarray(image, dtype=float)
    return (levels.reshape(*levels.shape[:2], -1) - 128) / 255


def test_channels_are_scipys_dct_of_jfifs_ycbcr() -> None:
    """Channel 64 c + 8 v + u is component c at vertical frequency v and horizontal frequency u, divided by a scale."""
    levels, codec = picture(48, 72), DCTCodec()
    expected = block_dct(levels / 255 @ JFIF.T - np.array([128 / 255, 0, 0]))
    assert np.abs(codec.encode(as_tensor(levels))[0].numpy() - expected).max() < 2e-6
    codec.scale.copy_(torch.linspace(0.1, 3, CHANNELS))
    assert (
        np.abs(codec.encode(as_tensor(levels))[0].numpy() * codec.scale.numpy()[:, None, None] - expected).max() < 2e-6
    )


@pytest.mark.parametrize("size", [(8, 8), (24, 80), (128, 40)])
def test_nothing_is_lost(size: tuple[int, int]) -> None:
    """Also with a photograph's scale, and for colours that no YCbCr of 8 bits has."""
    codec = DCTCodec()
    codec.measure(as_tensor(picture(128, 128)))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert float((codec.decode(codec.encode(images)) - images).abs().max()) < 1e-5
    latents = torch.randn(2, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(1))
    assert float((codec.encode(codec.decode(latents)) - latents).abs().max()) < 1e-3  # outside of [0, 1], too


def test_measured_on_pictures_each_coefficient_is_of_size_one() -> None:
    codec, images = DCTCodec(), as_tensor(picture(256, 256))
    codec.measure(images)
    sizes = codec.encode(images).square().mean(dim=(0, 2, 3)).sqrt()
    assert torch.allclose(sizes, torch.ones(CHANNELS), atol=1e-4)
    assert codec.scale[0] > 20 * codec.scale[63] > 0  # as in any photograph
    codec.measure(torch.full((1, 3, 16, 16), 0.5))  # all but the mean are 0: nothing is divided by it
    assert bool((codec.scale > 0).all()) and bool(torch.isfinite(codec.encode(images)).all())


def test_white_noise_stays_white() -> None:
    """Of gray noise each of the 64 coefficients of luma has its variance, and no two go together; chroma has none."""
    noise = torch.randn(1, 1, 1024, 1024, generator=torch.Generator().manual_seed(2)).expand(-1, 3, -1, -1)
    latent = DCTCodec().encode(0.5 + 0.1 * noise)[0]
    luma = latent[:64].flatten(1)
    luma = luma - luma.mean(1, keepdim=True)
    covariance = luma @ luma.T / luma.shape[1] / 0.01
    assert float((covariance - torch.eye(64)).abs().max()) < 0.06  # 16384 blocks: 0.008 is one standard deviation
    assert float(latent[64:].abs().max()) < 1e-5


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"subsampling": 1}], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (61, 91)])
def test_a_files_coefficients_are_those_of_what_pillow_decodes(options: dict, size: tuple[int, int]) -> None:
    """Up to the rounding of pixels, 0.29 of a level: every component, also those that the file has in half size."""
    jpeg = saved(picture(*size, 40, 215), quality=60, **options)
    latent = DCTCodec().encode_jpeg(read_jpeg(jpeg))[0].numpy()
    expected = block_dct(pillow_ycbcr(jpeg))
    assert latent.shape[1:] == tuple(-(-side // 8) for side in size)
    error = latent[:, : expected.shape[1], : expected.shape[2]] - expected
    for component in error.reshape(3, -1):
        assert component.std() < 0.6 * LEVEL
    assert error[:64].std() < 0.31 * LEVEL and np.abs(error.mean()) < 0.05 * LEVEL


def test_a_gray_files_coefficients() -> None:
    jpeg = saved(picture(40, 56, 40, 215)[..., 1], quality=75)
    latent = DCTCodec().encode_jpeg(read_jpeg(jpeg))[0].numpy()
    assert (latent[:64] - block_dct(pillow_ycbcr(jpeg))).std() < 0.31 * LEVEL and not latent[64:].any()


def test_coefficients_are_taken_as_they_are() -> None:
    """A component of full resolution is the file's integers times its table, to the last bit; no pixel in between."""
    codec, jpeg = DCTCodec(), read_jpeg(saved(picture(32, 40), quality=5, subsampling=0))  # clipped when it is decoded
    latent = codec.encode_jpeg(jpeg)[0].unflatten(0, (3, 8, 8))
    for found, plane, table in zip(latent, jpeg.coefficients.planes, jpeg.tables, strict=True):
        expected = (plane[0].int() * table.reshape(8, 8)).permute(2, 3, 0, 1).float() / 255
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_turned_files_come_upright(orientation: int) -> None:
    """Against Pillow's own turning, where the borders of blocks are others than in the file."""
    exif = Image.Exif()
    exif[274] = orientation
    jpeg = saved(picture(61, 91, 40, 215), quality=80, subsampling=0, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))), dtype=float)
    expected = block_dct(upright / 255 @ JFIF.T - np.array([128 / 255, 0, 0]))
    latent = DCTCodec().encode_jpeg(read_jpeg(jpeg))[0].numpy()
    assert latent.shape[1:] == (12, 8) if orientation != 3 else (8, 12)
    assert (latent[:, : expected.shape[1], : expected.shape[2]] - expected).std() < 0.5 * LEVEL


def test_files_in_rgb() -> None:
    jpeg = saved(picture(32, 48, 40, 215), quality=90, keep_rgb=True)
    assert read_jpeg(jpeg).color_space == "rgb"
    expected = block_dct(np.asarray(Image.open(io.BytesIO(jpeg)), dtype=float) / 255 @ JFIF.T - [128 / 255, 0, 0])
    assert (DCTCodec().encode_jpeg(read_jpeg(jpeg))[0].numpy() - expected).std() < 0.35 * LEVEL


def test_what_is_no_picture_or_latent_is_refused() -> None:
    codec = DCTCodec()
    for shape in ((1, 3, 12, 16), (1, 3, 16, 12), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match="multiples of 8"):
            codec.encode(torch.zeros(shape))
    for shape in ((1, 4, 8, 8), (192, 8, 8)):
        with pytest.raises(ValueError, match="192"):
            codec.decode(torch.zeros(shape))
