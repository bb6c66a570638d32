"""Restoration by a diffusion prior (DDRM-JPEG), from JPEG files to pictures: what node and command line both call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .compute import Compute, OnProgress, Report, finite, part_of
from .diffusion.ddrm import ddrm_timesteps, sample_ddrm
from .diffusion.prior import DiffusionPrior, PriorNetworkConfig
from .diffusion.samplers import SamplerStep
from .jpeg.file import JPEGData
from .measurements import JPEGMeasurement, Measurement, PaperJPEGMeasurement
from .noise import SampleNoise, sample_generator
from .pipelines import finished, to_8bit
from .tiling import Tiler, crop_to, pad_to_multiple

MEASUREMENTS = ("soft", "projection", "shift", "paper")
"""How predictions are held to a file: moved to what is expected inside its cells; clamped into them; moved by whole
cells, as the paper; or, with the paper's own simulation of JPEG in place of the file's coefficients and tables, exactly
as its authors did."""


_SAMPLING = 0.98
"""The part of the progress that the samples make; the rest is the closed loop's."""


@dataclass(frozen=True)
class DDRMSettings:
    """How DDRM samples; the defaults are the paper's, but for the measurement.

    Args:
        steps: Evaluations of the network for each sample.
        start: Timestep from below which sampling starts: more noise there gives the prior more to decide.
        eta: Share of fresh noise at each step, 0 to 1.
        eta_b: Weight of the correction at each step, 0 to 1; None for 0.4 with `shift` and `paper`, 1 with the others.
        measurement: One of `MEASUREMENTS`.
        seed: Of the noise; every picture of a batch gets the same.
        samples: Restorations that are averaged: more raise PSNR, fewer keep more texture.
        consistency: How far the result itself is moved into agreement, 0 not at all to 1.
        closed_loop: The result agrees in whole 8-bit levels, too, where it is all the way.
        label: The class of the pictures, for priors that are told one.
        strength: 0 gives the decoded JPEG back, 1 the restoration; in between they are blended, before the result is
            moved into agreement.
    """

    steps: int = 20
    start: int = 300
    eta: float = 1.0
    eta_b: float | None = None
    measurement: str = "soft"
    seed: int = 0
    samples: int = 8
    consistency: float = 1.0
    closed_loop: bool = True
    label: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.measurement not in MEASUREMENTS:
            raise ValueError(f"expected a measurement of {', '.join(MEASUREMENTS)}, got {self.measurement!r}.")
        if self.samples < 1:
            raise ValueError(f"expected at least 1 sample, got {self.samples}.")
        ddrm_timesteps(self.steps, self.start)
        shares = {"eta": self.eta, "eta_b": self.eta_b, "consistency": self.consistency, "strength": self.strength}
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"expected {name} between 0 and 1, got {value:g}.")

    @property
    def mode(self) -> str:
        """The correction that `sample_ddrm` is asked for."""
        return "shift" if self.measurement == "paper" else self.measurement


def restore_ddrm(
    prior: DiffusionPrior, sources: Sequence[JPEGData | Measurement], settings: DDRMSettings, *,
    compute: Compute | None = None, samples_at_once: int = 1, on_progress: OnProgress | None = None,
) -> Tensor:  # fmt: skip
    """Restore pictures with a diffusion prior.

    Pictures are restored one by one. The samples of one run as batches; what they give does not depend on that. Each
    evaluation of the network is tiled, not the sampling: the predictions of the tiles are blended at every step.

    Args:
        prior: The network that knows what pictures look like.
        sources: JPEG files, or other measurements, all of one size.
        settings: How to sample.
        compute: Where the network runs, and how large pictures are split; by default the CPU, in tiles of the size that
            the prior was trained on. The sampler's state lies there as well while the memory suffices.
        samples_at_once: Size of a batch; halved when memory runs out, before the tiles are.
        on_progress: Called after each tile and each evaluation; the last fraction is 1.

    Returns:
        (B, 3, H, W) float32 in [0, 1] in whole 8-bit levels, on the CPU.

    Raises:
        ValueError: No picture or pictures of several sizes, timesteps or a class that the prior does not know, or the
            network returned something that is no number.
    """
    _check(prior, sources, settings)
    align = math.lcm(16, _config(prior).size_multiple)
    compute = compute or Compute(tiler=Tiler(prior.tile, align=align))
    batches, results = _Batches(max(1, samples_at_once), compute), []
    for index, source in enumerate(sources):
        picture = _Picture(prior, source, settings, compute, _never_back(part_of(on_progress, index, len(sources))))
        results.append(picture.restored(batches))
    return torch.cat(results)


class _Batches:
    """How many samples run at once, and where their state lies; less of both when memory runs out."""

    def __init__(self, size: int, compute: Compute) -> None:
        self.size, self.home, self.tiler = size, compute.device, compute.tiler

    def can_shrink(self, error: Exception) -> bool:
        """Whether `error` says that memory ran out, and there is a way to need less."""
        out_of_memory = isinstance(error, _TooManySamplesError) or self.tiler.is_out_of_memory(error)
        return out_of_memory and (self.size > 1 or self.home.type != "cpu")

    def shrink(self) -> None:
        """Half as many samples; where it is one, its state goes to main memory."""
        if self.size > 1:
            self.size //= 2
        else:
            self.home = torch.device("cpu")
        if self.tiler.release is not None:
            self.tiler.release()


class _TooManySamplesError(Exception):
    """Memory ran out with several samples at once. The tiler, which would take smaller tiles, lets it pass."""


class _Picture:
    """The restoration of one picture."""

    def __init__(
        self, prior: DiffusionPrior, source: JPEGData | Measurement, settings: DDRMSettings, compute: Compute,
        report: Report,
    ) -> None:  # fmt: skip
        self.prior, self.source, self.settings, self.compute, self.report = prior, source, settings, compute, report
        self.multiple = math.lcm(compute.tiler.align, _config(prior).size_multiple)
        self.measurements: dict[torch.device, Measurement] = {}

    def restored(self, batches: _Batches) -> Tensor:
        """The average of the samples (1, 3, H, W), each clipped, brought into agreement where that is asked for."""
        total, done, samples = torch.zeros(()), 0, self.settings.samples
        while done < samples:
            numbers = range(done, min(done + batches.size, samples))
            sampled = self._attempt(numbers, batches)
            if sampled is None:
                self.measurements.clear()
                batches.shrink()
                continue
            for sample in sampled.split(1):  # one by one, so that the sum does not depend on the batches
                total = total + sample.clamp(0, 1)
            done = numbers.stop
            self.report(_SAMPLING * done / samples, total / done)
        measurement = self._measurement(torch.device("cpu"))
        mean = finished(measurement.observed, total / samples, self.settings.strength, None)
        result = measurement.finish(mean) if self.settings.consistency else to_8bit(mean)
        self.report(1.0, result)
        return result

    def _finishing(self, done: float) -> None:
        """Interrupts, and reports the part of the closed loop that is done."""
        self.compute.check()
        self.report(_SAMPLING + 0.999 * (1 - _SAMPLING) * done, None)

    def _attempt(self, numbers: range, batches: _Batches) -> Tensor | None:
        """The samples of these numbers on the CPU; None where memory ran out and less of it may do."""
        try:
            return self._sampled(numbers, batches.home).cpu()
        except Exception as error:
            if not batches.can_shrink(error):
                raise
        return None

    def _sampled(self, numbers: range, home: torch.device) -> Tensor:
        """The samples of these numbers (B, 3, H, W) in [0, 1], not clipped, on `home`."""
        measurement, settings = self._measurement(home), self.settings
        padded, size = pad_to_multiple(2 * measurement.observed.to(home) - 1, self.multiple)
        evaluations = 0

        def report(part: float, preview: Tensor | None) -> None:
            share = (evaluations + part) / settings.steps
            self.report(_SAMPLING * (numbers.start + len(numbers) * share) / settings.samples, preview)

        def denoise(x: Tensor, timestep: int) -> Tensor:
            return self._predicted_noise(x, timestep, lambda part: report(part, None))

        def callback(step: SamplerStep) -> None:
            nonlocal evaluations
            evaluations = step.index
            report(0.0, (crop_to(step.denoised[:1], size) + 1) / 2)

        noise = SampleNoise([sample_generator(settings.seed, number) for number in numbers])
        sampled = sample_ddrm(
            denoise, self.prior.alphas_cumprod, padded.expand(len(numbers), -1, -1, -1),
            _Padded(measurement, size, self.multiple), noise, steps=settings.steps, start=settings.start,
            eta=settings.eta, eta_b=settings.eta_b, mode=settings.mode, callback=callback,
        )  # fmt: skip
        return (crop_to(sampled, size) + 1) / 2

    def _predicted_noise(self, x: Tensor, timestep: int, on_part: Callable[[float], None]) -> Tensor:
        """The prior's prediction for x_t, tile by tile, on the device of x."""
        tiler, device = self.compute.tiler, self.compute.device

        def on_device(tile: Tensor) -> Tensor:
            try:
                return self.prior(tile.to(device), timestep, self.settings.label).to(x.device)
            except Exception as error:
                if len(tile) > 1 and tiler.is_out_of_memory(error):
                    raise _TooManySamplesError(str(error)) from error
                raise

        def on_tile(done: int, total: int) -> None:
            self.compute.check()
            if done < total:
                on_part(done / total)

        tiled = tiler(on_device, x, on_tile=on_tile, network=self.prior.network, even=not self.prior.tile)
        return finite(tiled)

    def _measurement(self, device: torch.device) -> Measurement:
        """The measurement on a device, made once for all the samples."""
        if device not in self.measurements:
            self.measurements[device] = self._new_measurement(device)
        return self.measurements[device]

    def _new_measurement(self, device: torch.device) -> Measurement:
        if not isinstance(self.source, JPEGData):
            return self.source
        if self.settings.measurement == "paper":
            return PaperJPEGMeasurement.of_file(self.source, device)
        return JPEGMeasurement(
            self.source,
            device,
            strength=self.settings.consistency,
            closed_loop=self.settings.closed_loop,
            check=self._finishing,
        )


@dataclass(frozen=True)
class _Padded:
    """A measurement of pictures of `size` that were padded to `multiple`: the margin mirrors what is corrected."""

    measurement: Measurement
    size: tuple[int, int]
    multiple: int

    def shift(self, images: Tensor) -> Tensor:
        return pad_to_multiple(self.measurement.shift(crop_to(images, self.size)), self.multiple)[0]

    def expect(self, images: Tensor, spread: float) -> Tensor:
        return pad_to_multiple(self.measurement.expect(crop_to(images, self.size), spread), self.multiple)[0]

    def project(self, images: Tensor) -> Tensor:
        return pad_to_multiple(self.measurement.project(crop_to(images, self.size)), self.multiple)[0]


def _check(prior: DiffusionPrior, sources: Sequence[JPEGData | Measurement], settings: DDRMSettings) -> None:
    sizes = {_size(source) for source in sources}
    if len(sizes) != 1:
        found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)) or "none"
        raise ValueError(f"expected pictures of one size, got {found}. Restore pictures of different sizes one by one.")
    first = ddrm_timesteps(settings.steps, settings.start)[0]
    if first > prior.max_timestep:
        raise ValueError(
            f"expected timesteps up to {prior.max_timestep}, as far as this prior was trained, but start "
            f"{settings.start} with {settings.steps} steps begins at {first}. Lower start."
        )
    if settings.measurement == "paper":
        for source in sources:
            if isinstance(source, JPEGData):
                PaperJPEGMeasurement.check_file(source)
    if (settings.label is None) != (not prior.classes):
        raise ValueError(
            f"this prior was trained on {prior.classes} classes: say of which the picture is, 0 to {prior.classes - 1}."
            if prior.classes
            else f"this prior knows no classes, got class {settings.label}. Leave it out."
        )
    if settings.label is not None and not 0 <= settings.label < prior.classes:
        raise ValueError(f"expected a class from 0 to {prior.classes - 1} for this prior, got {settings.label}.")


def _size(source: JPEGData | Measurement) -> tuple[int, int]:
    if isinstance(source, JPEGData):
        return source.upright_height, source.upright_width
    return source.observed.shape[-2], source.observed.shape[-1]


def _config(prior: DiffusionPrior) -> PriorNetworkConfig:
    return cast("PriorNetworkConfig", prior.network.config)


def _never_back(report: Report) -> Report:
    """Reports that do not fall where a batch starts again."""
    furthest = 0.0

    def forward(done: float, preview: Tensor | None) -> None:
        nonlocal furthest
        furthest = max(furthest, done)
        report(furthest, preview)

    return forward
