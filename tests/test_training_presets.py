"""`python -m training presets`: the list, one preset as a commented file, and what is said of wrong names."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.preset_memory import LiveTensors, count, countable
from training.__main__ import main
from training.command_line.checks import groups, leaves
from training.command_line.configure import parse
from training.command_line.files import read_config
from training.commands import COMMANDS
from training.presets.commented import to_commented_yaml
from training.presets.descriptions import describe_class, describe_fields
from training.presets.figures import KNOWN, NOTES
from training.presets.table import in_hours, make_table

_PRESETS = [(command, preset) for command, row in COMMANDS.items() for preset in row.presets()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; returns status, output and messages."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["training", "presets", *arguments])
        status = main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize(("command", "preset"), _PRESETS)
def test_every_preset_as_a_commented_file_gives_the_same_configuration_back(
    command: str, preset: str, tmp_path: Path
) -> None:
    """Over any other preset, for the file names every field."""
    presets = COMMANDS[command].presets()
    path = tmp_path / "my.yaml"
    path.write_text(to_commented_yaml(command, preset, presets[preset]), encoding="utf-8")
    for default in presets.values():
        assert read_config(path, default) == presets[preset]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_field_is_explained_with_what_it_may_be(command: str) -> None:
    config = COMMANDS[command].presets()["paper"]
    lines = to_commented_yaml(command, "paper", config).splitlines()
    fields = [number for number, line in enumerate(lines) if re.match(r" *[a-z_0-9]+:( |$)", line)]
    assert len(fields) == len(leaves(config)) + len(groups(config))
    for number in fields:
        indent = len(lines[number]) - len(lines[number].lstrip())
        assert lines[number - 1].startswith(" " * indent + "# "), lines[number]
        comment = lines[number - 1].lstrip("# ")
        is_group = lines[number].endswith(":")
        assert is_group or comment.endswith(")"), comment
        assert max(map(len, lines)) < 130
    text = " ".join(line.strip().removeprefix("# ") for line in lines)
    assert "Images over which the learning rate rises from 0. (a whole number, at least 0) warmup_images:" in text
    assert "`cosine` falls to 1% of the learning rate at the end. (one of 'constant', 'cosine') schedule:" in text


def test_what_is_left_out_of_the_file_is_as_in_the_preset_by_the_command_in_it(tmp_path: Path) -> None:
    config = COMMANDS["driftrec"].presets()["starter"]
    lines = to_commented_yaml("driftrec", "starter", config).splitlines()
    (words,) = [line.split()[4:] for line in lines if line.startswith("#   python -m training driftrec ")]
    path = tmp_path / "my.yaml"
    path.write_text("\n".join(line for line in lines if "width:" not in line and "crop: 64" not in line))
    _, found = parse("driftrec", [str(path) if word == "my.yaml" else word for word in words[1:]])
    assert found == config


def test_the_file_begins_with_its_schema_and_the_command_that_takes_it() -> None:
    first, *others = to_commented_yaml("cave", "small", COMMANDS["cave"].presets()["small"]).splitlines()
    assert first == "# yaml-language-server: $schema=cave.schema.json"
    assert "#   python -m training cave --preset small --config my.yaml" in others[:6]
    assert any("python -m training presets schema cave > cave.schema.json" in line for line in others[:6])


@pytest.mark.parametrize("command", list(COMMANDS))
def test_nothing_of_a_configuration_goes_without_a_description(command: str) -> None:
    config = COMMANDS[command].presets()["paper"]
    for names in leaves(config):
        group = config
        for name in names[:-1]:
            group = getattr(group, name)
        assert describe_class(type(group)), names
        assert describe_fields(type(group)).get(names[-1]), f"{'.'.join(names)} has no text below it"


def test_descriptions_come_from_the_text_below_a_field_or_from_the_arguments_of_the_class() -> None:
    presets = COMMANDS["codiff"].presets()["paper"]
    assert describe_fields(type(presets.loss))["perceptual"] == "DISTS in the paper."
    unet = describe_fields(type(presets.unet))
    assert unet["head_dim"] == "Width of an attention head."
    assert unet["widths"].endswith("each level is half the size of the one above.")
    assert "Raises" not in " ".join(unet.values())


def test_the_list_has_every_preset_and_says_where_its_numbers_come_from(run) -> None:
    status, printed, _ = run()
    assert status == 0 and printed == make_table() + "\n"
    rows = printed.split("\n\n")[0].splitlines()[1:]
    command, found = "", {}
    for row in rows:
        cells = row.split()
        command = command if row.startswith(" ") else cells.pop(0)
        found[command, cells[0]] = cells
        assert f"{COMMANDS[command].presets()[cells[0]].run.images:,}" in cells
    assert list(found) == _PRESETS
    assert found["driftrec", "starter"][3:9] == ["0.22", "GiB", "a", "60", "min", "d"]
    assert found["prior", "paper"][3:7] == ["1,393", "GiB", "a", "-"]
    assert found["codiff", "24gb"][3:7] == ["19.8", "GiB", "c", "-"]
    assert all(f"\n{mark}: {said}." in printed for mark, said in NOTES.items())


def test_what_is_said_of_presets_is_said_of_those_that_there_are() -> None:
    assert set(KNOWN) == set(_PRESETS)
    for known in KNOWN.values():
        assert known.purpose
        assert (known.memory is None) == (known.memory_from not in NOTES)
        assert (known.rate is None) == (known.rate_from not in NOTES)


def test_times_are_rough() -> None:
    times = {5: "1 min", 240: "4 min", 3571: "60 min", 5400: "1.5 h", 90_000: "25 h"}
    assert {seconds: in_hours(seconds) for seconds in times} == times


def test_one_preset_is_shown(run) -> None:
    status, printed, said = run("show", "driftrec", "starter")
    assert (status, said) == (0, "")
    assert printed == to_commented_yaml("driftrec", "starter", COMMANDS["driftrec"].presets()["starter"])
    assert run("show", "quality")[1].splitlines()[1].startswith("# The preset paper of quality.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "driftrek", "starter"], "expected a command, got 'driftrek'; did you mean 'driftrec'?"),
        (["show", "driftrec", "startr"],
         "driftrec: expected one of paper, starter, got 'startr'; did you mean 'starter'?"),
        (["show", "24gb"], "the preset 24gb is one of 2 commands: show codiff 24gb, show sodiff 24gb."),
        (["show"], "expected a command and a preset after show, got none."),
        (["schema"], "expected one command after schema, got none."),
        (["sow", "driftrec"], "expected show, schema or nothing, got 'sow'; did you mean show?"),
        (["driftrec", "starter"], "got 'driftrec'; did you mean show driftrec starter?"),
        (["schema", "restore"], "expected a command, got 'restore'"),
    ],
)  # fmt: skip
def test_wrong_names_are_told_with_the_nearest(run, arguments: list[str], expected: str) -> None:
    status, printed, said = run(*arguments)
    assert (status, printed) == (2, "")
    assert said.startswith("training presets: ") and expected in said
    assert "Traceback" not in said


def test_a_presets_name_is_enough_where_only_one_command_has_it(run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = COMMANDS["quality"].presets()["paper"]
    only = replace(COMMANDS["quality"], presets=lambda: {"paper": config, "lone": config})
    monkeypatch.setitem(COMMANDS, "quality", only)
    status, printed, _ = run("show", "lone")
    assert status == 0 and printed.splitlines()[1].startswith("# The preset lone of quality.")


def test_live_tensors_are_counted_until_their_last_view_goes() -> None:
    with LiveTensors() as live:
        first = torch.empty(1000, device="meta")
        view = (first + 1).view(10, 100)
        assert live.bytes == 8000
        del view
        assert (live.bytes, live.peak) == (4000, 8000)
        weight = torch.nn.Parameter(torch.empty(100, 50, device="meta"))
        (first.view(10, 100) @ weight).sum().backward()
        assert live.bytes == 4000 + 2 * 100 * 50 * 4, "the weight and its gradient stay"


@pytest.mark.parametrize(("command", "preset"), [("quality", "starter"), ("saipe", "small")])
def test_the_memory_in_the_list_is_what_is_counted(command: str, preset: str) -> None:
    config = countable(COMMANDS[command].presets()[preset])
    assert f"{count(config, command) / 2**30:.2f}" == f"{KNOWN[command, preset].memory:.2f}"
