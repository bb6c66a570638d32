"""Means over the pictures, and everything that the report says, as plain values."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from training.evaluate.metrics import MissingMetric
from training.evaluate.store import Measurement

VERSION = 1


@dataclass(frozen=True)
class Row:
    """One restorer under one condition, or the JPEG itself.

    Args:
        protocol: Where it belongs.
        condition: Label of what happened to the pictures.
        quality: Of their last compression, for plots.
        system: Label of the restorer with its settings, or `JPEG`.
        restorer: Label of its file, `JPEG` for the JPEG.
        value: What varies in this protocol: samples, or steps.
        pictures: How many were measured.
        means: Metric -> mean over the pictures that could be measured so.
        counts: How many these were, where not all.
        seconds: A picture.
        bits_per_pixel: Of the JPEGs, mean.
        evaluations: Of the network for a picture, mean, where counted.
    """

    protocol: str
    condition: str
    quality: int | None
    system: str
    restorer: str
    value: float | None
    pictures: int
    means: dict[str, float]
    counts: dict[str, int]
    seconds: float
    bits_per_pixel: float | None
    evaluations: float | None


@dataclass(frozen=True)
class MetricFacts:
    """A metric as the report names it."""

    name: str
    label: str
    variant: str
    better: str
    digits: int

    @property
    def unit(self) -> str:
        """What follows its figures in sentences."""
        return " dB" if self.name.startswith("psnr") else ""


@dataclass(frozen=True)
class Line:
    """One picture of one row, for the CSV."""

    protocol: str
    condition: str
    quality: int | None
    system: str
    measurement: Measurement


@dataclass(frozen=True)
class Told:
    """The quality that a restorer tells of one picture's JPEG, for the CSV."""

    restorer: str
    picture: str
    quality: int
    told: float


@dataclass
class Results:
    """What an evaluation found.

    Args:
        facts: Date, device, versions, data, settings: what a figure is worth nothing without.
        restorers: Label, family, licence and origin of each.
        metrics: What was measured.
        missing: What was not, and why.
        rows: Means.
        lines: Pictures.
        told: Pictures of the protocol `quality`.
        left_out: Pictures that could not be read, and why.
        quality: Rows of the protocol `quality`, see `seeing.py`.
        embeddings: Points of the protocol `embeddings`, see `seeing.py`.
        published: Protocol -> figures of papers that were measured in the same way, see `published.py`.
    """

    facts: dict[str, Any]
    restorers: list[dict[str, Any]]
    metrics: list[MetricFacts]
    missing: list[MissingMetric]
    rows: list[Row] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    quality: list[dict[str, Any]] = field(default_factory=list)
    embeddings: list[dict[str, Any]] = field(default_factory=list)
    published: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def protocols(self) -> list[str]:
        """Those that have rows, in their order."""
        return list(dict.fromkeys(row.protocol for row in self.rows))

    def metric(self, name: str) -> MetricFacts:
        """A metric by its name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def to_json(self) -> dict[str, Any]:
        """As plain values; single pictures are in the CSV."""
        return {
            "version": VERSION,
            **self.facts,
            "restorers": self.restorers,
            "metrics": [asdict(metric) for metric in self.metrics],
            "not_measured": [asdict(metric) for metric in self.missing],
            "pictures_left_out": [{"picture": name, "reason": reason} for name, reason in self.left_out],
            "rows": [asdict(row) for row in self.rows],
            "quality": self.quality,
            "embeddings": self.embeddings,
            "published": self.published,
        }

    def to_csv(self) -> str:
        """A line for each picture under each condition and restorer; the protocol `quality` brings two more columns."""
        names = [metric.name for metric in self.metrics if any(metric.name in line.measurement.values
                                                               for line in self.lines)]  # fmt: skip
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        more = ["quality", "told_quality"] if self.told else []
        writer.writerow(["protocol", "condition", "system", "picture", *names, "seconds", "bits_per_pixel", *more])
        for line in self.lines:
            values = line.measurement.values
            writer.writerow([
                line.protocol, line.condition, line.system, line.measurement.key.picture,
                *("" if values.get(name) is None else values[name] for name in names),
                round(line.measurement.seconds, 4), line.measurement.bits_per_pixel,
                *((line.quality, "") if more else ()),
            ])  # fmt: skip
        for told in self.told:
            row = ["quality", str(told.quality), told.restorer, told.picture, *([""] * (len(names) + 2))]
            writer.writerow([*row, told.quality, round(told.told, 3)])
        return text.getvalue()


def means_of(measurements: Sequence[Measurement]) -> tuple[dict[str, float], dict[str, int]]:
    """The mean of each metric over the pictures that have one, and how many these are where not all."""
    means, counts = {}, {}
    for name in dict.fromkeys(name for measurement in measurements for name in measurement.values):
        values = [measurement.values.get(name) for measurement in measurements]
        known = [value for value in values if value is not None]
        if known:
            means[name] = float(np.mean(known))
        if len(known) < len(measurements):
            counts[name] = len(known)
    return means, counts


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean where all are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
