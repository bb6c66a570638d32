"""What all importers share: reading a pickled checkpoint without running its code, and comparing what is in it."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_SHOWN = 3
_UNREADABLE = (
    pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError,
)  # fmt: skip
"""What `torch.load` raises for files that are cut, changed, of another kind, or that hold more than values."""


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be used; the message names it and says what is wrong."""


def read_pickled(
    path: str | os.PathLike[str], *, wanted: str, content: str, error: type[CheckpointError]
) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, in the present or the legacy format, its tensors on the CPU.

    Args:
        path: The file. Only containers, numbers, strings and tensors are unpickled from it.
        wanted: Such a file in words, e.g. `a DriftRec .ckpt file`.
        content: What it holds in words, e.g. `a Lightning checkpoint`.
        error: What is raised.

    Raises:
        CheckpointError: There is no file, it is not whole, it holds anything else, or no dictionary of names.
    """
    checkpoint = unpickled(path, wanted=wanted, error=error)
    if not isinstance(checkpoint, dict):
        raise error(f"{Path(path).name}: expected {content}, a dictionary, got {kind(checkpoint)}.")
    return checkpoint


def unpickled(path: str | os.PathLike[str], *, wanted: str, error: type[CheckpointError]) -> Any:
    """`read_pickled` of a file that may hold a list or a single value as well.

    Raises:
        CheckpointError: There is no file, it is not whole, or it holds anything but plain values and tensors.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise error(f"{name}: there is no such file. Give the path of {wanted}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as reason:
        foreign = re.search(r"GLOBAL (\S+)", str(reason))
        if foreign is None:
            raise error(f"{name}: not a whole checkpoint ({_found(reason)}). Download or copy it again.") from reason
        raise error(
            f"{name}: refused, because it does not hold tensors and plain values only, and unpickling anything else "
            f"could run code (it asks for {foreign[1]}). Save it again with torch.save as dictionaries, lists, numbers "
            "and tensors."
        ) from reason


def differences(found: Iterable[Any], expected: Iterable[str]) -> str:
    """Names that are missing and names that are too many, the first of each; empty where there are none."""
    found, expected = set(map(str, found)), set(expected)
    problems = (listed("missing", sorted(expected - found)), listed("unexpected", sorted(found - expected)))
    return "; ".join(problem for problem in problems if problem)


def tensor_differences(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> str:
    """`differences` of the names, and the first tensors whose shape or type is another; empty where there are none.

    All but counters (shape `()`) must be dense floating-point tensors.
    """
    common = sorted(expected.keys() & found.keys())
    tensors = [key for key in common if torch.is_tensor(found[key])]
    shapes = [
        f"{key} is {tuple(found[key].shape)} instead of {expected[key]}"
        for key in tensors
        if found[key].shape != expected[key]
    ]
    others = [f"{key} is {kind(found[key])}" for key in common if not torch.is_tensor(found[key])]
    others += [f"{key} is {found[key].dtype}" for key in tensors if not _is_usable(found[key])]
    problems = (differences(found, expected), listed("of another shape", shapes), listed("of another type", others))
    return "; ".join(problem for problem in problems if problem)


def listed(what: str, names: list[str]) -> str:
    """`what: a, b, c and 5 more`, or nothing."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}" if names else ""


def kind(value: object) -> str:
    """What a value is, in words."""
    return "none" if value is None else f"a {type(value).__name__}"


def _is_usable(tensor: torch.Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and (tensor.is_floating_point() or tensor.dim() == 0)


def _found(reason: Exception) -> str:
    """The reason without what torch wraps around it: advice to load the file in the way that runs its code."""
    lines = str(reason).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return lines[0].strip(" .") if lines else type(reason).__name__
