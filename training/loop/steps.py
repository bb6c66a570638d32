"""One step of a training: the networks with their optimisers, the average of the weights, and the random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from training.configs.common import OptimizerConfig, RunConfig
from training.files import FileProblemError
from training.loop.checkpoint import Average, CheckpointError
from training.loop.optimizers import Learner, learning_rate
from training.trainers.task import Task

_MOST_SKIPPED = 50
"""Steps in a row that fp16 may skip: its scale falls by half each time, from 65,536 to 1 within a third of that."""


class TrainingStoppedError(FileProblemError):
    """The training cannot go on; the message says at which step, and what to look at."""


class Steps:
    """A task's networks, and what a step does to them.

    Args:
        task: What is trained.
        optimizer: Of its model.
        run: Length, batch, precision.
        accelerator: Knows the device and the processes.
        state: Of an earlier run, to go on from; None for a new one.

    Raises:
        CheckpointError: The state belongs to another network.
        ValueError: An option is asked for that this machine or this training has not.
    """

    def __init__(
        self, task: Task, optimizer: OptimizerConfig, run: RunConfig, accelerator: Accelerator,
        state: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.task, self.run_config, self.accelerator = task, run, accelerator
        task.model.to(accelerator.device)
        self.model = Learner(task.model, optimizer, store_frozen=task.stores_frozen)
        self.critic: Learner | None = None
        if task.critic is not None:
            self.critic = Learner(task.critic.to(accelerator.device), task.critic_optimizer)
        if state is not None:
            self._restore(state)
        self.average = Average(task.model, optimizer.ema_decay) if optimizer.ema_decay else None
        if self.average is not None and state is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        blocks = _frozen_blocks(task) if run.fsdp else []
        for learner in self._learners():
            learner.prepare(accelerator, run, [block for block in blocks if _within(block, learner)])

    def _learners(self) -> list[Learner]:
        return [self.model] if self.critic is None else [self.model, self.critic]

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
        if self.critic is not None:
            if state.get("critic") is None:
                raise CheckpointError("the checkpoint has no critic in it. Give --run.output another folder.")
            self.critic.load_state_dict(state["critic"])
        if self.accelerator.scaler is not None and state.get("scaler") is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        scaler = self.accelerator.scaler
        return {
            **self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "critic": self.critic.state_dict() if self.critic is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For the time being the model has the averaged weights, is in evaluation mode, and takes no gradients."""
        model = self.task.model
        with self.average.in_place(model) if self.average is not None else nullcontext():
            model.eval()
            try:
                with torch.no_grad():
                    yield
            finally:
                model.train()

    def take(self, images: int, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
        """One step of the model, and of its critic on what the model gave before it.

        Args:
            images: Seen before this step.
            micro_batches: This process's share of the batch.

        Returns:
            Figures of the step: losses, the gradients' norms, the learning rate.

        Raises:
            TrainingStoppedError: A loss or a gradient is no number.
        """
        generator, statistics = self._generator(images), {"loss": 0.0}
        rates = [learning_rate(learner.config, images, self.run_config.batch, self.run_config.images)
                 for learner in self._learners()]  # fmt: skip
        for learner, rate in zip(self._learners(), rates, strict=True):
            learner.begin(rate)
        for number, batch in enumerate(micro_batches):
            last, moved = number == len(micro_batches) - 1, self._moved(batch)
            with self.critic.frozen() if self.critic is not None else nullcontext():
                found = {"loss": self._backward(self.model, self.task.loss, moved, generator, images, last=last)}
            found |= {key: float(value) for key, value in self.task.noted.items()}
            if self.critic is not None:
                loss = self._backward(self.critic, self.task.critic_loss, moved, generator, images, last=last)
                found["critic_loss"] = loss
            for key, value in found.items():
                statistics[key] = statistics.get(key, 0.0) + value / len(micro_batches)
        norms = self._take_steps(images, micro_batches)
        statistics |= {"gradient_norm": norms[0], "learning_rate": rates[0]}
        return statistics if self.critic is None else {**statistics, "critic_gradient_norm": norms[1]}

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch on the device, its pictures laid out as the networks are."""
        moved = {key: value.to(self.accelerator.device, non_blocking=True) if torch.is_tensor(value) else value
                 for key, value in batch.items()}  # fmt: skip
        if self.run_config.channels_last:
            for key, value in moved.items():
                if torch.is_tensor(value) and value.dim() == 4:
                    moved[key] = value.contiguous(memory_format=torch.channels_last)
        return moved

    def _backward(
        self, learner: Learner, loss_of: Callable[..., Tensor], batch: dict[str, Any], generator: torch.Generator,
        images: int, *, last: bool,
    ) -> float:  # fmt: skip
        """The gradients of one micro-batch; processes exchange them with the last one."""
        with nullcontext() if last else self.accelerator.no_sync(learner.wrapped):
            loss = loss_of(learner.wrapped, batch, generator)
            self.accelerator.backward(loss / self.run_config.accumulate)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._stop(images, f"the {self._name(learner)}loss is {value}", [batch])
        return value

    def _take_steps(self, images: int, micro_batches: list[dict[str, Any]]) -> list[float]:
        """Clip, step and average; the norms of the gradients."""
        scaler, norms = self.accelerator.scaler, []
        for learner in self._learners():
            norm = learner.step(scaler)
            self._check_norm(learner, norm, images, micro_batches)
            norms.append(norm)
        if scaler is not None:
            scaler.update()
        if self.average is not None and math.isfinite(norms[0]):
            self.average.update(self.task.model)
        return norms

    def _check_norm(
        self, learner: Learner, norm: float, images: int, micro_batches: list[dict[str, Any]]
    ) -> None:  # fmt: skip
        """fp16's loss scaling skips a step with infinite gradients now and then, and then scales less; not for ever."""
        learner.skipped = 0 if math.isfinite(norm) else learner.skipped + 1
        if learner.skipped > (_MOST_SKIPPED if self.run_config.precision == "fp16" else 0):
            again = f", for the {learner.skipped}. time in a row," if learner.skipped > 1 else ""
            self._stop(images, f"the {self._name(learner)}gradient's norm is {norm}{again}", micro_batches)

    def _name(self, learner: Learner) -> str:
        return "critic's " if learner is self.critic else ""

    def _stop(self, images: int, what: str, batches: list[dict[str, Any]]) -> NoReturn:
        pictures = ", ".join(
            f"{Path(path).name} (index {int(index)})"
            for batch in batches
            for path, index in zip(batch["path"], batch["index"], strict=True)
        )
        raise TrainingStoppedError(
            f"step {images // self.run_config.batch}, {images} images: {what} in the batch {pictures}. "
            f"The last checkpoint is whole; lower the learning rate or set a gradient clip, and repeat the command."
        )

    def _generator(self, images: int) -> torch.Generator:
        """The random numbers of a step and process, the same whether or not the run was interrupted before."""
        words = np.random.SeedSequence([self.run_config.seed, 2, images, self.accelerator.process_index])
        seed = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.manual_seed(seed)  # dropout has no other source
        return torch.Generator(device=self.accelerator.device).manual_seed(seed)


def _frozen_blocks(task: Task) -> list[torch.nn.Module]:
    blocks = task.frozen_blocks()
    if not blocks:
        raise ValueError(
            "run.fsdp: this training has no frozen base model to spread over processes, and its own network is small "
            "enough for each. Leave the option off."
        )
    return blocks


def _within(block: torch.nn.Module, learner: Learner) -> bool:
    return any(module is block for module in learner.module.modules())
