"""The protocols `quality` and `embeddings` of `python -m training evaluate`."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from training.evaluate import seen_protocols
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
    assert "Not measured" not in shown.out + page and "0picture [" not in shown.err and "What was measured" not in page
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
        assert len(entry["points"]) == 2 * 5 and entry["chance"] == 0.2
        assert entry["same_quality"] == pytest.approx(0.2), "of two pictures all five of the other one are the nearest"
        assert len({(point["x"], point["y"]) for point in entry["points"]}) == 10
    assert "Prompts of saipe" in (output / "report.html").read_text(encoding="utf-8")


@dataclass
class Network:
    """Passes for one that tells qualities and makes prompts, one call after the other; the last go round again."""

    answers: Sequence[Seen]
    calls: int = 0

    def __call__(self, _: torch.Tensor) -> Seen:
        self.calls += 1
        return self.answers[(self.calls - 1) % len(self.answers)]


def test_errors_and_their_mean_are_those_of_what_is_told(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pictures at two qualities; errors that cancel out are in the mean error alone."""
    told = {("a", 20): 15.0, ("a", 60): 62.0, ("b", 20): 30.0, ("b", 60): 58.0}
    network = Network([Seen(value, None) for value in told.values()])
    monkeypatch.setattr(seen_protocols, "load_seeing", lambda restorer, device: network)
    output = tmp_path / "out"
    assert evaluate(monkeypatch, "--data", clean, "--restorer", write_quality(tmp_path / "q.safetensors"), "--protocol",
                    "quality", "--qualities", 20, 60, "--output", output, "--device", "cpu") == 0  # fmt: skip
    figures = [(row["quality"], row["error"], row["bias"]) for row in found(output, "quality")]
    assert figures == [(20, 7.5, 2.5), (60, 2.0, 0.0)]


def test_results_of_one_picture_are_json_that_others_read(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """NaN is none: many readers refuse the whole file for it. One picture has no neighbours to compare prompts with."""
    pytest.importorskip("sklearn", reason="draws the map: pip install scikit-learn")
    output, restorer = tmp_path / "out", write_tiny_codiff(tmp_path / "codiff.safetensors")
    assert evaluate(monkeypatch, "--data", clean, "--limit", 1, "--restorer", restorer, "--protocol", "single",
                    "embeddings", "--qualities", 5, 10, 20, 30, 40, 50, "--metrics", "psnr", "--output", output,
                    "--device", "cpu") == 0  # fmt: skip

    def refuse(constant: str) -> None:
        raise AssertionError(f"results.json has {constant}")

    results = json.loads((output / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert results["embeddings"][0]["same_quality"] is None and len(results["rows"]) == 2 * 6
    for text in (capsys.readouterr().out, (output / "report.html").read_text(encoding="utf-8")):
        assert "There is no prompt of another picture" in text and "nan" not in re.sub(r"base64,\S+", "", text)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def test_the_share_of_neighbours_of_the_same_quality() -> None:
    """All where prompts point to their quality; one of five where they turn with the picture, every third alike."""
    directions = np.eye(3)
    looks = [Look(picture, quality, Seen(None, None)) for picture in range(6) for quality in range(3)]
    pointing = np.stack([directions[look.quality] + 0.01 * look.picture for look in looks])
    assert same_quality_share(looks, pointing) == 1
    turned = np.stack([directions[(look.quality + look.picture) % 3] for look in looks])
    assert same_quality_share(looks, turned) == pytest.approx(0.2)


def test_neighbours_are_the_five_nearest_of_other_pictures_by_cosine() -> None:
    """Against a search look by look; lengths do not count, nor do the picture's own prompts."""
    generator = np.random.default_rng(0)
    looks = [Look(picture, quality, Seen(None, None)) for picture in range(7) for quality in (5, 10, 20, 40)]
    vectors = generator.normal(size=(len(looks), 6)) * generator.uniform(0.1, 10, size=(len(looks), 1))
    vectors += [3 * np.eye(6)[look.picture % 6] + 0.5 * np.eye(6)[look.quality % 6] for look in looks]
    same = []
    for number, look in enumerate(looks):
        others = [other for other in range(len(looks)) if looks[other].picture != look.picture]
        nearest = sorted(others, key=lambda other: -cosine(vectors[number], vectors[other]))[:5]
        same += [looks[other].quality == look.quality for other in nearest]
    assert 0.1 < np.mean(same) < 0.9
    assert same_quality_share(looks, vectors) == pytest.approx(np.mean(same))
