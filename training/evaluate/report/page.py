"""The page itself: headings, tables, plots and sliders, as one HTML text without anything from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from html import escape
from string import Template
from typing import Any

from training.evaluate.examples import Example
from training.evaluate.metrics import MEANINGS
from training.evaluate.protocols import PICTURE_PROTOCOLS
from training.evaluate.report.plots import kind_of, plot_map, plot_metric, plot_quality
from training.evaluate.report.style import PAGE
from training.evaluate.results import MetricFacts, Results, Row
from training.evaluate.tables import (
    arrow,
    best_of,
    by_quality,
    cell,
    columns_of,
    condition_head,
    error_cell,
    how_many,
    neighbours,
)

ExamplesOf = Callable[[Row], Sequence[Example]]
"""The pictures to show of a row."""


def to_html(results: Results, examples_of: ExamplesOf) -> str:
    """The whole report.

    Args:
        results: What was found.
        examples_of: Pictures of a row.
    """
    sections = [_protocol(results, protocol) for protocol in results.protocols]
    if results.quality:
        sections.append(_quality(results))
    sections += [_map(embedded) for embedded in results.embeddings]
    sections += [_pictures(results, examples_of), _measures(results)]
    title = f"Restorers on {results.facts['data']}"
    return Template(PAGE).substitute(
        title=escape(title), facts=_facts(results), body="\n".join(section for section in sections if section)
    )


def _facts(results: Results) -> str:
    facts = results.facts
    lines = [
        f"{facts['pictures']} pictures of {facts['data']}; {facts['date']}, {facts['device']}, torch {facts['torch']}",
        *(f"{restorer['label']}: family {restorer['family']}, licence {restorer['license']}, {restorer['file']}"
          for restorer in results.restorers),
        f"Command: {facts['command']}",
    ]  # fmt: skip
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _protocol(results: Results, protocol: str) -> str:
    rows = [row for row in results.rows if row.protocol == protocol]
    told = PICTURE_PROTOCOLS[protocol]
    table = _table(results, protocol)
    note = "<p class=note>Lines in italics are figures that papers printed for the same pictures.</p>"
    note *= "<tr class=published>" in table
    kind = kind_of(protocol)
    plots = [plot_metric(rows, metric, kind) for metric in columns_of(results, protocol)] if kind else []
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots if plot)
    return (
        f"<section><h2>{escape(told.title)}</h2><p>{escape(told.about)}</p>{table}{note}"
        f"<div class=plots>{figures}</div></section>"
    )


def _table(results: Results, protocol: str) -> str:
    rows = [row for row in results.rows if row.protocol == protocol]
    metrics = columns_of(results, protocol)
    evaluations = any((row.evaluations or 0) > 1 for row in rows)
    heads = [condition_head(rows), "restorer", *(f"{metric.label} {arrow(metric)}" for metric in metrics)]
    heads += ["seconds per picture"]
    heads += ["evaluations"] if evaluations else []
    body: list[str] = []
    for condition in dict.fromkeys(row.condition for row in rows):
        together = [row for row in rows if row.condition == condition]
        body += [_row(row, together, metrics, evaluations=evaluations) for row in together]
        body += _published(results, protocol, condition, metrics, len(heads))
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _row(row: Row, together: Sequence[Row], metrics: Sequence[MetricFacts], *, evaluations: bool) -> str:
    cells = [f"<td>{escape(row.condition)}</td><td>{escape(row.system)}{how_many(row, together)}</td>"]
    for metric in metrics:
        best = metric.name in row.means and row.means[metric.name] == best_of(together, metric)
        cells.append(_number(cell(row, metric), best=best))
    cells.append(f"<td class=number>{row.seconds:.2f}</td>")
    if evaluations:
        cells.append(f"<td class=number>{f'{row.evaluations:.0f}' if row.evaluations else '-'}</td>")
    first = " class=first" if row is together[0] else ""
    return f"<tr{first}>{''.join(cells)}</tr>"


def _published(
    results: Results, protocol: str, condition: str, metrics: Sequence[MetricFacts], columns: int
) -> Iterator[str]:
    for row in results.published.get(protocol, []):
        values: dict[str, float] = row["values"]
        if row["condition"] != condition or not any(metric.name in values for metric in metrics):
            continue
        cells = [f"<td>{escape(condition)}</td><td>{escape(row['method'])} ({escape(row['source'])})</td>"]
        cells += [
            f"<td class=number>{values.get(metric.name, '')}</td>" for metric in metrics
        ]  # fmt: skip
        cells.append("<td></td>" * (columns - 2 - len(metrics)))
        yield f"<tr class=published>{''.join(cells)}</tr>"


def _quality(results: Results) -> str:
    names = list(dict.fromkeys(row["restorer"] for row in results.quality))
    body = []
    for quality, rows in by_quality(results).items():
        least = min(row["error"] for row in rows.values()) if len(rows) > 1 else None
        cells = "".join(_number(error_cell(rows[name]), best=rows[name]["error"] == least) for name in names)
        body.append(f"<tr><td>{quality}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("JPEG quality", *names))
    rings = " Rings are qualities that were not trained on."
    rings *= any(row["trained"] is not None for row in results.quality)
    return (
        "<section><h2>The quality that is told</h2><p>Mean absolute error of the JPEG quality, in brackets the mean "
        f"error (CODiff, Fig. 7).{rings}</p>"
        f"<div class=plots><figure>{plot_quality(results.quality)}</figure></div>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _number(text: str, *, best: bool) -> str:
    return f"<td class=number>{f'<b>{text}</b>' if best else text}</td>"


def _map(embedded: dict[str, Any]) -> str:
    return (
        f"<section><h2>Prompts of {escape(embedded['restorer'])}</h2><p>The mean of each picture's tokens, as t-SNE "
        f"lays them out (CODiff, Fig. 4; SODiff, Fig. 3). {neighbours(embedded)}</p>"
        f"<div class=plots><figure>{plot_map(embedded['points'])}</figure></div></section>"
    )


def _pictures(results: Results, examples_of: ExamplesOf) -> str:
    """A group of sliders for each restorer and condition; the first one of each restorer is open."""
    shown: set[tuple[str, str]] = set()
    opened: set[str] = set()
    parts = []
    for row in results.rows:
        if (row.system, row.condition) in shown or not (examples := examples_of(row)):
            continue
        shown.add((row.system, row.condition))
        sliders = "".join(_slider(example, results.metric(example.metric)) for example in examples)
        state = "" if row.restorer in opened else " open"
        opened.add(row.restorer)
        kind = "JPEG quality " if condition_head([row]) == "JPEG quality" else ""
        parts.append(
            f"<details{state}><summary>{escape(row.system)}, {kind}{escape(row.condition)}</summary>"
            f"<div class=sliders>{sliders}</div></details>"
        )
    if not parts:
        return ""
    with_pictures = {condition for _, condition in shown}
    without = [label for label in dict.fromkeys(row.condition for row in results.rows) if label not in with_pictures]
    others = f" There are none for: {escape(', '.join(without))}." if without else ""
    return (
        "<section><h2>Pictures</h2><p>Left of the line the JPEG, right of it the restoration; drag to move it, and "
        f"hold <i>original</i> to compare. Large pictures show their middle.{others}</p>{''.join(parts)}</section>"
    )


def _slider(example: Example, metric: MetricFacts) -> str:
    original = ""
    if example.clean is not None:
        original = f'<img class=clean alt=original src="{_data(example.clean)}"><button type=button>original</button>'
    return (
        "<figure class=slider><div class=stack>"
        f'<img class=before alt=JPEG src="{_data(example.before)}">'
        f'<img class=after alt=restored src="{_data(example.after)}">{original}'
        '<input type=range min=0 max=100 value=50 aria-label="where the restoration begins"></div>'
        f"<figcaption>{escape(caption(example, metric))}</figcaption></figure>"
    )


def caption(example: Example, metric: MetricFacts) -> str:
    """Which picture it is, why it is shown, and how it differs from the JPEG."""
    why = " (one of those improved least)" if example.worst else " (one of the first)" if example.first else ""
    amount = f"{abs(example.gain):.{metric.digits}f}"
    higher = (example.gain > 0) == (metric.better == "higher")
    difference = f"{amount}{metric.unit} {'higher' if higher else 'lower'} than the JPEG's"
    how = difference if float(amount) else "the same as the JPEG's"
    return f"{example.picture}{why}: {metric.label} {how}"


def _measures(results: Results) -> str:
    measured = "".join(
        f"<li>{escape(metric.label)} {arrow(metric)}: {escape(MEANINGS[metric.name])} ({escape(metric.variant)})</li>"
        for metric in results.metrics
    )
    missing = "".join(f"<li>{escape(gone.label)}: {escape(gone.reason)}</li>" for gone in results.missing)
    left_out = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in results.left_out)
    parts = {"What was measured": measured, "Not measured": missing, "Left out": left_out}
    return "".join(
        f"<section><h2>{title}</h2><ul>{entries}</ul></section>" for title, entries in parts.items() if entries
    )


def _data(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"
