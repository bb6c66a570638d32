"""The samplers on residuals whose score is known exactly, and against independent implementations of each formula."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from restoration.diffusion.prediction import constrained
from restoration.diffusion.samplers import (
    SAMPLERS,
    NoiseSource,
    sample,
    sample_multistep,
    score_from_denoised,
    uniform_times,
)
from restoration.diffusion.sde import SDES, CosVE


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small operations: sharing each among threads takes several times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LEVEL = 1 / 255
WEIGHTS = np.array([0.30, 0.35, 0.20, 0.15])
MEANS = np.array([-15.9, -1.9, 9.1, 24.1]) * LEVEL
SPREADS = np.array([4.0, 1.0, 2.0, 6.0]) * LEVEL  # the residual's standard deviation is 13.9 levels
SIDE = 120  # every pixel is one sample: the noise of a picture differs from pixel to pixel
T_EPS = 0.03


def noise(seed=1):
    return NoiseSource(torch.Generator().manual_seed(seed))


def grey(side=SIDE, batch=1):
    return torch.full((batch, 1, side, side), 0.5, dtype=torch.float64)


class MixtureDenoiser:
    """The exact data prediction where clean minus compressed pixels follow a mixture of normal distributions."""

    def __init__(self, sde, weights=WEIGHTS, means=MEANS, spreads=SPREADS):
        self.sde, self.parts, self.calls = sde, list(zip(weights, means, spreads, strict=True)), []

    def __call__(self, x, degraded, t):
        self.calls.append((x, t))
        a, variance, u = float(self.sde.mean_coefficient(t)), float(self.sde.variance(t)), x - degraded
        totals = [(a * s) ** 2 + variance for _, _, s in self.parts]
        logits = [np.log(w) - 0.5 * np.log(total) - 0.5 * (u - a * m) ** 2 / total
                  for (w, m, _), total in zip(self.parts, totals, strict=True)]  # fmt: skip
        posterior = torch.softmax(torch.stack(logits), dim=0)
        means = [m + a * s**2 / total * (u - a * m) for (_, m, s), total in zip(self.parts, totals, strict=True)]
        return degraded + (posterior * torch.stack(means)).sum(dim=0)


def normal_denoiser(sde, mean=0.03, spread=0.05):
    return MixtureDenoiser(sde, [1.0], [mean], [spread])


@cache
def truth():
    rng = np.random.default_rng(0)
    part = rng.choice(len(WEIGHTS), p=WEIGHTS, size=300_000)
    return (MEANS[part] + SPREADS[part] * rng.standard_normal(part.size)) / LEVEL


def residuals(image):
    return ((image - 0.5) / LEVEL).numpy().ravel()


@cache
def run(name, steps, sde_name="cosve"):
    """Residuals in levels, and the number of evaluations."""
    sde = SDES[sde_name]()
    denoise = MixtureDenoiser(sde)
    image = sample(name, denoise, sde, grey(), noise(), steps=steps)
    return residuals(image), len(denoise.calls)


def w1(name, steps, sde_name="cosve"):
    return wasserstein_distance(run(name, steps, sde_name)[0], truth())


def rmse(name, steps):
    """To the path of the probability-flow ODE from the same start."""
    return float(np.sqrt(np.mean((run(name, steps)[0] - run("ode_2m", 400)[0]) ** 2)))


# --- error against evaluations on the mixture -------------------------------------------------------------------------


@pytest.mark.parametrize("sde_name", ["ouve", "tsdve", "cosve"])
def test_eight_evaluations_of_ode_2m_do_what_euler_maruyama_does_with_a_hundred(sde_name):
    assert w1("ode_2m", 8, sde_name) < w1("euler_maruyama", 100, sde_name) + 0.05
    assert w1("euler_maruyama", 100, sde_name) < 0.5


def test_the_second_order_pays_at_eight_evaluations():
    assert w1("ode_2m", 8) < 0.4
    assert w1("ode_1", 8) > 1.5
    assert w1("ode_1", 50) < 0.6


def test_fifteen_evaluations_of_sde_2m_do_what_euler_maruyama_does_with_fifty():
    assert w1("sde_2m", 15) < w1("euler_maruyama", 50) + 0.2
    assert w1("sde_2m", 15) < 0.5
    assert w1("sde_1", 15) > 1.2


def test_euler_heun_reaches_the_distribution():
    assert w1("euler_heun", 100) < 0.6


def test_the_orders_of_convergence_are_one_and_two():
    assert np.log2(rmse("ode_1", 50) / rmse("ode_1", 100)) == pytest.approx(1.0, abs=0.15)
    assert np.log2(rmse("ode_2m", 50) / rmse("ode_2m", 100)) == pytest.approx(2.0, abs=0.25)


def test_rk45_follows_the_same_ode_and_tightens_with_its_tolerance():
    sde, errors, evaluations = CosVE(), [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        denoise = MixtureDenoiser(sde)
        found = residuals(sample("rk45", denoise, sde, grey(), noise(), tolerance=tolerance))
        errors.append(float(np.sqrt(np.mean((found - run("ode_2m", 400)[0]) ** 2))))
        evaluations.append(len(denoise.calls))
    assert errors[0] > errors[1]
    assert errors[1] < 0.1
    assert errors[2] < 1e-3
    assert evaluations[0] < evaluations[1] < evaluations[2]


@pytest.mark.parametrize("sde_name", ["ouve", "tsdve", "cosve"])
@pytest.mark.parametrize(("name", "options"), [("ode_2m", {"steps": 300}), ("rk45", {"tolerance": 1e-7})])
def test_the_flow_of_a_normal_residual_has_its_closed_form(sde_name, name, options):
    """u(t) - a m stays proportional to the standard deviation sqrt(a^2 s^2 + sigma^2)."""
    sde, mean, spread = SDES[sde_name](), 0.03, 0.05
    denoise = normal_denoiser(sde, mean, spread)
    found = sample(name, denoise, sde, grey(6), noise(), t_eps=T_EPS, **options)
    start = denoise.calls[0][0] - 0.5
    a, total = (np.array([float(value) for value in values]) for values in (
        sde.mean_coefficient(np.array([1.0, T_EPS])),
        (sde.mean_coefficient(np.array([1.0, T_EPS])) * spread) ** 2 + sde.variance(np.array([1.0, T_EPS])),
    ))  # fmt: skip
    end = a[1] * mean + (start - a[0] * mean) * np.sqrt(total[1] / total[0])
    expected = 0.5 + mean + a[1] * spread**2 / total[1] * (end - a[1] * mean)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


# --- each formula against another implementation of it ----------------------------------------------------------------


class Replay:
    """The random numbers of a `NoiseSource`, as NumPy arrays."""

    def __init__(self, seed, shape):
        self.generator, self.shape = torch.Generator().manual_seed(seed), shape

    def normal(self):
        return torch.randn(self.shape, generator=self.generator).double().numpy()

    def sign(self):
        return 1.0 if int(torch.randint(2, (), generator=self.generator)) else -1.0


def lambda_times(sde, steps):
    """Times uniform in ln(a / sigma), by interpolation in a fine table."""
    grid = np.linspace(1.0, T_EPS, 200_001)
    values = np.log(sde.mean_coefficient(grid) / sde.std(grid))
    return np.interp(np.linspace(values[0], values[-1], steps), values, grid)


@pytest.mark.parametrize("sde_name", ["ouve", "tsdve", "cosve"])
def test_times_are_uniform_in_the_half_log_snr(sde_name):
    sde = SDES[sde_name]()
    times = uniform_times(sde, 9, T_EPS)
    assert (times[0], times[-1]) == (1.0, T_EPS)
    np.testing.assert_allclose(times, lambda_times(sde, 9), atol=1e-8)


def single_steps(sde, steps, update):
    """A first-order sampler written out in NumPy; `update(u, D - y, c, n, replay)` makes one step."""
    replay, denoise = Replay(1, (1, 1, 6, 6)), MixtureDenoiser(sde)
    times = lambda_times(sde, steps)
    u = float(sde.std(1.0)) * replay.normal()
    for index, t in enumerate(times):
        predicted = denoise(torch.from_numpy(u) + 0.5, torch.tensor(0.5, dtype=torch.float64), t).numpy() - 0.5
        if index == steps - 1:
            return predicted + 0.5
        u = update(u, predicted, t, times[index + 1], replay)
    return None


def test_ode_1_is_ddim():
    """The noise that the prediction implies, kept: u_n = a_n u_0 + sigma_n (u_c - a_c u_0) / sigma_c."""
    sde = CosVE()

    def ddim(u, u0, c, n, replay):
        epsilon = (u - sde.mean_coefficient(c) * u0) / sde.std(c)
        return sde.mean_coefficient(n) * u0 + sde.std(n) * epsilon

    found = sample("ode_1", MixtureDenoiser(sde), sde, grey(6), noise(), steps=7)
    np.testing.assert_allclose(found.numpy(), single_steps(sde, 7, ddim), atol=1e-7)


def test_sde_1_draws_from_the_posterior_of_ddpm():
    """q(u_n | u_c, u_0), the product of two normal densities (Ho et al. 2020, Eq. 6 and 7)."""
    sde = CosVE()

    def posterior(u, u0, c, n, replay):
        step_mean = sde.mean_coefficient(c) / sde.mean_coefficient(n)
        step_variance = sde.variance(c) - step_mean**2 * sde.variance(n)
        precision = 1 / sde.variance(n) + step_mean**2 / step_variance
        mean = (sde.mean_coefficient(n) * u0 / sde.variance(n) + step_mean * u / step_variance) / precision
        return mean + replay.normal() / np.sqrt(precision)

    found = sample("sde_1", MixtureDenoiser(sde), sde, grey(6), noise(), steps=7)
    np.testing.assert_allclose(found.numpy(), single_steps(sde, 7, posterior), atol=1e-7)


@pytest.mark.parametrize(("name", "algorithm"), [("ode_2m", "dpmsolver++"), ("sde_2m", "sde-dpmsolver++")])
def test_the_multistep_samplers_are_dpm_solver_of_the_residual(name, algorithm):
    """Against diffusers' scheduler: u / sqrt(a^2 + sigma^2) is variance-preserving with noise level sigma / a."""
    scheduler = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=2, solver_type="midpoint", prediction_type="sample"
    )
    sde, steps, replay, denoise = CosVE(), 9, Replay(1, (1, 1, 6, 6)), MixtureDenoiser(CosVE())
    times = lambda_times(sde, steps)
    a, sigma = sde.mean_coefficient(times), sde.std(times)
    scheduler.set_timesteps(steps)
    scheduler.timesteps = torch.arange(steps, 0, -1)
    scheduler.sigmas = torch.from_numpy(np.append(sigma / a, 0.0))
    state = torch.from_numpy(float(sde.std(1.0)) * replay.normal()) / np.hypot(a[0], sigma[0])
    half = torch.tensor(0.5, dtype=torch.float64)
    for index, t in enumerate(times):
        predicted = denoise(state * np.hypot(a[index], sigma[index]) + half, half, t) - half
        fresh = torch.from_numpy(replay.normal()) if algorithm.startswith("sde") else None
        state = scheduler.step(predicted, scheduler.timesteps[index], state, variance_noise=fresh).prev_sample.double()
    found = sample(name, MixtureDenoiser(sde), sde, grey(6), noise(), steps=steps)
    torch.testing.assert_close(found, state + 0.5, atol=1e-5, rtol=0)


def reverse_drift(sde, denoise, x, t, drift_rate):
    """f - g^2 score with f = gamma F (y - x) and the score by Tweedie's formula."""
    half = torch.tensor(0.5, dtype=torch.float64)
    predicted = denoise(torch.from_numpy(x), half, t).numpy()
    a, sigma = float(sde.mean_coefficient(t)), float(sde.std(t))
    score = -(x - (0.5 + a * (predicted - 0.5))) / sigma**2
    return drift_rate(t) * (0.5 - x) - diffusion(sde, t) ** 2 * score


def diffusion(sde, t):
    return 3.618835 * 0.01 * 100**t


def cosine_rate(t):
    return 1 - np.cos(np.pi * t)


def test_euler_maruyama_is_the_published_loop():
    """Times from 1 to t_eps inclusive, steps of 1/N all the same, no noise at the end."""
    sde, steps, replay = CosVE(), 30, Replay(1, (1, 1, 6, 6))
    denoise = MixtureDenoiser(sde)
    x = 0.5 + float(sde.std(1.0)) * replay.normal()
    for t in np.linspace(1, T_EPS, steps):
        mean = x - reverse_drift(sde, denoise, x, t, cosine_rate) / steps
        x = mean + diffusion(sde, t) * np.sqrt(1 / steps) * replay.normal()
    found = sample("euler_maruyama", MixtureDenoiser(sde), sde, grey(6), noise(), steps=steps)
    np.testing.assert_allclose(found.numpy(), mean, atol=1e-5)


def test_euler_heun_is_the_published_loop():
    """Two stages with dW + s sqrt(h) and dW - s sqrt(h); a plain step where the second would be at t <= 0."""
    sde, steps, replay = CosVE(), 30, Replay(1, (1, 1, 6, 6))
    denoise, h = MixtureDenoiser(sde), 1 / 30
    x = 0.5 + float(sde.std(1.0)) * replay.normal()
    for t in np.linspace(1, T_EPS, steps):
        drift, dw = reverse_drift(sde, denoise, x, t, cosine_rate), np.sqrt(h) * replay.normal()
        if t - h <= 0:
            mean = x - h * drift
            x = mean + diffusion(sde, t) * dw
            continue
        s = replay.sign()
        k1 = -h * drift + (dw + s * np.sqrt(h)) * diffusion(sde, t)
        later = reverse_drift(sde, denoise, x + k1, t - h, cosine_rate)
        k2 = -h * later + (dw - s * np.sqrt(h)) * diffusion(sde, t - h)
        mean, x = x - h * (drift + later) / 2, x + (k1 + k2) / 2
    found = sample("euler_heun", MixtureDenoiser(sde), sde, grey(6), noise(), steps=steps)
    np.testing.assert_allclose(found.numpy(), mean, atol=1e-5)
    assert len(denoise.calls) == 2 * steps - 1


def test_the_score_is_that_of_the_perturbed_density():
    sde, t, mean, spread = CosVE(), 0.3, 0.03, 0.05
    a, x = float(sde.mean_coefficient(t)), 0.5 + 0.1 * torch.randn(1, 1, 5, 5, dtype=torch.float64)
    denoised = normal_denoiser(sde, mean, spread)(x, grey(5), t)
    expected = -(x - 0.5 - a * mean) / ((a * spread) ** 2 + float(sde.variance(t)))
    torch.testing.assert_close(score_from_denoised(sde, x, grey(5), denoised, t), expected)


# --- what callers rely on ---------------------------------------------------------------------------------------------

each_sampler = pytest.mark.parametrize("name", list(SAMPLERS))


@each_sampler
def test_it_starts_at_the_compressed_image_plus_noise(name):
    sde, denoise = CosVE(), normal_denoiser(CosVE())
    sample(name, denoise, sde, grey(5), noise(3), steps=3)
    expected = 0.5 + float(sde.std(1.0)) * Replay(3, (1, 1, 5, 5)).normal()
    np.testing.assert_allclose(denoise.calls[0][0].numpy(), expected, atol=1e-12)
    assert denoise.calls[0][1] == 1.0


@each_sampler
def test_the_seed_decides_and_the_global_generator_is_left_alone(name):
    sde, before = CosVE(), torch.get_rng_state()
    results = [sample(name, normal_denoiser(sde), sde, grey(6), noise(seed), steps=5) for seed in (3, 3, 4)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "rk45"])
def test_an_image_of_a_batch_equals_the_image_alone(name):
    sde, images = CosVE(), torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    batch = sample(name, normal_denoiser(sde), sde, images, noise(), steps=6)
    for index in range(3):
        alone = sample(name, normal_denoiser(sde), sde, images[index : index + 1], noise(), steps=6)
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-6, rtol=0)


@each_sampler
def test_the_callback_hears_of_every_evaluation(name):
    sde, denoise, heard = CosVE(), normal_denoiser(CosVE()), []
    result = sample(name, denoise, sde, grey(5), noise(), steps=6, callback=heard.append)
    assert [step.index for step in heard] == list(range(1, len(denoise.calls) + 1))
    assert [step.t for step in heard] == [t for _, t in denoise.calls]
    assert {step.total for step in heard} == {0 if name == "rk45" else len(heard)}
    assert name == "rk45" or len(heard) <= SAMPLERS[name].evaluations(6)
    if name not in ("euler_maruyama", "euler_heun"):
        assert torch.equal(heard[-1].denoised, result)


@each_sampler
@torch.no_grad()
def test_a_constrained_denoiser_projects_every_data_prediction(name):
    sde, projected, heard = CosVE(), [], []

    def project(denoised):
        projected.append(denoised)
        return denoised.clamp(0.52, 0.54)

    denoise = constrained(normal_denoiser(sde), project)
    result = sample(name, denoise, sde, grey(5), noise(), steps=6, callback=heard.append)
    assert len(projected) == len(heard)
    assert any((values < 0.52).any() or (values > 0.54).any() for values in projected)
    assert all(step.denoised.min() >= 0.52 and step.denoised.max() <= 0.54 for step in heard)
    if name not in ("euler_maruyama", "euler_heun"):
        assert result.min() >= 0.52 and result.max() <= 0.54


def test_one_step_is_the_prediction_from_pure_noise():
    sde, denoise = CosVE(), normal_denoiser(CosVE())
    found = sample("ode_2m", denoise, sde, grey(5), noise(), steps=1)
    assert len(denoise.calls) == 1
    assert torch.equal(found, denoise(denoise.calls[0][0], grey(5), 1.0))


def test_stochasticity_between_the_ends_keeps_the_distribution():
    """eta = 0.5 on a normal residual: mean and deviation as exact as those of both ends."""
    sde, mean, spread = CosVE(), 0.03, 0.05
    found = sample_multistep(
        normal_denoiser(sde, mean, spread), sde, grey(), noise(), steps=60, eta=0.5, t_eps=0.005
    ) - 0.5  # fmt: skip
    assert float(found.mean()) == pytest.approx(mean, abs=3e-3)
    assert float(found.std()) == pytest.approx(spread, rel=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "heun"}, "expected one of ode_2m, .* got 'heun'"),
        ({"name": "ode_2m", "steps": 0}, "expected at least 1 step, got 0"),
        ({"name": "ode_2m", "t_eps": 0.0}, "expected t_eps between 0 and 1"),
        ({"name": "ode_2m", "t_eps": 1.0}, "expected t_eps between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(denoise=normal_denoiser(CosVE()), sde=CosVE(), degraded=grey(4), noise=noise(), **options)
