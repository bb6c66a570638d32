"""Numbers out of range: refused where a configuration is made, all at once, and before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from training.command_line.checks import ConfigError
from training.command_line.configure import parse
from training.configs.codiff import CoDiffConfig
from training.configs.common import DataConfig, OptimizerConfig, RunConfig, ValidationConfig
from training.configs.driftrec import SDEConfig
from training.configs.ranges import RANGES
from training.degradation import Degradation


@pytest.mark.parametrize(("group", "field"), [(group, field) for group, fields in RANGES.items() for field in fields])
def test_numbers_out_of_range_are_refused_and_the_ends_of_the_range_are_not(group: str, field: str) -> None:
    """Of the groups whose ranges are checked by the table, both; of one with checks of its own, what lies outside."""
    kinds = (DataConfig, OptimizerConfig, ValidationConfig, RunConfig, SDEConfig, CoDiffConfig, Degradation)
    config = {kind.__name__: kind() for kind in kinds}
    value, allowed = getattr(config[group], field), RANGES[group][field]

    def with_number(number: float) -> Any:
        whole = isinstance(value, int) or (isinstance(value, tuple) and not isinstance((*value, 0)[0], float))
        number = int(number) if whole else number
        several = 1 if field == "qualities" else len(value) or 1 if isinstance(value, tuple) else 0  # each of them once
        return replace(config[group], **{field: (number,) * several if several else number})

    outside = [allowed.least - 1, *([] if allowed.most == math.inf else [allowed.most if allowed.open else 101])]
    for number in outside:
        with pytest.raises(ValueError, match=field if group != "Degradation" else "quality|probability|misaligned"):
            with_number(number)
    if group != "Degradation":
        with_number(allowed.least)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--network.in-channels=0", "expected channels and a patch size of at least 1"),
        ("--network.patch-size=0", "expected channels and a patch size of at least 1"),
        ("--network.dropout=1", "a dropout from 0 to 1"),
        ("--sde.sigma-min=2", "expected 0 < sigma_min < sigma_max, got 2 and 1"),
        ("--sde.gamma=0", "expected a number above 0, or null, got 0"),
        ("--prediction.sigma-data=0", "expected a sigma_data above 0, got 0"),
    ],
)
def test_numbers_that_no_network_can_be_made_of_are_refused_before(option: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("driftrec", ["--preset", "starter", option])
    assert str(caught.value).startswith(option.partition("=")[0] + ": ") and expected in str(caught.value)


def test_several_numbers_out_of_range_are_told_at_once() -> None:
    arguments = ["--run.batch", "0", "--data.workers", "-1", "--validation.qualities", "5", "101", "--optimizer.betas",
                 "0.9", "1", "--data.downscale", "2", "1"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse("regression", arguments)
    assert str(caught.value).splitlines() == [
        "5 mistakes",
        "  --data.workers: expected at least 0, got -1.",
        "  --data.downscale: expected the smaller factor first, got [2.0, 1.0].",
        "  --optimizer.betas: expected at least 0 and below 1, got 0.9 1.",
        "  --validation.qualities: expected 0 to 100, got 5 101.",
        "  --run.batch: expected at least 1, got 0.",
    ]


def test_a_quality_that_is_asked_for_twice_is_refused() -> None:
    """Its figures would be added up twice."""
    with pytest.raises(ConfigError, match=r"^--validation\.qualities: expected each once, got 10 20 10\.$"):
        parse("regression", ["--validation.qualities", "10", "20", "10"])
