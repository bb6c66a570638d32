"""The report of `python -m training evaluate` as people read it: captions, headings, which groups are open."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from training.evaluate.examples import Example, Examples
from training.evaluate.metrics import LABELS, MEANINGS, Metric
from training.evaluate.pictures import Degraded
from training.evaluate.report.page import caption, to_html
from training.evaluate.results import MetricFacts, Results, Row
from training.evaluate.store import Key, Measurement
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


def test_a_first_picture_that_is_the_worst_is_named_so(tmp_path: Path) -> None:
    """By the gains of all pictures; the next worst fill up the number, and those that were taken away are not shown."""
    metric = Metric("psnr", "PSNR", "RGB", "higher", 3, reference=True, measure=lambda picture, clean: 0.0)
    examples = Examples(tmp_path, 4, metric)
    gains = {"a": -2.0, "b": 3.0, "c": 2.0, "d": -1.0, "e": 0.5}
    picture = torch.zeros(1, 3, 8, 8)
    for name, gain in gains.items():
        keys = [Key(system, "10", "", name, "") for system in ("mine", "JPEG")]
        examples.consider(Measurement(keys[0], {"psnr": 30 + gain}), Measurement(keys[1], {"psnr": 30.0}),
                          Degraded(picture, None, None, None), picture)  # fmt: skip
    found = [(shown.picture, shown.first, shown.worst, shown.gain) for shown in examples.chosen("mine", "10", gains)]
    assert found == [("a", True, True, -2), ("b", True, False, 3), ("d", False, True, -1), ("e", False, False, 0.5)]
    left = [shown.picture for shown in examples.chosen("mine", "10", {"b": 3.0, "e": 0.5})]
    assert left == ["b", "e"]


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
