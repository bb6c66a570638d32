"""A training that is killed at any moment, also while it saves, goes on and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shared import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are forked here")
NAMES = ["driftrec", "regression", "quality", "cave", "saipe", "codiff", "sodiff", "prior"]


def killed(name: str, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Runs killed_trainings.py."""
    script = str(ROOT / "tests" / "killed_trainings.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, name, str(folder), str(kills), str(seed)], cwd=ROOT, env=environment, timeout=1200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_kills_change_nothing(tmp_path: Path) -> None:
    result = killed("regression", tmp_path, 2)
    assert result["problems"] == []
    assert result["kills"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_kills_change_nothing(name: str, tmp_path: Path) -> None:
    """To the bit: checkpoints, kept and best files, what is exported, and the figures of every step."""
    result = killed(name, tmp_path, 20)
    print(name, result)
    assert result["problems"] == []
    assert result["kills"] == 20
    assert result["inside"] >= 3, "some must come while a file is being written"
