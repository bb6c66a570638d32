"""The one training loop: accelerate, averaged weights, resuming by repetition, validation, samples, logs."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from restoration.devices import accelerator_available
from training.checkpoint import Average, read_checkpoint, write_checkpoint
from training.configs import DataConfig, OptimizerConfig, RunConfig
from training.data import IndexSampler, PairDataset, make_loader
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
        self._scaler_state: dict[str, Any] | None = None
        share = self.accelerator.num_processes * run.accumulate
        if run.batch % share:
            raise ValueError(
                f"run.batch: expected a multiple of {share} (processes x run.accumulate), got {run.batch}. "
                "Change one of them."
            )

    def train(self) -> None:
        """Run to the end, from the last checkpoint where there is one; saves and returns early on SIGTERM or Ctrl-C.

        Raises:
            TrainingStoppedError: The loss or the gradient is no number.
            CheckpointError: A checkpoint cannot be written or read.
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
        self.task.model.to(self.accelerator.device)
        self.average = Average(self.task.model, self.optimizer_config.ema_decay)
        trained = [parameter for parameter in self.task.model.parameters() if parameter.requires_grad]
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        if self.folder.checkpoint.exists():
            self._restore(read_checkpoint(self.folder.checkpoint), optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.task.model, optimizer)
        if self.accelerator.scaler is not None and self._scaler_state is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)

    def _restore(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.task.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        self.images = int(state["images"])
        self._scaler_state = state.get("scaler")
        self.folder.say(f"going on from {self.folder.checkpoint} at {self.images} images")

    def _loop(self) -> None:
        run = self.run_config
        if self.images == 0:
            self._validate()
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
                self._validate()
            if due or stop or validation_due:
                self._save()
                saved_at, saved_time = self.images, time.monotonic()
            if stop:
                progress.close()
                self.folder.say(
                    f"asked to stop: saved at {self.images} images; repeat the command to go on. "
                    f"{self.folder.restorer.name} is from the last validation."
                )
                return
        progress.close()
        self._save()
        self._validate()

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
        learning_rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        generator = self._generator()
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, batch in enumerate(micro_batches):
            total += self._backward(batch, generator, last=number == len(micro_batches) - 1) / len(micro_batches)
        norm = self._clip(micro_batches)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:  # as fp16's loss scaling does when it overflows
            self.average.update(self.task.model)
        return {"loss": total, "gradient_norm": norm, "learning_rate": learning_rate}

    def _backward(self, batch: dict[str, Any], generator: torch.Generator, *, last: bool) -> float:
        moved = {
            key: value.to(self.accelerator.device) if torch.is_tensor(value) else value for key, value in batch.items()
        }
        if last:
            loss = self.task.loss(self.model, moved, generator)
            self.accelerator.backward(loss / self.run_config.accumulate)
        else:
            with self.accelerator.no_sync(self.model):
                loss = self.task.loss(self.model, moved, generator)
                self.accelerator.backward(loss / self.run_config.accumulate)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._stop(f"the loss is {value}", [batch])
        return value

    def _clip(self, micro_batches: list[dict[str, Any]]) -> float:
        limit = self.optimizer_config.gradient_clip or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit) or 0.0)
        if not math.isfinite(norm) and self.run_config.precision != "fp16":  # fp16's loss scaling skips such steps
            self._stop(f"the gradient's norm is {norm}", micro_batches)
        return norm

    def _stop(self, what: str, batches: list[dict[str, Any]]) -> None:
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

    def _learning_rate(self) -> float:
        config = self.optimizer_config
        rise = min(1.0, (self.images + self.run_config.batch) / config.warmup_images) if config.warmup_images else 1.0
        if config.schedule == "constant":
            return config.learning_rate * rise
        done = min(1.0, self.images / self.run_config.images)
        return config.learning_rate * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            self._with_average(self._measure)
        self.accelerator.wait_for_everyone()

    def _measure(self) -> None:
        figures = self.validate(self.images)
        self.folder.log(self.images, {f"validation/{key}": value for key, value in figures.items()})
        self.folder.export(self.task, self.images, figures, self.run_config)

    def _with_average(self, work: Callable[[], None]) -> None:
        """Run `work` on the averaged weights, in evaluation mode, without gradients."""
        model: nn.Module = self.task.model
        self.average.swap(model)
        model.eval()
        try:
            with torch.no_grad():
                work()
        finally:
            self.average.swap(model)
            model.train()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                "model": self.task.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
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
