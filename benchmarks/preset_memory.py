"""Memory of a training step of each preset, counted from the shapes of all tensors that are alive at once.

`python -m benchmarks preset_memory [COMMAND ...]`. A step runs for one picture and for two, from which follows that of
the batch: without computing anything, on torch's device `meta`, or on the CPU in mixed precision, which `meta` has not.
Counted are weights, averaged weights, Adam's two averages, gradients, and what the forward and the backward pass hold
at their peak; not what libraries want for themselves. Presets on Stable Diffusion need that model, and are left out.
"""

from __future__ import annotations

import argparse
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._common import SHARED, header
from training.commands import COMMANDS
from training.data.views import seen_side
from training.trainers.task import Task

_LPIPS = SHARED / "weights" / "lpips_squeeze" / "lpips_squeeze_f32.npz"


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def count(config: Any, command: str) -> int:
    """Bytes of a step of a configuration, on one device."""
    task = COMMANDS[command].make_task(config)
    networks = [task.model] if task.critic is None else [task.model, task.critic]
    device = "meta" if config.run.precision == "no" else "cpu"
    for network in networks:
        network.to(device).train()
    kept = sum(_kept(network, averaged=bool(config.optimizer.ema_decay) and not number)
               for number, network in enumerate(networks))  # fmt: skip
    one, two = (_peak(task, config, pictures, device) for pictures in (1, 2))
    pictures = config.run.batch // config.run.accumulate
    gradients = sum(_trained(network) for network in networks)
    return kept + max(gradients, one + (pictures - 1) * (two - one))


def _trained(network: nn.Module) -> int:
    return sum(parameter.numel() * 4 for parameter in network.parameters() if parameter.requires_grad)


def _kept(network: nn.Module, *, averaged: bool) -> int:
    """Weights, and of those that are trained Adam's averages and the moving one."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return weights + (3 if averaged else 2) * _trained(network)


def _peak(task: Task, config: Any, pictures: int, device: str) -> int:
    """What a forward and a backward pass hold at most, gradients included."""
    side = (pictures, 3, seen_side(config), seen_side(config))
    batch = {
        "clean": torch.full(side, 0.5, device=device), "degraded": torch.full(side, 0.5, device=device),
        "quality": torch.full((pictures,), 50.0, device=device), "index": torch.zeros(pictures, dtype=torch.int64),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    mixed = device == "cpu"
    with LiveTensors() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = task.loss(task.model, batch, generator)
        loss.backward()
        if task.critic is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = task.critic_loss(task.critic, batch, generator)
            loss.backward()
    for network in (task.model, task.critic):
        if network is not None:
            network.zero_grad(set_to_none=True)
    return live.peak


def countable(config: Any) -> Any:
    """The configuration with what it cannot be built without, at its largest; None for one on Stable Diffusion."""
    if getattr(config, "sides", ()):
        return replace(config, sides=())  # batches are cut to one of them
    if getattr(config, "backbone", None) == "sd2.1-base":
        return None
    if getattr(config, "align", None) == "text":
        return replace(config, align="none")  # captions change next to nothing
    perceptual = getattr(getattr(config, "loss", None), "perceptual", None)
    if getattr(perceptual, "kind", None) == "lpips":
        if not _LPIPS.exists():
            return None
        return replace(config, loss=replace(config.loss, perceptual=replace(perceptual, lpips=Path(_LPIPS))))
    return config


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks preset_memory", description=__doc__)
    parser.add_argument(
        "commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; all, if none is named"
    )
    commands = parser.parse_args(arguments).commands or list(COMMANDS)
    print(f"torch {torch.__version__}, counted\n\n{header('command', 'preset', 'pictures at a time', 'GiB')}")
    for command in commands:
        for preset, config in COMMANDS[command].presets().items():
            possible = countable(config)
            size = "-" if possible is None else f"{count(possible, command) / 2**30:.2f}"
            print(f"| {command} | {preset} | {config.run.batch // config.run.accumulate} | {size} |", flush=True)
