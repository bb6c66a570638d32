"""Values that were given for a configuration are put into it, and everything that is wrong with them is reported."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Names = tuple[str, ...]
"""A field by its names from the top, e.g. ("data", "crop")."""
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "batch_size": "run.batch",
    "gradient_accumulation_steps": "run.accumulate",
    "mixed_precision": "run.precision",
    "epochs": "run.images",
    "steps": "run.images",
    "max_train_steps": "run.images",
    "output_dir": "run.output",
    "num_workers": "data.workers",
    "resolution": "data.crop",
}
"""How other trainers call a field."""


class ConfigError(ValueError):
    """A configuration is not valid; the message lists everything that is wrong with it."""


def config_error(problems: Sequence[str]) -> ConfigError:
    """One error that says all."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError("\n".join([f"{len(problems)} mistakes", *(f"  {problem}" for problem in problems)]))


@dataclass(frozen=True)
class Given:
    """A value that somebody gave for a field.

    Args:
        names: The field.
        value: What it gets, already of the field's type.
        label: How messages speak of it, e.g. `my.yaml, line 3: data.crop` or `--data.crop`.
    """

    names: Names
    value: Any
    label: str


def is_group(value: Any) -> bool:
    """Whether a field's value is a dataclass with fields of its own."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def leaves(config: Any, above: Names = ()) -> dict[Names, Any]:
    """Every field of a configuration and of the groups in it -> its type."""
    kinds = typing.get_type_hints(type(config))
    found: dict[Names, Any] = {}
    for field in dataclasses.fields(config):
        value, names = getattr(config, field.name), (*above, field.name)
        found |= leaves(value, names) if is_group(value) else {names: kinds[field.name]}
    return found


def groups(config: Any) -> list[Names]:
    """Every group of fields in a configuration."""
    return list(dict.fromkeys(names[:depth] for names in leaves(config) for depth in range(1, len(names))))


def value_of(config: Any, names: Names) -> Any:
    """What a configuration has for a field."""
    return functools.reduce(getattr, names, config)


def put_in(config: T, given: Sequence[Given], problems: list[str]) -> T:
    """The configuration with the values in it; of several for one field the last.

    Checks stop at the first thing that they find wrong. What is at fault is therefore reported and left out, and the
    rest is checked again, until nothing is wrong.

    Args:
        config: What the values change.
        given: The values.
        problems: Takes a sentence for each check that refuses them.
    """
    left = list({one.names: one for one in given}.values())
    while (refusal := _refusal(config, left)) is not None:
        fault = _at_fault(config, left, refusal)
        problems.append(_labelled(fault, refusal))
        if not fault:
            return config
        left = [one for one in left if one not in fault]
    return _with(config, left)


def _refusal(config: Any, given: Sequence[Given]) -> str | None:
    """What the first check that fails says."""
    try:
        _with(config, given)
    except ValueError as error:
        return str(error)
    return None


def _at_fault(config: Any, given: Sequence[Given], refusal: str) -> list[Given]:
    """The values with which the check refuses: put in one after the other, those that it stops at."""
    kept: list[Given] = []
    fault: list[Given] = []
    for one in given:
        (fault if _is_same(_refusal(config, [*kept, one]), refusal) else kept).append(one)
    return fault


def _is_same(refusal: str | None, other: str) -> bool:
    """Whether two messages come from one check; what it got does not count, which may be a whole group."""
    return refusal is not None and refusal.split(", got ")[0] == other.split(", got ")[0]


def _with(config: Any, given: Sequence[Given]) -> Any:
    return _replaced(config, {one.names: one.value for one in given})


def _replaced(config: Any, values: dict[Names, Any]) -> Any:
    changes = {}
    for field in dataclasses.fields(config):
        below = {names[1:]: value for names, value in values.items() if names[0] == field.name}
        if below:
            changes[field.name] = below[()] if () in below else _replaced(getattr(config, field.name), below)
    return dataclasses.replace(config, **changes) if changes else config


def _labelled(fault: Sequence[Given], refusal: str) -> str:
    """A check's message behind the names of the values, one of which the message may begin with."""
    if len(fault) == 1:
        for first in range(len(fault[0].names)):
            refusal = refusal.removeprefix(".".join(fault[0].names[first:]) + ": ")
    return ": ".join([*([" and ".join(one.label for one in fault)] if fault else []), refusal])


def unknown_name(names: Names, config: Any, show: Callable[[Names], str]) -> str:
    """What is said of a name that no field has: the nearest ones, or those that there are.

    Args:
        names: The unknown name.
        config: Where it was looked for.
        show: How the message writes a name.
    """
    known = [*groups(config), *leaves(config)]
    siblings = [other for other in known if other[:-1] == names[:-1]]
    elsewhere = tuple(_ELSEWHERE.get(names[-1], "").split("."))
    near = (
        _nearest(names, [other for other in known if other[-1] == names[-1]], 0.0)
        or _nearest(names, [other for other in known if other == elsewhere], 0.0)
        or _nearest(names, siblings, 0.6)
        or _nearest(names, known, 0.75)
    )
    if near:
        return f"did you mean {' or '.join(show(other) for other in near)}?"
    return "known are " + ", ".join(show(other) for other in siblings or known if len(other) <= len(names))


def _nearest(names: Names, others: Iterable[Names], least: float) -> list[Names]:
    """What is most alike, one or two of the same likeness; as many last names as were given are compared."""
    wanted = ".".join(names)
    alike = {other: difflib.SequenceMatcher(None, wanted, ".".join(other[-len(names) :])).ratio() for other in others}
    best = sorted((other for other, ratio in alike.items() if ratio >= least), key=lambda other: -alike[other])
    return [other for other in best[:2] if alike[other] > alike[best[0]] - 0.02]
