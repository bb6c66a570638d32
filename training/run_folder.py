"""The folder of a run: its configuration, checkpoint, logs, samples and the exported restorer file."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from restoration.restorer_file import RestorerFileError, half, read_metadata, write_restorer
from training.config_files import to_plain, to_yaml
from training.configs import RunConfig
from training.trainers.task import Task

_MAY_CHANGE = (
    *("run.images", "run.batch", "run.accumulate", "run.precision", "run.output", "run.init_from", "run.license"),
    *("run.half", "run.checkpoint_every", "run.checkpoint_minutes"),
    *("data.train", "data.validation", "data.workers", "data.cache_mb", "captions", "text_encoder.cache"),
    *("validation", "optimizer", "critic_optimizer"),
)
"""What may differ when a run goes on: all that does not change what is trained."""
_MUST_NOT_CHANGE = ("optimizer.eight_bit", "critic_optimizer.eight_bit")
"""Exceptions to it: the stored states of the optimiser would not fit."""


class RunFolderError(RuntimeError):
    """The folder holds another run."""


class RunFolder:
    """What a run leaves on the disk. Only the main process writes.

    Args:
        path: The folder.
        command: Name of the training, also the exported file's.
        config: The resolved configuration.
        main: Whether this is the main process.
        provenance: What the exported file says of its data.
    """

    def __init__(self, path: Path, command: str, config: Any, *, main: bool, provenance: dict[str, Any]) -> None:
        self.path, self.command, self.config, self.main, self.provenance = path, command, config, main, provenance
        self.checkpoint = path / "checkpoint.pt"
        self.restorer = path / f"{command}.safetensors"
        self._writer: SummaryWriter | None = None
        if main:
            self._open()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        described = self.path / "config.yaml"
        stored = self.path / "config.json"
        stored.write_text(json.dumps({"command": self.command, **to_plain(self.config)}, indent=1), encoding="utf-8")
        described.write_text(
            f"# python -m training {self.command} --config {described}\n{to_yaml(self.config)}", encoding="utf-8"
        )
        self._writer = SummaryWriter(str(self.path / "tensorboard"))

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def progress(self, done: int, total: int) -> Any:
        """A progress bar in images, with images/s and the time that is left."""
        interval = 0.2 if sys.stderr.isatty() else 30.0
        return tqdm(
            total=total, initial=done, unit="image", disable=not self.main, smoothing=0.05, dynamic_ncols=True,
            mininterval=interval, maxinterval=2 * interval,
        )  # fmt: skip

    def log(self, images: int, values: dict[str, float]) -> None:
        """Add numbers to TensorBoard and to stats.jsonl."""
        if self._writer is None:
            return
        for key, value in values.items():
            self._writer.add_scalar(key, value, images)
        with (self.path / "stats.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, **values}) + "\n")

    def show(self, images: int, grid: Any) -> None:
        """Keep the before/after grid, (3, H, W) in [0, 1], as a picture and in TensorBoard."""
        if self._writer is None:
            return
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        pixels = grid.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"{images:09d}.png")
        self._writer.add_image("before, after, clean", grid, images)

    def export(self, task: Task, images: int, figures: dict[str, float] | None, run: RunConfig) -> None:
        """Write the restorer file from the task's present weights; without `figures` it keeps those that it has."""
        if figures is None:
            before = self._exported() or {}
            measured = {key: before[key] for key in ("metrics", "measured_at") if key in before}
        else:
            rounded = {key: round(value, 5) for key, value in figures.items()}
            measured = {"metrics": rounded, "measured_at": images}
        training = {**self.provenance, "images": images, **measured, "date": datetime.date.today().isoformat()}
        tensors = half(task.tensors()) if run.half else task.tensors()
        write_restorer(self.restorer, task.metadata(training, run.license), tensors)

    def measured_at(self) -> int | None:
        """Images that the restorer file's weights had seen when its figures were measured; None without such a file."""
        return (self._exported() or {}).get("measured_at")

    def _exported(self) -> dict[str, Any] | None:
        """What the restorer file of this folder says of its training; None where there is no whole one."""
        if not self.restorer.exists():
            return None
        try:
            training = read_metadata(self.restorer).training
        except RestorerFileError:
            return None
        return {"measured_at": training.get("images"), **training}  # files of the first version were always measured

    def close(self) -> None:
        """Flush the logs."""
        if self._writer is not None:
            self._writer.close()


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
