"""What was measured, line by line as it comes: a run that is stopped loses nothing, and repeating it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluate.metrics import Metrics

_LINES, _FEATURES = "measurements", "features"


@dataclass(frozen=True)
class Key:
    """What one measurement is of: no two differ in anything that could change what is measured.

    Args:
        system: Of `System.identity`.
        condition: Label of what happened to the picture.
        subsampling: Of its chroma, where it was compressed here.
        picture: Its name.
        fingerprint: Of its levels.
        version: Of this pack, and the kind of device.
    """

    system: str
    condition: str
    subsampling: str
    picture: str
    fingerprint: str
    version: str

    def short(self) -> str:
        """For a file's name."""
        text = "\n".join(dataclasses.astuple(self))
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Measurement:
    """The figures of one picture.

    Args:
        values: Metric -> figure; None where this picture cannot be measured so.
        seconds: That the restoration took; 0 for the JPEG.
        bits_per_pixel: Of the JPEG's file.
        evaluations: Of the network, where there is one.
        reasons: Metric -> why there is no figure.
        features: Name -> what a network that metrics of sets look with saw; not kept in memory.
    """

    key: Key
    values: dict[str, float | None]
    seconds: float = 0.0
    bits_per_pixel: float | None = None
    evaluations: int | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict, compare=False)


class Store:
    """The folder of an evaluation.

    Figures are kept by their metric's name and variant, so none is taken for that of other weights. Lines of other
    versions are passed over, and what they are of is measured again.

    Args:
        folder: Made where it is missing.
        metrics: That are measured.
        rank: Of this process; each has a file of its own for what it adds, and reads those of all.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, metrics: Metrics, rank: int = 0) -> None:
        self.folder = folder
        self._own = folder / (f"{_LINES}-{rank}.jsonl" if rank else f"{_LINES}.jsonl")
        self._stored = {metric.name: f"{metric.name}: {metric.variant}" for metric in metrics.single}
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[Key, Measurement] = {}
        for measurement in self._read():
            self._learn(measurement)

    def get(self, key: Key, features: Sequence[str] = ()) -> Measurement | None:
        """What was measured before; None where a figure or a feature of it is missing."""
        found = self.part(key)
        if found is None or len(found.values) < len(self._stored) or self.lacks(key, features):
            return None
        return found

    def part(self, key: Key) -> Measurement | None:
        """What was measured before, of those metrics that are measured now, as far as it is known."""
        known = self._known.get(key)
        if known is None:
            return None
        values, reasons = ({name: found[stored] for name, stored in self._stored.items() if stored in found}
                           for found in (known.values, known.reasons))  # fmt: skip
        return dataclasses.replace(known, values=values, reasons=reasons)

    def lacks(self, key: Key, features: Sequence[str]) -> list[str]:
        """Those of some features that are not kept."""
        return [name for name in features if not self._feature(key, name).exists()]

    def features(self, key: Key, name: str) -> np.ndarray:
        """What a network saw in a picture."""
        return np.load(self._feature(key, name), allow_pickle=False)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, its features first."""
        for name, values in measurement.features.items():
            self._write_features(self._feature(measurement.key, name), values)
        values, reasons = ({self._stored[name]: value for name, value in found.items()}
                           for found in (measurement.values, measurement.reasons))  # fmt: skip
        stored = dataclasses.replace(measurement, values=values, reasons=reasons, features={})
        self._learn(stored)
        with self._own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_to_plain(stored)) + "\n")

    def _learn(self, measurement: Measurement) -> None:
        """The figures of lines with equal keys add up, in whatever order they are read."""
        before = self._known.get(measurement.key)
        if before is not None:
            values, reasons = {**before.values, **measurement.values}, {**before.reasons, **measurement.reasons}
            measurement = dataclasses.replace(measurement, values=values, reasons=reasons)
        self._known[measurement.key] = measurement

    def _feature(self, key: Key, name: str) -> Path:
        return self.folder / _FEATURES / f"{key.short()}-{name}.npy"

    def _write_features(self, path: Path, values: np.ndarray) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(temporary, path)

    def _read(self) -> Iterator[Measurement]:
        """All whole lines of all processes; where a kill cut the last one of this process's own, it is removed."""
        for path in sorted(self.folder.glob(f"{_LINES}*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content) and path == self._own:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            yield from _parsed(whole)


def _parsed(lines: bytes) -> Iterator[Measurement]:
    for line in lines.splitlines():
        try:
            yield _from_plain(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):  # of another version, or damaged
            continue


def _to_plain(measurement: Measurement) -> dict[str, Any]:
    """A line: in place of a figure there may be the sentence that says why there is none."""
    plain = {name: getattr(measurement, name) for name in ("seconds", "bits_per_pixel", "evaluations")}
    values = {name: measurement.reasons.get(name, value) for name, value in measurement.values.items()}
    return {**dataclasses.asdict(measurement.key), "values": values, **plain}


def _from_plain(plain: dict[str, Any]) -> Measurement:
    key = Key(**{entry.name: _text(plain.pop(entry.name)) for entry in dataclasses.fields(Key)})
    found: Mapping[str, Any] = plain.pop("values")
    reasons = {name: value for name, value in found.items() if isinstance(value, str)}
    values = {name: None if name in reasons else float(value) for name, value in found.items()}
    return Measurement(key, values, reasons=reasons, **plain)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value
