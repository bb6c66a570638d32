"""From a restorer file to the function that restores one picture with it: a row for each family, without ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from restoration.compute import Compute, NotFiniteError
from restoration.diffusion.prediction import RegressionRestorer, ScoreDenoiser
from restoration.diffusion.prior import DiffusionPrior
from restoration.jpeg import JPEGConstraint, JPEGData
from restoration.one_step_pipeline import LatentModel, OneStepSettings, restore_one_step, see_images
from restoration.pipelines import DriftRecSettings, restore_driftrec, restore_regression
from restoration.prior_pipeline import DDRMSettings, restore_ddrm
from restoration.prompts import CaVEPrompt, SAIPEPrompt
from restoration.restorer_file import RestorerFile, RestorerFileError, RestorerMetadata
from restoration.restorers import Restorer, build_restorer, load_weights
from restoration.tiling import Tiler
from training.restore.picture import RestorePicture
from training.restore.settings import RestoreSettings

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_JPEG_GRID = 16
_TILE, _OVERLAP = 1024, 64
_ADAPTER_TILE, _ADAPTER_OVERLAP = 768, 256  # as the adapters were published, in pixels
_TAKEN = {
    "driftrec": ("seed", "samples", "steps", "sampler"),
    "regression": (),
    "prior": ("seed", "samples", "steps", "class_label"),
    "codiff": (),
    "sodiff": ("quality",),
}
"""Family -> the settings that it has beside those of all."""
_ONE_STEP = ("codiff", "sodiff")
NO_RESTORERS = {
    "quality": "it tells the quality of pictures and restores none",
    "saipe": "it is the first stage of SODiff alone, which restores nothing: train the second (python -m training "
    "sodiff --saipe)",
    "cave": "it is the first stage of CODiff alone, which restores nothing: train the second (python -m training "
    "codiff --cave)",
}
"""Family -> why its files restore nothing."""


@dataclass(frozen=True)
class Loading:
    """How a restorer is loaded.

    Args:
        settings: How it restores.
        device: Where its networks run.
        dtype: Of its networks; None for half precision on CUDA devices, else single, as in ComfyUI.
        base: Where Stable Diffusion 2.1-base is, for adapters of it.
    """

    settings: RestoreSettings
    device: torch.device
    dtype: torch.dtype | None = None
    base: str | None = None

    @property
    def network_dtype(self) -> torch.dtype:
        """The type that the networks get."""
        return self.dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)


def settings_of(family: str) -> tuple[str, ...]:
    """The settings that a family has beside those of all; none for one that restores nothing."""
    return _TAKEN.get(family, ())


def check_family(metadata: RestorerMetadata, name: str, loading: Loading) -> None:
    """Refuse what a restorer cannot do, before anything is loaded.

    Raises:
        ValueError: It restores nothing, lacks its base model, or is given settings that it does not have.
    """
    family, base = metadata.family, loading.base
    if family not in _TAKEN:
        reason = NO_RESTORERS.get(family, "this version does not know how to use it")
        raise ValueError(f"{name} is of the family {family}: {reason}. Give --restorer one of {', '.join(_TAKEN)}.")
    if metadata.base is not None and base is None:
        raise ValueError(
            f"{name} adapts {metadata.base} and needs it: give --base the folder of Stable Diffusion 2.1-base in "
            "diffusers' layout (unet, vae, scheduler), or restore in ComfyUI, where Load Checkpoint reads it."
        )
    if metadata.base is None and base is not None:
        raise ValueError(f"{name} needs no base model. Leave --base out.")
    possible = {setting for settings_of_one in _TAKEN.values() for setting in settings_of_one}
    idle = sorted(possible.difference(_TAKEN[family]))
    given = [f"--{setting.replace('_', '-')}" for setting in idle if getattr(loading.settings, setting) is not None]
    if given:
        raise ValueError(f"{name} is of the family {family}, which has no {', '.join(given)}. Leave that out.")
    if _is_single(metadata) and loading.dtype not in (None, torch.float32):
        raise ValueError(f"{name} runs in single precision here. Leave --dtype out.")


def _is_single(metadata: RestorerMetadata) -> bool:
    """Whether it is a one-step restorer with a network of its own, which runs in single precision alone."""
    return metadata.family in _ONE_STEP and metadata.base is None


def load_restorer(file: RestorerFile, loading: Loading) -> RestorePicture:
    """The function that restores one picture; it holds the networks, and the tile size that fits the memory.

    Raises:
        ValueError: As `check_family`, or the file or its base model is not whole, or not fit for the type.
    """
    check_family(file.metadata, file.name, loading)
    if loading.settings.strength == 0:
        return _untouched
    single = _is_single(file.metadata) or loading.network_dtype == torch.float32
    return _advising(_restoring(file, loading), single=single)


def _advising(restore: RestorePicture, *, single: bool) -> RestorePicture:
    """The same, with what to do where a result is no number; `single` is whether it runs in single precision."""
    advice = "get the --restorer again, or give another one" if single else "give --dtype fp32"

    def advising(image: Tensor, jpeg: JPEGData | None, constraint: JPEGConstraint | None) -> Tensor:
        try:
            return restore(image, jpeg, constraint)
        except NotFiniteError as error:
            precision = "single" if single else "half"
            raise ValueError(
                f"the network, in {precision} precision, returned something that is no number: {advice}"
            ) from error

    return advising


def _restoring(file: RestorerFile, loading: Loading) -> RestorePicture:
    if file.metadata.family in _ONE_STEP:
        return _one_step(file, loading)
    restorer = build_restorer(file.metadata, file.name, dtype=loading.network_dtype)
    load_weights(restorer, file)
    restorer.to(loading.device).eval().requires_grad_(False)
    restorer.compute_dtype = loading.network_dtype
    return _FAMILIES[file.metadata.family](restorer, loading)


def _untouched(image: Tensor, jpeg: JPEGData | None, constraint: JPEGConstraint | None) -> Tensor:
    """The picture itself, bit by bit; held to its file where that is asked for."""
    return image if constraint is None else constraint.finish(image)


def _driftrec(restorer: Restorer, loading: Loading) -> RestorePicture:
    model, given = cast(ScoreDenoiser, restorer), loading.settings
    settings = DriftRecSettings(
        strength=given.strength, **_given(seed=given.seed, samples=given.samples, steps=given.steps,
                                          sampler=given.sampler),
    )  # fmt: skip
    compute = _compute(loading, model.network.config.size_multiple)

    def restore(image: Tensor, jpeg: JPEGData | None, constraint: JPEGConstraint | None) -> Tensor:
        return restore_driftrec(model, image, settings, compute=compute, constraints=_one(constraint))

    return restore


def _regression(restorer: Restorer, loading: Loading) -> RestorePicture:
    model = cast(RegressionRestorer, restorer)
    color, strength = DriftRecSettings().color, loading.settings.strength
    compute = _compute(loading, model.network.config.size_multiple)

    def restore(image: Tensor, jpeg: JPEGData | None, constraint: JPEGConstraint | None) -> Tensor:
        return restore_regression(
            model, image, compute=compute, color=color, strength=strength, constraints=_one(constraint)
        )

    return restore


def _prior(restorer: Restorer, loading: Loading) -> RestorePicture:
    prior, given = cast(DiffusionPrior, restorer), loading.settings
    settings = DDRMSettings(
        strength=given.strength, label=given.class_label, consistency=float(given.consistency),
        **_given(seed=given.seed, samples=given.samples, steps=given.steps),
    )  # fmt: skip
    size_multiple = prior.network.config.size_multiple  # type: ignore[union-attr]
    compute = _compute(loading, cast(int, size_multiple), tile=prior.tile or _TILE)

    def restore(image: Tensor, jpeg: JPEGData | None, constraint: JPEGConstraint | None) -> Tensor:
        if jpeg is None:
            raise ValueError(
                "it is no JPEG, and a prior restores by what the file of a JPEG says: give --restorer another family"
            )
        return restore_ddrm(prior, [jpeg], settings, compute=compute)

    return restore


def _one_step(file: RestorerFile, loading: Loading) -> RestorePicture:
    prompt = cast("CaVEPrompt | SAIPEPrompt", build_restorer(file.metadata, file.name, dtype=torch.float32))
    load_weights(prompt, file)
    prompt.to(loading.device).eval().requires_grad_(False)
    _check_quality(prompt, file.name, loading.settings)
    settings = OneStepSettings(strength=loading.settings.strength, quality=loading.settings.quality)
    model, compute = _latent_model(file, loading)
    seeing = Compute(loading.device, Tiler(_TILE, release=_release(loading.device)))

    def restore(image: Tensor, jpeg: JPEGData | None, constraint: JPEGConstraint | None) -> Tensor:
        seen = see_images(prompt, image, settings, compute=seeing)
        return restore_one_step(model, image, seen, settings, compute=compute, constraints=_one(constraint))

    return restore


def _latent_model(file: RestorerFile, loading: Loading) -> tuple[LatentModel, Compute]:
    """What encodes, denoises and decodes, and how large pictures are split for it."""
    if loading.base is not None:
        from training.restore.adapted_base import load_adapted_base

        model = load_adapted_base(file, loading.base, loading.device, loading.network_dtype)
        return model, _compute(loading, model.size_multiple, tile=_ADAPTER_TILE, overlap=_ADAPTER_OVERLAP)
    from training.networks.backbone import load_latent_model

    small = load_latent_model(file, loading.device)
    return small, _compute(loading, small.size_multiple)


def _check_quality(prompt: CaVEPrompt | SAIPEPrompt, name: str, settings: RestoreSettings) -> None:
    """Refuse a quality where the restorer has no use for one.

    Raises:
        RestorerFileError: It has none.
    """
    if settings.quality is None or not isinstance(prompt, SAIPEPrompt):
        return
    if prompt.predictor is None or not prompt.tells_quality or prompt.calibration is None:
        raise RestorerFileError(f"{name} does not restore by quality: it was trained without. Leave --quality out.")


def _compute(loading: Loading, size_multiple: int, tile: int = _TILE, overlap: int = _OVERLAP) -> Compute:
    """Where and in which tiles networks run; what the settings say goes before what suits the family."""
    settings = loading.settings
    tile = tile if settings.tile is None else settings.tile
    overlap = overlap if settings.overlap is None else settings.overlap
    align = math.lcm(_JPEG_GRID, size_multiple)
    return Compute(loading.device, Tiler(tile, overlap, align, release=_release(loading.device)))


def _release(device: torch.device) -> Callable[[], None] | None:
    return torch.cuda.empty_cache if device.type == "cuda" else None


def _one(constraint: JPEGConstraint | None) -> list[JPEGConstraint] | None:
    return None if constraint is None else [constraint]


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that are not None."""
    return {key: value for key, value in settings.items() if value is not None}


_FAMILIES: dict[str, Callable[[Restorer, Loading], RestorePicture]] = {
    "driftrec": _driftrec,
    "regression": _regression,
    "prior": _prior,
}
