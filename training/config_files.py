"""Reading a configuration from YAML, strictly: every unknown key and wrong value is reported, all at once."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration is not valid; the message lists everything that is wrong with it."""


def read_config(path: Path, default: T) -> T:
    """The configuration `default` with the values of a YAML file put in.

    Raises:
        ConfigError: The file cannot be read, or has unknown keys or values of a wrong type. All of them are named.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, got the byte {error.object[error.start]:#04x} at position {error.start}. "
            "Save it as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    problems: list[str] = []
    config = _merge(default, {} if values is None else values, "", problems)
    if problems:
        raise ConfigError("\n".join([f"{path}: {len(problems)} problem(s)", *(f"  {problem}" for problem in problems)]))
    return config


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


def _merge(default: Any, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{where or 'the file'}: expected keys and values, got {values!r}")
        return default
    types_by_name = typing.get_type_hints(type(default))
    known = {field.name for field in dataclasses.fields(default)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            problems.append(f"{path}: unknown key, {hint}")
        elif dataclasses.is_dataclass(current := getattr(default, key)):
            changes[key] = _merge(current, value, path, problems)
        else:
            changes[key] = _convert(types_by_name[key], value, path, problems)
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:
        problems.append(f"{where or 'the file'}: {error}")
        return default


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    converted = _try_convert(kind, value)
    if converted is _WRONG:
        problems.append(f"{path}: expected {_describe(kind)}, got {value!r}")
    return None if converted is _WRONG else converted


_WRONG = object()


def _try_convert(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return next((found for option in arguments if (found := _try_convert(option, value)) is not _WRONG), _WRONG)
    if origin is typing.Literal:
        return value if value in arguments else _WRONG
    if origin is tuple:
        return _try_tuple(arguments, value)
    if origin is dict:
        return value if isinstance(value, dict) else _WRONG
    if kind is type(None):
        return None if value is None else _WRONG
    if kind is Path:
        return Path(value) if isinstance(value, str) else _WRONG
    if kind is float:
        return _try_float(value)
    if kind is int and isinstance(value, bool):
        return _WRONG
    return value if isinstance(value, kind) else _WRONG


def _try_tuple(arguments: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return _WRONG
    kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        return _WRONG
    items = [_try_convert(kind, item) for kind, item in zip(kinds, value, strict=True)]
    return _WRONG if _WRONG in items else tuple(items)


def _try_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _WRONG
    try:
        return float(value)  # YAML reads 1e-4 as text
    except ValueError:
        return _WRONG


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(kind))
    return str(kind) if typing.get_origin(kind) else getattr(kind, "__name__", str(kind))
