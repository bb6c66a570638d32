"""Results as text: one table a protocol, as Markdown, which reads well on a screen, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from training.evaluate.protocols import PICTURE_PROTOCOLS
from training.evaluate.results import MetricFacts, Results, Row

_WIDEST_NAME = 44


def to_text(results: Results) -> str:
    """All tables, and what was not measured."""
    parts = [_table(results, protocol) for protocol in results.protocols]
    if results.quality:
        parts.append(_quality_table(results))
    for embedded in results.embeddings:
        parts.append(f"{embedded['restorer']}: {neighbours(embedded)}")
    if results.missing:
        parts.append("\n".join(["Not measured:", *(f"- {gone.label}: {gone.reason}" for gone in results.missing)]))
    if results.left_out:
        parts.append("\n".join(["Left out:", *(f"- {name}: {reason}" for name, reason in results.left_out)]))
    return "\n\n".join(parts)


def columns_of(results: Results, protocol: str) -> list[MetricFacts]:
    """The metrics that have a figure in a protocol."""
    rows = [row for row in results.rows if row.protocol == protocol]
    return [metric for metric in results.metrics if any(metric.name in row.means for row in rows)]


def cell(row: Row, metric: MetricFacts) -> str:
    """A mean as it stands in tables; of how many pictures, where not of all."""
    if metric.name not in row.means:
        return "-"
    of = f" ({row.counts[metric.name]} of {row.pictures})" if metric.name in row.counts else ""
    return f"{row.means[metric.name]:.{metric.digits}f}{of}"


def how_many(row: Row, rows: Sequence[Row]) -> str:
    """To stand behind a row's name: of how many pictures it is, where others under the same condition are of more."""
    most = max(other.pictures for other in rows)
    return "" if row.pictures == most else f" ({row.pictures} of {most} pictures)"


def best_of(rows: Sequence[Row], metric: MetricFacts) -> float | None:
    """The best mean of rows under one condition; None where there is but one, or they are of different pictures."""
    measured = [row for row in rows if metric.name in row.means]
    values = [row.means[metric.name] for row in measured]
    if len(values) < 2 or len({row.counts.get(metric.name, row.pictures) for row in measured}) > 1:
        return None
    return max(values) if metric.better == "higher" else min(values)


def condition_head(rows: Sequence[Row]) -> str:
    """The heading over conditions of one protocol."""
    return "JPEG quality" if all(row.condition == str(row.quality) for row in rows) else "condition"


def by_quality(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Of the protocol `quality`: the quality as it is named in tables -> restorer -> its row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results.quality:
        name = f"{row['quality']}{' (unseen)' if row['trained'] is False else ''}"
        found.setdefault(name, {})[row["restorer"]] = row
    return found


def neighbours(embedded: dict[str, Any]) -> str:
    """Of the protocol `embeddings`: whether prompts lie by quality."""
    if embedded["same_quality"] is None:
        return "There is no prompt of another picture to compare with."
    return (
        f"Of the nearest prompts of other pictures {embedded['same_quality']:.0%} are of the same quality; by chance "
        f"{embedded['chance']:.0%} would be."
    )


def error_cell(row: dict[str, Any]) -> str:
    """The mean absolute error of a quality that is told, in brackets the mean error."""
    return f"{row['error']:.1f} ({row['bias']:+.1f})"


def arrow(metric: MetricFacts) -> str:
    """Which way is better."""
    return "↑" if metric.better == "higher" else "↓"


def _table(results: Results, protocol: str) -> str:
    rows = [row for row in results.rows if row.protocol == protocol]
    metrics = columns_of(results, protocol)
    with_evaluations = any((row.evaluations or 0) > 1 for row in rows)
    head = [condition_head(rows), "restorer", *(f"{metric.label} {arrow(metric)}" for metric in metrics), "s/picture"]
    head += ["evaluations"] if with_evaluations else []
    body = []
    for row in rows:
        name = _short(row.system) + how_many(row, [other for other in rows if other.condition == row.condition])
        line = [row.condition, name, *(cell(row, metric) for metric in metrics), f"{row.seconds:.2f}"]
        body.append(line + ([f"{row.evaluations:.0f}" if row.evaluations else "-"] if with_evaluations else []))
    return "\n".join([f"{PICTURE_PROTOCOLS[protocol].title} ({rows[0].pictures} pictures)", *aligned(head, body)])


def _quality_table(results: Results) -> str:
    names = list(dict.fromkeys(row["restorer"] for row in results.quality))
    body = [[quality, *(error_cell(rows[name]) for name in names)] for quality, rows in by_quality(results).items()]
    title = "Mean absolute error of the JPEG quality that is told, in brackets the mean error"
    return "\n".join([title, *aligned(["JPEG quality", *names], body)])


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, its columns as wide as their longest cell."""
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(text.ljust(width) for text, width in zip(cells, widths, strict=True))} |"

    yield line(head)
    yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    yield from map(line, body)


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST_NAME else f"{name[: _WIDEST_NAME - 3]}..."
