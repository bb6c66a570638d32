"""What a training takes of memory, its weights counted, its activations measured on a small crop; and of its disk."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from training.check.findings import Finding, amount
from training.configs.common import OptimizerConfig, RunConfig
from training.data.views import seen_side
from training.trainers.task import Task

_MEASURED_SIDE = 128
_FLOAT = 4
_WORKING = 1.25
"""What is needed at a time beside the kept activations, as a factor of them: a rough allowance."""
_MIXED = 0.6
"""Activations in mixed precision, most of them in 16 bits."""


@dataclass(frozen=True)
class Cost:
    """In bytes.

    Args:
        memory: Of a step in one process, weights and states included; about.
        checkpoint: Each checkpoint.
        restorer: The restorer file.
    """

    memory: int
    checkpoint: int
    restorer: int


def measure(task: Task, config: Any, processes: int = 1) -> Cost:
    """The cost of a training, by one evaluation of its loss on this machine's CPU.

    Args:
        task: What is trained, on the CPU.
        config: Its configuration.
        processes: That share the batch.
    """
    learners = [_states(task.model, config.optimizer, averaged=bool(config.optimizer.ema_decay))]
    if task.critic is not None:
        learners.append(_states(task.critic, task.critic_optimizer, averaged=False))
    weights = _size(task.model) + (_size(task.critic) if task.critic is not None else 0)
    pictures = max(1, config.run.batch // (processes * config.run.accumulate))
    activations = _activations(task, config) * pictures * (1.0 if config.run.precision == "no" else _MIXED)
    stored = sum(trained + states for trained, states in learners)  # gradients are as large as what is trained
    frozen = _size(task.model) - _size(task.model, trained=True) if task.stores_frozen else 0
    return Cost(
        memory=int(weights + stored + activations * _WORKING),
        checkpoint=stored + frozen,
        restorer=sum(tensor.nbytes for tensor in task.tensors().values()) // (2 if config.run.half else 1),
    )


def check_disk(cost: Cost, run: RunConfig) -> list[Finding]:
    """The room that the run's files take, and whether it is there."""
    kept = 0
    if run.keep_every:
        kept = min(run.keep or math.inf, run.images // run.keep_every)
    checkpoints, restorers = 2 + int(kept), 3 + int(kept)  # one is written while the last one stays; and the best
    needed = checkpoints * cost.checkpoint + restorers * cost.restorer
    free = _free(run.output)
    text = (
        f"disk: {run.output} will hold about {amount(needed)} ({checkpoints} checkpoints of "
        f"{amount(cost.checkpoint)}); {amount(free)} are free"
    )
    if needed < free:
        return [Finding("note", f"{text}.")]
    return [Finding("problem", f"{text}: free some, lower --run.keep, or give --run.output another disk.")]


def check_free_disk(run: RunConfig) -> list[Finding]:
    """The room that there is for a run whose files are not known before its network is."""
    return [
        Finding(
            "note",
            f"disk: {amount(_free(run.output))} are free for {run.output}; what its checkpoints take is not estimated, "
            "for the base model is not loaded here.",
        )
    ]


def _free(output: Path) -> int:
    folder = next(place for place in (output, *output.absolute().parents) if place.is_dir())
    return shutil.disk_usage(folder).free


def check_writable(output: Path) -> list[Finding]:
    """Whether the run's folder can be made and written to."""
    folder = next(place for place in (output, *output.absolute().parents) if place.exists())
    if folder.is_dir() and os.access(folder, os.W_OK):
        return []
    reason = "cannot be written to" if folder.is_dir() else "is a file"
    return [Finding("problem", f"run.output: {folder} {reason}. Give --run.output another folder.")]


def _states(module: nn.Module, optimizer: OptimizerConfig, *, averaged: bool) -> tuple[int, int]:
    """Of what is trained: its size, which its gradients have as well, and that of Adam's and the average's states."""
    trained = _size(module, trained=True)
    moments = trained // 2 if optimizer.eight_bit else 2 * trained
    return trained, moments + (trained if averaged else 0)


def _size(module: nn.Module, *, trained: bool = False) -> int:
    return sum(
        parameter.numel() * (_FLOAT if trained else parameter.element_size())
        for parameter in module.parameters()
        if parameter.requires_grad or not trained
    )


def _activations(task: Task, config: Any) -> float:
    """Bytes that are kept for the gradients of one picture: measured on two small crops, in proportion to pixels."""
    multiple, crop = task.size_multiple, seen_side(config)
    side = max(multiple, min(crop, _MEASURED_SIDE) // multiple * multiple)
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "clean": torch.rand(2, 3, side, side, generator=generator),
        "degraded": torch.rand(2, 3, side, side, generator=generator),
        "quality": torch.tensor([20.0, 60.0]),
        "index": torch.arange(2),
        "path": ["", ""],
    }
    if getattr(config, "align", None) == "text":
        batch["text"] = torch.zeros(2, config.network.tokens, config.network.context_dim)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*task.model.parameters(), *task.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    task.model.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(task.model, batch, generator)  # its graph holds what was kept, so that no place is used twice
    per_picture = sum(kept.values()) / len(batch["path"])
    del loss
    return per_picture * (crop / side) ** 2
