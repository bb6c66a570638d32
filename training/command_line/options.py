"""Options of a command line for a configuration, e.g. `--data.crop 64`, read as strictly as YAML."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from training.command_line.checks import Given, Names, groups, leaves, unknown_name, value_of
from training.command_line.values import WRONG, convert_words, wrong_value


class Option(NamedTuple):
    """An option as it was written, and the words after it; without an option, words that come before any."""

    name: str
    words: list[str]


def split_options(arguments: Sequence[str]) -> list[Option]:
    """The words of a command line, each with the option before it. `--name=word` is as good as `--name word`."""
    found: list[Option] = [Option("", [])]
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, word = argument.partition("=")
            found.append(Option(name, [word] if equals else []))
        else:
            found[-1].words.append(argument)
    return found[0 if found[0].words else 1 :]


def given_in_options(
    options: Iterable[Option], config: Any, problems: list[str], before: Sequence[Given] = ()
) -> list[Given]:  # fmt: skip
    """What options give for a configuration.

    Args:
        options: Names with dots between groups and hyphens between words; underscores will do. Of a switch `x.y`,
            `--x.y` is true and `--x.no-y` false. Of names with numbers `x.y`, `--x.y.a 1` changes that of a.
        config: The configuration that they are for, for names, types and those numbers.
        problems: Takes a sentence for every option that is wrong by itself.
        before: What was given by then, and is kept where options change a part of it.
    """
    reader, found = _Reader(config, problems), list(before)
    for option in options:
        given = reader.given(option, found)
        found += [] if given is None else [given]
    return found[len(before) :]


class _Reader:
    """Reads options for one configuration."""

    def __init__(self, config: Any, problems: list[str]) -> None:
        self.config, self.problems, self.kinds = config, problems, leaves(config)

    def given(self, option: Option, before: Sequence[Given]) -> Given | None:
        names, words = tuple(option.name.removeprefix("--").replace("-", "_").split(".")), option.words
        switch = (*names[:-1], names[-1].removeprefix("no_"))
        if not option.name:
            return self._wrong(" ".join(words), "expected options, which begin with --")
        if names in self.kinds:
            return self._converted(option, names, self.kinds[names])
        if self.kinds.get(switch) is bool:
            nothing = f"expected nothing after it, got {' '.join(words)!r}"
            return self._wrong(option.name, nothing) if words else Given(switch, False, option.name)
        if typing.get_origin(self.kinds.get(names[:-1])) is dict:
            return self._entry(option, names, before)
        if names in groups(self.config):
            below = [written(field) for field in self.kinds if field[: len(names)] == names]
            return self._wrong(option.name, f"a group of options: {', '.join(below)}")
        return self._wrong(option.name, f"unknown option, {unknown_name(names, self.config, written)}")

    def _entry(self, option: Option, names: Names, before: Sequence[Given]) -> Given | None:
        """One of several names with numbers, beside the others."""
        field, kind = names[:-1], typing.get_args(self.kinds[names[:-1]])[1]
        entry = self._converted(option, field, kind)
        present = next((one.value for one in reversed(before) if one.names == field), value_of(self.config, field))
        return entry and Given(field, {**present, names[-1]: entry.value}, option.name)

    def _converted(self, option: Option, names: Names, kind: Any) -> Given | None:
        value = convert_words(kind, option.words)
        if value is WRONG:
            return self._wrong(option.name, wrong_value(kind, option.words))
        return Given(names, value, option.name)

    def _wrong(self, option: str, what: str) -> None:
        self.problems.append(f"{option}: {what}")


def written(names: Names) -> str:
    """A field as an option."""
    return "--" + ".".join(names).replace("_", "-")
