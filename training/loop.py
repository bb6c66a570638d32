"""The one training loop: accelerate, averaged weights, resuming by repetition, validation, samples, logs."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from restoration.devices import accelerator_available
from training.checkpoint import Average, CheckpointError, read_checkpoint, write_checkpoint
from training.configs import DataConfig, OptimizerConfig, RunConfig
from training.data import IndexSampler, PairDataset, make_loader
from training.optimizers import Learner, learning_rate
from training.run_folder import RunFolder
from training.trainers.task import Task


class TrainingStoppedError(RuntimeError):
    """The training cannot go on; the message says at which step, and what to look at."""


class Trainer:
    """Trains a task until its images are used up.

    Args:
        task: What is trained.
        dataset: Its pairs.
        data: Workers of the data pipeline.
        optimizer: Optimiser settings.
        run: Length, batch, precision, checkpoints.
        folder: Where everything is written.
        validate: Called with the averaged weights in place and the images seen; returns what was measured.
        validate_every: Images between two calls of it.

    Raises:
        ValueError: The batch cannot be shared out, or the optimiser is not installed.
    """

    def __init__(
        self, task: Task, dataset: PairDataset, data: DataConfig, optimizer: OptimizerConfig, run: RunConfig,
        folder: RunFolder, validate: Callable[[int], dict[str, float]], validate_every: int,
    ) -> None:  # fmt: skip
        self.task, self.dataset, self.data, self.optimizer_config, self.run_config = task, dataset, data, optimizer, run
        self.folder, self.validate, self.validate_every = folder, validate, validate_every
        self.accelerator = Accelerator(mixed_precision=run.precision, cpu=not accelerator_available())
        self.images = 0
        self.stop_asked = False
        share = self.accelerator.num_processes * run.accumulate
        if run.batch % share:
            raise ValueError(
                f"run.batch: expected a multiple of {share} (processes x run.accumulate), got {run.batch}. "
                "Change one of them."
            )

    def train(self) -> None:
        """Run to the end, from the last checkpoint where there is one; saves and returns early on SIGTERM or Ctrl-C.

        Raises:
            TrainingStoppedError: A loss or a gradient is no number.
            CheckpointError: A checkpoint cannot be written, read or used.
            ValueError: The optimiser is not installed.
        """
        self._prepare()
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.folder.close()

    def _ask_to_stop(self, number: int, _: object) -> None:
        """The first signal lets the step end and saves; a second Ctrl-C stops at once."""
        if self.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_asked = True
        self.folder.say("stopping after this step; Ctrl-C again stops at once, without saving")

    def _prepare(self) -> None:
        task, device = self.task, self.accelerator.device
        task.model.to(device)
        self.model = Learner(task.model, self.optimizer_config, store_frozen=task.stores_frozen)
        self.critic: Learner | None = None
        if task.critic is not None:
            self.critic = Learner(task.critic.to(device), task.critic_optimizer)
        state = read_checkpoint(self.folder.checkpoint) if self.folder.checkpoint.exists() else None
        if state is not None:
            self._restore(state)
        decay = self.optimizer_config.ema_decay
        self.average = Average(task.model, decay) if decay else None
        if self.average is not None and state is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        for learner in self._learners():
            learner.prepare(self.accelerator)

    def _learners(self) -> list[Learner]:
        return [self.model] if self.critic is None else [self.model, self.critic]

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
        if self.critic is not None:
            if state.get("critic") is None:
                raise CheckpointError(f"{self.folder.checkpoint} has no critic in it. Remove it to start anew.")
            self.critic.load_state_dict(state["critic"])
        self.images = int(state["images"])
        if self.accelerator.scaler is not None and state.get("scaler") is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.folder.say(f"going on from {self.folder.checkpoint} at {self.images} images")

    def _loop(self) -> None:
        run = self.run_config
        if self.images >= run.images and self.folder.measured_at() == self.images:
            self._on_main(self._export)
            self.folder.say(
                f"this run is finished: {self.images} of {run.images} images. A larger --run.images goes on."
            )
            return
        if self.images == 0:
            self._on_main(self._measure)
        progress = self.folder.progress(self.images, run.images)
        saved_at, saved_time = self.images, time.monotonic()
        for micro_batches in self._batches():
            before = self.images
            statistics = self._step(micro_batches)
            self.images += run.batch
            self.folder.log(self.images, statistics)
            progress.set_postfix_str(f"loss {statistics['loss']:.4f}", refresh=False)
            progress.update(run.batch)
            minutes = (time.monotonic() - saved_time) / 60
            due = self.images - saved_at >= run.checkpoint_every or minutes >= run.checkpoint_minutes
            stop = self._anyone_asked_to_stop()
            validation_due = self.images // self.validate_every > before // self.validate_every
            if validation_due and self.images < run.images and not stop:
                self._on_main(self._measure)
            if due or stop or validation_due:
                self._save()
                saved_at, saved_time = self.images, time.monotonic()
            if stop:
                progress.close()
                self._on_main(self._export)
                self.folder.say(
                    f"asked to stop: saved at {self.images} images, {self.folder.restorer.name} as well; "
                    "repeat the command to go on."
                )
                return
        progress.close()
        self._save()
        self._on_main(self._measure)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """Lists of `accumulate` micro-batches, one list for each optimiser step of this process."""
        run, world = self.run_config, self.accelerator.num_processes
        sampler = IndexSampler(
            self.images, max(run.images, self.images), self.accelerator.process_index, world, run.batch
        )
        per_process = run.batch // world // run.accumulate
        pin = self.accelerator.device.type == "cuda"
        loader = iter(make_loader(self.dataset, sampler, per_process, self.data.workers, pin_memory=pin))
        while micro_batches := list(islice(loader, run.accumulate)):
            yield micro_batches

    def _step(self, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
        """One step of the model, and of its critic on what the model gave before it."""
        generator, statistics = self._generator(), {"loss": 0.0}
        rates = [learning_rate(learner.config, self.images, self.run_config.batch, self.run_config.images)
                 for learner in self._learners()]  # fmt: skip
        for learner, rate in zip(self._learners(), rates, strict=True):
            learner.begin(rate)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            moved = {key: value.to(self.accelerator.device) if torch.is_tensor(value) else value
                     for key, value in batch.items()}  # fmt: skip
            with self.critic.frozen() if self.critic is not None else nullcontext():
                loss = self._backward(self.model, self.task.loss, moved, generator, last=last)
            statistics["loss"] += loss / len(micro_batches)
            if self.critic is not None:
                loss = self._backward(self.critic, self.task.critic_loss, moved, generator, last=last)
                statistics["critic_loss"] = statistics.get("critic_loss", 0.0) + loss / len(micro_batches)
        norms = self._take_steps(micro_batches)
        statistics |= {"gradient_norm": norms[0], "learning_rate": rates[0]}
        return statistics if self.critic is None else {**statistics, "critic_gradient_norm": norms[1]}

    def _backward(
        self, learner: Learner, loss_of: Callable[..., Tensor], batch: dict[str, Any], generator: torch.Generator, *,
        last: bool,
    ) -> float:  # fmt: skip
        """The gradients of one micro-batch; processes exchange them with the last one."""
        with nullcontext() if last else self.accelerator.no_sync(learner.wrapped):
            loss = loss_of(learner.wrapped, batch, generator)
            self.accelerator.backward(loss / self.run_config.accumulate)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._stop(f"the {self._name(learner)}loss is {value}", [batch])
        return value

    def _take_steps(self, micro_batches: list[dict[str, Any]]) -> list[float]:
        """Clip, step and average; the norms of the gradients."""
        scaler, norms = self.accelerator.scaler, []
        for learner in self._learners():
            norm = learner.step(scaler)
            if not math.isfinite(norm) and self.run_config.precision != "fp16":  # fp16's loss scaling skips such steps
                self._stop(f"the {self._name(learner)}gradient's norm is {norm}", micro_batches)
            norms.append(norm)
        if scaler is not None:
            scaler.update()
        if self.average is not None and math.isfinite(norms[0]):
            self.average.update(self.task.model)
        return norms

    def _name(self, learner: Learner) -> str:
        return "critic's " if learner is self.critic else ""

    def _stop(self, what: str, batches: list[dict[str, Any]]) -> NoReturn:
        pictures = ", ".join(
            f"{Path(path).name} (index {int(index)})"
            for batch in batches
            for path, index in zip(batch["path"], batch["index"], strict=True)
        )
        raise TrainingStoppedError(
            f"step {self.images // self.run_config.batch}, {self.images} images: {what} in the batch {pictures}. "
            f"The last checkpoint is whole; lower the learning rate or set a gradient clip, and repeat the command."
        )

    def _generator(self) -> torch.Generator:
        """The random numbers of this step and process, the same whether or not the run was interrupted before."""
        words = np.random.SeedSequence([self.run_config.seed, 2, self.images, self.accelerator.process_index])
        seed = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.manual_seed(seed)  # dropout has no other source
        return torch.Generator(device=self.accelerator.device).manual_seed(seed)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Run `work` in the main process, on the averaged weights, in evaluation mode, without gradients."""
        if self.accelerator.is_main_process:
            model: nn.Module = self.task.model
            with self.average.in_place(model) if self.average is not None else nullcontext():
                model.eval()
                try:
                    with torch.no_grad():
                        work()
                finally:
                    model.train()
        self.accelerator.wait_for_everyone()

    def _measure(self) -> None:
        figures = self.validate(self.images)
        self.folder.log(self.images, {f"validation/{key}": value for key, value in figures.items()})
        self.folder.export(self.task, self.images, figures, self.run_config)

    def _export(self) -> None:
        """Write the restorer file without measuring: it keeps the figures of the last validation."""
        self.folder.export(self.task, self.images, None, self.run_config)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                **self.model.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
                "critic": self.critic.state_dict() if self.critic is not None else None,
                "images": self.images,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            }
            write_checkpoint(self.folder.checkpoint, state)
        self.accelerator.wait_for_everyone()

    def _anyone_asked_to_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop_asked
        asked = torch.tensor([int(self.stop_asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum"))
