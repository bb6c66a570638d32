"""docs/mistakes.md: every command in it is run as it stands there, and says what is written there."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT

from tests.ddrm_graphs import write_prior
from training.__main__ import main
from training.command_line.files import to_plain
from training.configs.driftrec import PRESETS
from training.loop.checkpoint import write_checkpoint

DOCUMENT = ROOT / "docs" / "mistakes.md"


class Mistake(NamedTuple):
    """One of the document: its title, the file my.yaml or nothing, the command, what it says, the exit status."""

    title: str
    yaml: str
    command: list[str]
    said: str
    status: int


def read_document() -> list[Mistake]:
    found, status = [], 0
    for part in re.split(r"^(?=##)", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE):
        head = part.splitlines()[0]
        status = int(head[-1]) if head.startswith("## ") else status
        if head.startswith("### "):
            yaml = re.search(r"```yaml\n(.*?)```", part, re.DOTALL)
            command, *said = [line[4:] for line in part.splitlines() if line.startswith("    ")][-_length(part) :]
            words = shlex.split(command.removeprefix("$ python -m training "))
            found.append(Mistake(head[4:], yaml[1] if yaml else "", words, "\n".join(said), status))
    return found


def _length(part: str) -> int:
    """Lines of the last indented block."""
    return len(part.rstrip().rpartition("    $ ")[2].splitlines())


MISTAKES = read_document()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the document speaks of."""
    for name in ("pictures", "empty", "broken", "sd21-768/scheduler", "runs/theirs", "runs/cut"):
        (tmp_path / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(generator.integers(0, 255, (72, 96, 3), np.uint8)).save(tmp_path / f"pictures/{number}.png")
    (tmp_path / "broken" / "holiday.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "broken" / "scan.png").write_bytes((tmp_path / "pictures/0.png").read_bytes()[:20])
    (tmp_path / "notes.txt").write_text("not a restorer")
    (tmp_path / "sd21-768/scheduler/scheduler_config.json").write_text(
        json.dumps(
            {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
        )
    )
    write_prior(tmp_path / "prior.safetensors")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    stored = {"command": "driftrec", **to_plain(PRESETS["starter"])}
    (tmp_path / "runs/theirs/config.json").write_text(json.dumps(stored))
    write_checkpoint(tmp_path / "runs/theirs/checkpoint.pt", {"images": 480})
    whole = (tmp_path / "runs/theirs/checkpoint.pt").read_bytes()
    (tmp_path / "runs/cut/checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


class _Without:
    """Finds no package of some names, as where they are not installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, *_: object) -> None:
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without(monkeypatch: pytest.MonkeyPatch, package: str, *importing: str) -> None:
    """Take a package away, and the modules that have imported it."""
    for name in (package, *importing):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without(package), *sys.meta_path])


def failing(error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    """Let the training itself end with an error."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def train(_: object) -> None:
            raise error

        monkeypatch.setattr("training.loop.session.Session.train", train)

    return patch


SIMULATED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "27": lambda monkeypatch: without(monkeypatch, "accelerate", "training.loop.session"),
    "28": lambda monkeypatch: without(monkeypatch, "bitsandbytes"),
    "30": failing(
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.20 GiB "
            "is free. Of the allocated memory 5.90 GiB is allocated by PyTorch."
        )
    ),
    "31": failing(RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")),
    "32": failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/starter-driftrec/stats.jsonl")),
}
"""Number -> what makes it happen where the machine does not."""


def _warnings(printed: str) -> str:
    """What `check` warns of, beside what it notes."""
    return "\n".join(line for line in printed.splitlines() if line.startswith(("warning: ", "problem: ")))


def matches(said: str, expected: str) -> bool:
    """Whether a text is as expected, where `[...]` may be anything."""
    return re.fullmatch(".*".join(re.escape(part) for part in expected.split("[...]")), said, re.DOTALL) is not None


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.title for mistake in MISTAKES])
def test_the_command_says_what_is_written(
    mistake: Mistake, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if mistake.yaml:
        (world / "my.yaml").write_text(mistake.yaml, encoding="utf-8")
    SIMULATED.get(mistake.title.split(".")[0], lambda _: None)(monkeypatch)
    before = sorted(path for path in world.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["training", *mistake.command])
    assert main() == mistake.status
    printed = capsys.readouterr()
    said = printed.err.strip() if mistake.status else _warnings(printed.out)
    assert matches(said, mistake.said), said
    assert mistake.said and "Traceback" not in said
    if mistake.status and mistake.title.split(".")[0] not in ("14", "24", "28"):
        assert sorted(path for path in world.rglob("*")) == before, "something was written"


def test_the_document_has_the_mistakes_that_people_make() -> None:
    titles = " ".join(mistake.title.lower() for mistake in MISTAKES)
    assert len(MISTAKES) >= 20
    assert [mistake.title.split(".")[0] for mistake in MISTAKES] == [str(n + 1) for n in range(len(MISTAKES))]
    expected = (
        "typo",
        "path",
        "without pictures",
        "cannot be read",
        "too small",
        "base model",
        "memory",
        "disk",
        "package",
    )
    assert [words for words in expected if words not in titles] == []
    assert {mistake.status for mistake in MISTAKES} == {0, 1, 2}
