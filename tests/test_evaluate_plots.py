"""The plots of the report: which points are joined, how restorers are named, and that several fit into one page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from training.evaluate.report.plots import plot_map, plot_metric, plot_quality
from training.evaluate.results import MetricFacts, Row

pytest.importorskip("matplotlib", reason="draws the report's plots: pip install matplotlib")
PSNR = MetricFacts("psnr", "PSNR", "RGB", "higher", 3)


def row(system: str, restorer: str, quality: int, psnr: float, value: float | None = None) -> Row:
    return Row("single", str(quality), quality, system, restorer, value, 3, {"psnr": psnr}, {}, 1.0, quality / 50, None)


def texts(svg: str) -> list[str]:
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    ]


def joined(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each curve that has more than two."""
    found = [re.findall(r"[ML] (\S+) (\S+)", path) for path in re.findall(r'<path d="([^"]*)" clip-path', svg)]
    return [[(float(x), float(y)) for x, y in points] for points in found if len(points) > 2]


def averaging() -> list[Row]:
    """Of two qualities, the JPEG first, as an evaluation has them."""
    rows = []
    for quality, psnr in ((10, 25.0), (20, 28.0)):
        rows += [row("JPEG", "JPEG", quality, psnr - 1)]
        rows += [row(f"drift, {count} averaged", "drift", quality, psnr + count / 10, count) for count in (1, 2, 4)]
    return rows


def test_averages_of_each_quality_are_a_line_of_their_own() -> None:
    """Joined to one, the line went back and forth between the qualities."""
    svg = plot_metric(averaging(), PSNR, "value") or ""
    curves = joined(svg)
    assert [len(points) for points in curves] == [3, 3]
    for points in curves:
        assert [x for x, _ in points] == sorted({x for x, _ in points})
    named = [text for text in texts(svg) if "quality" in text]
    assert named == ["JPEG, quality 10", "drift, quality 10", "JPEG, quality 20", "drift, quality 20"]
    strokes = re.findall(r"stroke-dasharray: ([^;]*);[^\"]*stroke: #8c8c8c", svg)
    assert len(set(strokes)) == 2, "the two JPEGs look alike"


def test_averages_of_one_quality_are_named_by_their_restorer() -> None:
    svg = plot_metric([one for one in averaging() if one.quality == 10], PSNR, "value") or ""
    assert {"JPEG", "drift"} <= set(texts(svg)) and [len(points) for points in joined(svg)] == [3]


NAMES = ("a$_$b", "$x^2", "_mine", r"back\$slash", 'a<b>&"c"', "tab\tand\udce9", "__")


@pytest.mark.parametrize("name", NAMES)
def test_restorers_are_named_in_the_legend_as_their_files_are(name: str) -> None:
    """Dollars are no formulae, a first underscore hides nothing, and what cannot be shown is a replacement."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in name)
    svg = plot_metric([row(name, name, quality, 25 + quality) for quality in (10, 20)], PSNR, "quality") or ""
    assert shown in [text.lstrip("\u200b") for text in texts(svg)]
    told = [{"restorer": name, "quality": quality, "error": 1.0, "trained": None} for quality in (10, 20)]
    assert shown in [text.lstrip("\u200b") for text in texts(plot_quality(told))]


def plots() -> list[str]:
    ssim = MetricFacts("ssim", "SSIM <7>", "RGB", "higher", 3)
    rows = [row(name, name, quality, 25 + quality) for name in ("JPEG", "mine") for quality in (10, 20)]
    both = [Row(**{**vars(one), "means": {"psnr": 1.0, "ssim": 1.0}}) for one in rows]
    told = [{"restorer": "mine", "quality": quality, "error": 1.0, "trained": False} for quality in (10, 20)]
    points = [{"x": quality, "y": 1.0, "quality": quality, "picture": "a"} for quality in (10, 20)]
    found = [plot_metric(both, metric, kind) for metric in (PSNR, ssim) for kind in ("quality", "rate")]
    return [plot or "" for plot in (*found, plot_quality(told), plot_map(points))]


def test_plots_on_one_page_share_no_names_and_refer_to_their_own() -> None:
    """A clipping path of another plot may be hidden with it, or be of another size."""
    every: list[str] = []
    for svg in plots():
        own = re.findall(r'\bid="([^"]+)"', svg)
        referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert referred and {first or second for first, second in referred} <= set(own)
        every += own
    assert len(every) == len(set(every))
    assert plots() == plots(), "the same figures give the same bytes"


def test_plots_say_in_words_what_they_show() -> None:
    """For those who cannot see them."""
    roots = [ElementTree.fromstring(svg) for svg in plots()]
    assert {root.get("role") for root in roots} == {"img"}
    assert [root.get("aria-label") for root in roots] == [
        "PSNR against JPEG quality", "PSNR against bits per pixel", "SSIM <7> against JPEG quality",
        "SSIM <7> against bits per pixel", "error of the quality that is told against JPEG quality",
        "map of prompts, coloured by JPEG quality",
    ]  # fmt: skip
