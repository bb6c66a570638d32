"""Plots as SVG text: figures against quality, bytes or samples, errors of the quality, maps of prompts."""

from __future__ import annotations

import io
import itertools
import re
import zlib
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from training.evaluate.protocols import PICTURE_PROTOCOLS
from training.evaluate.results import MetricFacts, Row
from training.evaluate.tables import arrow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (4.6, 3.3)
_DASHES = (":", "-.", "--", (0, (1, 4)))
"""Of level lines, which stand for one figure."""
_AXES = {
    "quality": "JPEG quality",
    "rate": "bits per pixel",
    "value": "samples",
}


def plot_metric(rows: Sequence[Row], metric: MetricFacts, kind: str) -> str | None:
    """A line for each restorer; None where there are not two points to join.

    Args:
        rows: Of one protocol.
        metric: What is on the vertical axis.
        kind: What is on the horizontal one: `quality`, `rate` or `value` (samples).
    """
    conditions = list(dict.fromkeys(row.condition for row in rows)) if kind == "value" else []
    lines = {}
    for name in dict.fromkeys(_line_of(row, kind, conditions) for row in rows):
        found = [(_place(row, kind), row.means[metric.name]) for row in rows
                 if _line_of(row, kind, conditions) == name and metric.name in row.means]  # fmt: skip
        lines[name] = sorted((x, y) for x, y in found if x is not None)
    if max(map(len, lines.values()), default=0) < 2:
        return None
    figure, axes = _figure()
    dashes = itertools.cycle(_DASHES)
    for name, points in lines.items():
        if len(points) == 1:
            axes.axhline(points[0][1], color="0.55", linestyle=next(dashes), label=_label(name))
        elif points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=_label(name), **_style(name))
    axes.set_xlabel(_AXES[kind])
    axes.set_ylabel(f"{metric.label} {arrow(metric)}")
    if kind == "value":
        axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    return _svg(figure, f"{metric.label} against {_AXES[kind]}")


def plot_quality(rows: Sequence[dict[str, Any]]) -> str:
    """The mean absolute error of the quality, a line for each restorer; qualities that were not trained are rings."""
    figure, axes = _figure()
    for name in dict.fromkeys(row["restorer"] for row in rows):
        own = sorted((row for row in rows if row["restorer"] == name), key=lambda row: row["quality"])
        (line,) = axes.plot([row["quality"] for row in own], [row["error"] for row in own], marker="o", markersize=4,
                            label=_label(name))  # fmt: skip
        unseen = [row for row in own if row["trained"] is False]
        axes.plot([row["quality"] for row in unseen], [row["error"] for row in unseen], "o", markersize=6,
                  markerfacecolor="white", color=line.get_color())  # fmt: skip
    axes.set_xlabel(_AXES["quality"])
    axes.set_ylabel("mean absolute error ↓")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return _svg(figure, "error of the quality that is told against JPEG quality")


def plot_map(points: Sequence[dict[str, Any]]) -> str:
    """Prompts in two dimensions, coloured by the quality of their JPEGs."""
    from matplotlib import colormaps

    figure, axes = _figure()
    qualities = sorted({point["quality"] for point in points})
    for number, quality in enumerate(qualities):
        own = [point for point in points if point["quality"] == quality]
        color = colormaps["viridis"](number / max(1, len(qualities) - 1))
        axes.scatter([point["x"] for point in own], [point["y"] for point in own], s=9, color=color, label=f"{quality}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(title="quality", fontsize=7, title_fontsize=7)
    return _svg(figure, "map of prompts, coloured by JPEG quality")


def kind_of(protocol: str) -> str | None:
    """What is on the horizontal axis of a protocol's plots."""
    return PICTURE_PROTOCOLS[protocol].plots


def _line_of(row: Row, kind: str, conditions: Sequence[str]) -> str:
    """The name of a row's line; several conditions of one restorer are lines of their own where samples vary."""
    if kind != "value":
        return row.system
    return f"{row.restorer}, quality {row.condition}" if len(conditions) > 1 else row.restorer


def _label(name: str) -> str:
    """As matplotlib shows it unchanged: no formula between dollars, and not hidden for its first character."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in name).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _place(row: Row, kind: str) -> float | None:
    if kind == "rate":
        return row.bits_per_pixel
    if kind == "value":
        return row.value if row.value is not None else 1.0
    return None if row.quality is None else float(row.quality)


def _style(name: str) -> dict[str, Any]:
    return {"color": "0.35", "linestyle": "--"} if name == "JPEG" else {}


def _figure() -> tuple[Figure, Axes]:
    """A figure that belongs to no window.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"the report's plots: matplotlib cannot be imported ({error}). Run `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Figure, about: str) -> str:
    """The `<svg>` element alone, with what it shows in words; text stays text.

    The same figure gives the same bytes; the names inside of it are those of no other figure, so that several fit into
    one page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jpeg-restorer", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*pt"', r"\1", text[text.index("<svg") :], count=1)
    prefix = f"f{zlib.crc32((about + text).encode()):08x}-"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1)
