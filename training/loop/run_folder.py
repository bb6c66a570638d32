"""The folder of a run: its configuration, checkpoints, logs, samples and the exported restorer files."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from restoration.restorer_file import RestorerFileError, RestorerMetadata, half, read_metadata, write_restorer
from training.command_line.files import to_plain, to_yaml
from training.configs.common import RunConfig
from training.files import link_file, remove_parts, replace_file, replace_text
from training.loop.checkpoint import write_checkpoint
from training.loop.logs import Log, StatsFile, TensorBoard, WeightsAndBiases
from training.loop.progress import Progress, make_progress
from training.loop.validation import is_better
from training.trainers.task import Task

_MAY_CHANGE = (
    *("run.images", "run.batch", "run.accumulate", "run.precision", "run.output", "run.init_from", "run.license"),
    *("run.half", "run.checkpoint_every", "run.checkpoint_minutes", "run.keep", "run.wandb"),
    *("run.compile", "run.channels_last", "run.fsdp"),
    *("data.train", "data.validation", "data.workers", "data.cache_mb", "captions", "text_encoder.cache"),
    *("validation", "optimizer", "critic_optimizer"),
)
"""What may differ when a run goes on: all that does not change what is trained."""
_MUST_NOT_CHANGE = ("optimizer.eight_bit", "critic_optimizer.eight_bit")
"""Exceptions to it: the stored states of the optimiser would not fit."""


class RunFolderError(RuntimeError):
    """The folder holds another run, or something cannot be written to it.

    Args:
        message: What happened, and what to do.
        filename: What could not be written.
    """

    def __init__(self, message: str, filename: str | None = None) -> None:
        super().__init__(message)
        self.filename = filename


class RunFolder:
    """What a run leaves on the disk. Only the main process writes.

    Args:
        path: The folder.
        command: Name of the training, also the exported file's.
        config: The resolved configuration.
        main: Whether this is the main process.
        provenance: What the exported file says of its data.

    Raises:
        RunFolderError: The disk is full or not writable; of all that writes as well.
        ValueError: Weights & Biases is asked for and cannot be had.
    """

    def __init__(self, path: Path, command: str, config: Any, *, main: bool, provenance: dict[str, Any]) -> None:
        self.path, self.command, self.config, self.main, self.provenance = path, command, config, main, provenance
        self.checkpoint = path / "checkpoint.pt"
        self.restorer = path / f"{command}.safetensors"
        self.best = path / f"{command}-best.safetensors"
        self.kept = path / "kept"
        self._logs: list[Log] = []
        self._full = False
        if main:
            with self._writing(path):
                self._describe()

    def _describe(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.kept, self.path / "samples"):
            remove_parts(folder)
        described = self.path / "config.yaml"
        stored = {"command": self.command, **to_plain(self.config)}
        replace_text(self.path / "config.json", json.dumps(stored, indent=1))
        replace_text(described, f"# python -m training {self.command} --config {described}\n{to_yaml(self.config)}")

    def begin(self, images: int) -> None:
        """Open the logs, where the run goes on after so many images."""
        if not self.main:
            return
        with self._writing(self.path / "stats.jsonl"):
            self._logs.append(StatsFile(self.path / "stats.jsonl", images))
        with self._writing(self.path / "tensorboard"):
            self._logs.append(TensorBoard(self.path / "tensorboard", images))
        if self.config.run.wandb is not None:
            self._logs.append(WeightsAndBiases(self.config.run.wandb, self.path, to_plain(self.config)))

    @contextmanager
    def _writing(self, what: Path | str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._full = True
            raise RunFolderError(
                f"cannot write {what}: {error}. Free some space, or give --run.output a folder that can be written to.",
                str(what),
            ) from error

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def progress(self, done: int, total: int) -> Progress:
        """Shows how far the run is, and an estimate of its end."""
        return make_progress(done, total, self.say, main=self.main)

    def log(self, images: int, values: dict[str, float]) -> None:
        """Add numbers to all logs."""
        for log in self._logs:
            with self._writing(log.where):
                log.figures(images, values)

    def show(self, images: int, grid: Any) -> None:
        """Keep the before/after grid, (3, H, W) in [0, 1], as a picture, and show it in the logs."""
        if not self.main:
            return
        pixels = grid.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        path = self.path / "samples" / f"{images:09d}.png"
        with self._writing(path):
            path.parent.mkdir(exist_ok=True)
            replace_file(path, lambda file: Image.fromarray(pixels).save(file, "PNG"))
        for log in self._logs:
            with self._writing(log.where):
                log.picture(images, "before, after, clean", grid)

    def export(self, task: Task, images: int, figures: dict[str, float] | None, run: RunConfig) -> None:
        """Write the restorer file from the task's present weights; without `figures` it keeps those that it has.

        Where the figures are the best so far of trained weights, they are written as the best file first.

        Raises:
            ValueError: `validation.best` names something that is not measured.
        """
        if not self.main:
            return
        metadata = self._metadata(task, images, figures, run)
        tensors = _tensors(task, run)
        if figures is not None and self._is_best(task, images, metadata.training["metrics"]):
            with self._writing(self.best):
                write_restorer(self.best, metadata, tensors)
        with self._writing(self.restorer):
            write_restorer(self.restorer, metadata, tensors)

    def _metadata(self, task: Task, images: int, figures: dict[str, float] | None, run: RunConfig) -> RestorerMetadata:
        if figures is None:
            before = _training(self.restorer) or {}
            measured = {key: before[key] for key in ("metrics", "measured_at") if key in before}
        else:
            rounded = {key: round(value, 5) for key, value in figures.items()}
            measured = {"metrics": rounded, "measured_at": images}
        training = {**self.provenance, "images": images, **measured, "date": datetime.date.today().isoformat()}
        return task.metadata(training, run.license)

    def _is_best(self, task: Task, images: int, figures: dict[str, float]) -> bool:
        before = (_training(self.best) or {}).get("metrics")
        better = is_better(figures, before, self.config.validation.best, task.judged_by)
        return better and images > 0

    def save(self, state: dict[str, Any], *, keep: bool = False) -> None:
        """Replace the checkpoint; with `keep` the new one stays under a second name, and old ones of those leave.

        Raises:
            CheckpointError: It cannot be written.
        """
        if not keep:
            write_checkpoint(self.checkpoint, state)
            return
        kept = self._kept(state["images"], ".pt")
        write_checkpoint(kept, state)
        with self._writing(self.checkpoint):
            link_file(kept, self.checkpoint)
        names = sorted(self.kept.glob(f"{self.command}-*.pt"))
        most = self.config.run.keep
        for old in names[: max(0, len(names) - most)] if most else []:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def keep(self, task: Task, images: int, run: RunConfig) -> None:
        """Write a restorer file of the present weights that stays as long as the checkpoint that is kept next."""
        if not self.main:
            return
        restorer = self._kept(images, ".safetensors")
        with self._writing(restorer):
            restorer.parent.mkdir(exist_ok=True)
            write_restorer(restorer, self._metadata(task, images, None, run), _tensors(task, run))

    def _kept(self, images: int, ending: str) -> Path:
        return self.kept / f"{self.command}-{images:09d}{ending}"

    def measured_at(self) -> int | None:
        """Images that the restorer file's weights had seen when its figures were measured; None without such a file."""
        return (_training(self.restorer) or {}).get("measured_at")

    def close(self) -> None:
        """Write what the logs still hold; where something could not be written already, that has been said."""
        logs, self._logs, said = self._logs, [], self._full
        for log in logs:
            try:
                with self._writing(log.where):
                    log.close()
            except RunFolderError:
                if not said:
                    raise


def _tensors(task: Task, run: RunConfig) -> dict[str, Tensor]:
    return half(task.tensors()) if run.half else task.tensors()


def _training(path: Path) -> dict[str, Any] | None:
    """What a restorer file says of its training; None where there is no whole one."""
    if not path.exists():
        return None
    try:
        training = read_metadata(path).training
    except RestorerFileError:
        return None
    return {"measured_at": training.get("images"), **training}  # files of the first version were always measured


def check_same_run(path: Path, command: str, config: Any) -> None:
    """Compare with what the folder holds, if it holds a run that can go on.

    Raises:
        RunFolderError: It is another run; what differs is named.
    """
    stored = path / "config.json"
    if not (stored.exists() and (path / "checkpoint.pt").exists()):
        return
    now = _flat({"command": command, **to_plain(config)})
    then = _flat(json.loads(stored.read_text(encoding="utf-8")))
    changed = [key for key in now if now[key] != then.get(key, now[key]) and not _may_change(key)]
    if changed:
        listed = ", ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in changed[:4])
        raise RunFolderError(
            f"{path} holds another run ({listed}). Give --run.output another folder, or remove this one."
        )


def _may_change(key: str) -> bool:
    return key.startswith(_MAY_CHANGE) and not key.startswith(_MUST_NOT_CHANGE)


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {where: value}
    return {
        key: item
        for name, part in value.items()
        for key, item in _flat(part, f"{where}.{name}" if where else str(name)).items()
    }
