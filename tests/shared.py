"""Where the tests find pictures and metric weights that are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("JPEG_RESTORER_SHARED", ROOT.parent / "shared"))


def shared_path(*parts: str) -> Path:
    """A file or folder of the shared data; the calling test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is absent: set JPEG_RESTORER_SHARED to the folder that holds it")
    return path
