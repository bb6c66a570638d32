"""Where the figures and pictures of a run go: stats.jsonl, TensorBoard, and Weights & Biases where it is asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from training.files import replace_file, replace_text

_FLUSH_SECONDS = 20.0


class Log(Protocol):
    """One place that figures and pictures go to."""

    @property
    def where(self) -> str:
        """Its name in messages."""
        ...

    def figures(self, images: int, values: dict[str, float]) -> None:
        """Add numbers, by name, that hold after so many images."""
        ...

    def picture(self, images: int, name: str, picture: Tensor) -> None:
        """Add a picture (3, H, W) in [0, 1]."""
        ...

    def close(self) -> None:
        """Write all that is still to be written."""
        ...


class StatsFile:
    """A line of JSON for every step and every validation: `images`, and the figures; null for what is no number.

    Args:
        path: The file. What an earlier run wrote stays, up to where this one goes on, but for a line that a kill cut.
        images: Where this one goes on.

    Raises:
        OSError: The disk is full or not writable; of the other methods as well.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.where = str(path)
        _rewind(path, images)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def figures(self, images: int, values: dict[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"images": images, **numbers}) + "\n")

    def picture(self, images: int, name: str, picture: Tensor) -> None:
        """Pictures are not for this file."""

    def close(self) -> None:
        self._file.close()


def _rewind(path: Path, images: int) -> None:
    """Leave out the lines of steps that will be taken again."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _images(line) <= images] if images else []
    if len(kept) < len(lines):
        replace_file(path, lambda file: file.writelines(kept))


def _images(line: bytes) -> float:
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """A file of events that TensorBoard shows, written by the training itself: a full disk is noticed at once.

    Args:
        folder: Of such files, one for each time that the run was started.
        images: Where the run goes on; TensorBoard leaves out what earlier files have of later steps.

    Raises:
        OSError: The disk is full or not writable; of the other methods as well.
    """

    def __init__(self, folder: Path, images: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2  # made at run time: type checkers do not see what is in them
        self._summaries: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.where = str(folder / name)
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(step=images + 1 if images else 0, session_log=start)
        self._file.flush()

    def figures(self, images: int, values: dict[str, float]) -> None:
        numbers = [self._summaries.Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._add(step=images, summary=self._summaries.Summary(value=numbers))

    def picture(self, images: int, name: str, picture: Tensor) -> None:
        from torch.utils.tensorboard.summary import image

        self._add(step=images, summary=image(name, picture.detach().cpu(), dataformats="CHW"))

    def _add(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


class WeightsAndBiases:
    """A run of a project on wandb.ai, or kept for later with WANDB_MODE=offline; repeating the command goes on with it.

    Args:
        project: Its name.
        folder: Of the run; its name becomes that of the run there.
        config: The resolved configuration.

    Raises:
        ValueError: wandb is not installed, or does not let the run begin.
    """

    where = "Weights & Biases"

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        self._wandb = import_wandb()
        identity = folder / "wandb_id.txt"
        if not identity.exists():
            replace_text(identity, uuid.uuid4().hex[:12] + "\n")
        try:
            self._run = self._wandb.init(
                project=project, id=identity.read_text(encoding="utf-8").strip(), name=folder.name, dir=str(folder),
                config=config, resume="allow",
            )  # fmt: skip
        except self._wandb.Error as error:
            raise ValueError(
                f"run.wandb: Weights & Biases does not begin ({error}). Run `wandb login`, set WANDB_MODE=offline, or "
                "leave the option off."
            ) from error
        self._run.define_metric("*", step_metric="images")

    def figures(self, images: int, values: dict[str, float]) -> None:
        self._run.log({"images": images, **values})

    def picture(self, images: int, name: str, picture: Tensor) -> None:
        pixels = picture.detach().mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        self._run.log({"images": images, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """The optional package.

    Raises:
        ValueError: It cannot be imported.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"run.wandb: wandb cannot be imported ({error}). Run `pip install wandb`, or leave the option off."
        ) from error
