"""The protocols `quality` and `embeddings` of `python -m training evaluate`."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.restorer_file import RestorerMetadata, write_restorer
from tests.one_step_networks import write_tiny_codiff, write_tiny_sodiff
from tests.reduced_sd21 import cave_tensors, write_quality, write_saipe
from training.__main__ import main
from training.evaluate.seeing import Seen
from training.evaluate.seen_protocols import Look, same_quality_share

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", "evaluate", *map(str, arguments)])
    return main()


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    folder = tmp_path / "clean"
    folder.mkdir()
    Image.fromarray(data.astronaut()[:128, 128:288]).save(folder / "a.png")
    Image.fromarray(data.chelsea()[60:188, 100:260]).save(folder / "b.png")
    return folder


def found(output: Path, key: str) -> list[dict]:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))[key]


def write_cave(path: Path) -> Path:
    """A first stage of CODiff, random."""
    config = CaVEConfig(widths=(4, 8, 8, 16), blocks=1)
    tensors = cave_tensors(CaVE(config, device="meta"), torch.Generator().manual_seed(0))
    named = {f"prompt.{key}": value for key, value in tensors.items()}
    write_restorer(path, RestorerMetadata("cave", {"cave": config.to_dict()}), named)
    return path


def test_the_quality_starter_tells_qualities_and_untrained_networks_do_not(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family that tells one; the trained one is within 10 of the truth where its benchmark says 3."""
    files = {
        "quality": WEIGHTS / "starter-quality.safetensors", "cave": write_cave(tmp_path / "cave.safetensors"),
        "codiff": write_tiny_codiff(tmp_path / "codiff.safetensors"),
        "sodiff": write_tiny_sodiff(tmp_path / "sodiff.safetensors"),
        "random": write_quality(tmp_path / "random.safetensors"),
    }  # fmt: skip
    output = tmp_path / "out"
    assert evaluate(monkeypatch, "--data", clean, "--restorer", *files.values(), "--protocol", "quality", "--qualities",
                    20, 60, "--trained-qualities", 20, "--output", output, "--device", "cpu") == 0  # fmt: skip
    rows = found(output, "quality")
    assert len(rows) == 5 * 2 and {(row["quality"], row["trained"]) for row in rows} == {(20, True), (60, False)}
    errors = {name: np.mean([row["error"] for row in rows if row["restorer"] == file.stem])
              for name, file in files.items()}  # fmt: skip
    assert errors["quality"] < 10 < max(errors.values())
    assert all(abs(row["bias"]) <= row["error"] + 1e-9 for row in rows)
    lines = list(csv.DictReader(io.StringIO((output / "results.csv").read_text(encoding="utf-8"))))
    assert len(lines) == 5 * 2 * 2 and {line["picture"] for line in lines} == {"a.png", "b.png"}
    for row in rows:
        told = [float(line["told_quality"]) - row["quality"] for line in lines
                if (line["system"], line["condition"]) == (row["restorer"], str(row["quality"]))]  # fmt: skip
        assert np.mean(told) == pytest.approx(row["bias"], abs=2e-3)


def test_the_quality_alone_shows_and_names_nothing_of_pictures(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """No empty bar, no metrics that were not asked for; a heading that is no restorer's name; the best in bold."""
    (clean / "broken.png").write_bytes(b"no picture")
    restorers = WEIGHTS / "starter-quality.safetensors", write_quality(tmp_path / "quality.safetensors")
    output = tmp_path / "out"
    arguments = ["--data", clean, "--restorer", *restorers, "--protocol", "quality", "--qualities", 20, "--output"]
    assert evaluate(monkeypatch, *arguments, output, "--device", "cpu") == 1
    shown, page = capsys.readouterr(), (output / "report.html").read_text(encoding="utf-8")
    assert "Not measured" not in shown.out + page and "0picture" not in shown.err and "What was measured" not in page
    assert shown.out.count("left out: broken.png") == 1 and page.count("<li>broken.png: ") == 1
    assert "<tr><th>JPEG quality</th><th>starter-quality</th><th>quality</th></tr>" in page
    assert page.count("<b>") == 1 and "| JPEG quality |" in shown.out
    assert "Rings" not in page
    evaluate(monkeypatch, *arguments, output, "--device", "cpu", "--trained-qualities", 20)
    assert "Rings are qualities" in (output / "report.html").read_text(encoding="utf-8")


def test_prompts_are_laid_out_by_quality(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="draws the map: pip install scikit-learn")
    restorers = (
        write_tiny_codiff(tmp_path / "codiff.safetensors"), write_saipe(tmp_path / "saipe.safetensors"),
        write_cave(tmp_path / "cave.safetensors"),
    )  # fmt: skip
    output = tmp_path / "out"
    assert evaluate(monkeypatch, "--data", clean, "--restorer", *restorers, "--protocol", "embeddings", "--output",
                    output, "--device", "cpu") == 0  # fmt: skip
    maps = found(output, "embeddings")
    assert [entry["restorer"] for entry in maps] == ["codiff", "saipe", "cave"]
    for entry in maps:
        assert len(entry["points"]) == 2 * 5 and entry["chance"] == 0.2 and 0 <= entry["same_quality"] <= 1
        assert len({(point["x"], point["y"]) for point in entry["points"]}) == 10
    assert "Prompts of saipe" in (output / "report.html").read_text(encoding="utf-8")


def test_the_share_of_neighbours_of_the_same_quality() -> None:
    """All where prompts point to their quality, none where they point away from it, whatever the picture adds."""
    directions = np.eye(3)
    looks = [Look(picture, quality, Seen(None, None)) for picture in range(6) for quality in range(3)]
    pointing = np.stack([directions[look.quality] + 0.01 * look.picture for look in looks])
    assert same_quality_share(looks, pointing) == 1
    own = np.stack([directions[(look.quality + look.picture) % 3] for look in looks])

    def at(look: Look) -> int:
        return (look.quality + look.picture) % 3

    alike = [
        [other.quality == look.quality for other in looks
         if other.picture != look.picture and at(other) == at(look)]
        for look in looks
    ]  # fmt: skip
    by_hand = np.mean([np.mean(row) for row in alike])
    assert by_hand == pytest.approx(0.2)
    assert same_quality_share(looks, own) < 0.5
