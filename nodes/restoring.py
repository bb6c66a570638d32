"""What RestoreJPEG does with a restorer of each family: the very functions that the family's own nodes call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..restoration.compute import Compute, OnProgress, Progress
from ..restoration.jpeg import JPEGData, apply_orientation, decode
from ..restoration.one_step_pipeline import OneStepSettings, restore_one_step, see_images
from ..restoration.pipelines import DriftRecSettings, batch_of, finished
from ..restoration.prior_pipeline import DDRMSettings, restore_ddrm
from ..restoration.prompts import CaVEPrompt
from .driftrec import constraints_of, restore_pixels
from .latent_model import latent_model_of
from .runtime import prepare_compute, prepare_exact, prepare_prior, prepare_whole
from .types import Restorer

_PIXEL_TILE = 1024
_EXACT_TILE = 1024
_SEEING = 0.1
"""The part of the progress that looking at the pictures makes."""
_SAMPLING = 0.98
"""The part of the progress that a prior's samples make where they are blended afterwards."""
_SEEDS = 2**64


@dataclass(frozen=True)
class Settings:
    """How pictures are restored, whatever restores them; what a family does not know of, it ignores.

    Args:
        strength: 0 gives the input back, 1 the restoration; in between they are blended.
        seed: Of the noise (driftrec, prior).
        samples: Restorations that are averaged (driftrec, prior).
        consistency: How far results, and predictions on the way, are moved into what the file allows.
        closed_loop: Whether results agree with the file in whole 8-bit levels, too.
        quality: In place of what is seen, 0 to 100, or None (sodiff).
        same_for_batch: Whether the pictures are frames of a film: one timestep, one noise.
        tile: Side of tiles in pixels; 0 for what suits the restorer.
        overlap: Of neighbouring tiles, pixels; at most half of their side is taken.
    """

    strength: float = 1.0
    seed: int = 0
    samples: int = 4
    consistency: float = 1.0
    closed_loop: bool = True
    quality: float | None = None
    same_for_batch: bool = True
    tile: int = 0
    overlap: int = 64


@dataclass(frozen=True)
class Pictures:
    """What is restored: pictures (B, 3, H, W) in [0, 1], upright, and the JPEG of each, or none at all."""

    images: Tensor
    jpegs: Sequence[JPEGData] = ()

    def single(self) -> list[Pictures]:
        """One by one."""
        jpegs = [[jpeg] for jpeg in self.jpegs] or [[]] * len(self.images)
        return [Pictures(image, jpeg) for image, jpeg in zip(self.images.split(1), jpegs, strict=True)]


@dataclass(frozen=True)
class Restoration:
    """The result (B, 3, H, W), and the timesteps of the pictures where a one-step restorer has taken them."""

    images: Tensor
    timesteps: list[float] = field(default_factory=list)


def decoded(jpegs: Sequence[JPEGData]) -> Tensor:
    """The pictures (B, 3, H, W) that files of one size hold, as libjpeg decodes them, turned upright."""
    pictures = [apply_orientation(decode(jpeg.coefficients), jpeg.orientation) for jpeg in jpegs]
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


def restore(
    restorer: Restorer, pictures: Pictures, settings: Settings, report: OnProgress, *, model: Any = None,
    vae: Any = None,
) -> Restoration:  # fmt: skip
    """Pictures restored by a restorer of any family that restores.

    Without `same_for_batch`, each picture is restored as it would be alone, with a seed that counts up.

    Args:
        restorer: What restores.
        pictures: What is restored; a prior needs their JPEGs.
        settings: How.
        report: Called with the progress.
        model: For adapters of a base model.
        vae: As well.

    Raises:
        ValueError: A setting, a MODEL or a VAE does not suit the restorer.
    """
    run = _FAMILIES[restorer.metadata.family]
    if settings.strength == 0:
        return _untouched(pictures, settings, report)
    if settings.same_for_batch or len(pictures.images) == 1:
        return run(_Task(restorer, settings, model, vae), pictures, report)
    found, singles = [], pictures.single()
    for index, single in enumerate(singles):
        own = replace(settings, seed=(settings.seed + index) % _SEEDS)
        part = _part(report, index / len(singles), (index + 1) / len(singles))
        found.append(run(_Task(restorer, own, model, vae), single, part))
    return Restoration(torch.cat([one.images for one in found]), [step for one in found for step in one.timesteps])


@dataclass(frozen=True)
class _Task:
    """With what, and how."""

    restorer: Restorer
    settings: Settings
    model: Any
    vae: Any


def _untouched(pictures: Pictures, settings: Settings, report: OnProgress) -> Restoration:
    """The pictures themselves, bit by bit; held to their files where that is asked for."""
    images, compute = pictures.images, Compute(check=lambda: report(Progress(0.0, None)))
    constraints = constraints_of(list(pictures.jpegs), settings.consistency, settings.closed_loop, compute)
    if constraints:
        pairs = zip(images.split(1), constraints, strict=True)
        images = batch_of((finished(image, image, 1.0, constraint) for image, constraint in pairs), images)
    report(Progress(1.0, None))
    return Restoration(images)


def _by_pixels(task: _Task, pictures: Pictures, report: OnProgress) -> Restoration:
    """DriftRec and regression, as DriftRecSample."""
    settings = task.settings
    height, width = pictures.images.shape[-2:]
    compute = prepare_compute(task.restorer, height, width, settings.tile or _PIXEL_TILE, settings.overlap)
    constraints = constraints_of(list(pictures.jpegs), settings.consistency, settings.closed_loop, compute)
    sampling = DriftRecSettings(seed=settings.seed, samples=settings.samples, strength=settings.strength)
    return Restoration(restore_pixels(task.restorer, pictures.images, sampling, compute, constraints, report))


def _by_prior(task: _Task, pictures: Pictures, report: OnProgress) -> Restoration:
    """DDRM, as DDRMJPEGRestore: what is in the files is restored; the pictures are what it is blended with."""
    settings, prior = task.settings, task.restorer.module
    if prior.classes:
        raise ValueError(
            f"{task.restorer.name} is a prior that was trained on {prior.classes} classes and has to be told which one "
            "a picture shows; this node has no input for it. Use Restore JPEG with DDRM, which has class_label."
        )
    blended = settings.strength < 1
    sampling = DDRMSettings(
        seed=settings.seed,
        samples=settings.samples,
        consistency=0.0 if blended else settings.consistency,
        closed_loop=settings.closed_loop,
    )
    height, width = pictures.images.shape[-2:]
    compute, at_once = prepare_prior(
        task.restorer, height, width, settings.samples, settings.tile, settings.overlap
    )  # fmt: skip
    restored = restore_ddrm(
        prior, pictures.jpegs, sampling, compute=compute, samples_at_once=at_once,
        on_progress=_part(report, 0.0, _SAMPLING) if blended else report,
    )  # fmt: skip
    return Restoration(_blended(restored, pictures, settings, report) if blended else restored)


def _blended(restored: Tensor, pictures: Pictures, settings: Settings, report: OnProgress) -> Tensor:
    """Restorations blended with the pictures, then held to their files."""
    compute = Compute(check=lambda: report(Progress(_SAMPLING, None)))
    constraints = constraints_of(list(pictures.jpegs), settings.consistency, settings.closed_loop, compute)
    given = pictures.images.to(restored)
    each = zip(given.split(1), restored.split(1), constraints or [None] * len(given), strict=True)
    result = batch_of((finished(*pair, settings.strength, constraint) for *pair, constraint in each), given)
    report(Progress(1.0, None))
    return result


def _in_one_step(task: _Task, pictures: Pictures, report: OnProgress) -> Restoration:
    """CODiff and SODiff, as prompt, timestep, VAE Encode, One-Step Denoise, VAE Decode and Hold to JPEG."""
    settings, prompt, images = task.settings, task.restorer.module, pictures.images
    latent_model = latent_model_of(task.restorer, task.model, task.vae)
    quality = None if isinstance(prompt, CaVEPrompt) else settings.quality
    if quality is not None and prompt.predictor is None:
        raise ValueError(
            f"expected no quality for {task.restorer.name}, which restores everything from one timestep, "
            f"{prompt.timestep:g}. Set quality to -1."
        )
    one_step = OneStepSettings(settings.strength, None, quality, settings.same_for_batch)
    seen = see_images(
        prompt, images, one_step, compute=_prepare_prompt(task.restorer, images), on_progress=_part(report, 0, _SEEING)
    )
    compute = latent_model.compute((images.shape[-2], images.shape[-1]), settings.tile, settings.overlap)
    constraints = constraints_of(list(pictures.jpegs), settings.consistency, settings.closed_loop, compute)
    restored = restore_one_step(
        latent_model, images, seen, one_step, compute=compute, constraints=constraints,
        on_progress=_part(report, _SEEING, 1.0),
    )  # fmt: skip
    return Restoration(restored, seen.timesteps.tolist())


def _prepare_prompt(restorer: Restorer, images: Tensor) -> Compute:
    """Where and how the networks run that look at the pictures."""
    prompt = restorer.module
    if isinstance(prompt, CaVEPrompt):
        return prepare_exact(restorer, prompt.network, images.shape, _EXACT_TILE, restorer.dtype)
    compute = prepare_whole(restorer, prompt.network, images.shape)
    if prompt.predictor is None:
        return compute
    return prepare_exact(restorer, prompt.predictor, images.shape, _EXACT_TILE, torch.float32)


def _part(report: OnProgress, start: float, stop: float) -> OnProgress:
    """Reports what is done of a part of the work as that of the whole."""
    return lambda progress: report(Progress(start + (stop - start) * progress.fraction, progress.preview))


_FAMILIES: dict[str, Callable[[_Task, Pictures, OnProgress], Restoration]] = {
    "codiff": _in_one_step,
    "sodiff": _in_one_step,
    "driftrec": _by_pixels,
    "regression": _by_pixels,
    "prior": _by_prior,
}
FAMILIES = tuple(_FAMILIES)
"""That restore."""
