"""DDRM's sampler: the authors' loop written out, a prior whose posterior is known, and what callers rely on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.stats import truncnorm
from torch import Tensor

from restoration.diffusion.ddrm import DEFAULT_ETA_B, ddrm_timesteps, sample_ddrm
from restoration.diffusion.prior import NoiseSchedule
from restoration.jpeg import encode, jpeg_data_from, tables_for_quality
from restoration.measurements import JPEGMeasurement, PaperJPEGMeasurement
from restoration.noise import SampleNoise, sample_generator

ABAR = NoiseSchedule().alphas_cumprod()


class Anything:
    """A measurement that every picture agrees with."""

    def shift(self, images: Tensor) -> Tensor:
        return images

    def project(self, images: Tensor) -> Tensor:
        return images

    def expect(self, images: Tensor, spread: float) -> Tensor:
        return images


class Shifts(Anything):
    """Corrections that are told apart by what they add."""

    def shift(self, images: Tensor) -> Tensor:
        return images + 0.25

    def project(self, images: Tensor) -> Tensor:
        return images - 0.25

    def expect(self, images: Tensor, spread: float) -> Tensor:
        return images + spread


def noise(count: int = 1, seed: int = 0) -> SampleNoise:
    return SampleNoise([sample_generator(seed, number) for number in range(count)])


class Recorded:
    """Numbers drawn beforehand, in float64, for two implementations alike."""

    def __init__(self, shape: tuple[int, ...], count: int, seed: int = 0) -> None:
        self.drawn = np.random.default_rng(seed).standard_normal((count, *shape))
        self.used = 0

    def normal(self, like: Tensor) -> Tensor:
        self.used += 1
        return torch.from_numpy(self.drawn[self.used - 1]).to(like)


# --- the authors' loop ------------------------------------------------------------------------------------------------

BASE_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
BASE_CHROMA = "17 18 24 47 18 21 26 66 24 26 56 99 47 66 99 99"
MATRIX = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])


def authors_tables(quality: float) -> list[np.ndarray]:
    luma = np.array([float(number) for number in BASE_LUMA.split()]).reshape(8, 8)
    chroma = np.full((8, 8), 99.0)
    chroma[:4, :4] = np.array([float(number) for number in BASE_CHROMA.split()]).reshape(4, 4)
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return [np.clip(np.floor((scale * base + 50) / 100), 1, 255) for base in (luma, chroma, chroma)]


def authors_round_trip(picture: np.ndarray, quality: float) -> np.ndarray:
    """Dec(Enc(x)) of x (3, H, W) in [-1, 1], block by block with SciPy's DCT."""
    planes = np.tensordot(MATRIX, (picture + 1) / 2 * 255, 1)
    planes[1:] += 128
    kept = []
    for plane, table in zip(
        [planes[0], planes[1, ::2, ::2], planes[2, ::2, ::2]], authors_tables(quality), strict=True
    ):
        out = np.empty_like(plane)
        for top in range(0, plane.shape[0], 8):
            for left in range(0, plane.shape[1], 8):
                units = dctn(plane[top : top + 8, left : left + 8] - 128, norm="ortho") / table
                out[top : top + 8, left : left + 8] = idctn(np.round(units) * table, norm="ortho") + 128
        kept.append(out)
    whole = np.stack([kept[0], *(plane.repeat(2, 0).repeat(2, 1) for plane in kept[1:])])
    whole[1:] -= 128
    return np.tensordot(np.linalg.inv(MATRIX), whole, 1) / 255 * 2 - 1


def authors_loop(model, y0: np.ndarray, drawn: np.ndarray, quality: float, eta: float, eta_b: float) -> np.ndarray:
    """The published loop for 20 steps from 300, on one picture."""
    abar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    seq = list(range(0, 300, 300 // 20))
    x = np.sqrt(abar[seq[-1]]) * y0 + np.sqrt(1 - abar[seq[-1]]) * drawn[0]
    for number, (i, j) in enumerate(zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True)):
        at, at_next = abar[i], 1.0 if j < 0 else abar[j]
        et = model(x, i)
        x0 = (x - et * np.sqrt(1 - at)) / np.sqrt(at)
        corrected = x0 - authors_round_trip(x0, quality) + authors_round_trip(y0, quality)
        x = (
            eta_b * np.sqrt(at_next) * corrected
            + (1 - eta_b) * np.sqrt(at_next) * x0
            + (1 - eta) * et * np.sqrt(1 - at_next)
        )
        if at_next < 1:
            x = x + eta * np.sqrt(1 - at_next) * drawn[number + 1]
    return x


def smooth_model(x: np.ndarray, t: int) -> np.ndarray:
    """Some function that depends on place, channel and time, and pulls towards gray."""
    return np.sqrt(1 - ABAR[t]) * (0.9 * x + 0.1 * np.sin(3 * np.roll(x, 1, -1)))


@pytest.mark.parametrize("quality", [5, 10, 30, 75])
@pytest.mark.parametrize(("eta", "eta_b"), [(1.0, 0.4), (0.85, 1.0)])
def test_paper_is_the_published_loop(quality, eta, eta_b):
    """The same numbers in float64 to 1e-6, operator, order of operations and rounding included."""
    clean = np.random.default_rng(3).uniform(-1, 1, (3, 4, 4)).repeat(8, 1).repeat(8, 2)
    y0 = authors_round_trip(clean, quality)
    recorded = Recorded((1, 3, 32, 32), 20)
    expected = authors_loop(smooth_model, y0, recorded.drawn[:, 0], quality, eta, eta_b)
    measurement = PaperJPEGMeasurement.simulate(torch.from_numpy(clean + 1)[None] / 2, quality)

    def denoise(x: Tensor, t: int) -> Tensor:
        return torch.from_numpy(smooth_model(x.numpy(), t))

    observed = 2 * measurement.observed - 1
    found = sample_ddrm(
        denoise, ABAR, observed, measurement, recorded, steps=20, start=300, eta=eta, eta_b=eta_b, mode="shift"
    )
    assert np.abs(observed[0].numpy() - y0).max() < 1e-9
    assert np.abs(found[0].numpy() - expected).max() < 1e-6
    assert recorded.used == 20


# --- timesteps and weights --------------------------------------------------------------------------------------------


def test_timesteps_are_the_authors_where_steps_divide_the_start():
    assert ddrm_timesteps(20, 300) == list(range(285, -1, -15))
    assert ddrm_timesteps(1, 300) == [0]
    assert ddrm_timesteps(5, 5) == [4, 3, 2, 1, 0]
    assert ddrm_timesteps(1000, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize(("steps", "start"), [(7, 300), (13, 1000), (299, 300)])
def test_there_are_as_many_timesteps_as_steps(steps, start):
    """Falling, below the start, ending at 0: also where steps do not divide start."""
    times = ddrm_timesteps(steps, start)
    assert len(times) == steps and times[-1] == 0 and times[0] < start
    assert all(first > second for first, second in pairwise(times))


@pytest.mark.parametrize(("steps", "start"), [(0, 300), (301, 300), (1, 0), (-2, 10)])
def test_more_steps_than_timesteps_are_refused_in_words(steps, start):
    with pytest.raises(ValueError, match=rf"steps.*got {steps}"):
        ddrm_timesteps(steps, start)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eta": 1.5}, "eta between 0 and 1"),
        ({"eta_b": -0.1}, "eta_b between 0 and 1"),
        ({"mode": "clamp"}, "mode of soft, projection, shift"),
        ({"start": 1500}, "start of at most 1000"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(options, said):
    with pytest.raises(ValueError, match=said):
        sample_ddrm(lambda x, t: x, ABAR, torch.zeros(1, 3, 8, 8), Anything(), noise(), **options)


def test_the_mode_decides_which_correction_and_its_weight():
    """With one step at t = 0 the result is the prediction plus weight x correction."""

    def run(**options) -> float:
        drawn = Recorded((1, 1, 2, 2), 1)
        start = np.sqrt(1 - ABAR[0]) * torch.from_numpy(drawn.drawn[0]).float()
        found = sample_ddrm(
            lambda x, t: start / np.sqrt(1 - ABAR[0]),
            ABAR,
            torch.zeros(1, 1, 2, 2),
            Shifts(),
            drawn,
            steps=1,
            **options,
        )
        return float(found.mean())

    assert run(mode="projection") == pytest.approx(-0.5 * DEFAULT_ETA_B["projection"], abs=1e-5)
    assert run(mode="shift") == pytest.approx(0.5 * DEFAULT_ETA_B["shift"], abs=1e-5)
    assert run(mode="soft") == pytest.approx(np.sqrt(1 / ABAR[0] - 1), abs=1e-5)  # the noise, in units of [-1, 1]
    assert run(mode="shift", eta_b=1.0) == pytest.approx(0.5, abs=1e-5)


def test_no_fresh_noise_follows_the_predicted_one():
    """eta 0 is DDIM: from x_T = sqrt(abar) y + sqrt(1 - abar) z a perfect prediction of z leads back to y."""
    observed, drawn = torch.rand(1, 3, 8, 8) * 2 - 1, Recorded((1, 3, 8, 8), 10)
    z = torch.from_numpy(drawn.drawn[0]).float()
    found = sample_ddrm(lambda x, t: z, ABAR, observed, Anything(), drawn, eta=0.0, steps=10)
    torch.testing.assert_close(found, observed, atol=1e-5, rtol=0)


def test_the_callback_hears_of_every_evaluation():
    heard = []
    sample_ddrm(lambda x, t: x, ABAR, torch.zeros(1, 3, 8, 8), Anything(), noise(), steps=6, callback=heard.append)
    assert [(step.index, step.total, step.t) for step in heard] == [
        (number + 1, 6, t) for number, t in enumerate([250, 200, 150, 100, 50, 0])
    ]


def test_a_sample_does_not_depend_on_its_batch():
    """Each has noise of its own; the global generator is left alone."""
    observed = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = torch.get_rng_state()

    def run(generators) -> Tensor:
        batch = observed.expand(len(generators), -1, -1, -1)
        return sample_ddrm(lambda x, t: 0.3 * x, ABAR, batch, Anything(), SampleNoise(generators), steps=5)

    together = run([sample_generator(4, number) for number in range(3)])
    alone = torch.cat([run([sample_generator(4, number)]) for number in range(3)])
    assert torch.equal(together, alone) and not torch.equal(together[0], together[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_needs_a_generator_for_each_image():
    with pytest.raises(ValueError, match=r"batch of 2.*got 3"):
        noise(2).normal(torch.zeros(3, 3, 8, 8))


# --- a prior whose posterior is known ---------------------------------------------------------------------------------


class BlockGaussian:
    """Gray pictures whose DCT coefficients are independent and normal: the exact prediction, and the posterior mean.

    In units of the state, levels / 127.5 - 1. Colour is pinned to gray, as its variance is zero.
    """

    def __init__(self, blocks: tuple[int, int], mean: np.ndarray, spread: np.ndarray) -> None:
        self.blocks, self.mean, self.spread = blocks, mean, spread  # (8, 8) each, in levels

    def coefficients(self, picture: np.ndarray) -> np.ndarray:
        """(..., H, W) levels minus 128 -> (..., Hb, Wb, 8, 8)."""
        rows, columns = self.blocks
        cut = picture.reshape(*picture.shape[:-2], rows, 8, columns, 8).swapaxes(-3, -2)
        return dctn(cut, axes=(-2, -1), norm="ortho")

    def picture(self, coefficients: np.ndarray) -> np.ndarray:
        rows, columns = self.blocks
        cut = idctn(coefficients, axes=(-2, -1), norm="ortho").swapaxes(-3, -2)
        return cut.reshape(*cut.shape[:-4], 8 * rows, 8 * columns)

    def denoise(self, x: Tensor, t: int) -> Tensor:
        a, variance = np.sqrt(ABAR[t]), 1 - ABAR[t]
        found = self.coefficients(x.double().mean(1).numpy() * 127.5)
        remaining = variance * 127.5**2 / 3  # the mean of three channels carries a third of the noise's variance
        gain = a * self.spread**2 / (a**2 * self.spread**2 + remaining)
        x0 = self.picture(self.mean + gain * (found - a * self.mean)) / 127.5
        clean = torch.from_numpy(x0)[:, None].expand_as(x)
        return ((x - a * clean) / np.sqrt(variance)).to(x.dtype)

    def posterior_mean(self, planes: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Of the coefficients, given that each lies in its cell: means of truncated normal distributions."""
        low, high = ((planes + side) * table for side in (-0.5, 0.5))
        return truncnorm.mean(
            (low - self.mean) / self.spread, (high - self.mean) / self.spread, loc=self.mean, scale=self.spread
        )


@pytest.fixture(scope="module")
def gaussian():
    """A prior with a falling spectrum, a picture drawn from it, and its JPEG of quality 10."""
    prior = BlockGaussian((6, 8), np.zeros((8, 8)), 160 / (1 + np.add.outer(np.arange(8), np.arange(8))) ** 1.5)
    drawn = np.random.default_rng(5).standard_normal((6, 8, 8, 8)) * prior.spread
    clean = prior.picture(drawn) + 128
    picture = torch.from_numpy(clean / 255).float().expand(1, 3, -1, -1)
    jpeg = jpeg_data_from(encode(picture, tables_for_quality(10), "gray", round_to_8bit=False), "drawn.jpg")
    planes, table = (one[0].double().numpy() for one in (jpeg.coefficients.planes[0], jpeg.tables[0]))
    return prior, jpeg, prior.posterior_mean(planes, table), clean


def average(prior: BlockGaussian, jpeg, samples: int = 64, mode: str = "projection", **options) -> np.ndarray:
    """The coefficients of the average over samples."""
    measurement = JPEGMeasurement(jpeg)
    observed = (2 * measurement.observed - 1).expand(samples, -1, -1, -1)
    found = sample_ddrm(prior.denoise, ABAR, observed, measurement, noise(samples), mode=mode, **options)
    return prior.coefficients(((found.double().mean(dim=(0, 1)) + 1) / 2 * 255 - 128).numpy())


def rmse(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.mean((first - second) ** 2)))


def test_the_average_approaches_the_constrained_mean(gaussian):
    """In RMSE of coefficients, levels: the JPEG's decode is 2.6 away from the posterior mean, the prior's mean 26.

    What DDRM reaches (64 samples): projection 2.2 in 20 steps and 1.8 in 100; shift 1.0; soft 1.4. It is no exact
    sampler: the projection leaves coefficients at the border of their cells that the posterior spreads inside.
    """
    prior, jpeg, posterior, _ = gaussian
    decoded = prior.coefficients((JPEGMeasurement(jpeg).observed[0].double().mean(0) * 255 - 128).numpy())
    assert rmse(decoded, posterior) > 2.5 and rmse(np.zeros_like(posterior), posterior) > 20
    projected = rmse(average(prior, jpeg), posterior)
    assert projected < 2.35
    assert rmse(average(prior, jpeg, steps=100), posterior) < projected - 0.3
    assert rmse(average(prior, jpeg, mode="shift"), posterior) < 1.15
    assert rmse(average(prior, jpeg, mode="soft"), posterior) < 1.5


def test_the_average_is_nearer_to_the_picture_than_the_decode(gaussian):
    """The posterior mean is the best estimate; all modes come closer to the drawn picture than the JPEG does."""
    prior, jpeg, posterior, clean = gaussian
    truth, decoded = (
        prior.coefficients(levels - 128)
        for levels in (clean, JPEGMeasurement(jpeg).observed[0].double().mean(0).numpy() * 255)
    )
    best, before = rmse(posterior, truth), rmse(decoded, truth)
    for mode, share in (("projection", 0.7), ("shift", 0.8), ("soft", 0.5)):
        assert best < rmse(average(prior, jpeg, mode=mode), truth) < before - share * (before - best)


def test_without_a_measurement_ddim_has_its_closed_form(gaussian):
    """eta 0: each coefficient of the start is multiplied by what the steps make of it."""
    prior, *_ = gaussian
    drawn, times = Recorded((1, 3, 48, 64), 40), ddrm_timesteps(40, 1000)
    found = sample_ddrm(
        prior.denoise, ABAR, torch.zeros(1, 3, 48, 64, dtype=torch.float64), Anything(), drawn, steps=40, start=1000,
        eta=0.0,
    )  # fmt: skip
    x = prior.coefficients(np.sqrt(1 - ABAR[times[0]]) * drawn.drawn[0, 0].mean(0) * 127.5)
    for abar, after in zip(ABAR[times], [*ABAR[times[1:]], 1.0], strict=True):
        x0 = np.sqrt(abar) * prior.spread**2 / (abar * prior.spread**2 + (1 - abar) * 127.5**2 / 3) * x
        x = np.sqrt(after) * x0 + np.sqrt((1 - after) / (1 - abar)) * (x - np.sqrt(abar) * x0)
    np.testing.assert_allclose(prior.coefficients(found[0].mean(0).numpy() * 127.5), x, atol=1e-6)


def test_projection_ends_inside_the_cells(gaussian):
    """Every coefficient of a sample, before anything is rounded or finished; half weight leaves some outside."""
    prior, jpeg, *_ = gaussian
    planes, table = (one[0].double().numpy() for one in (jpeg.coefficients.planes[0], jpeg.tables[0]))
    for mode, eta_b, inside in (("projection", None, True), ("soft", None, True), ("projection", 0.5, False)):
        coefficients = average(prior, jpeg, samples=1, mode=mode, eta_b=eta_b)
        outside = np.abs(coefficients / table - planes).max() - 0.5
        assert (outside < 1e-3) == inside, (mode, eta_b)
