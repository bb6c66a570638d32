"""Configurations in YAML, read strictly: every unknown key and wrong value is reported, all at once."""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import yaml

from training.command_line.checks import ConfigError, Given, Names, config_error, is_group, leaves, put_in, unknown_name
from training.command_line.values import WRONG, convert, wrong_value

T = TypeVar("T")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How files begin that Windows PowerShell wrote."""


def read_config(path: Path, default: T) -> T:
    """The configuration `default` with the values of a YAML file put in.

    Raises:
        ConfigError: The file cannot be read, has unknown keys or values of a wrong type, gives a key twice, or values
            that do not go together. All of that is named.
    """
    problems: list[str] = []
    config = put_in(default, given_in_file(path, default, problems), problems)
    if problems:
        raise config_error(in_order_of_lines(path, problems))
    return config


def in_order_of_lines(path: Path | None, problems: Sequence[str]) -> list[str]:
    """What is wrong, with what is said of lines of a file in their order, where the first of it stood."""
    line = re.compile(rf"{re.escape(str(path))}, line (\d+): ")
    lines = {place: int(found[1]) for place, problem in enumerate(problems) if (found := line.match(problem))}
    if not lines:
        return list(problems)
    ordered = [problems[place] for place in sorted(lines, key=lambda place: lines[place])]
    first = min(lines)
    others = [problem for place, problem in enumerate(problems) if place > first and place not in lines]
    return [*problems[:first], *ordered, *others]


def given_in_file(path: Path, config: Any, problems: list[str]) -> list[Given]:
    """What a YAML file gives for a configuration.

    Args:
        path: The file.
        config: The configuration that it is for, for names and types.
        problems: Takes a sentence for everything in the file that is wrong by itself.
    """
    try:
        document = _read(path)
    except ConfigError as error:
        problems.append(str(error))
        return []
    problems += document.doubled
    return _Reader(document, config, problems).given({} if document.values is None else document.values, config, ())


def to_plain(value: Any) -> Any:
    """A configuration as dictionaries, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return {key: to_plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def to_yaml(config: Any) -> str:
    """A configuration as YAML that `read_config` takes."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Takes dates for text: no field is one, and of a day that there is not YAML would say neither file nor line."""

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Document(NamedTuple):
    """A YAML file: its values, the line of each key, and what is said of keys that it gives twice."""

    path: Path
    values: Any
    lines: dict[Names, int]
    doubled: list[str]

    def label(self, names: Names) -> str:
        """How messages speak of a key."""
        line = f", line {self.lines[names]}" if names in self.lines else ""
        return f"{self.path}{line}: {'.'.join(names)}" if names else str(self.path)


def _read(path: Path) -> _Document:
    document = _Document(path, None, {}, [])
    try:
        loader = _Loader(_text(path))
        try:
            node = loader.get_single_node()
            _note_lines(node, (), document)
            return document if node is None else document._replace(values=loader.construct_document(node))
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        said = " ".join(part for part in (error.problem, error.context) if part)
        raise ConfigError(f"{path}{line}: not valid YAML: {said}.") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the latter of values with a tag, e.g. !!int many
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, got the byte {data[error.start]:#04x} at position {error.start}. "
            "Save it as UTF-8."
        ) from error


def _note_lines(node: Any, above: Names, document: _Document) -> None:
    """Note where each key is, and which are given twice, of which YAML would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        names, line = (*above, str(key.value)), key.start_mark.line + 1
        if names in document.lines:
            document.doubled.append(f"{document.label(names)}: given again in line {line}. Keep one of the two.")
        document.lines[names] = line
        if len(names) < _DEEPEST:
            _note_lines(value, names, document)


_DEEPEST = 16
"""Levels of keys that are looked at; an alias may stand for what it is part of."""


class _Reader:
    """Goes through the values of a file along the groups of a configuration."""

    def __init__(self, document: _Document, config: Any, problems: list[str]) -> None:
        self.document, self.config, self.problems, self.kinds = document, config, problems, leaves(config)

    def given(self, values: Any, group: Any, above: Names) -> list[Given]:
        """What the file gives for a group; a group of which everything is commented out gives nothing."""
        if values is None:
            return []
        if not isinstance(values, dict):
            self._wrong(above, f"expected keys and values, got {values!r}")
            return []
        known = {field.name for field in dataclasses.fields(group)}
        return [one for key, value in values.items() for one in self._one(key, value, group, above, key in known)]

    def _one(self, key: Any, value: Any, group: Any, above: Names, known: bool) -> list[Given]:
        names = (*above, str(key))
        if not known:
            self._wrong(names, f"unknown key, {unknown_name(names, self.config, lambda n: _shown(n, above))}")
        elif is_group(below := getattr(group, key)):
            return self.given(value, below, names)
        elif (converted := convert(self.kinds[names], value)) is WRONG:
            self._wrong(names, wrong_value(self.kinds[names], value))
        else:
            return [Given(names, converted, self.document.label(names))]
        return []

    def _wrong(self, names: Names, what: str) -> None:
        self.problems.append(f"{self.document.label(names)}: {what}")


def _shown(names: Names, above: Names) -> str:
    return repr(names[-1] if names[:-1] == above else ".".join(names))
