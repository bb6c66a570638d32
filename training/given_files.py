"""Restorer files that options name."""

from __future__ import annotations

import json
from pathlib import Path

from restoration.restorer_file import RestorerFile, RestorerFileError, read_restorer


def read_given(path: Path, option: str) -> RestorerFile:
    """The restorer file that an option names.

    Args:
        path: The file.
        option: The option, e.g. `--cave`.

    Raises:
        RestorerFileError: It is not there, or no restorer; the message begins with the option.
    """
    check_given(path, option)
    try:
        return read_restorer(path)
    except RestorerFileError as error:
        raise RestorerFileError(f"{option} {path}: {str(error).removeprefix(f'{path.name}: ')}") from error


def check_given(path: Path, option: str) -> None:
    """See that an option names a file, and not the folder of a training or what it goes on from.

    Raises:
        RestorerFileError: It does not; the message begins with the option, and says what to give.
    """
    if path.is_dir():
        there = _restorers_in(path)
        instead = f"give the restorer file in it, e.g. {there[0]}" if there else "give the path of a restorer file"
        raise RestorerFileError(f"{option}: {path} is a folder; {instead}.")
    if not path.is_file():
        raise RestorerFileError(f"{option} {path}: there is no such file. Give the path of a restorer file.")
    restorer = _trained_in(path.parent) if path.suffix == ".pt" else None
    if restorer is not None:
        later = "" if restorer.is_file() else ", which is written when the training first measures, or stops"
        raise RestorerFileError(f"{option}: {path} is what a training goes on from; give {restorer}{later}.")


def _trained_in(folder: Path) -> Path | None:
    """The restorer that the training of a folder writes; None where the folder is none of a training."""
    try:
        command = json.loads((folder / "config.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return folder / f"{command}.safetensors" if isinstance(command, str) else None


def _restorers_in(folder: Path) -> list[Path]:
    """A training's own one first."""
    own = _trained_in(folder)
    return sorted(folder.glob("*.safetensors"), key=lambda path: (path != own, path.name))
