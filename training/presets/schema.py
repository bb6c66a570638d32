"""The JSON Schema of a training's configuration, with which editors complete, explain and check YAML files."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any

from training.command_line.checks import is_group
from training.command_line.files import to_plain
from training.configs.ranges import Range, range_of
from training.presets.descriptions import describe_class, describe_fields

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}


def make_schema(command: str, config: Any) -> dict[str, Any]:
    """The schema (draft 2020-12) of a command's configuration; no field is required, and no other is allowed.

    Args:
        command: The command.
        config: What holds where a file says nothing: the defaults.
    """
    return {"$schema": DIALECT, "title": f"python -m training {command}", **_of_group(config)}


def _of_group(config: Any) -> dict[str, Any]:
    described, kinds = describe_fields(type(config)), typing.get_type_hints(type(config))
    properties = {
        field.name: _of_field(config, field.name, kinds[field.name], described.get(field.name, ""))
        for field in dataclasses.fields(config)
    }
    return {
        "description": describe_class(type(config)), "type": "object", "properties": properties,
        "additionalProperties": False,
    }  # fmt: skip


def _of_field(config: Any, field: str, kind: Any, said: str) -> dict[str, Any]:
    value = getattr(config, field)
    if not is_group(value):
        limited = _limited(of_type(kind), range_of(config, field))
        return {"description": said, **limited, "default": to_plain(value)}
    group = _of_group(value)
    described = f"{group['description']} {said}".strip()
    return {**group, "description": described, "type": ["object", "null"]}  # all of it may be commented out


def _limited(schema: dict[str, Any], limits: Range | None) -> dict[str, Any]:
    """The schema of a number, or of a list of them, with the smallest and the largest."""
    if limits is None:
        return schema
    if "prefixItems" in schema:
        return {**schema, "prefixItems": [_limited(item, limits) for item in schema["prefixItems"]]}
    if "items" in schema:
        return {**schema, "items": _limited(schema["items"], limits)}
    most = {} if limits.most == math.inf else {"exclusiveMaximum" if limits.open else "maximum": limits.most}
    return {**schema, "minimum": limits.least, **most}


def of_type(kind: Any) -> dict[str, Any]:
    """The schema of a field's type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _of_union([of_type(option) for option in arguments])
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return _of_tuple(arguments)
    if origin is dict:
        return {"type": "object", "additionalProperties": of_type(arguments[1])}
    return {"type": _TYPES[kind]}


def _of_union(options: list[dict[str, Any]]) -> dict[str, Any]:
    """One list of types where that says it, as editors show it best."""
    if all(option.keys() == {"type"} for option in options):
        return {"type": [option["type"] for option in options]}
    return {"anyOf": options}


def _of_tuple(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments[-1] is Ellipsis:
        return {"type": "array", "items": of_type(arguments[0])}
    return {
        "type": "array", "prefixItems": [of_type(kind) for kind in arguments],
        "minItems": len(arguments), "maxItems": len(arguments),
    }  # fmt: skip
