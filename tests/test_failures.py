"""What a person is told when a command ends early: disk, memory, packages; and what keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from training import __main__ as program
from training.failures import MISTAKE, NO_ROOM, explain
from training.loop.checkpoint import CheckpointError


def said(error: BaseException, command: str = "driftrec", *, trains: bool = True) -> tuple[str, int]:
    ending = explain(error, command, trains=trains)
    assert ending is not None
    return ending.sentence, ending.status


def test_a_full_disk_is_told_wherever_it_shows() -> None:
    sentence, status = said(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/checkpoint.part"))
    assert status == NO_ROOM
    assert sentence == (
        "runs/a/checkpoint.part: the disk is full. Free some space and repeat the command: it goes on from the last "
        "checkpoint, which is whole."
    )
    serializer = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert said(serializer, "convert", trains=False)[0].startswith("the disk is full. Free some space")


def test_memory_that_is_used_up_is_told_with_what_takes_less() -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
    sentence, status = said(gpu, "codiff")
    assert status == NO_ROOM
    assert sentence.startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB). Raise --run.accumulate")
    assert "--gradient-checkpointing" in sentence
    assert "--gradient-checkpointing" not in said(gpu, "driftrec")[0]
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert "out of memory" in said(caught.value)[0]
    with pytest.raises(MemoryError) as numpys:
        np.empty(1 << 60, np.uint8)
    assert said(numpys.value, "evaluate", trains=False)[0].endswith("Lower --tile.")
    assert "--run.accumulate" in said(MemoryError())[0]


def test_a_workers_error_is_told_without_its_traceback() -> None:
    try:
        raise ValueError("the picture x.png is no picture. Take it away.")
    except ValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError) as caught:
        wrapped.reraise()
    assert said(caught.value) == ("the picture x.png is no picture. Take it away.", MISTAKE)
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "lower --data.workers or --data.cache-mb" in said(killed)[0]


def test_mistakes_are_told_as_they_are_and_files_by_name() -> None:
    assert said(CheckpointError("a is not whole.")) == ("a is not whole.", MISTAKE)
    assert said(FileNotFoundError("there is no folder a")) == ("there is no folder a", MISTAKE)
    denied = PermissionError(errno.EACCES, "Permission denied", "runs/a")
    assert said(denied) == ("runs/a: Permission denied.", MISTAKE)


def test_a_missing_package_is_told_with_what_brings_it() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
    sentence, status = said(caught.value)
    assert status == MISTAKE
    assert "No module named 'a_package_that_nobody_has'" in sentence
    assert 'pip install -e ".[training]"' in sentence


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("a bug"), ModuleNotFoundError("no", name="training.nowhere"), TypeError("x")]
)
def test_a_mistake_in_the_program_keeps_its_traceback(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(error, "driftrec", trains=True) is None

    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr(program, "_run", fail)
    monkeypatch.setattr(sys, "argv", ["training", "driftrec"])
    with pytest.raises(type(error)):
        program.main()


def test_the_command_line_ends_with_the_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "a")

    monkeypatch.setattr(program, "_run", fail)
    monkeypatch.setattr(sys, "argv", ["training", "driftrec"])
    assert program.main() == NO_ROOM
    assert capsys.readouterr().err.startswith("training driftrec: a: the disk is full.")


@pytest.mark.parametrize(("command", "hint"), [("drift", "driftrec"), ("eval", "evaluate"), ("preset", "presets")])
def test_a_wrong_command_is_told_with_the_nearest(
    command: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", command])
    assert program.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"expected a command of the list, got {command!r}. Did you mean {hint}?" in printed.err


def test_the_family_is_listed_in_the_order_of_its_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training"])
    assert program.main() == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [
        *("prepare", "check", "cave", "saipe", "codiff", "sodiff", "driftrec", "regression", "prior", "quality"),
        *("convert", "evaluate", "restore", "presets", "ablate"),
    ]


def test_every_command_of_the_list_can_be_run() -> None:
    """Their modules exist, without importing what they need."""
    root = Path(program.__file__).parent.parent
    for other in program._OTHERS.values():
        path = root / other.module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), other.module
