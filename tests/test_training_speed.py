"""Options that make a training faster or smaller in memory: the same is learnt, runs go on with and without them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import ROOT
from spread_training import make_config
from tiny_trainings import same, tiny, weights, write_pictures

from training.configs.common import OptimizerConfig
from training.loop.checkpoint import read_checkpoint
from training.loop.optimizers import make_optimizer
from training.loop.session import Session

START = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    write_pictures(folder)
    return folder


def with_options(config: Any, *, fused: bool = False, **run: Any) -> Any:
    return replace(
        config, optimizer=replace(config.optimizer, fused=fused), run=replace(config.run, **run)
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    Session("regression", tiny(folder, output)).train()
    return output


def close(one: Path, other: Path) -> None:
    """After ten steps of up to 1e-3 each weights differ by rounding alone."""
    a, b = weights(one), weights(other)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("options", [{"fused": True}, {"channels_last": True}], ids=["fused", "channels_last"])
def test_the_option_changes_rounding_alone_and_may_change_when_a_run_goes_on(
    options: dict[str, Any], folder: Path, tmp_path: Path, plain: Path
) -> None:
    config = tiny(folder, tmp_path / "whole")
    Session("regression", with_options(config, **options)).train()
    close(tmp_path / "whole", plain)
    parts = tiny(folder, tmp_path / "parts")
    for images, now in ((12, options), (28, options), (40, options)):
        part = replace(parts, optimizer=replace(parts.optimizer, schedule="constant"))
        Session("regression", with_options(part, images=images, **now)).train()
    straight = tiny(folder, tmp_path / "straight")
    straight = replace(straight, optimizer=replace(straight.optimizer, schedule="constant"))
    Session("regression", with_options(straight, **options)).train()
    assert same(tmp_path / "parts", tmp_path / "straight"), "it goes on to the bit"
    longer = tiny(folder, tmp_path / "whole", images=44)
    Session("regression", longer).train()
    Session("regression", with_options(longer, images=48, **options)).train()
    assert read_checkpoint(tmp_path / "whole" / "checkpoint.pt")["images"] == 48


def test_layouts_are_those_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    session = Session("regression", tiny(folder, tmp_path, images=4, channels_last=True))
    session.train()
    filters = [parameter for parameter in session.task.model.parameters() if parameter.dim() == 4]
    assert filters and all(value.is_contiguous(memory_format=torch.channels_last) for value in filters)


def test_a_fused_step_is_refused_where_there_is_none() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match=r"optimizer\.fused, optimizer\.eight_bit: there is no such variant"):
        make_optimizer(parameter, OptimizerConfig(fused=True, eight_bit=True))
    whole_numbers = [torch.nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)]
    with pytest.raises(
        ValueError, match=r"optimizer\.fused: there is no such kernel for this device .* Leave the option off"
    ):
        make_optimizer(whole_numbers, OptimizerConfig(fused=True))


@pytest.mark.slow
def test_a_compiled_training_learns_the_same_and_goes_on_without(folder: Path, tmp_path: Path, plain: Path) -> None:
    Session("regression", tiny(folder, tmp_path, compile=True)).train()
    close(tmp_path, plain)
    Session("regression", tiny(folder, tmp_path, images=44)).train()
    assert read_checkpoint(tmp_path / "checkpoint.pt")["images"] == 44


def test_spreading_is_refused_where_nothing_is_frozen_and_with_what_it_cannot_do(
    folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=r"run\.fsdp: this training has no frozen base model to spread"):
        Session("regression", tiny(folder, tmp_path, fsdp=True)).train()
    with pytest.raises(ValueError, match=r"run\.fsdp: it does not go together with run\.compile or run\.channels_last"):
        Session("regression", tiny(folder, tmp_path, fsdp=True, compile=True)).train()


def spread(name: str, folder: Path, *, fsdp: bool) -> dict[str, float]:
    """Runs spread_training.py in two processes."""
    make_config(name, folder, fsdp=fsdp)  # its files, by one process
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(ROOT / "tests" / "spread_training.py"), name, str(folder), str(int(fsdp))),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {"weights": float(done.stdout.rsplit("megabytes of weights: ", 1)[1].split()[0])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["codiff", "sodiff"])
def test_spread_over_two_processes_the_same_is_learnt_with_half_of_the_frozen_weights(
    name: str, tmp_path: Path
) -> None:  # fmt: skip
    """With the reduced SD 2.1; its checkpoint goes on without."""
    whole = spread(name, tmp_path / "ddp", fsdp=False)
    shared = spread(name, tmp_path / "fsdp", fsdp=True)
    assert shared["weights"] < 0.62 * whole["weights"]
    one, other = (read_checkpoint(tmp_path / kind / "run" / "checkpoint.pt") for kind in ("ddp", "fsdp"))
    for part, found in ((one["model"], other["model"]), (one["critic"]["model"], other["critic"]["model"])):
        assert part.keys() == found.keys()
        for key, value in part.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=2e-4, msg=key)
    config = make_config(name, tmp_path / "fsdp", fsdp=False)
    Session(name, replace(config, run=replace(config.run, images=config.run.images + 2))).train()
    state = read_checkpoint(tmp_path / "fsdp" / "run" / "checkpoint.pt")
    assert state["images"] == config.run.images + 2
