"""What `python -m training evaluate` refuses: one sentence that names the option, before anything is measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from skimage import data
from test_training_quality import SMALL

from restoration.restorer_file import write_restorer
from tests.conftest import write_regression
from training.__main__ import main
from training.configs.quality import PRESETS
from training.evaluate.command import _finite
from training.trainers.quality import QualityTask


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Path]:
    """A folder of one picture, a restorer, a folder of a training, and nothing."""
    places = {name: tmp_path / name for name in ("clean", "run", "none")}
    for name in ("clean", "run"):
        places[name].mkdir()
    Image.fromarray(data.astronaut()[:48, 200:264]).save(places["clean"] / "a.png")
    (places["run"] / "config.json").write_text(json.dumps({"command": "regression"}), encoding="utf-8")
    (places["run"] / "checkpoint.pt").write_bytes(b"PK")
    write_regression(places["run"] / "regression.safetensors")
    return {**places, "mine": write_regression(tmp_path / "mine.safetensors"), "out": tmp_path / "out"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected --data FOLDER with clean pictures, or --degraded FOLDER, got neither."),
        (["--data", "{none}"], "--data: there is no folder {none}."),
        (["--data", "{clean}", "--qualities", "10", "400"],
         "--qualities: expected JPEG qualities from 1 to 100, got 400."),
        (["--data", "{clean}", "--trained-qualities", "0"],
         "--trained-qualities: expected JPEG qualities from 1 to 100, got 0."),
        (["--data", "{clean}", "--limit", "-1"], "expected --limit of at least 0, got -1."),
        (["--data", "{clean}", "--examples", "-2"], "expected --examples of at least 0, got -2."),
        (["--data", "{clean}", "--restorer", "{mine}", "--tile", "-1"], "expected --tile of at least 0, got -1."),
        (["--data", "{clean}", "--degraded", "{clean}", "--protocol", "double"],
         "--degraded: its pictures are measured as they are, so only the protocol single fits, got double."),
        (["--data", "{clean}", "--protocol", "samplers"],
         "--protocol samplers: expected a --restorer that has sampler, got none."),
        (["--data", "{clean}", "--restorer", "{mine}", "--protocol", "averaging"],
         "--protocol averaging: expected a --restorer that has samples, got mine (regression)."),
        (["--data", "{clean}", "--restorer", "{mine}", "--protocol", "quality"],
         "--protocol quality: expected a --restorer of the families cave, codiff, sodiff, quality, got mine (regr"),
        (["--data", "{clean}", "--restorer", "{mine}", "--worst-by", "lpips"], "--worst-by: expected a metric that is"),
        (["--data", "{clean}", "--metrics", "pnsr"], "--metrics: there is no metric pnsr. Perhaps you meant psnr."),
        (["--data", "{clean}", "--restorer", "{none}"], "--restorer {none}: there is no such file."),
        (["--data", "{clean}", "--restorer", "{run}/checkpoint.pt"],
         "--restorer: {run}/checkpoint.pt is what a training goes on from; give {run}/regression.safetensors."),
        (["--data", "{clean}", "--restorer", "{run}"],
         "--restorer: {run} is a folder; give the restorer file in it, e.g. {run}/regression.safetensors."),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_sentence_before_anything_runs(
    arguments: list[str], said: str, world: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    given = [argument.format(**world) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["training", "evaluate", *given, "--output", str(world["out"]), "--device", "cpu"])
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"training evaluate: {said.format(**world)}")
    assert not (world["out"] / "measurements.jsonl").exists()


def test_files_that_only_tell_the_quality_go_along_with_restorers(
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each protocol asks those that it can, in one report; numbers beyond all bounds are null there."""
    teller = write_quality(world["out"].with_suffix(".safetensors"))
    options = ["--data", world["clean"], "--restorer", world["mine"], teller, "--protocol", "single", "quality"]
    options += ["--qualities", 20, "--examples", 0, "--metrics", "psnr", "--output", world["out"]]
    monkeypatch.setattr(sys, "argv", ["training", "evaluate", *map(str, options)])
    assert main() == 0
    said = capsys.readouterr().out
    results = json.loads((world["out"] / "results.json").read_text(), parse_constant=pytest.fail)
    assert {row["system"] for row in results["rows"]} == {"JPEG", "mine"}
    assert "Mean absolute error of the JPEG quality" in said and said.rstrip().endswith("in a browser.")
    assert [row["restorer"] for row in results["quality"]] == ["out"]
    assert _finite({"a": [float("inf"), float("nan"), 1.5], "b": "x"}) == {"a": [None, None, 1.5], "b": "x"}


def write_quality(path: Path) -> Path:
    """A predictor of the quality alone, untrained."""
    task = QualityTask(replace(PRESETS["starter"], network=SMALL))
    write_restorer(path, task.metadata({}, "unknown"), task.tensors())
    return path
