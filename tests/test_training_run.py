"""What a training leaves and shows while it runs: best and kept files, logs, an estimate of the end."""

from __future__ import annotations

import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_trainings import same, stats, tiny, write_pictures

from restoration.restorer_file import read_metadata, read_restorer
from training.loop.checkpoint import read_checkpoint
from training.loop.logs import StatsFile, TensorBoard
from training.loop.progress import Lines, duration
from training.loop.session import Session
from training.loop.validation import Validation, is_better


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    Session("regression", tiny(folder, output)).train()
    return output


# --- best and kept files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "expected"), [(None, 32), ("lpips", 16), ("psnr", 32)])
def test_the_best_file_is_of_the_best_validation_of_trained_weights(
    best: str | None, expected: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untrained network's figures, better than any, do not count; of LPIPS less is better."""
    figures = {0: (50.0, 0.0), 16: (20.0, 0.1), 32: (30.0, 0.3), 40: (25.0, 0.2)}

    def measured(self: Validation, task: object, images: int, cut_short: object) -> dict[str, float]:
        psnr, lpips = figures[images]
        return {"psnr/qf10": psnr - 5, "psnr/qf20": psnr + 5, "jpeg_psnr/qf10": 99.0, "lpips/qf10": lpips}

    monkeypatch.setattr(Validation, "__call__", measured)
    config = tiny(folder, tmp_path)
    Session("regression", replace(config, validation=replace(config.validation, best=best))).train()
    training = read_metadata(tmp_path / "regression-best.safetensors").training
    assert training["images"] == training["measured_at"] == expected
    assert training["metrics"]["psnr/qf10"] == figures[expected][0] - 5
    assert read_metadata(tmp_path / "regression.safetensors").training["images"] == 40


def test_a_best_file_holds_the_averaged_weights_of_its_moment(folder: Path, tmp_path: Path) -> None:
    Session("regression", tiny(folder, tmp_path)).train()
    file = read_restorer(tmp_path / "regression-best.safetensors")
    images = file.metadata.training["images"]
    again = tiny(folder, tmp_path / "again", checkpoint_every=4)
    if images < 40:
        stop_after(Session("regression", again), images=images)
    else:
        Session("regression", again).train()
    average = read_checkpoint(tmp_path / "again" / "checkpoint.pt")["average"]["values"]
    exported = file.part("regression")
    assert len(average) > 10
    assert all(torch.equal(exported[key.removeprefix("network.")], value) for key, value in average.items())


def test_an_unknown_measure_of_the_best_is_named_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path)
    session = Session("regression", replace(config, validation=replace(config.validation, best="pnsr")))
    with pytest.raises(ValueError, match=r"validation\.best: expected one of psnr, psnr_b, ssim, got 'pnsr'"):
        session.train()
    assert not any("loss" in line for line in stats(tmp_path))


def test_checkpoints_stay_as_they_are_told_to_and_can_be_gone_on_from(
    folder: Path, tmp_path: Path, whole: Path
) -> None:
    Session("regression", tiny(folder, tmp_path / "run", keep_every=8, keep=2)).train()
    kept = tmp_path / "run" / "kept"
    names = [f"regression-0000000{images}{end}" for images in (32, 40) for end in (".pt", ".safetensors")]
    assert sorted(path.name for path in kept.iterdir()) == names
    state = read_checkpoint(kept / "regression-000000032.pt")
    exported = read_restorer(kept / "regression-000000032.safetensors")
    assert state["images"] == exported.metadata.training["images"] == 32
    for key, value in state["average"]["values"].items():
        assert torch.equal(exported.tensors[f"regression.{key.removeprefix('network.')}"], value)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "checkpoint.pt").write_bytes((kept / "regression-000000032.pt").read_bytes())
    Session("regression", tiny(folder, tmp_path / "back")).train()
    assert same(tmp_path / "back", whole) and same(tmp_path / "run", whole)


def test_a_validation_that_was_due_when_the_run_was_stopped_is_made_up_for(
    folder: Path, tmp_path: Path, whole: Path
) -> None:
    stop_after(Session("regression", tiny(folder, tmp_path)), images=16)
    assert [line["images"] for line in stats(tmp_path) if "validation/psnr/qf10" in line] == [0]
    Session("regression", tiny(folder, tmp_path)).train()
    found = [line for line in stats(tmp_path) if "validation/psnr/qf10" in line]
    assert found == [line for line in stats(whole) if "validation/psnr/qf10" in line]
    assert [line["images"] for line in found] == [0, 16, 32, 40]
    best = [read_restorer(output / "regression-best.safetensors") for output in (tmp_path, whole)]
    assert best[0].metadata.training["images"] == best[1].metadata.training["images"]


# --- logs -------------------------------------------------------------------------------------------------------------


def test_every_step_is_logged_with_its_speed_and_the_parts_of_its_loss(folder: Path, tmp_path: Path) -> None:
    Session("codiff", tiny(folder, tmp_path, "codiff", images=8)).train()
    steps = [line for line in stats(tmp_path) if "loss" in line]
    assert [line["images"] for line in steps] == [4, 8]
    for line in steps:
        assert {"learning_rate", "gradient_norm", "loss/pixels", "quality_error"} <= line.keys()
        assert 0 <= line["loss/pixels"] <= line["loss"] and 0 <= line["quality_error"] <= 100
        seconds = 4 / line["speed/images_per_second"]
        assert line["speed/compute_seconds"] > 0 and line["speed/data_seconds"] >= 0
        assert line["speed/compute_seconds"] + line["speed/data_seconds"] <= seconds * 1.01
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for key in ("loss", "quality_error", "speed/images_per_second"):
        events = board.Scalars(key)
        assert [event.step for event in events] == [4, 8]
        assert [event.value for event in events] == pytest.approx([line[key] for line in steps], rel=1e-6)
    assert [event.step for event in board.Images("before, after, clean")] == [0, 8]
    assert "validation/psnr/qf10" in board.Tags()["scalars"]


def test_lines_of_steps_that_a_kill_undid_leave_stats(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text("".join(f'{{"images": {images}, "a": 1}}\n' for images in (0, 4, 8, 12)) + '{"ima')
    log = StatsFile(path, 8)
    log.figures(12, {"a": 2.0})
    log.close()
    assert stats(tmp_path) == [{"images": images, "a": 1} for images in (0, 4, 8)] + [{"images": 12, "a": 2.0}]
    StatsFile(path, 0).close()
    assert path.read_text() == ""


def test_tensorboard_leaves_out_what_a_kill_undid(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, 0)
    for images in (4, 8, 12):
        first.figures(images, {"loss": 1.0})
    first.close()
    second = TensorBoard(tmp_path, 8)
    second.figures(12, {"loss": 2.0})
    second.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(4, 1.0), (8, 1.0), (12, 2.0)]


class FakeWandb(types.ModuleType):
    """Stands for the package: keeps what it is told."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.refusal: str | None = None

    def init(self, **settings: Any) -> FakeWandb:
        if self.refusal:
            raise self.Error(self.refusal)
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "images")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1

    def Image(self, pixels: Any) -> tuple[int, ...]:  # noqa: N802
        return pixels.shape


def test_weights_and_biases_gets_all_figures_and_a_run_goes_on_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for images in (8, 12):
        Session("regression", tiny(folder, tmp_path, images=images, wandb="jpegs")).train()
    one, other = wandb.begun
    assert one["project"] == "jpegs" and one["config"]["run"]["images"] == 8
    assert one["id"] == other["id"] and other["resume"] == "allow"
    losses = {values["images"]: values["loss"] for values in wandb.logged if "loss" in values}
    assert losses == {line["images"]: line["loss"] for line in stats(tmp_path) if "loss" in line}
    assert any("validation/psnr/qf10" in values for values in wandb.logged)
    assert any("before, after, clean" in values for values in wandb.logged)
    assert wandb.finished == 2


def test_a_missing_or_unwilling_wandb_is_told_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    config = tiny(folder, tmp_path, wandb="jpegs")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb: wandb cannot be imported .* `pip install wandb`"):
        Session("regression", config)
    wandb = FakeWandb()
    wandb.refusal = "no API key"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match=r"run\.wandb: .*no API key.* WANDB_MODE=offline"):
        Session("regression", config).train()


def test_lines_tell_the_speed_and_the_end() -> None:
    now, said = [0.0], []
    lines = Lines(1000, 9000, said.append, seconds=30.0, clock=lambda: now[0])
    for _ in range(40):
        now[0] += 2.0
        lines.update(50, 0.5)
    assert len(said) == 2
    assert re.fullmatch(r"1,750 of 9,000 images, loss 0\.5000, 25\.0 images/s, 5 min left \(about \d\d:\d\d\)", said[0])
    assert said[1].startswith("2,500 of 9,000 images") and "4 min left" in said[1]
    shown = [duration(seconds) for seconds in (0, 89, 95, 7100, 7200, 19_190, 180_000, 300_000)]
    assert shown == ["0 s", "89 s", "2 min", "118 min", "2 h 0 min", "5 h 20 min", "2 d 2 h", "3 d 11 h"]


def test_figures_that_are_no_numbers_are_never_the_best() -> None:
    assert is_better({"psnr/qf10": 20.0}, None, None, ("psnr",))
    assert not is_better({"psnr/qf10": math.nan}, None, None, ("psnr",))
    assert not is_better({"psnr/qf10": math.nan}, {"psnr/qf10": 20.0}, None, ("psnr",))
    assert not is_better({"psnr/qf10": 20.0}, {"psnr/qf10": 20.0}, None, ("psnr",))
    assert is_better({"quality_error/qf10": 2.0, "psnr/qf10": 1.0}, {"quality_error/qf10": 3.0, "psnr/qf10": 9.0},
                     None, ("quality_error", "psnr"))  # fmt: skip
