"""What is compared: the JPEG itself, and restorers with their settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restoration import pipelines, prior_pipeline
from restoration.diffusion.samplers import SamplerStep
from restoration.jpeg import JPEGConstraint
from restoration.restorer_file import RestorerMetadata, read_metadata, read_restorer
from training.evaluate.digests import file_digest
from training.evaluate.options import SystemSettings
from training.evaluate.pictures import Degraded
from training.given_files import check_given
from training.restore.families import Loading, check_family, load_restorer, settings_of
from training.restore.picture import RestorePicture
from training.restore.settings import RestoreSettings

JPEG = "JPEG"
_SAMPLERS = (
    *(("euler_maruyama", 100), ("euler_heun", 100), ("ode_1", 10), ("ode_2m", 5), ("ode_2m", 10), ("ode_2m", 20)),
    *(("sde_2m", 10), ("sde_2m", 20), ("rk45", None)),
)
"""Samplers and steps of the protocol `samplers`: the paper's first two, what this pack adds, and its adaptive one."""
_SAMPLES = (1, 2, 4, 8, 16)
_DIGITS = 8


@dataclass(frozen=True)
class RestorerOnDisk:
    """A restorer file before it is loaded."""

    path: Path
    label: str
    metadata: RestorerMetadata
    digest: str


@dataclass(frozen=True)
class System:
    """One column of the comparison.

    Args:
        label: In tables.
        restorer: Its file, or None for the degraded picture as it is.
        settings: How it runs.
        value: What varies in this protocol, for plots: samples, or steps.
    """

    label: str
    restorer: RestorerOnDisk | None = None
    settings: RestoreSettings = field(default_factory=RestoreSettings)
    value: float | None = None

    def identity(self, dtype: str, base: str | None) -> str:
        """A short name of the restorer and how it runs, on whatever machine.

        Args:
            dtype: Of the networks.
            base: Digest of the base model, which counts only where the restorer adapts one.
        """
        if self.restorer is None:
            return JPEG
        adapted = None if self.restorer.metadata.base is None else base
        facts = [self.restorer.digest, dataclasses.asdict(self.settings), dtype, adapted]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Restored:
    """A restored picture (1, 3, H, W) on the CPU, and how often the network was evaluated; None for the JPEG."""

    image: Tensor
    evaluations: int | None


def read_restorers(paths: Sequence[Path]) -> list[RestorerOnDisk]:
    """Restorer files by their descriptions, each once; labels are file names, made longer where two are alike.

    Raises:
        RestorerFileError: A file is none.
        OSError: A file cannot be read.
    """
    for path in paths:
        check_given(path, "--restorer")
    paths = list({path.absolute(): path for path in paths}.values())
    digests = [file_digest(path) for path in paths]
    return [
        RestorerOnDisk(path, label, read_metadata(path), digest)
        for path, label, digest in zip(paths, _labels(paths, digests), digests, strict=True)
    ]


def _labels(paths: Sequence[Path], digests: Sequence[str]) -> list[str]:
    """Names without ending, with as many folders before them as tell them apart, from each other and from the JPEG."""
    whole = [path.absolute().with_suffix("").parts for path in paths]
    labels = [parts[-1] for parts in whole]
    for length in range(2, max(map(len, whole), default=0) + 1):
        alike = [label == JPEG or labels.count(label) > 1 for label in labels]
        labels = ["/".join(parts[-length:]) if same else label
                  for label, parts, same in zip(labels, whole, alike, strict=True)]  # fmt: skip
    alike = [labels.count(label) > 1 for label in labels]
    return [f"{path.stem} {digest[:_DIGITS]}" if same else label
            for path, label, digest, same in zip(paths, labels, digests, alike, strict=True)]  # fmt: skip


def systems_of(protocol: str, restorers: Sequence[RestorerOnDisk], settings: SystemSettings) -> list[System]:
    """The JPEG and what is compared with it in a protocol.

    Raises:
        ValueError: No restorer fits the protocol.
    """
    if protocol == "samplers":
        varied = [system for restorer in _taking(restorers, "sampler", protocol)
                  for system in _samplers(restorer, settings)]  # fmt: skip
    elif protocol == "averaging":
        varied = [system for restorer in _taking(restorers, "samples", protocol)
                  for system in _averages(restorer, settings)]  # fmt: skip
    else:
        varied = [System(restorer.label, restorer, _settings(restorer, settings)) for restorer in restorers]
    return [System(JPEG), *varied]


def _taking(restorers: Sequence[RestorerOnDisk], setting: str, protocol: str) -> list[RestorerOnDisk]:
    found = [restorer for restorer in restorers if setting in settings_of(restorer.metadata.family)]
    if not found:
        given = ", ".join(f"{restorer.label} ({restorer.metadata.family})" for restorer in restorers) or "none"
        raise ValueError(f"--protocol {protocol}: expected a --restorer that has {setting}, got {given}.")
    return found


def _samplers(restorer: RestorerOnDisk, given: SystemSettings) -> Iterator[System]:
    for sampler, steps in _SAMPLERS:
        settings = dataclasses.replace(_settings(restorer, given), sampler=sampler, steps=steps)
        count = f" {steps}" if steps else ""
        yield System(f"{restorer.label}, {sampler}{count}", restorer, settings, steps)


def _averages(restorer: RestorerOnDisk, given: SystemSettings) -> Iterator[System]:
    for samples in _SAMPLES:
        settings = dataclasses.replace(_settings(restorer, given), samples=samples)
        yield System(f"{restorer.label}, {samples} averaged", restorer, settings, samples)


def _settings(restorer: RestorerOnDisk, given: SystemSettings) -> RestoreSettings:
    """What was given, as far as the family has it."""
    taken = {name: value for name, value in dataclasses.asdict(given).items()
             if name in (*settings_of(restorer.metadata.family), "tile", "consistency")}  # fmt: skip
    return RestoreSettings(**taken)


def check_system(system: System, loading: Loading) -> None:
    """Refuse a system that cannot run, before anything is loaded.

    Raises:
        ValueError: It restores nothing, or lacks its base model.
    """
    if system.restorer is not None:
        check_family(system.restorer.metadata, system.restorer.path.name, _fitting(system, loading))


def load_system(system: System, loading: Loading) -> RestorePicture | None:
    """The function that restores a picture; None for the JPEG itself."""
    return None if system.restorer is None else load_restorer(
        read_restorer(system.restorer.path), _fitting(system, loading)
    )  # fmt: skip


def _fitting(system: System, loading: Loading) -> Loading:
    """The loading of one system: its settings, and base and type only where it takes them."""
    assert system.restorer is not None
    adapts = system.restorer.metadata.base is not None
    single = system.restorer.metadata.family in ("codiff", "sodiff") and not adapts
    return dataclasses.replace(
        loading, settings=system.settings, base=loading.base if adapts else None,
        dtype=None if single else loading.dtype,
    )  # fmt: skip


def run_system(restore: RestorePicture | None, degraded: Degraded, *, consistency: bool) -> Restored:
    """One picture, restored.

    Raises:
        ValueError: It cannot be restored by this restorer.
    """
    if restore is None:
        return Restored(degraded.pixels, None)
    constraint = JPEGConstraint(degraded.jpeg) if consistency and degraded.jpeg is not None else None
    with torch.inference_mode(), counting() as count:
        image = restore(degraded.pixels, degraded.jpeg, constraint)
    return Restored(image.cpu(), sum(count) or 1)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Evaluations of the network meanwhile, a number for each sample that is drawn, as its sampler counts them.

    An evaluation is one of the whole picture, whatever tiles it runs in; a sample that starts again, because memory ran
    out, counts once. Families without a sampler evaluate once, and give no number here.
    """
    count: list[int] = []
    samplers = pipelines.sample, prior_pipeline.sample_ddrm
    pipelines.sample, prior_pipeline.sample_ddrm = (_counted(sampler, count) for sampler in samplers)
    try:
        yield count
    finally:
        pipelines.sample, prior_pipeline.sample_ddrm = samplers


def _counted(sampler: Callable[..., Tensor], count: list[int]) -> Callable[..., Tensor]:
    def sample(*arguments: Any, callback: Callable[[SamplerStep], None], **settings: Any) -> Tensor:
        last = 0

        def note(step: SamplerStep) -> None:
            nonlocal last
            last = step.index
            callback(step)

        sampled = sampler(*arguments, callback=note, **settings)
        count.append(last)
        return sampled

    return sample
