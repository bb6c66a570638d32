"""A second network trained against the first: whose gradients reach whom, resuming, several processes, bad numbers."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from shared import ROOT
from toy_gan import TOY, ToyConfig, ToyTask

import training.loop.trainer
from restoration.restorer_file import read_restorer
from training.commands import COMMANDS
from training.configs.common import OptimizerConfig
from training.data.views import pairs_of
from training.loop.checkpoint import (
    CheckpointError,
    load_trained_state,
    read_checkpoint,
    trained_state,
    write_checkpoint,
)
from training.loop.optimizers import Learner, make_optimizer
from training.loop.session import Session
from training.loop.trainer import TrainingStoppedError


@pytest.fixture(autouse=True)
def toy_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "toy", TOY)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        coarse.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def toy(pictures: Path, output: Path, **run: object) -> ToyConfig:
    config = ToyConfig()
    data, options = replace(config.data, train=pictures), replace(config.run, output=output, **run)
    return replace(config, data=data, run=options)


def train(session: Session, *, stop_at: int | None = None) -> ToyTask:
    """Train; with `stop_at`, a SIGTERM arrives during the step that reaches so many images."""
    step = training.loop.trainer.Trainer._step

    def interrupted(self, batches):
        if self.images + self.run_config.batch == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop.trainer.Trainer, "_step", interrupted)
        session.train()
    assert isinstance(session.task, ToyTask)
    return session.task


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(output / "checkpoint.pt")
    return {**state["model"], **{f"critic.{key}": value for key, value in state["critic"]["model"].items()}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_network_gets_the_gradient_of_its_own_loss_at_the_weights_before_the_step(
    accumulate: int, pictures: Path, tmp_path: Path
) -> None:
    session = Session("toy", toy(pictures, tmp_path / "run", images=8, accumulate=accumulate))
    before = copy.deepcopy(session.task)
    task = train(session)
    pairs = pairs_of(session.config, session.training)
    items = [pairs[index] for index in range(8)]
    batch = {key: torch.stack([item[key] for item in items]) for key in ("clean", "degraded")}
    generator = torch.Generator()
    loss = before.loss(before.model, batch, generator)
    expected = torch.autograd.grad(loss, list(before.model.body.parameters()))
    for parameter, gradient in zip(task.model.body.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    critic_loss = before.critic_loss(before.critic, batch, generator)
    expected = torch.autograd.grad(critic_loss, list(before.critic.parameters()))
    for parameter, gradient in zip(task.critic.parameters(), expected, strict=True):
        assert parameter.requires_grad, "free again after the generator's pass"
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    for after, start, gradient in zip(task.critic.parameters(), before.critic.parameters(), expected, strict=True):
        step = start - 4e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's first, whatever its betas
        torch.testing.assert_close(after, step, rtol=1e-3, atol=1e-6)


def test_the_critic_steers_the_generator(pictures: Path, tmp_path: Path) -> None:
    """With the weight of its opinion at 0 another generator comes out, and the same critic's first loss."""
    alone = replace(toy(pictures, tmp_path / "alone", images=8), weight=0.0)
    train(Session("toy", alone))
    train(Session("toy", toy(pictures, tmp_path / "both", images=8)))
    alone_weights, both = weights(tmp_path / "alone"), weights(tmp_path / "both")
    assert not torch.equal(alone_weights["body.2.weight"], both["body.2.weight"])
    assert torch.equal(alone_weights["critic.0.weight"], both["critic.0.weight"])


def test_a_resumed_run_with_a_critic_ends_bit_identical(pictures: Path, tmp_path: Path) -> None:
    train(Session("toy", toy(pictures, tmp_path / "whole", images=64)))
    train(Session("toy", toy(pictures, tmp_path / "parts", images=64)), stop_at=32)
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["images"] == 32
    train(Session("toy", toy(pictures, tmp_path / "parts", images=64)))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and "critic.0.weight" in whole
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_what_one_does(accumulate: int, pictures: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(ROOT / "tests" / "toy_gan.py"), str(pictures), str(tmp_path / "two"), str(accumulate)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    train(Session("toy", toy(pictures, tmp_path / "one", images=32)))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = trained_state(ToyTask(ToyConfig()).model)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=2e-4, msg=key)  # each of the four steps goes 1e-3
        assert key.startswith("critic.") or not torch.allclose(start[key], value, atol=2e-4)


def test_a_critics_loss_that_is_no_number_stops_and_says_whose(pictures: Path, tmp_path: Path) -> None:
    config = replace(toy(pictures, tmp_path / "run"), weight=0.0)
    session = Session("toy", config)
    session.task.loss = lambda model, batch, generator: _kept(session.task, model, batch)  # type: ignore[method-assign]
    with torch.no_grad():
        next(session.task.critic.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingStoppedError, match=r"step 0, 0 images: the critic's loss is nan in the batch .*\.png"):
        session.train()


def _kept(task: ToyTask, model: torch.nn.Module, batch: dict) -> torch.Tensor:
    restored = model(batch["degraded"])
    task.restored = restored.detach()
    return restored.mean()


def test_only_what_is_trained_is_stored_and_optimised(pictures: Path, tmp_path: Path) -> None:
    task = train(Session("toy", toy(pictures, tmp_path / "run")))
    state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert sorted(state["model"]) == ["body.0.bias", "body.0.weight", "body.2.bias", "body.2.weight"]
    assert len(state["optimizer"]["state"]) == 4
    assert state["average"] is None
    exported = read_restorer(tmp_path / "run" / "toy.safetensors").part("regression")
    assert all(torch.equal(exported[key], value) for key, value in state["model"].items()), "the present weights"
    assert torch.equal(exported["base.weight"], task.model.base.weight)


def test_further_figures_of_a_task_are_measured_and_exported(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Session("toy", toy(pictures, tmp_path / "run")))
    assert "twice quality 20.000" in capsys.readouterr().out
    exported = read_restorer(tmp_path / "run" / "toy.safetensors").metadata.training
    assert exported["metrics"]["twice_quality/qf10"] == 20.0


def test_a_checkpoint_without_a_critic_is_refused(pictures: Path, tmp_path: Path) -> None:
    config = toy(pictures, tmp_path / "run", images=8)
    train(Session("toy", config))
    path = tmp_path / "run" / "checkpoint.pt"
    write_checkpoint(path, {**read_checkpoint(path), "critic": None})
    with pytest.raises(CheckpointError, match="has no critic"):
        Session("toy", config).train()


def test_mixed_precision_trains_both_networks(pictures: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
    try:
        train(Session("toy", toy(pictures, tmp_path / "run", precision="bf16")))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    fresh = ToyTask(ToyConfig())
    for key, value in weights(tmp_path / "run").items():
        part = fresh.critic if key.startswith("critic.") else fresh.model
        start = part.state_dict()[key.removeprefix("critic.")]
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.allclose(value, start, atol=1e-4)


def test_one_scale_serves_two_networks_and_skips_only_the_one_that_overflowed() -> None:
    """As with fp16: gradients of a scaled loss give the very step, and infinite ones no step of that network."""
    torch.manual_seed(0)
    networks = [torch.nn.Linear(4, 1) for _ in range(2)]
    plain = [copy.deepcopy(network) for network in networks]
    data = torch.randn(8, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    learners = [Learner(network, OptimizerConfig(gradient_clip=0.01)) for network in networks]
    for overflow in (False, True):
        for network in networks:
            loss = network(data).square().mean() * (1e38 if overflow and network is networks[0] else 1.0)
            scaler.scale(loss).backward()
        norms = [learner.step(scaler) for learner in learners]
        scaler.update()
        for network in networks:
            network.zero_grad()
    assert not np.isfinite(norms[0]) and np.isfinite(norms[1])
    assert scaler.get_scale() == 512.0
    for number, (network, expected) in enumerate(zip(networks, plain, strict=True)):
        optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-4, weight_decay=0.01)
        for _ in range(1 if number == 0 else 2):
            optimizer.zero_grad()
            expected(data).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
            optimizer.step()
        torch.testing.assert_close(network.weight, expected.weight, rtol=0, atol=1e-7)


def test_statistics_beside_trained_weights_are_stored_and_frozen_ones_are_not() -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)
    )
    module[2:].requires_grad_(False)
    module(torch.randn(2, 3, 4, 4))
    state = {key: value.clone() for key, value in trained_state(module).items()}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert state.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", *statistics}
    other = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)
    )
    frozen = other[2].weight.clone()
    other[2:].requires_grad_(False)
    load_trained_state(other, state)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(other[2].weight, frozen)
    with pytest.raises(CheckpointError, match=r"another network: 0\.bias is missing"):
        load_trained_state(other, {key: value for key, value in state.items() if key != "0.bias"})
    with pytest.raises(CheckpointError, match=r"another network: 9\.weight"):
        load_trained_state(other, {**state, "9.weight": torch.zeros(1)})


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_eight_bits_without_bitsandbytes_say_what_to_install() -> None:
    parameters = list(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_optimizer(parameters, OptimizerConfig(eight_bit=True))


def test_eight_bits_are_bitsandbytes_own_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("bitsandbytes")
    module.optim = types.SimpleNamespace(AdamW8bit=lambda parameters, **options: (parameters, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    parameters = list(torch.nn.Linear(2, 2).parameters())
    config = OptimizerConfig(learning_rate=2e-3, betas=(0.5, 0.9), weight_decay=0.1, eight_bit=True)
    given, options = make_optimizer(parameters, config)  # type: ignore[misc]
    assert given is parameters
    assert options == {"lr": 2e-3, "betas": (0.5, 0.9), "weight_decay": 0.1}
