"""The table from quality to timestep: scipy's isotonic regression, numpy's interpolation, a dial that moves one way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.optimize
import torch

from restoration.calibration import Calibration, isotonic

FALLING = Calibration((5, 20, 50, 95), (640.5, 400, 400, 30))
RISING = Calibration((5, 20, 50, 95), (30, 200, 410, 800))


@pytest.mark.parametrize("seed", range(20))
def test_pooling_adjacent_violators_is_scipys_isotonic_regression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, 40) + np.linspace(0, 5, 40) * rng.choice([-1, 0, 1])
    weights = rng.integers(1, 9, 40)
    expected = scipy.optimize.isotonic_regression(values, weights=weights).x
    np.testing.assert_allclose(isotonic(values, weights), expected, atol=1e-10)
    assert (np.diff(expected) == 0).any()  # there was something to pool


@pytest.mark.parametrize("sign", [1, -1])
def test_fit_takes_the_means_at_each_quality_and_the_direction_that_fits_better(sign: int) -> None:
    """scipy on the means, weighted with their counts; numpy's own grouping."""
    rng = np.random.default_rng(1)
    qualities = rng.choice([5.0, 10.0, 20.0, 35.0, 60.0, 90.0, 95.0], 300)
    timesteps = 500 + sign * 2 * (qualities - 40) + rng.normal(0, 150, 300).clip(-300, 300)
    table = Calibration.fit(qualities.tolist(), timesteps.tolist())
    levels = sorted(set(qualities.tolist()))
    means = [timesteps[qualities == level].mean() for level in levels]
    counts = [int((qualities == level).sum()) for level in levels]
    expected = scipy.optimize.isotonic_regression(means, weights=counts, increasing=sign > 0).x
    assert table.qualities == tuple(levels)
    np.testing.assert_allclose(table.timesteps, expected, atol=1e-9)
    assert sign * (table.timesteps[-1] - table.timesteps[0]) > 20


def test_fit_of_a_constant_and_of_one_quality() -> None:
    assert Calibration.fit([10, 20, 10], [300, 300, 300]) == Calibration((10, 20), (300, 300))
    assert Calibration.fit([50, 50], [100, 200]) == Calibration((50,), (150,))


def test_fit_takes_rounding_at_the_ends_of_the_timesteps() -> None:
    """A mean in single precision of 999s may come out a little above."""
    assert Calibration.fit([10, 20], [999.0001, 999.0]).timesteps == (999.0, 999.0)


@pytest.mark.parametrize("table", [FALLING, RISING, Calibration((50,), (321,))])
def test_timesteps_between_the_points_are_numpys_and_the_ends_are_held(table: Calibration) -> None:
    quality = torch.tensor([[0.0, 5.0, 7.3], [20.0, 49.99, 50.0], [72.0, 95.0, 100.0]], dtype=torch.float64)
    expected = np.interp(quality.numpy(), table.qualities, table.timesteps)
    actual = table.timestep(quality)
    assert actual.dtype == torch.float32 and actual.shape == (3, 3)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("table", [FALLING, RISING])
def test_an_override_that_equals_the_prediction_changes_nothing(table: Calibration) -> None:
    timestep, predicted = torch.tensor([0.0, 123.456, 999.0]), torch.tensor([3.0, 33.3, 99.0])
    assert torch.equal(table.shifted(timestep, predicted, predicted), timestep)


@pytest.mark.parametrize(("table", "sign"), [(FALLING, -1), (RISING, 1)])
def test_an_override_moves_the_timestep_one_way_within_its_range(table: Calibration, sign: int) -> None:
    """As far as numpy's interpolation says, until the range ends."""
    timestep, predicted = torch.tensor([250.0, 700.0]), torch.tensor([40.0, 12.0])
    dial = torch.arange(0.0, 101.0)
    moved = torch.stack([table.shifted(timestep, predicted, quality) for quality in dial], dim=1)
    assert moved.shape == (2, 101)
    assert (sign * moved.diff(dim=1) >= 0).all()
    for row in range(2):
        difference = np.interp(dial, table.qualities, table.timesteps) - np.interp(
            float(predicted[row]), table.qualities, table.timesteps
        )
        expected = np.clip(float(timestep[row]) + difference, 0, 999)
        np.testing.assert_allclose(moved[row].numpy(), expected, rtol=1e-5, atol=1e-3)
        assert np.ptp(expected) > 100


def test_the_range_is_0_to_999() -> None:
    table = Calibration((0, 100), (999, 0))
    moved = table.shifted(torch.tensor([500.0, 500.0]), torch.tensor([0.0, 100.0]), torch.tensor([100.0, 0.0]))
    assert moved.tolist() == [0.0, 999.0]


def test_the_table_survives_json() -> None:
    assert Calibration(**json.loads(json.dumps(FALLING.to_dict()))) == FALLING


@pytest.mark.parametrize(
    ("qualities", "timesteps", "sentence"),
    [
        ([], [], "one at least"),
        ([5, 10], [1], "as many"),
        ([10, 5], [1, 2], "increasing"),
        ([5, 5], [1, 2], "increasing"),
        ([5, 10, 20], [1, 3, 2], "rise or fall"),
        ([5, float("nan")], [1, 2], "from 0 to 100"),
        ([5, 101], [1, 2], "from 0 to 100"),
        ([5, 10], [1, 1000], "from 0 to 999"),
        ([5, 10], [-1, 2], "from 0 to 999"),
        ([5, 10], [1, "2"], "from 0 to 999"),
        ([5, True], [1, 2], "from 0 to 100"),
        (range(10**9), [1], "at most 1000"),
    ],
)
def test_what_is_no_table_is_refused_in_one_sentence(qualities, timesteps, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Calibration(qualities, timesteps)


@pytest.mark.parametrize(("qualities", "timesteps"), [([], []), ([1, 2], [3]), ([[1, 2]], [[3, 4]])])
def test_samples_that_do_not_pair_up_are_refused(qualities, timesteps) -> None:
    with pytest.raises(ValueError, match="two lists of one length"):
        Calibration.fit(qualities, timesteps)


def test_qualities_that_single_precision_cannot_tell_apart_are_refused():
    """Between them the interpolation would divide by zero."""
    with pytest.raises(ValueError, match="increasing qualities"):
        Calibration((50.0, 50.0000001, 60.0), (1.0, 2.0, 3.0))
