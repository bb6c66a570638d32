"""The weights file of this pack: one `.safetensors` with a JSON description in its metadata.

Tensor names are prefixed by the part of the restorer that they belong to (`score.`, `regression.`, `prompt.`, ...). The
metadata key `jpeg_restorer` holds the version, the family, everything that is needed to rebuild the networks, what base
model they need, what they were trained on, and the licence. Nothing pickled is ever read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .replacing import replace

METADATA_KEY = "jpeg_restorer"
VERSION = 1
FAMILIES = ("cave", "codiff", "saipe", "sodiff", "quality", "driftrec", "regression", "prior")
_MAX_METADATA = 1 << 20


class RestorerFileError(ValueError):
    """A file is not a restorer, or not a whole one; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class RestorerMetadata:
    """What a restorer file says of itself.

    Args:
        family: One of `FAMILIES`.
        config: Everything needed to rebuild the networks, as JSON values.
        base: None, or the base model that it adapts, e.g. `sd2.1-base`.
        training: Data, images seen, metrics, date.
        license: The licence of the weights.
        version: Of the file format.
    """

    family: str
    config: dict[str, Any]
    base: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    license: str = "unknown"
    version: int = VERSION


@dataclass(frozen=True)
class RestorerFile:
    """A restorer file in memory.

    Args:
        metadata: Its description.
        tensors: Its weights by their full names.
        name: The file's name, for messages.
    """

    metadata: RestorerMetadata
    tensors: dict[str, Tensor]
    name: str

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one part, without its prefix."""
        start = prefix + "."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


def write_restorer(path: str | os.PathLike[str], metadata: RestorerMetadata, tensors: Mapping[str, Tensor]) -> None:
    """Write a restorer file; it appears under its name only when it is whole.

    Raises:
        RestorerFileError: The description is not valid.
    """
    target = Path(path)
    _check(asdict(metadata), target.name)
    description = json.dumps(asdict(metadata), sort_keys=True)
    _check_length(description, target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    try:
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(whole, temporary, metadata={METADATA_KEY: description})
        os.chmod(temporary, 0o644)
        replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_metadata(path: str | os.PathLike[str]) -> RestorerMetadata:
    """The description of a restorer file, without its weights.

    Raises:
        RestorerFileError: The file is missing, cut, not a safetensors file, or not a restorer.
    """
    name = Path(path).name
    with _opened(path) as file:
        return _parse(file.metadata(), name)


def read_restorer(path: str | os.PathLike[str]) -> RestorerFile:
    """A whole restorer file, its tensors on the CPU.

    Raises:
        RestorerFileError: As `read_metadata`.
    """
    name = Path(path).name
    with _opened(path) as file:
        metadata = _parse(file.metadata(), name)
        return RestorerFile(metadata, {key: file.get_tensor(key) for key in file.keys()}, name)  # noqa: SIM118


def load_part(module: nn.Module, file: RestorerFile, prefix: str, *, assign: bool = False) -> None:
    """Put one part of a file into a network whose state dict must match it exactly.

    Raises:
        RestorerFileError: Tensors are missing, left over or of another shape; the first of each are named.
    """
    part = file.part(prefix)
    check_fit(part, module.state_dict(), file.name)
    module.load_state_dict(part, assign=assign)


def check_fit(part: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """See that the tensors of a file have the names and shapes that a network expects.

    Raises:
        RestorerFileError: Tensors are missing, left over or of another shape; the first of each are named.
    """
    missing = sorted(expected.keys() - part.keys())
    extra = sorted(part.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(part[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & part.keys())
        if part[key].shape != expected[key].shape
    ]
    problems = [_listed("missing", missing), _listed("unexpected", extra), _listed("of another shape", shapes)]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise RestorerFileError(
            f"{name}: its tensors do not fit the network that its metadata describes ({found}). "
            "Export it again, or download it again."
        )


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what}: {', '.join(keys[:3])}{more}"


def _opened(path: str | os.PathLike[str]) -> Any:
    name = Path(path).name
    if not Path(path).is_file():
        raise RestorerFileError(f"{name}: there is no such file. Choose one that is listed.")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise RestorerFileError(
            f"{name}: not a whole safetensors file ({error}). Download or export it again; "
            "pickled checkpoints must be converted first: python -m training convert."
        ) from error


def _parse(header: Mapping[str, str] | None, name: str) -> RestorerMetadata:
    text = (header or {}).get(METADATA_KEY)
    if text is None:
        raise RestorerFileError(
            f"{name}: a safetensors file, but not a JPEG restorer (its metadata has no {METADATA_KEY!r}). "
            "Choose a file made by `python -m training`, or one from the pack's weights folder."
        )
    _check_length(text, name)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RestorerFileError(f"{name}: its description is not valid JSON. Download or export it again.") from error
    return _check(fields, name)


def _check_length(text: str, name: str) -> None:
    if len(text) > _MAX_METADATA:
        raise RestorerFileError(
            f"{name}: its description is {len(text)} characters long, over the limit of {_MAX_METADATA}. "
            "Export it with a shorter one."
        )


def _check(fields: Any, name: str) -> RestorerMetadata:
    kinds: dict[str, tuple[type, ...]] = {
        "family": (str,), "config": (dict,), "base": (str, type(None)), "training": (dict,), "license": (str,),
        "version": (int,),
    }  # fmt: skip
    if not isinstance(fields, dict):
        raise RestorerFileError(f"{name}: its description is no JSON object. Download or export it again.")
    wrong = [key for key, kind in kinds.items() if not isinstance(fields.get(key, ...), kind)]
    if not wrong and (isinstance(fields["version"], bool) or fields["version"] < 1):
        wrong = ["version"]
    if wrong:
        raise RestorerFileError(f"{name}: its description lacks a valid {', '.join(wrong)}. Export it again.")
    if fields["version"] > VERSION:
        raise RestorerFileError(
            f"{name}: written by a newer version of this pack (format {fields['version']}, known is {VERSION}). "
            "Update the pack."
        )
    if fields["family"] not in FAMILIES:
        raise RestorerFileError(f"{name}: unknown family {fields['family']!r}, expected one of {', '.join(FAMILIES)}.")
    return RestorerMetadata(**{key: fields[key] for key in kinds})


def half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point tensors in half precision, for files that ship.

    Those of one dimension stay as they are: they are small, and the frequencies of a noise embedding among them do not
    bear rounding (a half's error in them changes the output of an NCSN++ by several percent).
    """
    return {
        key: value.to(torch.float16) if value.is_floating_point() and value.dim() > 1 else value
        for key, value in tensors.items()
    }
