"""docs/evaluation.md: its lines of Python make the weights of LPIPS, and what it names exists."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from shared import ROOT, shared_path

from restoration.lpips import LPIPS, load_lpips_squeeze
from training.evaluate.finders import find_single
from training.evaluate.metrics import LABELS, MetricFiles, MissingMetric
from training.evaluate.options import ProtocolName

DOCUMENT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def run_the_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    monkeypatch.chdir(folder)
    (folder / "lines.py").write_text(found[1], encoding="utf-8")
    runpy.run_path(str(folder / "lines.py"))
    return folder / "lpips_squeeze_f32.npz"


def write_squeezenet(folder: Path, network: LPIPS) -> None:
    """As torchvision's file: with a classifier, which LPIPS has not."""
    weights = {f"features.{name}": value for name, value in network.features.state_dict().items()}
    torch.save({**weights, "classifier.1.weight": torch.zeros(3, 512, 1, 1)}, folder / "squeezenet1_1-b8a52dc0.pth")


def test_the_lines_make_the_weights_of_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ones under the public files' names give the very distances."""
    network = LPIPS()
    write_squeezenet(tmp_path, network)
    heads = {f"lin{name.split('.')[0]}.model.1.weight": value for name, value in network.heads.state_dict().items()}
    assert len(heads) == 7
    torch.save(heads, tmp_path / "squeeze.pth")
    pair = torch.rand(2, 1, 3, 40, 48, generator=torch.Generator().manual_seed(0)).unbind()
    loaded = load_lpips_squeeze(run_the_lines(tmp_path, monkeypatch))
    assert torch.equal(loaded(*pair), network(*pair)) and network(*pair).item() != 0


def test_the_lines_take_the_authors_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeeze.pth").write_bytes(shared_path("weights", "lpips_heads", "v0.1", "squeeze.pth").read_bytes())
    write_squeezenet(tmp_path, LPIPS())
    made = load_lpips_squeeze(run_the_lines(tmp_path, monkeypatch))
    known = load_lpips_squeeze(shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz"))
    ours, theirs = made.heads.state_dict(), known.heads.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_and_protocols_are_named_as_the_command_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that the command asks for stands in the document's table, each protocol in the other one."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    lacking = [find_single(name, MetricFiles(), torch.device("cpu")) for name in LABELS if name not in ("fid", "kid")]
    asked = " ".join(gone.reason for gone in lacking if isinstance(gone, MissingMetric))
    files = re.findall(r"--weights\.[\w-]+ (\S+\.(?:npz|pth|pt))", asked)
    assert len(set(files)) == 6
    for name in (*files, *(f"| `{protocol}` |" for protocol in get_args(ProtocolName))):
        assert name in DOCUMENT, name
