"""Going on with other batches, processes and settings; stopping a whole group of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import ROOT
from stopping import stop_after
from tiny_trainings import tiny, weights, write_pictures

import training.loop.steps
from training.command_line.files import to_yaml
from training.loop.checkpoint import read_checkpoint
from training.loop.session import Session

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    write_pictures(folder)
    return folder


def command(config: Any, *launcher: str) -> list[str]:
    """The command line of a training of the baseline."""
    path = config.run.output.parent / "my.yaml"
    path.write_text(to_yaml(config))
    return [*(launcher or [sys.executable]), "-m", "training", "regression", "--config", str(path)]


def started(config: Any, *launcher: str) -> subprocess.Popen[str]:
    """A training in a group of processes of its own that has written its first checkpoint."""
    process = subprocess.Popen(
        command(config, *launcher), cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not config.run.output.joinpath("checkpoint.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    return process


def test_with_another_batch_every_picture_is_still_seen_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    take = training.loop.steps.Steps.take

    def noted(self: Any, images: int, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
        assert images == len(seen)
        seen.extend(int(index) for batch in micro_batches for index in batch["index"])
        return take(self, images, micro_batches)

    monkeypatch.setattr(training.loop.steps.Steps, "take", noted)
    for images, batch, accumulate in ((12, 4, 1), (36, 8, 2), (40, 2, 1)):
        Session("regression", tiny(folder, tmp_path, images=images, batch=batch, accumulate=accumulate)).train()
    assert seen == list(range(40))
    assert read_checkpoint(tmp_path / "checkpoint.pt")["images"] == 40


def test_with_more_processes_and_with_one_again_the_same_is_trained(folder: Path, tmp_path: Path) -> None:
    """Alone, then two, then alone: as one process alone from the start, but for the order of sums."""
    config = tiny(folder, tmp_path / "run", images=40)
    stop_after(Session("regression", config), images=16)
    two = replace(config, run=replace(config.run, images=28))
    done = subprocess.run(
        command(two, *TORCHRUN), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout and "at 16 images" in done.stdout
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"] == 28
    alone = tiny(folder, tmp_path / "alone", images=28)
    stop_after(Session("regression", replace(alone, run=replace(alone.run, images=40))), images=16)
    Session("regression", alone).train()
    for run in (config, replace(alone, run=replace(alone.run, images=40))):
        Session("regression", run).train()
    one, other = weights(tmp_path / "run"), weights(tmp_path / "alone")
    moved = weights_at_start(folder, tmp_path)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=2e-5, msg=key)
    assert max(float((one[key] - moved[key]).abs().max()) for key in moved) > 1e-3


def weights_at_start(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    session = Session("regression", tiny(folder, tmp_path / "new"))
    return {key: value.clone() for key, value in session.task.model.state_dict().items()}


def test_settings_of_the_optimiser_may_change_when_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """They are the configuration's, not those that the checkpoint remembers; and they change what is learnt."""
    config = tiny(folder, tmp_path / "run", images=8)
    Session("regression", config).train()
    longer = replace(config, run=replace(config.run, images=12))
    optimizer = replace(longer.optimizer, weight_decay=0.5, betas=(0.8, 0.95))
    Session("regression", replace(longer, optimizer=optimizer)).train()
    group = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.8, 0.95))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
def test_sigterm_to_a_whole_group_saves_and_ends_well(folder: Path, tmp_path: Path) -> None:
    """As a terminal, a container or a queue sends it: to the workers of the data pipeline, too."""
    config = tiny(folder, tmp_path / "run", images=10**6, checkpoint_every=40)
    config = replace(config, data=replace(config.data, workers=2))
    process = started(config)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-3000:]
    assert "Traceback" not in errors
    images = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"]
    assert f"asked to stop: saved at {images} images" in output
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
def test_sigterm_under_torchrun_saves(group: bool, folder: Path, tmp_path: Path) -> None:
    """Both processes end well; torchrun itself, told to stop, calls that a failure."""
    config = tiny(folder, tmp_path / "run", images=10**6, checkpoint_every=40)
    config = replace(config, data=replace(config.data, workers=1))
    process = started(config, *TORCHRUN)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=90)
    images = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"]
    assert f"asked to stop: saved at {images} images" in output, errors[-3000:]
    Session("regression", replace(config, run=replace(config.run, images=images + 8))).train()
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"] >= images + 8
