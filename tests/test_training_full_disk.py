"""A disk that is full, whatever is written to it: the training says so, and loses nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from shared import ROOT
from tiny_trainings import same, tiny, write_pictures

import training.loop.run_folder
from restoration.restorer_file import read_metadata
from training.command_line.files import to_yaml
from training.loop.checkpoint import read_checkpoint
from training.loop.logs import StatsFile, TensorBoard
from training.loop.run_folder import RunFolderError
from training.loop.session import Session
from training.loop.trainer import TrainingStoppedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    Session("regression", tiny(folder, output)).train()
    return output


def full(call: Callable[..., Any], at: Callable[..., bool], error: Exception) -> Callable[..., Any]:
    """The function, for which the disk is full when `at` says so of its arguments."""

    def called(*given: Any, **named: Any) -> Any:
        if at(*given):
            raise error
        return call(*given, **named)

    return called


NO_SPACE = OSError(28, "No space left on device")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL = {
    "stats.jsonl": (StatsFile, "figures", lambda self, images, values: images == 20, NO_SPACE, 20),
    "tensorboard": (TensorBoard, "figures", lambda self, images, values: images == 20, NO_SPACE, 20),
    "samples": (TensorBoard, "picture", lambda self, images, name, picture: images == 16, NO_SPACE, 16),
    "best": (
        training.loop.run_folder, "write_restorer", lambda path, metadata, _: metadata.training["images"] == 16,
        RUST, 16,
    ),
    "export": (
        training.loop.run_folder, "write_restorer",
        lambda path, metadata, _: metadata.training["images"] == 32 and "best" not in path.name, RUST, 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(FULL))
def test_a_full_disk_is_told_and_loses_nothing(
    what: str, folder: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, at, error, images = FULL[what]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full(getattr(place, name), at, error))
        with pytest.raises(
            TrainingStoppedError,
            match=rf"cannot write .*No space left.*Stopped at {images} images; nothing is lost\. Repeat the command",
        ):
            Session("regression", tiny(folder, tmp_path, checkpoint_every=10**6)).train()
    assert read_checkpoint(tmp_path / "checkpoint.pt")["images"] == images
    Session("regression", tiny(folder, tmp_path)).train()
    assert same(tmp_path, whole)
    assert read_metadata(tmp_path / "regression-best.safetensors").training["images"] == \
        read_metadata(whole / "regression-best.safetensors").training["images"]  # fmt: skip


def test_a_disk_that_is_full_from_the_start_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.loop.run_folder, "replace_text", full(print, lambda *_: True, NO_SPACE))
    with pytest.raises(RunFolderError, match=r"cannot write .*No space left on device\. Free some space, or give"):
        Session("regression", tiny(folder, tmp_path)).train()


LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("training", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
@pytest.mark.parametrize("part", ["checkpoint", pytest.param("restorer", marks=pytest.mark.slow)])
def test_files_that_cannot_grow_end_the_command_without_a_traceback(
    part: str, folder: Path, tmp_path: Path, whole: Path
) -> None:
    """The system's own limit of a file's size in place of a full disk, in the real command."""
    sizes = [(whole / name).stat().st_size for name in ("regression.safetensors", "checkpoint.pt")]
    limit = sum(sizes) // 2 if part == "checkpoint" else sizes[0] // 2
    config = tiny(folder, tmp_path / "run")
    (tmp_path / "my.yaml").write_text(to_yaml(config))
    arguments = ["regression", "--config", str(tmp_path / "my.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    name = "checkpoint.pt" if part == "checkpoint" else "regression.safetensors"
    assert re.search(rf"training regression: cannot write \S*{re.escape(name)}: .*[Ff]ile too large", done.stderr)
    assert not list((tmp_path / "run").rglob("*.part"))
    Session("regression", config).train()
    assert same(tmp_path / "run", whole)
