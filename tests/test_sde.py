"""The SDE family against SciPy's solution of its moment equations, and against DriftRec's published constants."""

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from restoration.diffusion.sde import OUVE, SDES, TSDVE, CosVE, make_sde

# name: F(t) and gamma of the paper
DRIFTS = {"ouve": (lambda t: 1.0, 1.0), "tsdve": (lambda t: t, 2.0), "cosve": (lambda t: 1 - np.cos(np.pi * t), 1.0)}
VARIANTS = [
    {}, {"sigma_min": 0.05, "sigma_max": 0.5}, {"gamma": 3.0}, {"sigma_min": 0.002, "sigma_max": 2.0, "gamma": 0.5}
]  # fmt: skip
TIMES = np.array([0.003, 0.01, 0.03, 0.07, 0.15, 0.25, 0.4, 0.5, 0.62, 0.75, 0.9, 1.0])

# t: sigma and a of OUVE, TSDVE, CosVE at the default parameters
TABLE = """
0.01 .003410 .99005 .003675 .99990 .003704 .999998
0.03 .006136 .97045 .006671 .99910 .006727 .999956
0.1  .013012 .90484 .014462 .99005 .014646 .998365
0.25 .030649 .77880 .034463 .93941 .035273 .975387
0.5  .099816 .60653 .108714 .77880 .110450 .833860
0.75 .316192 .47237 .329596 .56978 .327920 .591602
1    .999993 .36788 1.00000 .36788 1.00000 .36788
"""

each_sde = pytest.mark.parametrize("name", list(DRIFTS))
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def parameters(name, variant):
    return {"sigma_min": 0.01, "sigma_max": 1.0, "gamma": DRIFTS[name][1], **variant}


def moments(name, nu, sigma_min, sigma_max, gamma):
    """The mean coefficient and the variance by integrating their equations from t = 0."""
    rate = DRIFTS[name][0]

    def field(t, state):
        drift, spread = gamma * rate(t), nu * sigma_min * (sigma_max / sigma_min) ** t
        return [-drift * state[0], -2 * drift * state[1] + spread**2]

    solution = solve_ivp(field, (0, 1), [1.0, 0.0], t_eval=TIMES, method="DOP853", rtol=1e-11, atol=1e-16)
    return solution.y


@each_sde
@each_variant
def test_mean_and_variance_solve_the_moment_equations(name, variant):
    sde = make_sde(name, **parameters(name, variant))
    mean, variance = moments(name, sde.normalization, **parameters(name, variant))
    np.testing.assert_allclose(sde.mean_coefficient(TIMES), mean, rtol=1e-8)
    np.testing.assert_allclose(sde.variance(TIMES), variance, rtol=1e-6)
    np.testing.assert_allclose(sde.std(TIMES) ** 2, variance, rtol=1e-6)


@each_sde
@each_variant
def test_the_variance_is_the_integral_formula(name, variant):
    """sigma^2(t) = int_0^t exp(-2 gamma int_u^t F) g(u)^2 du, by adaptive quadrature."""
    values = parameters(name, variant)
    sde, rate = make_sde(name, **values), DRIFTS[name][0]
    for t in (0.02, 0.3, 1.0):

        def integrand(u, t=t):
            decay = quad(rate, u, t, epsabs=1e-13)[0]
            spread = sde.normalization * values["sigma_min"] * (values["sigma_max"] / values["sigma_min"]) ** u
            return np.exp(-2 * values["gamma"] * decay) * spread**2

        expected = quad(integrand, 0, t, epsabs=0, epsrel=1e-10)[0]
        assert float(sde.variance(t)) == pytest.approx(expected, rel=1e-8)  # fmt: skip


@each_sde
@each_variant
def test_the_noise_ends_at_sigma_max(name, variant):
    """Exactly for TSDVE and CosVE; OUVE falls short by exp(-2 gamma) sigma_min^2 in the variance, as published."""
    values = parameters(name, variant)
    missing = values["sigma_min"] ** 2 * np.exp(-2 * values["gamma"]) if name == "ouve" else 0.0
    assert float(make_sde(name, **values).variance(1.0)) == pytest.approx(values["sigma_max"] ** 2 - missing, rel=1e-10)


@pytest.mark.parametrize(("name", "expected"), [("ouve", 3.348185), ("tsdve", 3.590541), ("cosve", 3.618835)])
def test_the_normalisation_is_the_published_one(name, expected):
    sde = SDES[name]()
    assert sde.normalization == pytest.approx(expected, abs=5e-7)
    assert float(sde.diffusion(0.0)) == pytest.approx(expected * 0.01, rel=1e-6)
    assert float(sde.diffusion(1.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("column", "sde"), [(1, OUVE()), (3, TSDVE()), (5, CosVE())])
def test_the_values_of_the_published_table(column, sde):
    for row in (line.split() for line in TABLE.strip().splitlines()):
        for text, value in zip(
            row[column : column + 2], (sde.std(float(row[0])), sde.mean_coefficient(float(row[0]))), strict=True
        ):
            assert float(value) == pytest.approx(float(text), abs=0.51 * 10.0 ** -len(text.split(".")[1])), row


@each_sde
@each_variant
def test_times_and_half_log_snrs_are_each_others_inverse(name, variant):
    sde = make_sde(name, **parameters(name, variant))
    np.testing.assert_allclose(sde.time_at(sde.half_log_snr(TIMES)), TIMES, atol=1e-9)
    assert float(sde.time_at(float(sde.half_log_snr(0.37)))) == pytest.approx(0.37, abs=1e-9)
    inner = np.linspace(float(sde.half_log_snr(0.99)), float(sde.half_log_snr(0.01)), 7)
    np.testing.assert_allclose(sde.half_log_snr(sde.time_at(inner)), inner, atol=1e-9)


@each_sde
def test_the_half_log_snr_is_that_of_the_moments_and_falls(name):
    sde = make_sde(name)
    np.testing.assert_allclose(
        sde.half_log_snr(TIMES), np.log(sde.mean_coefficient(TIMES) / sde.std(TIMES)), atol=1e-12
    )
    assert (np.diff(sde.half_log_snr(np.linspace(0.001, 1, 500))) < 0).all()


@each_sde
def test_g_follows_from_a_and_sigma(name):
    """g^2 = (sigma^2)' - 2 (ln a)' sigma^2: what the fast samplers rest on, by central differences."""
    sde, h = make_sde(name), 1e-5
    t = np.linspace(0.05, 0.95, 19)
    slope = (sde.variance(t + h) - sde.variance(t - h)) / (2 * h)
    log_slope = (np.log(sde.mean_coefficient(t + h)) - np.log(sde.mean_coefficient(t - h))) / (2 * h)
    np.testing.assert_allclose(slope - 2 * log_slope * sde.variance(t), sde.diffusion(t) ** 2, rtol=1e-6)
    np.testing.assert_allclose(-log_slope, sde.drift(t), rtol=1e-6)


def test_tsdve_is_twice_as_stiff_by_default():
    assert (TSDVE().gamma, OUVE().gamma, CosVE().gamma) == (2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("t2ve", {}, "expected one of ouve, tsdve, cosve, got 't2ve'"),
        ("ouve", {"sigma_min": 1.0}, "expected 0 < sigma_min < sigma_max"),
        ("ouve", {"sigma_min": 0.0}, "expected 0 < sigma_min < sigma_max"),
        ("cosve", {"gamma": 0.0}, "expected gamma above 0"),
        ("cosve", {"gamma": -1.0}, "expected gamma above 0"),
    ],
)
def test_parameters_that_make_no_sde_are_refused(name, values, message):
    with pytest.raises(ValueError, match=message):
        make_sde(name, **values)
