"""Restorer files that options name."""

from __future__ import annotations

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
    if not path.is_file():
        raise RestorerFileError(f"{option} {path}: there is no such file. Give the path of a restorer file.")
    try:
        return read_restorer(path)
    except RestorerFileError as error:
        raise RestorerFileError(f"{option} {path}: {str(error).removeprefix(f'{path.name}: ')}") from error
