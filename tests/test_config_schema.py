"""The JSON Schema of each training's configuration: it accepts what the trainer accepts, and sees what it refuses."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import pytest
import yaml

from training.__main__ import main
from training.command_line.checks import leaves
from training.command_line.files import to_plain
from training.commands import COMMANDS
from training.presets.commented import to_commented_yaml
from training.presets.schema import make_schema, of_type

_PRESETS = [(command, preset) for command, row in COMMANDS.items() for preset in row.presets()]


def schema(command: str) -> dict[str, Any]:
    return make_schema(command, COMMANDS[command].presets()["paper"])


def property_of(schema: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        schema = schema["properties"][name]
    return schema


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_field_has_a_description_and_its_default_and_no_other_is_allowed(command: str) -> None:
    made, config = schema(command), COMMANDS[command].presets()["paper"]
    plain = to_plain(config)
    for names in leaves(config):
        default = plain
        for name in names:
            default = default[name]
        found = property_of(made, names)
        assert found["description"], names
        assert found["default"] == default, names
        above = property_of(made, names[:-1])
        assert above["additionalProperties"] is False
        assert set(above["properties"]) >= {names[-1]} and "required" not in above


def test_types_become_those_of_json() -> None:
    assert of_type(Literal["a", "b"]) == {"enum": ["a", "b"]}
    assert of_type(float | None) == {"type": ["number", "null"]}
    assert of_type(Literal["a"] | None) == {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}
    assert of_type(tuple[int, ...]) == {"type": "array", "items": {"type": "integer"}}
    assert of_type(tuple[float, float])["prefixItems"] == [{"type": "number"}] * 2
    assert of_type(dict[str, float]) == {"type": "object", "additionalProperties": {"type": "number"}}


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "presets", "schema", "sodiff"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out) == schema("sodiff")


class TestWithAnIndependentValidator:
    """By the package jsonschema."""

    jsonschema: Any

    @pytest.fixture(autouse=True)
    def validator(self) -> None:
        self.jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

    def errors(self, command: str, values: Any) -> list[str]:
        return sorted(
            error.json_path for error in self.jsonschema.Draft202012Validator(schema(command)).iter_errors(values)
        )

    @pytest.mark.parametrize("command", list(COMMANDS))
    def test_the_schema_is_one(self, command: str) -> None:
        self.jsonschema.Draft202012Validator.check_schema(schema(command))

    @pytest.mark.parametrize(("command", "preset"), _PRESETS)
    def test_every_preset_is_valid(self, command: str, preset: str) -> None:
        text = to_commented_yaml(command, preset, COMMANDS[command].presets()[preset])
        assert self.errors(command, yaml.safe_load(text)) == []

    def test_mistakes_are_seen(self) -> None:
        assert self.errors("driftrec", {"optimizr": {}}) == ["$"]
        assert self.errors("driftrec", {"data": {"crpo": 64}}) == ["$.data"]
        assert self.errors("driftrec", {"data": {"workers": "two", "flips": 1}}) == ["$.data.flips", "$.data.workers"]
        assert self.errors("driftrec", {"sde": {"name": "foo", "gamma": None}}) == ["$.sde.name"]
        assert self.errors("driftrec", {"data": {"downscale": [1, 2, 3]}, "run": None}) == ["$.data.downscale"]
        assert self.errors("driftrec", {"run": {"batch": 0}, "optimizer": {"ema_decay": 1.5}}) == [
            "$.optimizer.ema_decay", "$.run.batch"
        ]  # fmt: skip
        assert self.errors("driftrec", {"optimizer": {"betas": [0.9, 1.0]}}) == ["$.optimizer.betas[1]"]
        assert self.errors("driftrec", {"validation": {"qualities": [5, 101]}}) == ["$.validation.qualities[1]"]
        assert self.errors("driftrec", {"validation": {"qualities": [5, "ten"]}}) == ["$.validation.qualities[1]"]
