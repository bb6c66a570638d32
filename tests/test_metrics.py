"""The measures agree with skimage, with a paper's formula written as loops, and with published values."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from shared import shared_path
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restoration.lpips import LPIPS, load_lpips_squeeze
from restoration.metrics import blockiness, psnr, psnr_b, psnr_y, rgb_to_luma, ssim, studio_luma
from training.degradation import compress


def to_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def pair():
    clean = np.ascontiguousarray(data.astronaut()[40:201, 100:233])
    return clean, compress(clean, 10)


def test_psnr_and_ssim_equal_skimage(pair):
    clean, jpeg = pair
    x, y = to_tensor(jpeg), to_tensor(clean)
    assert psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(clean, jpeg), abs=1e-4)
    for size in (7, 9):
        expected = structural_similarity(clean, jpeg, channel_axis=2, win_size=size)
        assert ssim(x, y, size).item() == pytest.approx(expected, abs=2e-6)


def test_ssim_of_bright_flat_pictures_survives_float32():
    """Naive float32 variances of nearly white, nearly flat pictures are off by more than SSIM's constants allow."""
    clean = np.full((40, 40, 3), 250, np.uint8)
    clean[::2, ::3] = 251
    other = np.roll(clean, 1, axis=1)
    expected = structural_similarity(clean, other, channel_axis=2)
    assert ssim(to_tensor(other), to_tensor(clean)).item() == pytest.approx(expected, abs=1e-4)


def loop_bef(channel):
    """Yim and Bovik's blocking effect factor of one channel, pair by pair."""
    height, width = channel.shape
    edge, inside = [], []
    for row in range(height):
        for column in range(width - 1):
            difference = (channel[row, column] - channel[row, column + 1]) ** 2
            (edge if (column + 1) % 8 == 0 else inside).append(difference)
    for row in range(height - 1):
        for column in range(width):
            difference = (channel[row, column] - channel[row + 1, column]) ** 2
            (edge if (row + 1) % 8 == 0 else inside).append(difference)
    d_edge, d_inside = sum(edge) / len(edge), sum(inside) / len(inside)
    eta = math.log2(8) / math.log2(min(height, width)) if d_edge > d_inside else 0.0
    return eta * (d_edge - d_inside)


@pytest.mark.parametrize("height, width", [(64, 48), (61, 50), (9, 33)])
def test_blockiness_and_psnr_b_equal_the_papers_formula_in_loops(pair, height, width):
    clean, jpeg = (image[:height, :width].astype(np.float64) / 255 for image in pair)
    factors = [loop_bef(jpeg[..., channel]) for channel in range(3)]
    errors = [np.mean((clean[..., channel] - jpeg[..., channel]) ** 2) for channel in range(3)]
    expected = np.mean([-10 * math.log10(error + factor) for error, factor in zip(errors, factors, strict=True)])
    x, y = to_tensor(pair[1][:height, :width]), to_tensor(pair[0][:height, :width])
    assert blockiness(x).item() == pytest.approx(np.mean(factors), rel=1e-4, abs=1e-8)
    assert psnr_b(x, y).item() == pytest.approx(expected, abs=1e-3)


def test_blockiness_finds_the_grid_and_only_on_the_grid():
    """Steps on the block grid count, the same steps inside blocks do not (the factor never turns negative)."""
    steps = (torch.arange(64) // 8 % 2).float().expand(1, 1, 64, 64)
    assert blockiness(steps).item() > 0.05
    assert blockiness(steps.roll(4, dims=-1)).item() == 0.0


def test_values_are_one_per_picture_and_independent_of_the_batch(pair):
    clean, jpeg = (to_tensor(image) for image in pair)
    x, y = torch.cat([jpeg, clean, jpeg.flip(-1)]), torch.cat([clean, clean, clean.flip(-1)])
    for measure in (psnr, ssim, psnr_b):
        alone = torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(measure(x, y), alone)
    assert psnr(x, y)[1].isinf() and ssim(x, y)[1].item() == pytest.approx(1.0)


def test_luma_is_jfif_bt601():
    colours = torch.eye(3).view(3, 3, 1, 1)
    assert rgb_to_luma(colours).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_studio_luma_spans_16_to_235_and_its_psnr_is_of_these_levels(pair):
    corners = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]]).float().view(4, 3, 1, 1)
    assert (255 * studio_luma(corners)).flatten().tolist() == pytest.approx([16, 235, 81.481, 40.966])
    clean, jpeg = (image.astype(np.float64) / 255 @ np.array([65.481, 128.553, 24.966]) + 16 for image in pair)
    x, y = to_tensor(pair[1]), to_tensor(pair[0])
    assert psnr_y(x, y).item() == pytest.approx(peak_signal_noise_ratio(clean, jpeg, data_range=255), abs=1e-3)


def test_live1_luma_of_the_jpegs_agrees_with_the_values_that_restorers_are_compared_with():
    """Pillow's 4:2:0 files, mean over the 29 pictures of the PSNR of BT.601 studio-range luma."""
    qualities, values = (5, 10, 20, 40), []
    for path in sorted(shared_path("data", "eval", "LIVE1").glob("*.webp")):
        clean = np.array(Image.open(path).convert("RGB"))
        values.append([psnr_y(to_tensor(compress(clean, q)), to_tensor(clean)).item() for q in qualities])
    assert len(values) == 29
    assert np.mean(values, axis=0).round(2).tolist() == [25.95, 28.37, 30.64, 32.96]


def test_wrong_shapes_are_refused_in_words():
    small, large = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="equal shape"):
        psnr(small, large)
    with pytest.raises(ValueError, match="win_size"):
        ssim(small, small, 9)
    with pytest.raises(ValueError, match="above 8"):
        blockiness(small)
    with pytest.raises(ValueError, match=r"expected RGB pictures \(B,3,H,W\)"):
        psnr_y(small[:, :1], small[:, :1])


def test_live1_jpeg_agrees_with_published_tables():
    """DriftRec's Table IV prints SSIM .88, PSNR 29.4, PSNR-B 27.4 for the JPEGs of quality 30 themselves."""
    values = []
    for path in sorted(shared_path("data", "eval", "LIVE1").glob("*.webp")):
        clean = np.array(Image.open(path).convert("RGB"))
        x, y = to_tensor(compress(clean, 30)), to_tensor(clean)
        values.append([psnr(x, y).item(), psnr_b(x, y).item(), ssim(x, y, 9).item()])
    assert len(values) == 29
    mean_psnr, mean_psnr_b, mean_ssim = np.mean(values, axis=0)
    assert (round(mean_psnr, 1), round(mean_psnr_b, 1), round(mean_ssim, 2)) == (29.4, 27.4, 0.88)


def test_lpips_gives_the_published_value():
    """torchmetrics documents 0.1008 for net_type squeeze on uniform noise of seed 123."""
    model = load_lpips_squeeze(shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz"))
    generator = torch.Generator().manual_seed(123)
    first, second = (torch.rand(10, 3, 100, 100, generator=generator) for _ in range(2))
    values = model(first, second)
    assert values.shape == (10,)
    assert values.mean().item() == pytest.approx(0.1008, abs=5e-5)
    assert model(first, first).abs().max().item() == 0.0


def test_lpips_gives_finite_gradients_to_pictures_and_none_to_weights():
    model = LPIPS()
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(images, torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_wrong_lpips_file_is_refused(tmp_path):
    np.savez(tmp_path / "wrong.npz", **{"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)})
    with pytest.raises(ValueError, match=r"wrong\.npz does not hold"):
        load_lpips_squeeze(tmp_path / "wrong.npz")
