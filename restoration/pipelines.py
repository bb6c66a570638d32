"""One function a family, from images to restored images: what the nodes and the command line both call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .color import COLOR_CORRECTIONS
from .compute import Compute, OnProgress, Progress, Report, finite, part_of
from .diffusion.prediction import RegressionRestorer, ScoreDenoiser, constrained
from .diffusion.samplers import SAMPLERS, NoiseSource, SamplerStep, sample
from .embedding import embed_with_cave, embed_with_saipe, predict_timesteps
from .noise import sample_generator
from .tiling import crop_to, pad_to_multiple

__all__ = [
    "Compute",
    "Constraint",
    "DriftRecSettings",
    "Progress",
    "embed_with_cave",
    "embed_with_saipe",
    "finished",
    "predict_timesteps",
    "restore_driftrec",
    "restore_regression",
    "to_8bit",
]


class Constraint(Protocol):
    """What is known for certain of an image (1, 3, H, W) in [0, 1], such as `JPEGConstraint` of one file."""

    def project(self, images: Tensor) -> Tensor:
        """The nearest image that is allowed; inside of a sampler."""
        ...

    def finish(self, images: Tensor) -> Tensor:
        """A near image in whole 8-bit levels that is allowed."""
        ...


@dataclass(frozen=True)
class DriftRecSettings:
    """How DriftRec samples.

    Args:
        sampler: One of `SAMPLERS`.
        steps: Steps of the sampler, where it takes steps.
        tolerance: Tolerance, where it takes that.
        t_eps: The last time, in (0, 1); smaller keeps finer texture.
        seed: Of the noise; every image of a batch gets the same.
        samples: Restorations that are averaged: more raise PSNR, fewer keep more texture.
        color: Correction of the colours against the compressed image, one of `COLOR_CORRECTIONS`.
        strength: 0 gives the input back, 1 the restoration; in between they are blended.
    """

    sampler: str = "ode_2m"
    steps: int = 10
    tolerance: float = 1e-3
    t_eps: float = 0.03
    seed: int = 0
    samples: int = 1
    color: str = "mean"
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (("sampler", self.sampler, SAMPLERS), ("color", self.color, COLOR_CORRECTIONS)):
            if value not in known:
                raise ValueError(f"expected a {name} of {', '.join(known)}, got {value!r}.")
        if self.samples < 1 or self.steps < 1:
            raise ValueError(f"expected at least 1 sample and 1 step, got {self.samples} and {self.steps}.")


def restore_driftrec(
    model: ScoreDenoiser, images: Tensor, settings: DriftRecSettings, *, compute: Compute | None = None,
    constraints: Sequence[Constraint] | None = None, on_progress: OnProgress | None = None,
) -> Tensor:  # fmt: skip
    """Restore images by sampling from DriftRec.

    Images are restored one by one, so that none depends on its neighbours. The noise is that of the whole image, so
    that tiles agree: each evaluation of the network is tiled, not the sampling.

    Args:
        model: The denoiser.
        images: Compressed images, (B, 3, H, W) in [0, 1], of any size from 1x1.
        settings: How to sample.
        compute: Where the network runs, and how large images are split.
        constraints: One for each image: every data prediction is projected, and the result is finished.
        on_progress: Called after each tile and each evaluation; the last fraction is 1.

    Returns:
        (B, 3, H, W) float32 in [0, 1] in whole 8-bit levels, rounded.

    Raises:
        ValueError: t_eps lies below the times that were trained, or the network returned something that is no number.
    """
    if settings.t_eps < model.smallest_time:
        raise ValueError(
            f"expected t_eps of at least {model.smallest_time:g}, from where on this restorer was trained, "
            f"got {settings.t_eps:g}."
        )
    compute = compute or Compute()
    results = []
    for index, image in enumerate(images.float().split(1)):
        constraint = constraints[index] if constraints else None
        report = part_of(on_progress, index, len(images))
        restored = _average_of_samples(model, image, settings, compute, constraint, report)
        restored = COLOR_CORRECTIONS[settings.color](restored, image)
        results.append(finished(image, restored, settings.strength, constraint))
    return to_8bit(torch.cat(results))


def restore_regression(
    model: RegressionRestorer, images: Tensor, *, compute: Compute | None = None, color: str = "none",
    strength: float = 1.0, constraints: Sequence[Constraint] | None = None, on_progress: OnProgress | None = None,
) -> Tensor:  # fmt: skip
    """Restore images by one evaluation of a regression network; arguments as for `restore_driftrec`."""
    compute = compute or Compute()
    results = []
    for index, image in enumerate(images.float().split(1)):
        report = part_of(on_progress, index, len(images))
        padded, size = pad_to_multiple(image, _multiple(model, compute))
        evaluated = _tiled(model, compute, (padded,), lambda part, report=report: report(part, None))
        restored = crop_to(evaluated, size)
        restored = COLOR_CORRECTIONS[color](restored, image)
        results.append(finished(image, restored, strength, constraints[index] if constraints else None))
        report(1.0, results[-1])
    return to_8bit(torch.cat(results))


def to_8bit(images: Tensor) -> Tensor:
    """Round to whole 8-bit levels and clip; ComfyUI's SaveImage, which truncates, then changes nothing.

    Raises:
        ValueError: The images hold something that is no number.
    """
    return (finite(images) * 255).round().clamp(0, 255) / 255


def finished(image: Tensor, restored: Tensor, strength: float, constraint: Constraint | None) -> Tensor:
    """What a restoration of an image (1, 3, H, W) becomes in the end: blended with it, then held to what is certain."""
    if strength != 1:
        restored = torch.lerp(image.to(restored), restored, strength)
    return restored if constraint is None else constraint.finish(finite(restored).clamp(0, 1))


def _average_of_samples(
    model: ScoreDenoiser, image: Tensor, settings: DriftRecSettings, compute: Compute, constraint: Constraint | None,
    report: Report,
) -> Tensor:  # fmt: skip
    padded, size = pad_to_multiple(image, _multiple(model, compute))
    planned = SAMPLERS[settings.sampler].evaluations(settings.steps)
    finished = 0  # evaluations of the present sample

    def report_evaluation(done: float, preview: Tensor | None) -> None:
        part = done / planned if planned else 1 - math.exp(-done / 40)
        report((number + min(part, 1.0)) / settings.samples, preview)

    def denoise(x: Tensor, degraded: Tensor, t: float) -> Tensor:
        evaluate = partial(model, t=t)
        return _tiled(evaluate, compute, (x, degraded), lambda part: report_evaluation(finished + part, None))

    def project_padded(prediction: Tensor) -> Tensor:
        assert constraint is not None
        prediction[..., : size[0], : size[1]] = constraint.project(crop_to(prediction, size).clamp(0, 1))
        return prediction

    denoiser = denoise if constraint is None else constrained(denoise, project_padded)
    total = torch.zeros_like(image)
    for number in range(settings.samples):

        def callback(step: SamplerStep) -> None:
            nonlocal finished
            finished = step.index
            report_evaluation(finished, crop_to(step.denoised, size))

        finished = 0
        noise = NoiseSource(sample_generator(settings.seed, number))
        restored = sample(
            settings.sampler, denoiser, model.sde, padded, noise, steps=settings.steps, tolerance=settings.tolerance,
            t_eps=settings.t_eps, callback=callback,
        )  # fmt: skip
        total += crop_to(restored, size).clamp(0, 1)
        report((number + 1) / settings.samples, total / (number + 1))
    return total / settings.samples


def _tiled(
    function: Callable[..., Tensor], compute: Compute, tensors: tuple[Tensor, ...], on_part: Callable[[float], None]
) -> Tensor:
    home = tensors[0].device

    def on_device(*tiles: Tensor) -> Tensor:
        return function(*(tile.to(compute.device) for tile in tiles)).to(home)

    def on_tile(done: int, total: int) -> None:
        compute.check()
        if done < total:
            on_part(done / total)

    return compute.tiler(on_device, *tensors, on_tile=on_tile)


def _multiple(model: ScoreDenoiser | RegressionRestorer, compute: Compute) -> int:
    return math.lcm(compute.tiler.align, model.network.config.size_multiple)
