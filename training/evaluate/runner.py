"""The work: every system on every picture under every condition, measured, kept, and put together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.evaluate.examples import Example, Examples
from training.evaluate.metrics import Metric, Metrics, NotMeasuredError
from training.evaluate.pictures import Condition, Degraded, Source, compressed, fingerprint, read_clean, read_degraded
from training.evaluate.results import Line, Row, mean_or_none, means_of
from training.evaluate.store import Key, Measurement, Store
from training.evaluate.systems import JPEG, System, load_system, run_system
from training.restore.families import Loading
from training.restore.picture import RestorePicture

_UNREADABLE = (ValueError, OSError, MemoryError)
_CLEAN = "{}-clean"
"""Under which name the features of the clean picture are kept, beside the JPEG's."""


@dataclass(frozen=True)
class Part:
    """One protocol: its systems, the JPEG first, and its conditions."""

    protocol: str
    systems: Sequence[System]
    conditions: Sequence[Condition]


class Runner:
    """Measures systems; each is loaded once, and only if a figure of it is missing.

    Args:
        sources: The pictures.
        subsampling: Of the JPEGs that are made of them.
        metrics: What is measured; with degraded pictures alone none that needs a clean one.
        store: Where figures are kept.
        examples: Where pictures for the report are kept.
        loading: Device, precision and base model.
    """

    def __init__(
        self, sources: Sequence[Source], subsampling: str, metrics: Metrics, store: Store, examples: Examples,
        loading: Loading,
    ) -> None:  # fmt: skip
        self.sources, self.subsampling, self.metrics = list(sources), subsampling, metrics
        self.store, self.examples, self.loading = store, examples, loading
        self.left_out: dict[str, str] = {}
        self._found: dict[tuple[str, str], list[Measurement]] = {}

    def run(self, parts: Sequence[Part]) -> None:
        """Measure what is missing. Pictures that cannot be read or restored are named, and left out of that mean."""
        systems = {self.identity(system): system for part in parts for system in part.systems}
        wanted: dict[str, dict[Condition, None]] = {identity: {} for identity in systems}
        for part in parts:
            for system in part.systems:
                wanted[self.identity(system)].update(dict.fromkeys(part.conditions))
        total = sum(map(len, wanted.values())) * len(self.sources)
        if not total:
            return
        with tqdm(total=total, unit="picture", dynamic_ncols=True) as progress:
            for identity in sorted(systems, key=lambda name: name != JPEG):
                self._measure_system(systems[identity], list(wanted[identity]), progress)

    def rows(self, part: Part) -> list[Row]:
        """The means of a protocol, condition by condition."""
        return [self._row(part, condition, system) for condition in part.conditions for system in part.systems
                if self._of(system, condition)]  # fmt: skip

    def lines(self, part: Part) -> list[Line]:
        """The pictures of a protocol."""
        return [
            Line(part.protocol, condition.label, condition.quality, system.label, measurement)
            for condition in part.conditions for system in part.systems for measurement in self._of(system, condition)
        ]  # fmt: skip

    def examples_of(self, system: System, condition: str) -> list[Example]:
        """The pictures that the report shows of a system."""
        identity = self.identity(system)
        jpegs = {found.key.picture: found for found in self._found.get((JPEG, condition), [])}
        gains = {found.key.picture: self.examples.gain(found, jpegs.get(found.key.picture))
                 for found in self._found.get((identity, condition), [])}  # fmt: skip
        known = {picture: gain for picture, gain in gains.items() if gain is not None}
        return self.examples.chosen(identity, condition, {} if system.restorer is None else known)

    def identity(self, system: System) -> str:
        """The name of a system in the store."""
        return system.identity(str(self.loading.network_dtype), self.loading.base)

    def _of(self, system: System, condition: Condition) -> list[Measurement]:
        return self._found.get((self.identity(system), condition.label), [])

    def _measure_system(self, system: System, conditions: Sequence[Condition], progress: tqdm) -> None:
        """Load it when the first figure is missing."""
        restore, loaded, identity = None, False, self.identity(system)
        progress.set_postfix_str(system.label, refresh=False)
        for condition in conditions:
            found = self._found.setdefault((identity, condition.label), [])
            for source in self.sources:
                degraded = self._degraded(source, condition)
                if degraded is not None:
                    key = self._key(identity, condition, source, degraded)
                    measurement = self.store.get(key)
                    if measurement is None:
                        if not loaded:
                            restore, loaded = load_system(system, self.loading), True
                        measurement = self._measured(system, restore, key, degraded)
                    found += [measurement] if measurement is not None else []
                progress.update(1)

    def _measured(
        self, system: System, restore: RestorePicture | None, key: Key, degraded: Degraded
    ) -> Measurement | None:
        started = time.perf_counter()
        try:
            restored = run_system(restore, degraded, consistency=system.settings.consistency)
        except ValueError as error:
            self._leave_out(f"{key.picture} ({key.condition}) by {system.label}", str(error))
            return None
        seconds = 0.0 if restore is None else time.perf_counter() - started
        image = restored.image.to(self.loading.device)
        clean = None if degraded.clean is None else degraded.clean.to(self.loading.device)
        features = self._features(image)
        if restore is None and clean is not None:
            features |= {_CLEAN.format(name): values for name, values in self._features(clean).items()}
        values = {metric.name: _value(metric, image, clean) for metric in self.metrics.single}
        measurement = Measurement(
            key, values, round(seconds, 4), degraded.bits_per_pixel, restored.evaluations, features
        )
        self.store.add(measurement)
        if restore is not None:
            self.examples.consider(measurement, self.store.get(replace(key, system=JPEG)), degraded, restored.image)
        return measurement

    def _features(self, image: Tensor) -> dict[str, np.ndarray]:
        """What metrics of sets see in a picture; a network that several share runs once."""
        seen = {
            function: function(image) for function in dict.fromkeys(metric.features for metric in self.metrics.sets)
        }
        return {metric.name: seen[metric.features] for metric in self.metrics.sets}

    def _degraded(self, source: Source, condition: Condition) -> Degraded | None:
        if source.name in self.left_out:
            return None
        try:
            if condition.quality is None:
                return read_degraded(source)
            assert source.clean is not None
            return compressed(read_clean(source.clean), condition, self.subsampling, source.name)
        except _UNREADABLE as error:
            self._leave_out(source.name, str(error))
            return None

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        tqdm.write(f"left out: {name}: {reason}")

    def _key(self, identity: str, condition: Condition, source: Source, degraded: Degraded) -> Key:
        subsampling = self.subsampling if condition.quality is not None else ""
        levels = fingerprint(degraded.pixels) + ("" if degraded.clean is None else fingerprint(degraded.clean))
        return Key(identity, condition.label, subsampling, source.name, levels)

    def _row(self, part: Part, condition: Condition, system: System) -> Row:
        measurements = self._of(system, condition)
        means, counts = means_of(measurements)
        return Row(
            part.protocol, condition.label, condition.quality, system.label,
            JPEG if system.restorer is None else system.restorer.label, system.value, len(measurements),
            {**means, **self._set_figures(measurements)}, counts,
            float(np.mean([measurement.seconds for measurement in measurements])),
            mean_or_none([measurement.bits_per_pixel for measurement in measurements]),
            mean_or_none([measurement.evaluations for measurement in measurements]),
        )  # fmt: skip

    def _set_figures(self, measurements: Sequence[Measurement]) -> dict[str, float]:
        figures = {}
        keys = [measurement.key for measurement in measurements]
        for metric in self.metrics.sets:
            ours = np.stack([self.store.features(key, metric.name) for key in keys])
            theirs = [self.store.features(replace(key, system=JPEG), _CLEAN.format(metric.name)) for key in keys]
            try:
                figures[metric.name] = metric.distance(ours, np.stack(theirs))
            except NotMeasuredError:
                continue
        return figures


@torch.inference_mode()
def _value(metric: Metric, image: Tensor, clean: Tensor | None) -> float | None:
    try:
        return metric.measure(image, clean)
    except NotMeasuredError:
        return None
