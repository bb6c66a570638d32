"""Checkpoints that a kill at any moment cannot spoil, and the average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from training.files import FileProblemError, replace_file


class CheckpointError(FileProblemError):
    """A checkpoint cannot be written or used; the message says why."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to a temporary file, flush it to the disk, then rename it.

    Raises:
        CheckpointError: The disk is full or not writable; the checkpoint before it is untouched.
    """
    try:
        replace_file(path, lambda file: _save(state, file), flush=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error}. The checkpoint before it is whole; free some space and repeat the command.",
            str(path),
        ) from error


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, which does not stand a file that fails: it is told of nothing until it is done."""
    sink = _Sink(file)
    torch.save(state, sink)  # type: ignore[arg-type]
    if sink.error is not None:
        raise sink.error


class _Sink:
    """Writes to a file up to its first error, which it keeps."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """The caller flushes."""


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote; only tensors and plain values are accepted.

    Args:
        path: The file.
        mapped: Leave the tensors on the disk, for whom a few numbers are enough.

    Raises:
        CheckpointError: The file is not a whole checkpoint, or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(f"cannot read {path}: {error.strerror}.", str(path)) from error
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        if "memory" in reason.lower():
            raise
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({reason}). Move it away to start anew; the folder `kept` beside it may "
            "hold an older one (--run.keep-every)."
        ) from error


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes in a module: its trainable parameters, and the buffers beside them (norm statistics).

    Frozen parameters, e.g. of a base model under adapters, are left out, and buffers of submodules without a trainable
    parameter of their own.
    """
    state: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        start = f"{path}." if path else ""
        trainable = {name: value for name, value in part.named_parameters(recurse=False) if value.requires_grad}
        passing = part._non_persistent_buffers_set
        buffers = {name: value for name, value in part.named_buffers(recurse=False) if name not in passing}
        for name, value in {**trainable, **(buffers if trainable else {})}.items():
            state[start + name] = value.detach()
    return state


def load_trained_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` gave; frozen weights and buffers are taken where `state` has them, too.

    Raises:
        CheckpointError: Something is missing, unknown or of another shape; the first such name is given.
    """
    present = module.state_dict(keep_vars=True)
    missing = trained_state(module).keys() - state.keys()
    unknown = state.keys() - present.keys()
    reshaped = {key for key in state.keys() & present.keys() if state[key].shape != present[key].shape}
    if wrong := missing | unknown | reshaped:
        raise CheckpointError(
            f"the checkpoint belongs to another network: {min(wrong)} is missing, unknown or of another shape. "
            "Give --run.output another folder."
        )
    with torch.no_grad():
        for key, value in state.items():
            present[key].copy_(value)


class Average:
    """Exponential moving average of a module's trainable parameters, warmed up as torch_ema does: the n-th update has
    the decay min(decay, (1 + n) / (10 + n)).

    Args:
        module: Whose parameters are averaged.
        decay: The final decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: parameter.detach().clone() for name, parameter in _trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in _trainable(module):
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's trainable parameters and the averaged ones; calling it again undoes it."""
        for name, parameter in _trainable(module):
            present = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = present

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """The module has the averaged parameters for the time being."""
        self.swap(module)
        try:
            yield
        finally:
            self.swap(module)

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """The averages and the number of updates."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state, on the device of the present one."""
        self.updates = int(state["updates"])
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
