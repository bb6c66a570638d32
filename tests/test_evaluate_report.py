"""The report of `python -m training evaluate` as people read it: captions, headings, which groups are open."""

from __future__ import annotations

import csv
import io
import re
import sys
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from tests.conftest import write_regression
from training.__main__ import main
from training.evaluate.examples import Example
from training.evaluate.metrics import LABELS, MEANINGS
from training.evaluate.report.page import caption, to_html
from training.evaluate.results import MetricFacts, Results, Row
from training.evaluate.tables import condition_head, to_text

PSNR = MetricFacts("psnr", "PSNR", "RGB", "higher", 3)
LPIPS = MetricFacts("lpips_squeeze", "LPIPS", "v0.1", "lower", 4)


def example(gain: float, *, first: bool = False, worst: bool = False) -> Example:
    return Example("a.webp", first, worst, "psnr", gain, b"before", b"after", None)


def row(condition: str, system: str, *, protocol: str = "single", quality: int | None = 10) -> Row:
    restorer = system.partition(",")[0]
    return Row(protocol, condition, quality, system, restorer, None, 3, {"psnr": 30.0}, {}, 1.5, None, None)


def results(rows: list[Row]) -> Results:
    facts = {"data": "LIVE1", "pictures": 3, "date": "", "device": "cpu", "torch": "", "command": ""}
    return Results(facts, [], [PSNR], [], rows=rows)


@pytest.mark.parametrize(
    ("gain", "metric", "said"),
    [
        (0.0694, LPIPS, "LPIPS 0.0694 lower than the JPEG's"),
        (-0.01, LPIPS, "LPIPS 0.0100 higher than the JPEG's"),
        (0.52, PSNR, "PSNR 0.520 dB higher than the JPEG's"),
        (-0.52, PSNR, "PSNR 0.520 dB lower than the JPEG's"),
        (-0.0001, PSNR, "PSNR the same as the JPEG's"),
    ],
)
def test_captions_say_how_the_figure_changed(gain: float, metric: MetricFacts, said: str) -> None:
    assert caption(example(gain), metric) == f"a.webp: {said}"


def test_captions_say_why_a_picture_is_shown_and_the_worst_goes_first() -> None:
    assert caption(example(1, first=True), PSNR).startswith("a.webp (one of the first): ")
    assert caption(example(1, worst=True), PSNR).startswith("a.webp (one of those improved least): ")
    assert caption(example(1, first=True, worst=True), PSNR).startswith("a.webp (one of those improved least): ")


def test_a_first_picture_that_is_the_worst_is_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the gains of all pictures, as the CSV has them; the next worst fill up the number."""
    clean, output = tmp_path / "clean", tmp_path / "out"
    clean.mkdir()
    for name, left in zip("abcde", (200, 100, 0, 300, 400), strict=True):
        Image.fromarray(data.astronaut()[:48, left : left + 64]).save(clean / f"{name}.png")
    restorer = write_regression(tmp_path / "mine.safetensors")
    arguments = ["--data", clean, "--restorer", restorer, "--output", output, "--qualities", 10, "--metrics", "psnr"]
    monkeypatch.setattr(sys, "argv", ["training", "evaluate", *map(str, arguments), "--device", "cpu"])
    assert main() == 0
    lines = list(csv.DictReader(io.StringIO((output / "results.csv").read_text(encoding="utf-8"))))
    psnr = {(line["system"], line["picture"]): float(line["psnr"]) for line in lines}
    gains = {name: psnr["mine", name] - psnr["JPEG", name] for name in sorted({line["picture"] for line in lines})}
    by_gain = sorted(gains, key=lambda name: gains[name])
    shown = [*gains][:2] + [name for name in by_gain if name not in [*gains][:2]][:2]
    assert by_gain[0] in shown[:2], "the pictures no longer suit this test"
    expected = [caption(Example(name, name in shown[:2], name in by_gain[:2], "psnr", gains[name], b"", b"", None),
                        PSNR) for name in shown]  # fmt: skip
    page = (output / "report.html").read_text(encoding="utf-8")
    assert [unescape(text) for text in re.findall("<figcaption>(.*?)</figcaption>", page)] == expected


def test_the_first_group_of_every_restorer_is_open() -> None:
    rows = [row(condition, system, quality=int(condition)) for condition in ("10", "20") for system in ("one", "two")]
    rows += [row("10", f"drift, ode_2m {steps}", protocol="samplers") for steps in (5, 10)]
    page = to_html(results(rows), lambda _: [example(1)])
    groups = re.findall(r"<details( open)?><summary>(.*?)</summary>", page)
    assert [name for is_open, name in groups if is_open] == [
        "one, JPEG quality 10", "two, JPEG quality 10", "drift, ode_2m 5, JPEG quality 10",
    ]  # fmt: skip
    assert len(groups) == 6


def test_conditions_are_headed_by_what_they_are() -> None:
    rows = [row("10", "JPEG"), row("20", "JPEG", quality=20)]
    assert condition_head(rows) == "JPEG quality"
    assert condition_head([*rows, row("30/10", "JPEG")]) == "condition"
    assert condition_head([row("as given", "JPEG", quality=None)]) == "condition"
    found = results(rows)
    assert "| JPEG quality | restorer | PSNR ↑ | s/picture |" in to_text(found)
    page = to_html(found, lambda _: [])
    assert "<th>JPEG quality</th><th>restorer</th><th>PSNR ↑</th><th>seconds per picture</th>" in page
    assert found.to_json()["rows"][0]["condition"] == "10"


def test_every_metric_is_explained() -> None:
    assert list(MEANINGS) == list(LABELS)
    assert f"<li>PSNR ↑: {MEANINGS['psnr']} (RGB)</li>" in to_html(results([row("10", "JPEG")]), lambda _: [])
