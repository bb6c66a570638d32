"""The trainer's command line: presets, strict YAML, overrides, and what a user sees of mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from shared import ROOT

from training.command_line.configure import parse
from training.command_line.files import ConfigError, read_config, to_plain, to_yaml
from training.commands import COMMANDS
from training.configs.driftrec import PRESETS, REGRESSION_PRESETS
from training.loop.checkpoint import write_checkpoint


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("command", "preset"), [(c, p) for c, row in COMMANDS.items() for p in row.presets()])
def test_every_preset_survives_a_round_trip_through_yaml(command: str, preset: str, tmp_path: Path) -> None:
    config = COMMANDS[command].presets()[preset]
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path, COMMANDS[command].presets()["paper"]) == config


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_lists_the_options_that_choose_the_defaults(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    for option in ("--preset {paper", "--config FILE.yaml", "--dry-run", "--data.train", "--run.output"):
        assert option in done.stdout


def test_the_list_of_commands_needs_none_of_the_trainers_packages() -> None:
    script = (
        "import sys; sys.argv = ['training']\n"
        "sys.modules.update(torch=None, tyro=None, diffusers=None, accelerate=None)\n"
        "from training.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in (*COMMANDS, "convert"))


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("# Größe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: expected UTF-8 text, got the byte 0xf6 at position 4"):
        read_config(path, PRESETS["paper"])


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: {learning_rate: 3e-4}\nrun: {batch: 4, images: 1000}\n")
    dry_run, config = parse("driftrec", ["--preset", "starter", "--config", str(path), "--run.batch", "8", "--dry-run"])
    assert dry_run
    assert config.run.batch == 8
    assert config.run.images == 1000
    assert config.optimizer.learning_rate == 3e-4
    assert config.network.width == PRESETS["starter"].network.width


def test_all_mistakes_of_a_file_are_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "data: {crpo: 64, workers: two}\nsde: {name: foo}\noptimizr: {}\nrun: {batch: true}\n"
        "data2: 1\nprediction: {kind: image}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_config(path, PRESETS["paper"])
    message = str(caught.value)
    assert "data.crpo: unknown key, did you mean 'crop'?" in message
    assert "data.workers: expected a whole number, got 'two'" in message
    assert "sde.name: expected one of 'ouve', 'tsdve', 'cosve', got 'foo'" in message
    assert "optimizr: unknown key, did you mean 'optimizer'?" in message
    assert "run.batch: expected a whole number, got True" in message
    assert "prediction.kind: DriftRec: expected a prediction of noise or residual" in message


def test_the_written_configuration_names_every_field() -> None:
    values = yaml.safe_load(to_yaml(PRESETS["starter"]))
    assert values["network"]["channel_multipliers"] == [1, 2, 2, 2]
    assert values["data"]["degradation"]["subsampling"]["4:2:0"] == 0.7


def test_dry_run_prints_what_was_found_and_writes_nothing(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures" / "deep"
    pictures.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 40), (number * 40, 9, 9)).save(pictures / f"{number}.png")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    output = tmp_path / "out"
    done = run("driftrec", "--preset", "starter", "--data.train", str(pictures.parent), "--run.output", str(output),
               "--dry-run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "network: 2,4" in done.stdout and "parameters" in done.stdout
    assert "3 pictures to train on" in done.stdout
    assert "broken.jpg" in done.stdout
    assert not output.exists()


def test_dry_run_refuses_the_folder_of_another_run_and_says_where_its_own_stands(tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    Image.new("RGB", (40, 40), (40, 9, 9)).save(pictures / "a.png")
    output.mkdir()
    config = REGRESSION_PRESETS["starter"]
    stored = {"command": "regression", **to_plain(config)}
    (output / "config.json").write_text(json.dumps(stored))
    write_checkpoint(output / "checkpoint.pt", {"images": 480})
    arguments = ["regression", "--preset", "starter", "--data.train", str(pictures), "--run.output", str(output),
                 "--dry-run"]  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "goes on at 480 of 100000 images" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint.pt", "config.json"], "nothing was written"
    refused = run(*arguments, "--network.width", "16")
    assert refused.returncode == 2
    assert "holds another run (network.width was 32, is 16)" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["driftrec", "--data.train", "nowhere", "--dry-run"], "there is no folder nowhere"),
        (["driftrec", "--data.train", "{empty}", "--dry-run"], "no picture found in"),
        (["driftrec", "--config", "{empty}/absent.yaml"], "cannot be read"),
        (["driftrec", "--preset", "starter", "--data.crop", "40", "--data.train", "{pictures}", "--dry-run",
          "--run.output", "{empty}/run"],
         "data.crop: expected a multiple of 16"),
        (["drift"], "expected a command of the list, got 'drift'"),
        (["regression", "--run.init-from", "{empty}/absent.safetensors", "--data.train", "{pictures}"],
         "training regression: --run.init-from {empty}/absent.safetensors: there is no such file"),
        (["regression", "--run.batch", "3", "--run.accumulate", "2", "--data.train", "{pictures}",
          "--network.width", "8", "--run.output", "{empty}/run"], "expected a multiple of 2"),
        (["regression", "--data.train", "{pictures}", "--run.output", "{pictures}/runs/a"],
         "lies in data.train ({pictures}), whose pictures the run's samples would be taken for. Give --run.output a"),
        (["regression", "--data.train", "{pictures}/a.png"], "a.png is a file: give the folder that holds"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_sentence(arguments: list[str], expected: str, tmp_path: Path) -> None:
    empty, pictures = tmp_path / "empty", tmp_path / "pictures"
    empty.mkdir()
    pictures.mkdir()
    Image.new("RGB", (40, 40)).save(pictures / "a.png")
    done = run(*(argument.format(empty=empty, pictures=pictures) for argument in arguments))
    assert done.returncode == 2
    assert expected.format(empty=empty, pictures=pictures) in done.stderr
    assert "Traceback" not in done.stderr
