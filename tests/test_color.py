"""Colour corrections equal their formulae, written out in numpy."""

import numpy as np
import pytest
import torch

from restoration.color import COLOR_CORRECTIONS, match_adain, match_mean, match_wavelet


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    images = rng.uniform(0.3, 0.6, (2, 3, 37, 45))
    reference = 0.8 * images + rng.uniform(0, 0.1, (2, 3, 1, 1)) + rng.uniform(-0.02, 0.02, images.shape)
    return images, reference


def apply(function, images, reference):
    return function(torch.from_numpy(images).float(), torch.from_numpy(reference).float()).numpy()


def test_mean_matching_shifts_each_channel_of_each_picture(pair):
    images, reference = pair
    expected = images + (reference.mean((2, 3), keepdims=True) - images.mean((2, 3), keepdims=True))
    np.testing.assert_allclose(apply(match_mean, images, reference), expected, atol=1e-6)


def test_adain_uses_unbiased_variance_plus_epsilon(pair):
    """The low-contrast pictures make both the epsilon and the n-1 visible at this tolerance."""
    images, reference = (0.5 + 0.02 * (values - 0.45) for values in pair)
    images, reference = images[..., :6, :5], reference[..., :6, :5]
    expected = np.empty_like(images)
    for index in np.ndindex(2, 3):
        x, y = images[index], reference[index]
        deviations = [np.sqrt(((v - v.mean()) ** 2).sum() / (v.size - 1) + 1e-5) for v in (x, y)]
        expected[index] = (x - x.mean()) / deviations[0] * deviations[1] + y.mean()
    np.testing.assert_allclose(apply(match_adain, images, reference), expected, atol=1e-6)


def wavelet_split(channel):
    """High and low frequencies of one channel by five dilated binomial blurs, pixel by pixel."""
    height, width = channel.shape
    high, low = np.zeros_like(channel), channel
    for level in range(5):
        step = 2**level
        blurred = np.zeros_like(low)
        for dy, wy in ((-step, 1), (0, 2), (step, 1)):
            for dx, wx in ((-step, 1), (0, 2), (step, 1)):
                rows = np.clip(np.arange(height) + dy, 0, height - 1)
                columns = np.clip(np.arange(width) + dx, 0, width - 1)
                blurred += wy * wx / 16 * low[np.ix_(rows, columns)]
        high, low = high + low - blurred, blurred
    return high, low


def test_wavelet_takes_high_frequencies_from_one_and_low_from_the_other(pair):
    images, reference = pair
    expected = np.empty_like(images)
    for index in np.ndindex(2, 3):
        expected[index] = wavelet_split(images[index])[0] + wavelet_split(reference[index])[1]
    np.testing.assert_allclose(apply(match_wavelet, images, reference), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["mean", "adain", "wavelet"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50)])
def test_results_stay_in_range_and_finite_at_any_size(name, size):
    generator = torch.Generator().manual_seed(1)
    images, reference = torch.rand(2, 2, 3, *size, generator=generator).unbind(0)
    result = COLOR_CORRECTIONS[name](images * 0.2 + 0.8, reference)
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


def test_none_changes_nothing_and_a_shape_mismatch_is_refused():
    images = torch.full((1, 3, 4, 4), 1.5)
    assert COLOR_CORRECTIONS["none"](images, images) is images
    with pytest.raises(ValueError, match="equal shape"):
        match_mean(images, images[..., :2])
