"""Whether a folder's run may go on with a configuration: what is stored of a run to tell, and the comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from training.command_line.checks import Names, leaves, value_of
from training.command_line.files import to_plain
from training.files import FileProblemError

CONFIG = "config.json"
_FILES, _HELD_OUT = "files", "held_out"
_MAY_CHANGE = (
    *("run.images", "run.batch", "run.accumulate", "run.precision", "run.output", "run.init_from", "run.license"),
    *("run.half", "run.checkpoint_every", "run.checkpoint_minutes", "run.keep", "run.wandb"),
    *("run.compile", "run.channels_last", "run.fsdp", "gradient_checkpointing"),
    *("data.train", "data.validation", "data.workers", "data.cache_mb", "captions", "text_encoder.cache"),
    *("validation", "optimizer", "critic_optimizer"),
)
"""What may differ when a run goes on: all that does not change what is trained."""
_MUST_NOT_CHANGE = ("optimizer.eight_bit", "critic_optimizer.eight_bit")
"""Exceptions to it: the stored states of the optimiser would not fit."""


class RunFolderError(FileProblemError):
    """The folder holds another run, or something cannot be written to it."""


def stored_run(command: str, config: Any, held_out: Sequence[str]) -> str:
    """What `config.json` of a run's folder says.

    Args:
        command: Name of the training.
        config: The resolved configuration.
        held_out: Names of the pictures that are set aside for validation, of those that were given to train on.
    """
    files = {".".join(names): digest for names, digest in _digests(config).items()}
    stored = {"command": command, **to_plain(config), _FILES: files, _HELD_OUT: list(held_out)}
    return json.dumps(stored, indent=1)


def held_out_before(path: Path) -> list[str]:
    """Names of the pictures that the run in a folder has set aside, whatever is asked for now; none of a new run, and
    of one of an earlier version."""
    return _stored(path).get(_HELD_OUT, [])


def check_same_run(path: Path, command: str, config: Any) -> None:
    """Compare with what the folder holds, if it holds a run that can go on.

    Files that are named, such as a first stage, are compared by what is in them, and may lie elsewhere.

    Raises:
        RunFolderError: It is another run; what differs is named.
    """
    stored = _stored(path)
    if not stored:
        return
    changed = [] if stored.get("command", command) == command else [("command", stored["command"], command)]
    plain, digests, before = to_plain(config), _digests(config), stored.get(_FILES, {})
    for names in leaves(config):
        key = ".".join(names)
        now, then = _at(plain, names), _at(stored, names)
        if names in digests and before.get(key):
            now, then = digests[names], before[key]
        if now != then and then is not _ABSENT and not _may_change(key):
            changed.append((key, _at(stored, names), _at(plain, names)))
    if changed:
        listed = ", ".join(_said(*change) for change in changed[:4])
        raise RunFolderError(
            f"{path} holds another run ({listed}). Give --run.output another folder, or remove this one."
        )


def _said(key: str, then: Any, now: Any) -> str:
    return f"{key} was {then!r}, is {now!r}" if then != now else f"what is in the file of {key}, {now!r}, has changed"


def _stored(path: Path) -> dict[str, Any]:
    """What the folder tells of a run that can go on; nothing where there is none.

    Raises:
        RunFolderError: It is spoilt.
    """
    config = path / CONFIG
    if not (config.exists() and (path / "checkpoint.pt").exists()):
        return {}
    try:
        return json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(
            f"{config} is spoilt ({error}): it tells which run this is. Remove it to go on with this command's options."
        ) from error


_ABSENT = object()


def _at(plain: Mapping[str, Any], names: Names) -> Any:
    """The value at a place; absent where an earlier version had no such field."""
    return reduce(lambda part, name: part.get(name, _ABSENT) if isinstance(part, dict) else _ABSENT, names, plain)


def _digests(config: Any) -> dict[Names, str]:
    """What is in the files that a configuration names, where that makes a difference to what is trained."""
    values = {names: value_of(config, names) for names in leaves(config)}
    return {
        names: _digest(value)
        for names, value in values.items()
        if isinstance(value, Path) and not _may_change(".".join(names)) and value.is_file()
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _may_change(key: str) -> bool:
    return key.startswith(_MAY_CHANGE) and not key.startswith(_MUST_NOT_CHANGE)
