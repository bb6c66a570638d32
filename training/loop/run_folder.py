"""The folder of a run: its configuration, checkpoints, logs, samples and the exported restorer files."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from restoration.restorer_file import RestorerFileError, RestorerMetadata, half, read_metadata, write_restorer
from training.command_line.files import to_plain, to_yaml
from training.configs.common import RunConfig
from training.files import copy_file, remove_parts, replace_file, replace_text
from training.loop.checkpoint import write_checkpoint
from training.loop.lock import FolderLock, LockedError
from training.loop.logs import Log, StatsFile, TensorBoard, WeightsAndBiases
from training.loop.progress import Progress, make_progress, say
from training.loop.same_run import CONFIG, RunFolderError, stored_run
from training.loop.validation import is_better
from training.trainers.task import Task


class RunFolder:
    """What a run leaves on the disk. Only the main process writes.

    Args:
        path: The folder.
        command: Name of the training, also the exported file's.
        config: The resolved configuration.
        main: Whether this is the main process.
        provenance: What the exported file says of its data.
        held_out: Names of pictures that are set aside for validation.

    Raises:
        RunFolderError: Another training writes there; the disk is full or not writable, of all that writes as well.
        ValueError: Weights & Biases is asked for and cannot be had.
    """

    def __init__(
        self, path: Path, command: str, config: Any, *, main: bool, provenance: dict[str, Any],
        held_out: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.path, self.command, self.config, self.main, self.provenance = path, command, config, main, provenance
        self.checkpoint = path / "checkpoint.pt"
        self.restorer = path / f"{command}.safetensors"
        self.best = path / f"{command}-best.safetensors"
        self.kept = path / "kept"
        self._logs: list[Log] = []
        self._full = False
        self.held_out = held_out
        self._lock: FolderLock | None = None
        if main:
            with self._writing(path):
                path.mkdir(parents=True, exist_ok=True)
                self._lock = _held(path)
                self._describe()

    def _describe(self) -> None:
        for name in (f"{self.command}*", "checkpoint.pt", "config.*", "stats.jsonl", "samples/*.png", "kept/*"):
            remove_parts(self.path, name)
        described = self.path / "config.yaml"
        replace_text(self.path / CONFIG, stored_run(self.command, self.config, self.held_out))
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
        """Print a line without tearing the progress bar; to nobody where nobody reads along any more."""
        if self.main:
            say(text)

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
        """Replace the checkpoint; with `keep` another copy of it stays, and old ones of those leave.

        Raises:
            CheckpointError: It cannot be written.
        """
        if not keep:
            write_checkpoint(self.checkpoint, state)
            return
        kept = self._kept(state["images"], ".pt")
        write_checkpoint(kept, state)  # first: a kill between the two lets the run take these steps again
        with self._writing(self.checkpoint):
            copy_file(kept, self.checkpoint)
        names = sorted(self.kept.glob(f"{self.command}-*.pt"), key=lambda path: (len(path.name), path.name))
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
        """Write what the logs still hold, and let others write to the folder; where something could not be written
        already, that has been said."""
        if self._lock is not None:
            self._lock.release()
        logs, self._logs, said = self._logs, [], self._full
        for log in logs:
            try:
                with self._writing(log.where):
                    log.close()
            except RunFolderError:
                if not said:
                    raise


def _held(path: Path) -> FolderLock:
    try:
        return FolderLock(path)
    except LockedError as error:
        raise RunFolderError(str(error)) from error


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
