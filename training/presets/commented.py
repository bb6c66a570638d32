"""A configuration as YAML in which every field is explained."""

from __future__ import annotations

import dataclasses
import math
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from training.command_line.checks import is_group
from training.command_line.files import to_plain
from training.command_line.values import in_words
from training.configs.ranges import range_of
from training.presets.descriptions import describe_class, describe_fields

_WIDTH = 100


def to_commented_yaml(command: str, preset: str, config: Any) -> str:
    """YAML that `read_config` takes, with a comment above each field: what it is, in which unit, and what it may be.

    Args:
        command: What the configuration trains.
        preset: The preset that it is.
        config: Its configuration.
    """
    head = [
        f"# yaml-language-server: $schema={schema_name(command)}",
        f"# The preset {preset} of {command}. Change what you like, and run it:",
        f"#   python -m training {command} --preset {preset} --config my.yaml",
        "# What is left out is as in that preset; options win over the file, e.g. --run.batch 8.",
        "# For editors that complete and check, by the first line:",
        f"#   python -m training presets schema {command} > {schema_name(command)}",
        "#",
        *_comment(describe_class(type(config)), ""),
    ]
    return "\n".join([*head, *_lines(config, "")]) + "\n"


def schema_name(command: str) -> str:
    """The file beside a configuration in which editors look for its schema."""
    return f"{command}.schema.json"


def _lines(config: Any, indent: str) -> Iterator[str]:
    described, kinds = describe_fields(type(config)), typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, said = getattr(config, field.name), described.get(field.name, "")
        if not indent:
            yield ""
        if is_group(value):
            of_class = describe_class(type(value))
            yield from _comment(f"{of_class} {said}" if said else of_class, indent)
            yield f"{indent}{field.name}:"
            yield from _lines(value, indent + "  ")
        else:
            limits = range_of(config, field.name)
            allowed = in_words(kinds[field.name]) + (f", {limits}" if limits else "")
            yield from _comment(f"{said} ({allowed})".strip(), indent)
            yield f"{indent}{field.name}: {_value(value)}"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def _value(value: Any) -> str:
    """One value in one line of YAML."""
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
