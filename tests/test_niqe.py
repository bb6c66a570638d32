"""NIQE equals BasicSR's on photographs and on their JPEGs, and its parts equal their formulae; others are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate
from scipy.special import gamma
from scipy.stats import gennorm
from shared import shared_path
from skimage import data

from restoration.metrics import studio_luma
from restoration.niqe import NIQE, halved, load_niqe
from training.degradation import compress

BASICSR = {
    "bikes": (2.9275069, 5.3032976),
    "cemetry": (2.3382275, 5.8065349),
    "house": (2.5719129, 6.8138115),
    "ocean": (3.4105335, 8.1334756),
    "sailing1": (2.9283731, 5.9731607),
    "stream": (2.0568065, 5.1313347),
}
"""basicsr 1.4.2, calculate_niqe(crop_border=0), of pictures of LIVE1 and of their JPEGs of quality 10, 4:2:0."""
ASTRONAUT = 3.0649477
"""The same of skimage's astronaut."""
TOLERANCE = 2e-3  # 7e-4 is the largest difference that was seen
WITHOUT_ROUNDING = {"ocean": 14.2206070, "house": 11.3376772}
"""The same code of JPEGs of quality 5, in float64, and with differences below 1e-8 from the local mean taken as none.

BasicSR computes in float32 and counts rounding errors in flat blocks as values: up to 0.16 more or less at quality 5.
"""


def to_tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def niqe() -> NIQE:
    return load_niqe(shared_path("weights", "niqe", "niqe_pris_params.npz"))


@pytest.mark.parametrize("name", BASICSR)
def test_photographs_and_their_jpegs_have_basicsrs_values(niqe, name):
    clean = np.array(Image.open(shared_path("data", "eval", "LIVE1") / f"{name}.webp").convert("RGB"))
    pair = torch.cat([to_tensor(clean), to_tensor(compress(clean, 10))])
    assert niqe(pair).tolist() == pytest.approx(BASICSR[name], abs=TOLERANCE)


@pytest.mark.parametrize("name", WITHOUT_ROUNDING)
def test_flat_blocks_have_basicsrs_values_but_for_its_rounding_errors(niqe, name):
    clean = np.array(Image.open(shared_path("data", "eval", "LIVE1") / f"{name}.webp").convert("RGB"))
    assert niqe(to_tensor(compress(clean, 5))).item() == pytest.approx(WITHOUT_ROUNDING[name], abs=1e-4)


def test_what_is_flat_does_not_depend_on_rounding_errors(niqe):
    """A brighter picture has the same statistics, also where whole blocks are flat, which BasicSR leaves to chance."""
    luma = studio_luma(to_tensor(data.astronaut()))
    assert niqe(luma).item() == pytest.approx(ASTRONAUT, abs=TOLERANCE)
    luma[..., :200, :300] = 100 / 255
    for brighter in (1, 7, 20):
        assert niqe(luma + brighter / 255).item() == pytest.approx(niqe(luma).item(), abs=1e-6)


def test_luma_and_colours_of_a_picture_give_the_same_alone_and_in_a_batch(niqe):
    photo = to_tensor(data.astronaut()[:200, :300])
    batch = torch.cat([photo.flip(-1), photo])
    torch.testing.assert_close(niqe(studio_luma(batch)), torch.cat([niqe(one) for one in batch.split(1)]))
    assert niqe(batch).shape == (2,) and niqe(batch)[0] != niqe(batch)[1]


def test_normalized_luma_is_scipys(niqe):
    luma = data.camera()[100:150, 200:270].astype(np.float64)
    window = niqe.window.numpy()
    mean, square = (correlate(x, window, mode="nearest") for x in (luma, luma**2))
    expected = (luma - mean) / (np.sqrt(np.abs(square - mean**2)) + 1)
    torch.testing.assert_close(niqe.normalized(torch.from_numpy(luma)[None, None])[0, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0, 4.0])
def test_fitted_shape_and_scale_are_those_that_samples_were_drawn_with(shape):
    """Left and right halves of generalised Gaussians of two scales, joined in proportion, as the asymmetric density."""
    drawn = np.abs(gennorm.rvs(shape, size=200_000, random_state=0))
    left = np.random.default_rng(0).random(len(drawn)) < 2 / (2 + 3)
    alpha, low, high = NIQE().fit(torch.from_numpy(np.where(left, -2 * drawn, 3 * drawn))[None])
    assert [alpha.item(), low.item(), high.item()] == pytest.approx([shape, 2, 3], rel=0.03)


def test_features_are_the_papers_moments_of_products_of_neighbours():
    """Independent normal noise: shape 2 of the values, scale sqrt(2); products have no skew and a sharp peak."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 400, 400)))
    features = NIQE().describe(noise)[0].tolist()
    assert features[:2] == pytest.approx([2, 2**0.5], rel=0.02)
    for alpha, mean, left, right in np.reshape(features[2:], (4, 4)):
        ratio = gamma(2 / alpha) ** 2 / (gamma(1 / alpha) * gamma(3 / alpha))
        assert ratio == pytest.approx(4 / np.pi**2, rel=0.02)  # (E|xy|)^2 / E(xy)^2 of two normal numbers
        assert mean == pytest.approx(0, abs=0.02) and left == pytest.approx(right, rel=0.02)


def test_half_the_size_has_matlabs_weights_and_mirrored_borders():
    taps = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256  # imresize([..., 1, ...], 0.5) of MATLAB
    picture = np.random.default_rng(0).random((12, 20))
    padded = np.pad(picture, 3, mode="symmetric")
    rows = np.stack([taps @ padded[2 * row : 2 * row + 8] for row in range(6)])
    expected = np.stack([rows[:, 2 * column : 2 * column + 8] @ taps for column in range(10)], axis=1)
    torch.testing.assert_close(halved(torch.from_numpy(picture)[None, None])[0, 0], torch.from_numpy(expected))


def test_other_pictures_are_refused_with_a_sentence(niqe):
    with pytest.raises(ValueError, match=r"at least 4 blocks of 96x96 pixels, got a picture of 287x191, which holds 2"):
        niqe(torch.rand(1, 3, 191, 287))
    with pytest.raises(ValueError, match=r"expected pictures \(B,3,H,W\) or luma \(B,1,H,W\), got \(1, 4, 300, 300\)"):
        niqe(torch.rand(1, 4, 300, 300))
    flat = torch.full((1, 3, 200, 300), 0.5)
    flat[..., :80, :180] = torch.rand(1, 3, 80, 180, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"pixels with some texture, got 2: the rest is flat"):
        niqe(flat)


def test_other_files_are_refused_with_a_sentence(tmp_path):
    whole = {"mu_pris_param": np.zeros((1, 36)), "cov_pris_param": np.eye(36), "gaussian_window": np.ones((7, 7)) / 49}
    np.savez(tmp_path / "whole.npz", **whole)
    assert load_niqe(tmp_path / "whole.npz").covariance.equal(torch.eye(36, dtype=torch.float64))
    for key, value in (("mu_pris_param", np.zeros(18)), ("cov_pris_param", np.full((36, 36), np.nan)),
                       ("gaussian_window", None)):  # fmt: skip
        changed = {name: array for name, array in {**whole, key: value}.items() if array is not None}
        np.savez(tmp_path / "other.npz", **changed)
        with pytest.raises(ValueError, match=rf"other\.npz: expected {key} of [\dx]+ numbers, got"):
            load_niqe(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"absent\.npz: there is no such file"):
        load_niqe(tmp_path / "absent.npz")
