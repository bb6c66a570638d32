"""Whether the batch can be shared out, the crops suit the network, and the run lies apart from its pictures."""

from __future__ import annotations

from typing import Any

from training.check.findings import Finding
from training.configs.places import check_places
from training.loop.session import check_crops

ADAPTED_MULTIPLES = {"codiff": 32, "sodiff": 8}
"""Of what adapts a base model: what sides of crops are multiples of, known without loading it."""


def check_batch(config: Any, processes: int) -> list[Finding]:
    """Whether each process can have the same share of a batch, in equal parts."""
    run = config.run
    share = processes * run.accumulate
    if run.batch % share == 0:
        return []
    expected = f"expected a multiple of {share} (processes x run.accumulate), got {run.batch}"
    return [Finding("problem", f"run.batch: {expected}. Change one of them.")]


def check_place(config: Any) -> list[Finding]:
    """Whether the run's folder lies apart from the pictures."""
    try:
        check_places(config)
    except ValueError as error:
        return [Finding("problem", str(error))]
    return []


def check_sides(multiple: int, config: Any) -> list[Finding]:
    """Whether crops have sides that the network takes: multiples of `multiple`."""
    try:
        check_crops(multiple, config)
    except ValueError as error:
        return [Finding("problem", str(error))]
    return []
