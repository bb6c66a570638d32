"""What was measured, line by line as it comes: a run that is stopped loses nothing, and repeating it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluate.metrics import Metrics

_LINES, _VARIANTS, _FEATURES = "measurements", "metrics.json", "features"


@dataclass(frozen=True)
class Key:
    """What one measurement is of: no two differ in anything that could change its figures.

    Args:
        system: Of `System.identity`.
        condition: Label of what happened to the picture.
        subsampling: Of its chroma, where it was compressed here.
        picture: Its name.
        fingerprint: Of its levels.
    """

    system: str
    condition: str
    subsampling: str
    picture: str
    fingerprint: str

    def short(self) -> str:
        """For a file's name."""
        return hashlib.blake2b("\n".join(dataclasses.astuple(self)).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Measurement:
    """The figures of one picture.

    Args:
        values: Metric -> figure; None where this picture cannot be measured so (too small).
        seconds: That the restoration took; 0 for the JPEG.
        bits_per_pixel: Of the JPEG's file.
        evaluations: Of the network, where they are counted.
    """

    key: Key
    values: dict[str, float | None]
    seconds: float = 0.0
    bits_per_pixel: float | None = None
    evaluations: int | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict, compare=False)


class StoreError(ValueError):
    """The folder holds figures that do not belong to these."""


class Store:
    """The folder of an evaluation.

    Args:
        folder: Made where it is missing.
        metrics: That are measured; their variants must be those of the figures that are there.
        rank: Of this process; each has a file of its own for what it adds, and reads those of all.

    Raises:
        StoreError: They are others, or the file of figures cannot be understood.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, metrics: Metrics, rank: int = 0) -> None:
        self.folder = folder
        self._own = folder / (f"{_LINES}-{rank}.jsonl" if rank else f"{_LINES}.jsonl")
        self._names = tuple(metric.name for metric in metrics.single)
        self._sets = tuple(metric.name for metric in metrics.sets)
        folder.mkdir(parents=True, exist_ok=True)
        self._check_variants({metric.name: metric.variant for metric in (*metrics.single, *metrics.sets)})
        self._known = {measurement.key: measurement for measurement in self._read()}

    def get(self, key: Key) -> Measurement | None:
        """What was measured before, if all metrics were."""
        found = self._known.get(key)
        if found is None or any(name not in found.values for name in self._names):
            return None
        if any(not self._feature(key, name).exists() for name in self._sets):
            return None
        return found

    def features(self, key: Key, metric: str) -> np.ndarray:
        """What a metric of sets saw in a picture."""
        return np.load(self._feature(key, metric), allow_pickle=False)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, its features first."""
        for name, values in measurement.features.items():
            self._write_features(self._feature(measurement.key, name), values)
        before = self._known.get(measurement.key)
        if before is not None:
            measurement = dataclasses.replace(measurement, values={**before.values, **measurement.values})
        self._known[measurement.key] = measurement
        with self._own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_to_plain(measurement)) + "\n")

    def _feature(self, key: Key, metric: str) -> Path:
        return self.folder / _FEATURES / f"{key.short()}-{metric}.npy"

    def _write_features(self, path: Path, values: np.ndarray) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(temporary, path)

    def _check_variants(self, variants: dict[str, str]) -> None:
        path = self.folder / _VARIANTS
        then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        changed = [name for name, variant in variants.items() if then.get(name, variant) != variant]
        if changed:
            name = changed[0]
            raise StoreError(
                f"{self.folder} holds figures of another {name} ({then[name]}) than this one ({variants[name]}). Give "
                "another --output, or remove the folder."
            )
        if then != (now := {**then, **variants}):
            temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
            temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")
            os.replace(temporary, path)

    def _read(self) -> Iterator[Measurement]:
        """All whole lines of all processes; where a kill cut the last one of this process's own, it is removed."""
        for path in sorted(self.folder.glob(f"{_LINES}*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content) and path == self._own:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            yield from _parsed(path, whole.decode("utf-8"))


def _parsed(path: Path, lines: str) -> Iterator[Measurement]:
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            yield _from_plain(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{path}, line {number}: no measurement of this version ({error}). Give another --output, or remove "
                "the file."
            ) from error


def _to_plain(measurement: Measurement) -> dict[str, Any]:
    plain = {name: getattr(measurement, name) for name in ("values", "seconds", "bits_per_pixel", "evaluations")}
    return {**dataclasses.asdict(measurement.key), **plain}


def _from_plain(plain: dict[str, Any]) -> Measurement:
    names = [entry.name for entry in dataclasses.fields(Key)]
    key = Key(**{name: plain.pop(name) for name in names})
    return Measurement(key, **plain)
