"""The training loop: learning, resuming bit for bit, surviving kills, several processes, stopping on bad numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT
from stopping import stop_after

from restoration.pipelines import restore_regression
from restoration.restorer_file import read_restorer
from restoration.restorers import build_restorer, load_weights
from training.commands import COMMANDS
from training.configs.common import OptimizerConfig
from training.degradation import Degradation
from training.loop.checkpoint import Average, CheckpointError, read_checkpoint, write_checkpoint
from training.loop.run_folder import RunFolderError
from training.loop.session import Session
from training.loop.trainer import TrainingStoppedError

TINY = [
    "--preset", "starter", "--network.width", "8", "--network.channel-multipliers", "1", "1",
    "--network.res-blocks", "1", "--data.crop", "16", "--data.workers", "0", "--run.batch", "4",
    "--validation.images", "1", "--validation.crop", "16", "--validation.qualities", "10",
    "--validation.every", "1000000", "--optimizer.warmup-images", "0",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three smooth pictures with a few edges."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows, columns = np.mgrid[0:48, 0:48] / 48
    for number in range(3):
        waves = (
            np.stack([np.sin((number + 2) * rows * 3), np.cos(columns * 4 + number), rows * columns], -1) * 100 + 120
        )
        waves[10 + number : 20, 15:30] = 255 - 60 * number
        Image.fromarray(waves.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def tiny(command: str, pictures: Path, output: Path, **run: object):
    config = COMMANDS[command].presets()["starter"]
    network = dataclasses.replace(config.network, width=8, channel_multipliers=(1, 1), res_blocks=1)
    return dataclasses.replace(
        config,
        network=network,
        data=dataclasses.replace(config.data, train=pictures, crop=16, workers=0),
        optimizer=dataclasses.replace(config.optimizer, warmup_images=0, learning_rate=1e-3),
        validation=dataclasses.replace(config.validation, images=1, crop=16, qualities=(10,), every=10**6),
        run=dataclasses.replace(config.run, output=output, batch=4, checkpoint_every=16, **run),
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(output / "checkpoint.pt")
    return {**state["model"], **{f"average.{key}": value for key, value in state["average"]["values"].items()}}


@pytest.mark.parametrize("command", ["driftrec", "regression"])
def test_a_resumed_run_ends_bit_identical_to_an_uninterrupted_one(command: str, pictures: Path, tmp_path: Path) -> None:
    Session(command, tiny(command, pictures, tmp_path / "whole", images=64)).train()
    interrupted = tiny(command, pictures, tmp_path / "parts", images=64)
    session = Session(command, interrupted)
    stop_after(session, images=32)
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["images"] == 32
    Session(command, interrupted).train()
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_stopping_exports_the_checkpoints_weights_with_the_last_figures(pictures: Path, tmp_path: Path) -> None:
    config = tiny("regression", pictures, tmp_path / "run", images=64)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_decay=0.0))
    stop_after(Session("regression", config), images=16)
    state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    file = read_restorer(tmp_path / "run" / "regression.safetensors")
    assert file.metadata.training["images"] == state["images"] == 16
    assert file.metadata.training["measured_at"] == 0
    assert file.metadata.training["metrics"]["psnr/qf10"] > 0
    exported = file.part("regression")
    stored = {key.removeprefix("network."): value for key, value in state["model"].items()}
    assert exported.keys() == stored.keys()
    assert all(torch.equal(value, stored[key].to(value.dtype)) for key, value in exported.items())


def test_a_finished_run_says_so_and_measures_nothing_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("regression", pictures, tmp_path / "run", images=8)
    Session("regression", config).train()
    assert capsys.readouterr().out.count("validation at") == 2
    before = read_restorer(tmp_path / "run" / "regression.safetensors")
    Session("regression", dataclasses.replace(config, run=dataclasses.replace(config.run, license="CC0-1.0"))).train()
    output = capsys.readouterr().out
    assert "this run is finished: 8 of 8 images" in output and "validation at" not in output
    after = read_restorer(tmp_path / "run" / "regression.safetensors")
    assert after.metadata.license == "CC0-1.0"
    assert after.metadata.training["metrics"] == before.metadata.training["metrics"]
    assert all(torch.equal(after.tensors[key], value) for key, value in before.tensors.items())


def test_a_run_that_was_killed_before_its_last_validation_makes_up_for_it(pictures: Path, tmp_path: Path) -> None:
    config = tiny("regression", pictures, tmp_path / "run", images=8)
    Session("regression", config).train()
    (tmp_path / "run" / "regression.safetensors").unlink()
    Session("regression", config).train()
    assert read_restorer(tmp_path / "run" / "regression.safetensors").metadata.training["measured_at"] == 8


@pytest.mark.parametrize("decays", [(0.0, 0.999), (0.999, 0.0)])
def test_an_average_can_be_taken_up_and_given_up_when_a_run_goes_on(
    decays: tuple[float, float], pictures: Path, tmp_path: Path
) -> None:
    for images, decay in zip((8, 16), decays, strict=True):
        config = tiny("regression", pictures, tmp_path / "run", images=images)
        optimizer = dataclasses.replace(config.optimizer, ema_decay=decay)
        Session("regression", dataclasses.replace(config, optimizer=optimizer)).train()
        state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
        assert (state["average"] is None) == (decay == 0.0)
    if decays[1]:
        assert state["average"]["updates"] == 2


def test_checkpoints_of_the_first_version_go_on(pictures: Path, tmp_path: Path) -> None:
    """They hold every weight, averages of the frozen ones as well, and nothing of a critic."""
    config = tiny("driftrec", pictures, tmp_path / "run", images=8)
    Session("driftrec", config).train()
    path = tmp_path / "run" / "checkpoint.pt"
    state = read_checkpoint(path)
    del state["critic"]
    frequencies = next(key for key in state["model"] if key.endswith(".0.W"))
    state["model"][frequencies] = state["model"][frequencies] + 1
    state["average"]["values"][frequencies] = state["model"][frequencies].clone()
    write_checkpoint(path, state)
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, images=12))
    session = Session("driftrec", longer)
    session.train()
    assert read_checkpoint(path)["images"] == 12
    assert torch.equal(session.task.model.state_dict()[frequencies], state["model"][frequencies])


def test_training_gains_over_the_jpeg_and_exports_a_restorer_that_runs(pictures: Path, tmp_path: Path) -> None:
    config = tiny("regression", pictures, tmp_path / "run", images=1200)
    data = dataclasses.replace(config.data, degradation=Degradation(10, 10), downscale=(1.0, 1.0), rotations=False)
    config = dataclasses.replace(config, data=data, optimizer=OptimizerConfig(learning_rate=4e-3))
    Session("regression", config).train()
    file = read_restorer(tmp_path / "run" / "regression.safetensors")
    assert file.metadata.training["images"] == 1200
    metrics = file.metadata.training["metrics"]
    assert metrics["psnr/qf10"] > metrics["jpeg_psnr/qf10"] + 0.3
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert sum(loss is not None for loss in losses) == 300
    restorer = build_restorer(file.metadata, file.name).eval()
    load_weights(restorer, file)
    with torch.no_grad():
        assert restore_regression(restorer, torch.rand(1, 3, 20, 31)).shape == (1, 3, 20, 31)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


def test_killed_and_repeated_the_command_goes_on(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "training", "regression", *TINY, "--data.train", str(pictures)),
        *("--run.output", str(output), "--run.images", "100000", "--run.checkpoint-every", "40"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (output / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    process.kill()
    process.wait()
    reached = read_checkpoint(output / "checkpoint.pt")["images"]
    command[command.index("100000")] = str(reached + 40)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"going on from {output / 'checkpoint.pt'} at {reached} images" in done.stdout + done.stderr
    assert read_checkpoint(output / "checkpoint.pt")["images"] == reached + 40


def test_two_processes_share_the_batches(pictures: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "training", "driftrec", *TINY, "--data.train", str(pictures)),
        *("--run.output", str(tmp_path / "run"), "--run.images", "16"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"] == 16
    assert (tmp_path / "run" / "driftrec.safetensors").exists()


def test_a_loss_that_is_no_number_stops_with_step_and_pictures(pictures: Path, tmp_path: Path) -> None:
    session = Session("regression", tiny("regression", pictures, tmp_path / "run", images=64))
    with torch.no_grad():
        next(session.task.model.parameters()).fill_(float("nan"))
    with pytest.raises(
        TrainingStoppedError, match=r"step 0, 0 images: the loss is nan in the batch .*\.png \(index 0\)"
    ):
        session.train()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_another_configuration_does_not_continue_a_run(pictures: Path, tmp_path: Path) -> None:
    config = tiny("regression", pictures, tmp_path / "run", images=8)
    Session("regression", config).train()
    other = dataclasses.replace(config, network=dataclasses.replace(config.network, width=16))
    with pytest.raises(RunFolderError, match=r"network.width was 8, is 16"):
        Session("regression", other).train()


def test_a_field_that_did_not_exist_yet_does_not_stop_a_run_from_going_on(pictures: Path, tmp_path: Path) -> None:
    config = tiny("regression", pictures, tmp_path / "run", images=8)
    Session("regression", config).train()
    stored = tmp_path / "run" / "config.json"
    before = json.loads(stored.read_text())
    del before["network"]["fourier_scale"]
    stored.write_text(json.dumps(before))
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, images=12))
    Session("regression", longer).train()
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"] == 12


def test_validation_takes_pictures_of_any_size_and_leaves_out_cut_ones(pictures: Path, tmp_path: Path) -> None:
    validation = tmp_path / "validation"
    validation.mkdir()
    for name, side in (("a", 17), ("b", 90), ("c", 40)):
        Image.new("RGB", (side, side + 5), (200, side, 30)).save(validation / f"{name}.png")
    whole = tmp_path / "whole.jpg"
    Image.effect_mandelbrot((300, 300), (-2, -1, 1, 1), 90).convert("RGB").save(whole, quality=95)
    (validation / "0 cut.jpg").write_bytes(whole.read_bytes()[:4000])
    config = tiny("regression", pictures, tmp_path / "run", images=4)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation=validation),
        validation=dataclasses.replace(config.validation, images=3, crop=64),
    )
    Session("regression", config).train()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


def test_a_failed_write_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"images": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(path, {"images": 2})
    assert read_checkpoint(path) == {"images": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"values": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_checkpoint(path)


def test_the_average_follows_the_formula_of_torch_ema() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = Average(module, decay=0.999)
    expected, decay = 0.0, 0.999
    for step in range(1, 6):
        with torch.no_grad():
            module.weight.fill_(float(step))
        average.update(module)
        weight = min(decay, (1 + step) / (10 + step))
        expected = weight * expected + (1 - weight) * step
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_a_score_network_can_start_from_a_regression(pictures: Path, tmp_path: Path) -> None:
    Session("regression", tiny("regression", pictures, tmp_path / "first", images=8)).train()
    start = tmp_path / "first" / "regression.safetensors"
    config = tiny("driftrec", pictures, tmp_path / "second", images=8, init_from=start)
    session = Session("driftrec", config)
    given = read_restorer(start).part("regression")
    loaded = session.task.model.network.state_dict()
    assert all(
        torch.equal(loaded[key][tuple(slice(-side, None) for side in value.shape)], value)
        for key, value in given.items()
    )
    session.train()
    assert (tmp_path / "second" / "driftrec.safetensors").exists()


def test_a_run_that_goes_on_does_not_start_from_a_file_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Session("regression", tiny("regression", pictures, tmp_path / "first", images=8)).train()
    start = tmp_path / "first" / "regression.safetensors"
    Session("driftrec", tiny("driftrec", pictures, tmp_path / "second", images=8, init_from=start)).train()
    reached = read_checkpoint(tmp_path / "second" / "checkpoint.pt")["model"]
    start.unlink()
    longer = tiny("driftrec", pictures, tmp_path / "second", images=16, init_from=start)
    session = Session("driftrec", longer)
    session.describe()
    output = capsys.readouterr().out
    assert f"--run.init-from {start} is not used again" in output
    assert "goes on at 8 of 16 images" in output
    session.train()
    after = read_checkpoint(tmp_path / "second" / "checkpoint.pt")["model"]
    frequencies = next(key for key in reached if key.endswith(".0.W"))
    assert torch.equal(after[frequencies], reached[frequencies]), "frozen weights are stored, too"


def test_a_file_that_does_not_fit_is_named_with_its_option(pictures: Path, tmp_path: Path) -> None:
    Session("regression", tiny("regression", pictures, tmp_path / "first", images=4)).train()
    start = tmp_path / "first" / "regression.safetensors"
    config = tiny("regression", pictures, tmp_path / "second", images=4, init_from=start)
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, width=16))
    with pytest.raises(ValueError, match=rf"^--run\.init-from {start}: the file to start from has "):
        Session("regression", config)
