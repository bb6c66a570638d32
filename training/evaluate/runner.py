"""The work: every system on every picture under every condition, measured, kept, and put together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training.evaluate.digests import base_digest, pack_version
from training.evaluate.examples import Choice, Example, Examples, as_webp, shown_conditions
from training.evaluate.metrics import Metric, Metrics, MissingMetric, NotMeasuredError
from training.evaluate.pictures import Condition, Degraded, Source, compressed, fingerprint, read_clean, read_degraded
from training.evaluate.results import Line, Row, mean_or_none, means_of
from training.evaluate.store import Key, Measurement, Store
from training.evaluate.systems import JPEG, Restored, System, load_system, run_system
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


class _Running:
    """A system that is loaded when it has something to do."""

    def __init__(self, system: System, loading: Loading) -> None:
        self.system, self.loading = system, loading
        self._restore: RestorePicture | None = None
        self._loaded = False

    def load(self) -> None:
        """Do it now, so that it takes no time later."""
        if not self._loaded:
            self._restore, self._loaded = load_system(self.system, self.loading), True

    def __call__(self, degraded: Degraded) -> Restored:
        """As `run_system`."""
        self.load()
        return run_system(self._restore, degraded, consistency=self.system.settings.consistency)


class Runner:
    """Measures systems; each is loaded once, and only if a figure of it is missing.

    Args:
        sources: The pictures.
        subsampling: Of the JPEGs that are made of them.
        metrics: What is measured; with degraded pictures alone none that needs a clean one.
        store: Where figures are kept.
        examples: Chooses and keeps pictures for the report.
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
        self._base, self._version = base_digest(loading.base), f"{pack_version()}, {loading.device.type}"
        self._work: list[tuple[System, list[Condition]]] = []
        self._shown: set[str] = set()
        self._pictures: dict[tuple[str, str], list[Example]] | None = None
        self._sets_without: dict[str, str] = {}

    def run(self, parts: Sequence[Part]) -> None:
        """Measure what is missing. Pictures that cannot be read or restored are named, and left out of that mean."""
        self._work = self._planned(parts)
        labels = list(dict.fromkeys(condition.label for _, conditions in self._work for condition in conditions))
        self._shown = set(shown_conditions(labels, len(self._work) - 1, self.examples.count))
        total = sum(len(conditions) for _, conditions in self._work) * len(self.sources)
        if not total:
            return
        with tqdm(total=total, unit="picture", dynamic_ncols=True) as progress:
            for system, conditions in self._work:
                self._measure_system(system, conditions, progress)

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

    def not_measured(self) -> list[MissingMetric]:
        """Metrics that some results have no figure in, or all, with the reason of the first; after `rows`."""
        found = [measurement for measurements in self._found.values() for measurement in measurements]
        missing = []
        for metric in self.metrics.single:
            without = [measurement for measurement in found if metric.name in measurement.reasons]
            if without:
                reason = without[0].reasons[metric.name].removeprefix(f"{metric.label}: ")
                told = f"none for {len(without)} of {len(found)} results, e.g. {without[0].key.picture}: {reason}"
                missing.append(MissingMetric(metric.label, told))
        return [*missing, *(MissingMetric(label, reason) for label, reason in self._sets_without.items())]

    def examples_of(self, system: System, condition: str) -> list[Example]:
        """The pictures that the report shows of a system; restored once more where nobody kept them."""
        if self._pictures is None:
            self._pictures = {
                (self.identity(shown), label.label): list(self._examples(running, label))
                for shown, conditions in self._work for running in [_Running(shown, self.loading)]
                for label in conditions if shown.restorer is not None and label.label in self._shown
            }  # fmt: skip
        return self._pictures.get((self.identity(system), condition), [])

    def _planned(self, parts: Sequence[Part]) -> list[tuple[System, list[Condition]]]:
        """Each system once, the JPEG first, with its conditions of all protocols."""
        systems = {self.identity(system): system for part in parts for system in part.systems}
        wanted: dict[str, dict[Condition, None]] = {identity: {} for identity in systems}
        for part in parts:
            for system in part.systems:
                wanted[self.identity(system)].update(dict.fromkeys(part.conditions))
        return [(systems[identity], list(wanted[identity]))
                for identity in sorted(systems, key=lambda name: name != JPEG)]  # fmt: skip

    def _examples(self, running: _Running, condition: Condition) -> Iterator[Example]:
        jpegs = {found.key.picture: found for found in self._found.get((JPEG, condition.label), [])}
        for choice in self.examples.choose(self._of(running.system, condition), jpegs):
            key = choice.measurement.key
            source = next(source for source in self.sources if source.name == key.picture)
            degraded = self._degraded(source, condition)
            if degraded is None or self._key(key.system, condition, source, degraded) != key:  # changed meanwhile
                continue
            if self.examples.kept(key) is None and not self._keep(running, key, degraded):
                continue
            yield self._example(choice, degraded)

    def _keep(self, running: _Running, key: Key, degraded: Degraded) -> bool:
        """Restore a picture once more; False where that cannot be done."""
        try:
            self.examples.keep(key, running(degraded).image)
        except ValueError as error:
            self._leave_out(f"{key.picture} ({key.condition}) by {running.system.label}", str(error))
            return False
        return True

    def _example(self, choice: Choice, degraded: Degraded) -> Example:
        key, metric, clean = choice.measurement.key, self.examples.metric, degraded.clean
        after = self.examples.kept(key)
        assert after is not None and metric is not None
        return Example(
            key.picture, choice.first, choice.worst, metric.name, choice.gain, as_webp(degraded.pixels), after,
            None if clean is None else as_webp(clean),
        )  # fmt: skip

    def identity(self, system: System) -> str:
        """The name of a system in the store."""
        return system.identity(str(self.loading.network_dtype), self._base)

    def _of(self, system: System, condition: Condition) -> list[Measurement]:
        return self._found.get((self.identity(system), condition.label), [])

    def _measure_system(self, system: System, conditions: Sequence[Condition], progress: tqdm) -> None:
        identity, running = self.identity(system), _Running(system, self.loading)
        features = self._features_of(system)
        progress.set_postfix_str(system.label, refresh=False)
        for condition in conditions:
            found = self._found.setdefault((identity, condition.label), [])
            for source in self.sources:
                degraded = self._degraded(source, condition)
                if degraded is not None:
                    key = self._key(identity, condition, source, degraded)
                    measurement = self.store.get(key, features) or self._measured(running, key, degraded)
                    found += [measurement] if measurement is not None else []
                progress.update(1)

    def _measured(self, running: _Running, key: Key, degraded: Degraded) -> Measurement | None:
        """What is missing of a measurement, added to what is there."""
        running.load()
        started = time.perf_counter()
        try:
            restored = running(degraded)
        except ValueError as error:
            self._leave_out(f"{key.picture} ({key.condition}) by {running.system.label}", str(error))
            return None
        seconds = 0.0 if running.system.restorer is None else round(time.perf_counter() - started, 4)
        values, reasons = self._values(key, restored.image, degraded.clean)
        features = self._features(key, running.system, restored.image, degraded.clean)
        self.store.add(Measurement(
            key, values, seconds, degraded.bits_per_pixel, restored.evaluations, reasons, features
        ))  # fmt: skip
        measurement = self.store.part(key)
        if running.system.restorer is not None and measurement is not None and key.condition in self._shown:
            self.examples.consider(measurement, self.store.part(replace(key, system=JPEG)), restored.image)
        return measurement

    def _values(
        self, key: Key, image: Tensor, clean: Tensor | None
    ) -> tuple[dict[str, float | None], dict[str, str]]:  # fmt: skip
        """The figures that are not known yet, and why there are none."""
        device, known = self.loading.device, self.store.part(key)
        image, clean = image.to(device), None if clean is None else clean.to(device)
        values: dict[str, float | None] = {}
        reasons: dict[str, str] = {}
        for metric in self.metrics.single:
            if known is None or metric.name not in known.values:
                found = _value(metric, image, clean)
                values[metric.name] = found if isinstance(found, float) else None
                reasons |= {metric.name: found} if isinstance(found, str) else {}
        return values, reasons

    def _features_of(self, system: System) -> list[str]:
        """Names of what is kept of a picture for metrics of sets; with the JPEG's also the clean picture's."""
        networks = list(dict.fromkeys(metric.network for metric in self.metrics.sets))
        return networks + [_CLEAN.format(name) for name in networks if system.restorer is None]

    def _features(self, key: Key, system: System, image: Tensor, clean: Tensor | None) -> dict[str, np.ndarray]:
        """What metrics of sets see, as far as it is not kept yet; a network that several share runs once."""
        lacking = self.store.lacks(key, self._features_of(system))
        looks = {metric.network: metric.features for metric in self.metrics.sets}
        pictures = [(name, look, image) for name, look in looks.items()]
        pictures += [(_CLEAN.format(name), look, clean) for name, look in looks.items() if clean is not None]
        return {name: look(picture.to(self.loading.device)) for name, look, picture in pictures if name in lacking}

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
        return Key(identity, condition.label, subsampling, source.name, levels, self._version)

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
            ours = [self.store.features(key, metric.network) for key in keys]
            theirs = [self.store.features(replace(key, system=JPEG), _CLEAN.format(metric.network)) for key in keys]
            try:
                figures[metric.name] = metric.distance(np.stack(ours), np.stack(theirs))
            except NotMeasuredError as error:
                self._sets_without.setdefault(metric.label, str(error).removeprefix(f"{metric.label}: "))
        return figures


@torch.inference_mode()
def _value(metric: Metric, image: Tensor, clean: Tensor | None) -> float | str:
    """The figure, or why there is none."""
    try:
        return metric.measure(image, clean)
    except NotMeasuredError as error:
        return str(error)
