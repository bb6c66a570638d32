"""Checkpoints that a kill at any moment cannot spoil, and the average of the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message says why."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to a temporary file, flush it to the disk, then rename it.

    Raises:
        CheckpointError: The disk is full or not writable; the checkpoint before it is untouched.
    """
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}. The checkpoint before it is whole; free some space."
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote; only tensors and plain values are accepted.

    Raises:
        CheckpointError: The file is not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error}). Remove it to start anew.") from error


class Average:
    """Exponential moving average of a module's parameters, warmed up as torch_ema does: min(decay, (1 + n) / (10 + n)).

    Args:
        module: Whose parameters are averaged.
        decay: The final decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in module.named_parameters():
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's parameters and the averaged ones; calling it again undoes it."""
        for name, parameter in module.named_parameters():
            present = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = present

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """The averages and the number of updates."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state, on the device of the present one."""
        self.updates = int(state["updates"])
        for name, value in self.values.items():
            value.copy_(state["values"][name])
