"""One function a family, from images to restored images: what the nodes and the command line both call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from .networks.ncsnpp import NCSNpp
from .noise import sample_generator
from .strips import blend_, own, round_to_8bit_
from .tiling import crop_to, pad_to_multiple

__all__ = [
    "Compute",
    "Constraint",
    "DriftRecSettings",
    "Progress",
    "batch_of",
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

    def restored() -> Iterator[Tensor]:
        for index, image in enumerate(images.split(1)):
            image, constraint = image.float(), constraints[index] if constraints else None
            report = part_of(on_progress, index, len(images))
            result = _average_of_samples(model, image, settings, compute, constraint, report)
            result = COLOR_CORRECTIONS[settings.color](result, image)
            yield finished(image, result, settings.strength, constraint)

    return batch_of(restored(), images)


def restore_regression(
    model: RegressionRestorer, images: Tensor, *, compute: Compute | None = None, color: str = "none",
    strength: float = 1.0, constraints: Sequence[Constraint] | None = None, on_progress: OnProgress | None = None,
) -> Tensor:  # fmt: skip
    """Restore images by one evaluation of a regression network; arguments as for `restore_driftrec`."""
    compute = compute or Compute()

    def restored() -> Iterator[Tensor]:
        for index, image in enumerate(images.split(1)):
            image, report = image.float(), part_of(on_progress, index, len(images))
            result = _tiled(model, model.network, compute, (image,), lambda part, report=report: report(part, None))
            result = COLOR_CORRECTIONS[color](result, image)
            yield (result := finished(image, result, strength, constraints[index] if constraints else None))
            report(1.0, result)

    return batch_of(restored(), images)


def to_8bit(images: Tensor) -> Tensor:
    """Round to whole 8-bit levels and clip; ComfyUI's SaveImage, which truncates, then changes nothing.

    Raises:
        ValueError: The images hold something that is no number.
    """
    return round_to_8bit_(finite(images).clone())


def finished(image: Tensor, restored: Tensor, strength: float, constraint: Constraint | None) -> Tensor:
    """What a restoration of an image (1, 3, H, W) becomes in the end: blended with it, then held to what is certain.

    The memory of `restored` is used for it, unless it is the image's own.
    """
    restored = own(restored, image)
    if strength != 1:
        restored = blend_(restored, image, strength)
    return restored if constraint is None else constraint.finish(finite(restored).clamp_(0, 1))


def batch_of(results: Iterable[Tensor], images: Tensor) -> Tensor:
    """Results (1, 3, H, W), one for each of the images, rounded to whole 8-bit levels, as one batch.

    They come one by one, and a batch of one is the result itself: no picture lies in memory twice.

    Raises:
        ValueError: A result holds something that is no number.
    """
    batch: Tensor | None = None
    for index, result in enumerate(results):
        if len(images) == 1:
            batch = round_to_8bit_(finite(own(result, images)))
            continue
        if batch is None:
            batch = torch.empty_like(images, dtype=torch.float32, device=result.device)
        round_to_8bit_(batch[index : index + 1].copy_(finite(result)))
    return images.float().clone() if batch is None else batch


def _average_of_samples(
    model: ScoreDenoiser, image: Tensor, settings: DriftRecSettings, compute: Compute, constraint: Constraint | None,
    report: Report,
) -> Tensor:  # fmt: skip
    padded, size = pad_to_multiple(image, _multiple(model, compute))
    planned = SAMPLERS[settings.sampler].evaluations(settings.steps)
    evaluated = 0  # evaluations of the present sample

    def report_evaluation(done: float, preview: Tensor | None) -> None:
        part = done / planned if planned else 1 - math.exp(-done / 40)
        report((number + min(part, 1.0)) / settings.samples, preview)

    def report_part(done: float) -> None:
        report_evaluation(evaluated + done, None)

    def denoise(x: Tensor, degraded: Tensor, t: float) -> Tensor:
        return _tiled(partial(model, t=t), model.network, compute, (x, degraded), report_part)

    def project_padded(prediction: Tensor) -> Tensor:
        assert constraint is not None
        inside = crop_to(prediction, size)
        projected = constraint.project(inside.clamp_(0, 1))
        if inside.shape == prediction.shape:
            return projected
        inside.copy_(projected)
        return prediction

    denoiser = denoise if constraint is None else constrained(denoise, project_padded)
    total: Tensor | None = None
    for number in range(settings.samples):

        def callback(step: SamplerStep) -> None:
            nonlocal evaluated
            evaluated = step.index
            report_evaluation(evaluated, crop_to(step.denoised, size))

        evaluated = 0
        noise = NoiseSource(sample_generator(settings.seed, number))
        restored = sample(
            settings.sampler, denoiser, model.sde, padded, noise, steps=settings.steps, tolerance=settings.tolerance,
            t_eps=settings.t_eps, callback=callback,
        )  # fmt: skip
        restored = crop_to(restored, size).clamp(0, 1)
        total = restored if total is None else total.add_(restored)
        del restored
        report((number + 1) / settings.samples, total / (number + 1) if number else total)
    assert total is not None
    return total.div_(settings.samples) if settings.samples > 1 else total


def _tiled(
    function: Callable[..., Tensor], network: NCSNpp, compute: Compute, tensors: tuple[Tensor, ...],
    on_part: Callable[[float], None],
) -> Tensor:  # fmt: skip
    home = tensors[0].device

    def on_device(*tiles: Tensor) -> Tensor:
        return function(*(tile.to(compute.device) for tile in tiles)).to(home)

    def on_tile(done: int, total: int) -> None:
        compute.check()
        if done < total:
            on_part(done / total)

    multiple = network.config.size_multiple
    return compute.tiler(on_device, *tensors, on_tile=on_tile, network=network, multiple=multiple)


def _multiple(model: ScoreDenoiser, compute: Compute) -> int:
    return math.lcm(compute.tiler.align, model.network.config.size_multiple)
