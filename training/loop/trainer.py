"""The one training loop: accelerate, resuming by repetition, validation, checkpoints, logs; what ends it early."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator

from restoration.devices import accelerator_available
from training.configs.common import DataConfig, OptimizerConfig, RunConfig
from training.data.pairs import IndexSampler, PairDataset, make_loader
from training.loop.checkpoint import CheckpointError, read_checkpoint
from training.loop.run_folder import RunFolder
from training.loop.same_run import RunFolderError
from training.loop.steps import Steps, TrainingStoppedError
from training.trainers.task import Task

__all__ = ["Trainer", "TrainingStoppedError"]

_COMPILER = ("torch._dynamo", "torch._inductor")
"""Where the errors of torch.compile come from."""


def _signals() -> list[int]:
    """Those that ask to stop: of a terminal that is closed as well, but where somebody (nohup) has that ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    closes = [hangup] if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN else []
    breaks = [signal.SIGBREAK] if sys.platform == "win32" else []
    return [signal.SIGTERM, signal.SIGINT, *closes, *breaks]


class _Waited(NamedTuple):
    """What a process trains on in one step, and how long it waited for it, seconds."""

    micro_batches: list[dict[str, Any]]
    seconds: float


class Validate(Protocol):
    """Measures a task."""

    def __call__(self, images: int, cut_short: Callable[[], bool]) -> dict[str, float] | None:
        """What was measured after so many images; None where `cut_short`, which is asked now and then, said so."""
        ...


class Trainer:
    """Trains a task until its images are used up.

    Args:
        task: What is trained.
        dataset: Its pairs.
        data: Workers of the data pipeline.
        optimizer: Optimiser settings.
        run: Length, batch, precision, checkpoints.
        folder: Where everything is written.
        validate: Called with the averaged weights in place; see `Validate`.
        validate_every: Images between two calls of it.

    Raises:
        ValueError: The batch cannot be shared out, options contradict each other, or a package is not installed.
    """

    def __init__(
        self, task: Task, dataset: PairDataset, data: DataConfig, optimizer: OptimizerConfig, run: RunConfig,
        folder: RunFolder, validate: Validate, validate_every: int,
    ) -> None:  # fmt: skip
        self.task, self.dataset, self.data, self.optimizer_config, self.run_config = task, dataset, data, optimizer, run
        self.folder, self.validate, self.validate_every = folder, validate, validate_every
        self.accelerator = Accelerator(mixed_precision=run.precision, cpu=not accelerator_available())
        self.images = self.measured_at = 0
        self.stop_asked = False
        share = self.accelerator.num_processes * run.accumulate
        if run.batch % share:
            raise ValueError(
                f"run.batch: expected a multiple of {share} (processes x run.accumulate), got {run.batch}. "
                "Change one of them."
            )
        if run.fsdp and (run.compile or run.channels_last):
            raise ValueError("run.fsdp: it does not go together with run.compile or run.channels_last. Choose one.")

    def train(self) -> None:
        """Run to the end, from the last checkpoint where there is one; saves and returns early on SIGTERM or Ctrl-C.

        Raises:
            TrainingStoppedError: A loss or a gradient is no number, a file cannot be written, or torch cannot compile
                the networks.
            CheckpointError: A checkpoint cannot be written, read or used.
            ValueError: The optimiser is not installed, or an option is not for this training.
        """
        self._prepare()
        previous = {number: signal.signal(number, self._ask_to_stop) for number in _signals()}
        try:
            self._loop()
            self.folder.close()
        except RunFolderError as error:
            raise TrainingStoppedError(f"{error} {self._save_at_last()}", error.filename) from error
        except RuntimeError as error:
            if not (self.run_config.compile and type(error).__module__.startswith(_COMPILER)):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise TrainingStoppedError(
                f"run.compile: torch cannot compile this network here ({reason}). Leave the option off."
            ) from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.folder.close()

    def _ask_to_stop(self, number: int, _: object) -> None:
        """The first signal lets the step end and saves; a second Ctrl-C stops at once."""
        if self.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_asked = True
        with contextlib.suppress(RuntimeError):  # where it comes amid another line
            self.folder.say("stopping after this step; Ctrl-C again stops at once, without saving")

    def _prepare(self) -> None:
        path = self.folder.checkpoint
        state = read_checkpoint(path) if path.exists() else None
        self._check_agreement(int(state["images"]) if state is not None else 0)
        if state is not None:
            self.images = int(state["images"])
            self.measured_at = int(state.get("measured_at", self.images))
        self.steps = Steps(self.task, self.optimizer_config, self.run_config, self.accelerator, state)
        self.folder.begin(self.images)
        if state is not None:
            self.folder.say(f"going on from {path} at {self.images} images")

    def _check_agreement(self, images: int) -> None:
        """Processes on machines without a common folder would wait for each other, or train on other pictures."""
        if self.accelerator.num_processes == 1:
            return
        names = "\n".join(path.name for path in self.dataset.paths)
        said = torch.tensor([[images, zlib.crc32(names.encode("utf-8", "surrogateescape"))]])
        heard: Any = self.accelerator.gather(said.to(self.accelerator.device))
        if (heard != heard[0]).any():
            raise ValueError(
                f"the processes do not agree: they have seen {sorted(set(heard[:, 0].tolist()))} images, "
                f"{'of the same' if len(set(heard[:, 1].tolist())) == 1 else 'and find different'} pictures. Give "
                "--run.output and --data.train folders that all machines see."
            )

    def _loop(self) -> None:
        run = self.run_config
        if self.images >= run.images and self.folder.measured_at() == self.images:
            self._on_main(self._export)
            self.folder.say(
                f"this run is finished: {self.images} of {run.images} images. A larger --run.images goes on."
            )
            return
        if self.images == 0 or (self.images < run.images and self._passed(self.validate_every, self.measured_at)):
            self._measure_on_main()
        progress = self.folder.progress(self.images, run.images)
        self._saved = self.images, time.monotonic()
        last = time.monotonic()
        for micro_batches, waited in self._batches():
            before, began = self.images, time.monotonic()
            statistics = self._step(micro_batches)
            self.images += run.batch
            ended = time.monotonic()
            speed = {"images_per_second": run.batch / (ended - last), "data_seconds": waited,
                     "compute_seconds": ended - began}  # fmt: skip
            self.folder.log(self.images, {**statistics, **{f"speed/{key}": value for key, value in speed.items()}})
            progress.update(run.batch, statistics["loss"])
            last = ended
            stop, paused = self._after_step(before)
            if paused:
                last = time.monotonic()
            if stop:
                break
        progress.close()
        if self.images < run.images:
            self._on_main(self._export)
            self.folder.say(
                f"asked to stop: saved at {self.images} images, {self.folder.restorer.name} as well; "
                "repeat the command to go on."
            )
            return
        self._save()
        self._measure_on_main()

    def _after_step(self, before: int) -> tuple[bool, bool]:
        """Measure and save where it is due; whether to stop, and whether time was spent on it."""
        run = self.run_config
        saved_at, saved_time = self._saved
        stop, late = self._agree((time.monotonic() - saved_time) / 60 >= run.checkpoint_minutes)
        validation_due = self._passed(self.validate_every, before)
        if validation_due and self.images < run.images and not stop:
            self._measure_on_main()
            stop, _ = self._agree(late)
        keep = bool(run.keep_every) and self._passed(run.keep_every, before)
        due = late or self.images - saved_at >= run.checkpoint_every
        if not (due or stop or validation_due or keep):
            return False, False
        self._save(keep=keep)
        self._saved = self.images, time.monotonic()
        return stop, True

    def _passed(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` images lies between then and now."""
        return self.images // every > before // every

    def _batches(self) -> Iterator[_Waited]:
        """Lists of `accumulate` micro-batches, one list for each optimiser step of this process."""
        run, world = self.run_config, self.accelerator.num_processes
        sampler = IndexSampler(
            self.images, max(run.images, self.images), self.accelerator.process_index, world, run.batch
        )
        per_process = run.batch // world // run.accumulate
        pin = self.accelerator.device.type == "cuda"
        loader = iter(make_loader(self.dataset, sampler, per_process, self.data.workers, pin_memory=pin))
        while True:
            began = time.monotonic()
            micro_batches = list(islice(loader, run.accumulate))
            if not micro_batches:
                return
            yield _Waited(micro_batches, time.monotonic() - began)

    def _step(self, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
        return self.steps.take(self.images, micro_batches)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Run `work` in the main process, on the averaged weights, in evaluation mode, without gradients; in every
        process where none has the whole model."""
        if self.accelerator.is_main_process or self.steps.model.spread:
            with self.steps.averaged():
                work()
        self.accelerator.wait_for_everyone()

    def _measure_on_main(self) -> None:
        """Measure and export; a validation that was cut short is made up for when the run goes on."""
        self._on_main(self._measure)
        if not self._cut_short():
            self.measured_at = self.images

    def _cut_short(self) -> bool:
        """Whether a validation need not go on: the first process decides, but where all of them take part in it."""
        return self.stop_asked and not self.steps.model.spread

    def _measure(self) -> None:
        figures = self.validate(self.images, self._cut_short)
        if figures is None:
            self._export()
            return
        self.folder.log(self.images, {f"validation/{key}": value for key, value in figures.items()})
        self.folder.export(self.task, self.images, figures, self.run_config)

    def _export(self) -> None:
        """Write the restorer file without measuring: it keeps the figures of the last validation."""
        self.folder.export(self.task, self.images, None, self.run_config)

    def _state(self) -> dict[str, Any]:
        return {**self.steps.state_dict(), "images": self.images, "measured_at": self.measured_at}

    def _save(self, *, keep: bool = False) -> None:
        if keep:
            self._on_main(lambda: self.folder.keep(self.task, self.images, self.run_config))
        if self.accelerator.is_main_process:
            self.folder.save(self._state(), keep=keep)
        self.accelerator.wait_for_everyone()

    def _save_at_last(self) -> str:
        """Save where something else could not be written; what to tell of it. Other processes are not waited for."""
        try:
            if self.images:
                self.folder.save(self._state())
        except CheckpointError:
            return "The checkpoint could not be renewed either; the one before it is whole. Repeat the command then."
        return f"Stopped at {self.images} images; nothing is lost. Repeat the command to go on."

    def _agree(self, late: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether the first one finds a checkpoint late: they must all do
        the same, and their clocks differ."""
        if self.accelerator.num_processes == 1:
            return self.stop_asked, late
        said = [int(self.stop_asked), int(late and self.accelerator.is_main_process)]
        heard: Any = self.accelerator.reduce(torch.tensor(said, device=self.accelerator.device), "sum")
        return bool(heard[0]), bool(heard[1])
