"""Single values of a configuration: from YAML, or from the words of a command line, to what a field takes."""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

WRONG = object()
"""What a conversion gives where a value does not fit."""
_WORDS = {
    bool: ("true or false", "values of true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("null", "nulls"),
}
"""Type -> one of it, and several."""
_NULL = ("None", "null")
_FLAGS = {"true": True, "false": False}


def options_of(kind: Any) -> tuple[Any, ...]:
    """What a union may be; any other type is its only option."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def convert(kind: Any, value: Any) -> Any:
    """A value that YAML gave, as a field of type `kind` takes it; `WRONG` where it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return next((found for option in arguments if (found := convert(option, value)) is not WRONG), WRONG)
    if origin is typing.Literal:
        value = "no" if value is False and "no" in arguments else value  # YAML 1.1 reads no as false
        return value if value in arguments and not isinstance(value, bool) else WRONG
    if origin is tuple:
        return _convert_list(arguments, value) if isinstance(value, (list, tuple)) else WRONG
    if origin is dict:
        return _convert_names(arguments, value) if isinstance(value, dict) else WRONG
    if kind is type(None):
        return None if value is None else WRONG
    if kind is Any:
        return value
    if kind is Path:
        return Path(os.path.expanduser(value)) if isinstance(value, str) and value else WRONG
    if kind in (int, float):
        return _number(kind, value)
    return value if isinstance(value, kind) else WRONG


def convert_words(kind: Any, words: Sequence[str]) -> Any:
    """The words after an option, as a field of type `kind` takes them; `WRONG` where they do not fit."""
    options = options_of(kind)
    if type(None) in options and len(words) == 1 and words[0] in _NULL:
        return None
    return next((found for option in options if (found := _convert_words(option, words)) is not WRONG), WRONG)


def _convert_words(kind: Any, words: Sequence[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        kinds = arguments[:1] * len(words) if arguments[-1] is Ellipsis else arguments
        read = [_read(part, word) for part, word in zip(kinds, words, strict=False)]
        return _convert_list(arguments, read) if len(kinds) == len(words) else WRONG
    if origin is dict:
        pairs = {name: _read(arguments[1], word) for name, word in zip(words[::2], words[1::2], strict=False)}
        return _convert_names(arguments, pairs) if len(words) % 2 == 0 and words else WRONG
    if kind is bool and not words:
        return True
    return convert(kind, _read(kind, words[0])) if len(words) == 1 else WRONG


def _read(kind: Any, word: str) -> Any:
    """What YAML would have given for a word, where `kind` makes its meaning clear."""
    if kind is bool:
        return _FLAGS.get(word.lower(), word)
    if typing.get_origin(kind) is typing.Literal:
        return next((choice for choice in typing.get_args(kind) if str(choice) == word), word)
    if typing.get_origin(kind) in (tuple, dict):
        try:
            return yaml.safe_load(word)
        except (yaml.YAMLError, ValueError):  # the latter of days that there are not
            return word
    return word


def _convert_list(arguments: tuple[Any, ...], values: Sequence[Any]) -> Any:
    kinds = (arguments[0],) * len(values) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(values):
        return WRONG
    items = [convert(kind, item) for kind, item in zip(kinds, values, strict=True)]
    return WRONG if any(item is WRONG for item in items) else tuple(items)


def _convert_names(arguments: tuple[Any, ...], values: dict[Any, Any]) -> Any:
    items = {convert(arguments[0], name): convert(arguments[1], item) for name, item in values.items()}
    return WRONG if WRONG in items or any(item is WRONG for item in items.values()) else items


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return WRONG
    try:
        return kind(value) if isinstance(value, int) else _read_number(kind, value)
    except (ValueError, OverflowError):
        return WRONG


def _read_number(kind: type, value: float | str) -> Any:
    """Of text as well, for YAML reads 1e-4 as text; whole numbers digit by digit, where they are written so."""
    if kind is int and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    number = float(value)
    if kind is float:
        return number if math.isfinite(number) else WRONG
    return int(number) if number.is_integer() else WRONG


def in_words(kind: Any) -> str:
    """A type as people say it, e.g. `a path or null`."""
    if kind in _WORDS:
        return _WORDS[kind][0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin is tuple:
        several = _several(arguments[0])
        return f"a list of {several}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {several}"
    if origin is dict:
        return f"names with {_several(arguments[1])}"
    return getattr(kind, "__name__", str(kind))


def _several(kind: Any) -> str:
    return _WORDS[kind][1] if kind in _WORDS else f"values, each {in_words(kind)}"


def wrong_value(kind: Any, value: Any) -> str:
    """What is said of a value that does not fit: what was expected, what came, and the nearest choice."""
    if not isinstance(value, list):
        got, word = repr(value), str(value)
    else:
        got, word = repr(" ".join(value)) if value else "nothing", " ".join(value)
    choices = [str(choice) for option in options_of(kind) if typing.get_origin(option) is typing.Literal
               for choice in typing.get_args(option)]  # fmt: skip
    near = difflib.get_close_matches(word.lower(), choices, n=1)
    return f"expected {in_words(kind)}, got {got}" + (f"; did you mean {near[0]!r}?" if near else "")
