"""Options of a command line for a configuration, e.g. `--data.crop 64`, read as strictly as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from training.config_checks import Given, Names, groups, leaves, unknown_name
from training.config_values import WRONG, convert_words, wrong_value


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


def given_in_options(options: Iterable[Option], config: Any, problems: list[str]) -> list[Given]:
    """What options give for a configuration.

    Args:
        options: Names with dots between groups and hyphens between words; underscores will do. Of a switch `x.y`,
            `--x.y` is true and `--x.no-y` false.
        config: The configuration that they are for, for names and types.
        problems: Takes a sentence for every option that is wrong by itself.
    """
    kinds = leaves(config)
    found = (_given(option, config, kinds, problems) for option in options)
    return [one for one in found if one is not None]


def _given(option: Option, config: Any, kinds: dict[Names, Any], problems: list[str]) -> Given | None:
    names = tuple(option.name.removeprefix("--").replace("-", "_").split("."))
    if not option.name:
        problems.append(f"{' '.join(option.words)}: expected options, which begin with --")
    elif names in kinds:
        value = convert_words(kinds[names], option.words)
        if value is not WRONG:
            return Given(names, value, option.name)
        problems.append(f"{option.name}: {wrong_value(kinds[names], option.words)}")
    elif (switch := _switched_off(names)) in kinds and kinds[switch] is bool:
        if not option.words:
            return Given(switch, False, option.name)
        problems.append(f"{option.name}: expected nothing after it, got {' '.join(option.words)!r}")
    elif names in groups(config):
        problems.append(f"{option.name}: a group of options: {', '.join(_below(names, kinds))}")
    else:
        problems.append(f"{option.name}: unknown option, {unknown_name(names, config, written)}")
    return None


def written(names: Names) -> str:
    """A field as an option."""
    return "--" + ".".join(names).replace("_", "-")


def _switched_off(names: Names) -> Names:
    return (*names[:-1], names[-1].removeprefix("no_"))


def _below(group: Names, kinds: Iterable[Names]) -> list[str]:
    return [written(names) for names in kinds if names[: len(group)] == group]
