"""What stands in the tables of an evaluation: names as text, the best in bold, rows of fewer pictures, other papers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pytest

from tests.conftest import write_regression
from training.evaluate import command, runner
from training.evaluate.examples import Example
from training.evaluate.metrics import MissingMetric
from training.evaluate.options import EvaluateOptions
from training.evaluate.published import PublishedRow, to_plain
from training.evaluate.report.page import to_html
from training.evaluate.results import MetricFacts, Results, Row
from training.evaluate.tables import to_text

PSNR = MetricFacts("psnr", "PSNR", "RGB", "higher", 2)
LPIPS = MetricFacts("lpips_alex", "LPIPS", "AlexNet", "lower", 4)
NASTY = '<script>alert("1")</script>&\'$x'


def row(
    system: str, psnr: float, lpips: float, *, quality: int = 10, pictures: int = 29, counts: dict | None = None
) -> Row:
    means = {"psnr": psnr, "lpips_alex": lpips}
    return Row("single", str(quality), quality, system, system, None, pictures, means, counts or {}, 1.5, None, None)


def results(rows: Sequence[Row], name: str = "LIVE1", **more: object) -> Results:
    facts = {"data": name, "pictures": 29, "date": "", "device": "cpu", "torch": "", "command": f"evaluate {name}"}
    restorer = {"label": name, "file": f"{name}.safetensors", "family": "driftrec", "license": name}
    return Results(facts, [restorer], [PSNR, LPIPS], [], rows=list(rows), **more)  # pyright: ignore[reportArgumentType]


def page(found: Results) -> str:
    pytest.importorskip("matplotlib", reason="draws the report's plots: pip install matplotlib")
    return to_html(found, lambda _: [])


def cells(html: str) -> list[list[str]]:
    """The rows of the page's first table."""
    body = re.findall(r"<tbody>(.*?)</tbody>", html)[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr[^>]*>(.*?)</tr>", body)]


def test_names_are_text_wherever_they_stand() -> None:
    """Names of folders, restorers and pictures, licences and reasons come from files of anybody."""
    told = [{"restorer": NASTY, "quality": quality, "error": 1.0, "bias": 0.0, "trained": None, "pictures": 1}
            for quality in (10, 20)]  # fmt: skip
    points = [{"x": x, "y": 1.0, "quality": 10 * x, "picture": NASTY} for x in (1, 2)]
    embedded = {"restorer": NASTY, "same_quality": 0.5, "chance": 0.5, "points": points}
    found = results([row(NASTY, 25, 0.5), row(NASTY, 26, 0.4, quality=20)], NASTY, quality=told,
                    embeddings=[embedded], left_out=[(NASTY, NASTY)])  # fmt: skip
    found.missing.append(MissingMetric("NIQE", NASTY))
    pytest.importorskip("matplotlib", reason="draws the report's plots: pip install matplotlib")
    html = to_html(found, lambda _: [Example(NASTY, True, True, "psnr", 1.0, b"", b"", b"")])
    assert html.count("<script>") == 1, "that of the page itself"
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\((?:&quot;|\")1(?:&quot;|\")\)&lt;/script&gt;&amp;", "", html)
    for where in ("<h1>Restorers on {}</h1>", "<td>{}</td>", "<h2>Prompts of {}</h2>", "<li>{}: {}</li>", "<th>{}</th>",
                  "<li>NIQE: {}</li>", "<summary>{}, JPEG quality 10</summary>", "<figcaption>{} ("):  # fmt: skip
        assert where.replace("{}", escape(NASTY)) in html, where


def test_the_best_of_each_condition_is_bold() -> None:
    """The highest PSNR and the lowest LPIPS, condition by condition; of equal ones all; of one alone none."""
    rows = [row("JPEG", 25, 0.5), row("one", 27, 0.4), row("two", 26, 0.3), row("JPEG", 29, 0.2, quality=20)]
    rows += [row("one", 29, 0.1, quality=20), row("one", 30, 0.1, quality=40)]
    bold = [[cell for cell in line if "<b>" in cell] for line in cells(page(results(rows)))]
    assert bold == [[], ["<b>27.00</b>"], ["<b>0.3000</b>"], ["<b>29.00</b>"], ["<b>29.00</b>", "<b>0.1000</b>"], []]


def test_rows_of_fewer_pictures_say_so_and_none_is_the_best() -> None:
    """A restorer that failed on a hard picture has a better mean for it; other conditions are not touched."""
    rows = [row("JPEG", 25, 0.5), row("fails", 28, 0.3, pictures=28), row("JPEG", 29, 0.2, quality=20),
            row("fails", 30, 0.1, quality=20)]  # fmt: skip
    found = results(rows)
    lines = cells(page(found))
    assert [line[1] for line in lines] == ["JPEG", "fails (28 of 29 pictures)", "JPEG", "fails"]
    assert [sum("<b>" in cell for cell in line) for line in lines] == [0, 0, 0, 2]
    names = [line.split("|")[2].strip() for line in to_text(found).splitlines() if line.startswith(("| 10", "| 20"))]
    assert names == ["JPEG", "fails (28 of 29 pictures)", "JPEG", "fails"]


def test_a_metric_of_fewer_pictures_has_no_best() -> None:
    """One that says nothing about some pictures of one row; the other metrics are compared."""
    rows = [row("JPEG", 25, 0.5), row("mine", 28, 0.3, counts={"psnr": 27})]
    _, mine = cells(page(results(rows)))
    assert mine[2:4] == ["28.00 (27 of 29)", "<b>0.3000</b>"]


def test_a_restorer_that_fails_on_a_picture_is_marked_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the failure to the table: the picture is out of this restorer's mean alone."""
    from PIL import Image
    from skimage import data

    for name, left in (("a", 200), ("b", 100)):
        Image.fromarray(data.astronaut()[:48, left : left + 64]).save(tmp_path / f"{name}.png")
    real = runner.run_system

    def failing(restore: object, degraded: object, **settings: object) -> object:
        if restore is not None and not calls:
            calls.append(restore)
            raise ValueError("the picture is odd")
        return real(restore, degraded, **settings)  # pyright: ignore[reportArgumentType, reportCallIssue]

    calls: list[object] = []
    monkeypatch.setattr(runner, "run_system", failing)
    mine = write_regression(tmp_path / "mine.safetensors")
    found = command.evaluate(EvaluateOptions((mine,), tmp_path, output=tmp_path / "out", qualities=(10,),
                                             metrics=("psnr", "bef"), examples=0, device="cpu"))  # fmt: skip
    assert found is not None and len(found.left_out) == 1
    assert "mine (1 of 2 pictures)" in to_text(found) and "<b>" not in page(found)


def test_figures_of_papers_stand_below_ours_of_the_same_condition() -> None:
    """In the columns of their metrics, with their source, in italics; nothing where they have none of the columns."""
    papers = [
        PublishedRow("single", "10", "CODiff", "CODiff, Table 1", {"lpips_alex": 0.1428, "musiq": 74.39}),
        PublishedRow("single", "20", "FBCNN", "CODiff, Table 1", {"musiq": 73.96}),
        PublishedRow("single", "5", "SODiff", "SODiff, Table 1", {"lpips_alex": 0.2229}),
    ]
    found = results([row("JPEG", 25, 0.5), row("mine", 26, 0.4), row("JPEG", 29, 0.3, quality=20)])
    assert "in italics" not in page(found)
    found.published["single"] = [to_plain(paper) for paper in papers]
    html = page(found)
    assert [line[:4] for line in cells(html)] == [
        ["10", "JPEG", "25.00", "0.5000"], ["10", "mine", "<b>26.00</b>", "<b>0.4000</b>"],
        ["10", "CODiff (CODiff, Table 1)", "", "0.1428"], ["20", "JPEG", "29.00", "0.3000"],
    ]  # fmt: skip
    assert len({len(line) for line in cells(html)}) == 1, "a row lacks cells"
    assert html.count("<tr class=published>") == 1 and "Lines in italics are figures that papers printed" in html
