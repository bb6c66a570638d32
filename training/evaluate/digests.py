"""Short names of what figures depend on: files, folders of them, and this pack's version."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_PART = 1 << 20
_DIGITS = 8


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def weights_variant(paths: Iterable[Path]) -> str:
    """How a metric's variant names the weights that it runs with, e.g. `weights 5c4b27b1`."""
    return f"weights {' '.join(file_digest(path)[:_DIGITS] for path in paths)}"


def base_digest(base: str | None) -> str | None:
    """A short name of a base model: of a folder by the names and sizes of its files, else the name that was given.

    Weights of several GB are not read for it: files of other content but equal sizes are taken for the same.
    """
    if base is None or not Path(base).is_dir():
        return base
    files = sorted(path for path in Path(base).rglob("*") if path.is_file())
    lines = [f"{path.relative_to(base).as_posix()} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


@cache
def pack_version() -> str:
    """This pack's version, as its `pyproject.toml` says; `unknown` where that is not there."""
    try:
        found = re.search(r'^version = "([^"]+)"', _PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "unknown"
