"""The arithmetic of one-step restoration against diffusers' scheduler; its tiles against their definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm

from restoration.diffusion.one_step import alphas_cumprod_sd, interpolate_alphas_cumprod, predict_x0
from restoration.tiling import gaussian_weights, latent_tiles


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


def test_the_schedule_is_stable_diffusions() -> None:
    abar = alphas_cumprod_sd()
    assert torch.allclose(abar, scheduler().alphas_cumprod.double(), rtol=2e-6)
    assert float(abar[499]) == pytest.approx(0.27766943, abs=5e-7)
    abar.zero_()
    assert alphas_cumprod_sd()[0] > 0.99, "a caller must not be able to change it"


def test_x0_is_diffusers_prediction_of_the_original_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    latent, eps = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for timestep in (0, 199, 499, 999):
        expected = scheduler().step(eps, timestep, latent, generator=generator).pred_original_sample
        got = predict_x0(latent, eps, alphas_cumprod_sd()[timestep])
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    each = predict_x0(latent.half(), eps.half(), alphas_cumprod_sd()[[199, 499]])
    assert each.dtype == torch.float32
    one = predict_x0(latent[1:].half(), eps[1:].half(), alphas_cumprod_sd()[499])
    assert torch.equal(each[1:], one)


def test_between_integers_the_log_snr_is_linear_and_differentiable() -> None:
    abar = scheduler().alphas_cumprod.double().numpy()
    log_snr = np.log(abar / (1 - abar))
    timesteps = torch.tensor([0.0, 0.25, 499.5, 998.75, 999.0], dtype=torch.float64, requires_grad=True)
    expected = 1 / (1 + np.exp(-np.interp(timesteps.detach().numpy(), np.arange(1000), log_snr)))
    got = interpolate_alphas_cumprod(timesteps)
    assert np.allclose(got.detach().numpy(), expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(got.sum(), timesteps)
    assert (gradient < 0).all(), "more noise at every later timestep"
    for outside in (-0.1, 999.5, math.nan):
        with pytest.raises(ValueError, match="from 0 to 999"):
            interpolate_alphas_cumprod(outside)


def test_weights_are_the_published_gaussians() -> None:
    """Standard deviation 0.1 of a side, centred at (n-1)/2 across and at n/2 down."""
    weights = gaussian_weights(96, 64).double().numpy()
    rows = norm.pdf(np.arange(96), 96 / 2, 9.6)
    columns = norm.pdf(np.arange(64), 63 / 2, 6.4)
    expected = np.outer(rows, columns)
    assert np.allclose(weights, expected / expected.max(), rtol=1e-5, atol=1e-20)
    assert weights.min() > 0, "every pixel of a tile must count, or borders would divide by zero"


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize(("tile", "overlap"), [(96, 32), (32, 16), (40, 0)])
def test_tiles_cover_everything_with_their_overlap_and_end_at_the_border(tile: int, overlap: int, align: int) -> None:
    for side in (1, 31, 32, 40, 96, 97, 128, 160, 161, 200, 512):
        tiles = latent_tiles(side, 50, tile, overlap, align)
        spans = sorted({(one.top, one.top + one.height) for one in tiles})
        assert spans[0][0] == 0 and spans[-1][1] == side
        assert all(top % align == 0 for top, _ in spans)
        assert all(end - begin < tile + align for begin, end in spans)
        assert all(before[1] - after[0] >= overlap for before, after in itertools.pairwise(spans))
        if align == 1:
            fewest = next(n for n in range(1, 99) if n * tile - (n - 1) * overlap >= side)
            assert len(spans) == fewest, "the published number of tiles"


def test_a_1024_pixel_image_takes_two_by_two_tiles() -> None:
    """As the authors' script splits it: 96 wide, flush with the border at 128 latent pixels."""
    tiles = latent_tiles(128, 128, 96, 32)
    assert [(one.top, one.left) for one in tiles] == [(0, 0), (0, 32), (32, 0), (32, 32)]


@pytest.mark.parametrize(("tile", "overlap", "align"), [(96, 49, 1), (96, -1, 1), (0, 0, 1), (96, 30, 8)])
def test_impossible_tiles_are_refused(tile: int, overlap: int, align: int) -> None:
    with pytest.raises(ValueError, match=r"overlap|multiple"):
        latent_tiles(128, 128, tile, overlap, align)
