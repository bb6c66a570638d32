"""Images a second of each training, beside a plain loop of the same network on one batch in memory.

The plain loop has the same losses, precision and optimiser, and nothing else: no data, no average of the weights, no
clipping, no logs. Both run in turn on the same machine; the second share is that of the processor time of the process
that trains, which other programs disturb less. Beside them the data pipeline alone, training pairs a second on one core
with pictures that are decoded already, and Pillow's bare encoder and decoder on the same crops.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils.data import default_collate

from benchmarks._common import SHARED, header, heading
from benchmarks.data import bundled_folder, measure_floor
from restoration.devices import accelerator_available
from training.commands import COMMANDS
from training.configs.common import RunConfig, ValidationConfig
from training.data.pairs import to_tensor
from training.data.views import pairs_of, seen_side
from training.loop.allocator import keep_freed_memory
from training.loop.optimizers import make_optimizer
from training.loop.session import Session
from training.loop.trainer import Trainer

PRESETS = {"cave": "small", "saipe": "small"}
"""Trainings whose preset for a CPU is not called starter."""
_WARM = 3
"""Steps that are not timed."""
_LEAST = 10


class Speed(NamedTuple):
    """Images a second, and seconds of processor time an image of the process that trains."""

    rate: float
    processor: float

    def mean(self, other: Speed) -> Speed:
        """Halfway between two measurements."""
        return Speed((self.rate + other.rate) / 2, (self.processor + other.processor) / 2)


def main(arguments: list[str]) -> None:
    """`python -m benchmarks training [NAMES] [--data FOLDER] [--seconds S] [--workers N] [--device cpu]`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; all by default")
    parser.add_argument("--data", type=Path, help="folder of pictures (default: those that scikit-image carries)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time spent on each figure, about")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare crops")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - COMMANDS.keys():
        parser.error(f"expected names of {', '.join(COMMANDS)}, got {min(unknown)}")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = options.data or bundled_folder()
    for number, name in enumerate(options.names or COMMANDS):
        with tempfile.TemporaryDirectory() as place:
            row = _row(name, folder, Path(place), options)
        if not number:
            print(f"{row.pop('device')}, {options.workers} worker(s), pictures of {folder.name}")
            print(header("training", "batch", "plain loop", "training", "of it", "by processor time",
                         "waiting for data", "crop", "pairs/s a core", "Pillow's encode and decode"))  # fmt: skip
        row.pop("device", None)
        print(f"| {name} | {' | '.join(row.values())} |", flush=True)


def _row(name: str, folder: Path, place: Path, options: argparse.Namespace) -> dict[str, str]:
    """The cells of a table's row, and in words what it was measured on."""
    config = _config(name, folder, place / "run", options.workers)
    with contextlib.redirect_stdout(io.StringIO()):
        session = Session(name, config)
        dataset = pairs_of(config, session.training)
    for index in range(len(session.training)):
        dataset[index]  # decoded once
    pairs = _rate(lambda count: dataset[count], options.seconds / 4)
    batch = default_collate([dataset[index] for index in range(config.run.batch)])
    before = _plain(session, batch, options.seconds / 2)
    steps = max(_LEAST, round(before.rate * options.seconds / config.run.batch))
    trained, waiting = _trained(name, config, steps)
    plain = before.mean(_plain(session, batch, options.seconds / 2))
    floor = measure_floor(session.training[0], seen_side(config), options.seconds / 8)
    return {
        "device": heading(session.state.device or "cpu"), "batch": str(config.run.batch), "plain": f"{plain.rate:.1f}",
        "trained": f"{trained.rate:.1f}", "ratio": f"{trained.rate / plain.rate:.2f}",
        "processor": f"{plain.processor / trained.processor:.2f}", "waiting": f"{waiting:.0%}",
        "crop": str(seen_side(config)), "pairs": f"{pairs:.0f}", "floor": f"{floor:.0f}",
    }  # fmt: skip


def _config(name: str, folder: Path, output: Path, workers: int) -> Any:
    """The preset for a CPU, every step the same, and hardly anything that is no step: no checkpoints, one crop to
    validate on."""
    config = COMMANDS[name].presets()[PRESETS.get(name, "starter")]
    changes: dict[str, Any] = {"saipe": {"align": "none"}, "cave": {"sides": ()}}.get(name, {})
    loss = getattr(config, "loss", None)
    if getattr(getattr(loss, "perceptual", None), "kind", "none") == "lpips":
        weights = SHARED / "weights" / "lpips_squeeze" / "lpips_squeeze_f32.npz"
        found: dict[str, Any] = {"lpips": weights} if weights.exists() else {"kind": "none"}
        changes["loss"] = replace(loss, perceptual=replace(loss.perceptual, **found))  # type: ignore
    size = 64 if config.data.crop % 64 == 0 else config.data.crop
    return replace(
        config,
        data=replace(config.data, train=folder, workers=workers),
        validation=ValidationConfig(every=10**12, images=1, crop=size, qualities=(10,)),
        run=RunConfig(output, batch=config.run.batch, precision=config.run.precision, checkpoint_every=10**12),
        **changes,
    )


def _plain(session: Session, batch: dict[str, Any], seconds: float) -> Speed:
    """Of forward, backward and step."""
    task, device, config = session.task, session.state.device or torch.device("cpu"), session.config
    task.model.to(device).train()
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    crops = [pairs_of(config, session.training).pair(index)[1] for index in range(config.run.batch)]
    task.look(*(torch.stack([to_tensor(getattr(crop, side)) for crop in crops]) for side in ("image", "clean")))
    turns = [(task.model, task.loss, config.optimizer)]
    critics = []
    if task.critic is not None:
        turns.append((task.critic.to(device).train(), task.critic_loss, task.critic_optimizer))
        critics = _parameters(task.critic)
    optimizers = [make_optimizer(_parameters(module), settings) for module, _, settings in turns]
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.run.precision)

    def step(_: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for module, loss, _settings in turns:
            for parameter in critics:
                parameter.requires_grad_(module is task.critic)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                value = loss(module, batch, generator)
            value.backward()
        for optimizer in optimizers:
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for count in range(_WARM):
        step(count)
    start, processor, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds or count < 3:
        step(count)
        count += 1
    images = count * config.run.batch
    return Speed(images / (time.perf_counter() - start), (time.process_time() - processor) / images)


def _parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _trained(name: str, config: Any, steps: int) -> tuple[Speed, float]:
    """Of the training's steps, everything between them counted, and the share of waiting for data."""
    batch = config.run.batch
    config = replace(config, run=replace(config.run, images=(steps + _WARM) * batch))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        times = pool.submit(_run, name, config).result()
    lines = (config.run.output / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if "loss" in (row := json.loads(line))][_WARM:]
    seconds = sum(batch / row["speed/images_per_second"] for row in rows)
    processor = (times[-1] - times[_WARM]) / (len(times) - 1 - _WARM) / batch
    return Speed(len(rows) * batch / seconds, processor), sum(row["speed/data_seconds"] for row in rows) / seconds


def _run(name: str, config: Any) -> list[float]:
    """The training in a process of its own, as its command runs it; seconds of processor time before each step."""
    times, step = [], Trainer._step

    def timed(self: Trainer, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
        times.append(time.process_time())
        return step(self, micro_batches)

    if not accelerator_available():
        keep_freed_memory()
    with contextlib.redirect_stdout(io.StringIO()), patch.object(Trainer, "_step", timed):
        Session(name, config).train()
    return times


def _rate(step: Callable[[int], object], seconds: float) -> float:
    """Calls a second, at least three."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or count < 3:
        step(count)
        count += 1
    return count / elapsed
