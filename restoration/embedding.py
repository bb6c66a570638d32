"""What networks see in compressed images, from images to prompts, qualities and timesteps: called by the nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import Calibration
from .compute import Compute, OnProgress, Report, finite, part_of
from .diffusion.one_step import TIMESTEPS
from .networks.cave import CaVE
from .networks.timestep_predictor import TimestepPredictor, expected_timestep
from .prompts import CaVEPrompt, SAIPEPrompt


def embed_with_cave(
    model: CaVEPrompt, images: Tensor, *, compute: Compute | None = None, on_progress: OnProgress | None = None
) -> tuple[Tensor, Tensor]:
    """The prompts that CODiff's CaVE sees in images, and their JPEG qualities.

    Args:
        model: CaVE and its projection.
        images: (B, 3, H, W) in [0, 1]; each is looked at on its own.
        compute: Where the network runs; the tiles of its tiler save memory and change nothing.
        on_progress: Called after each tile; the last fraction is 1.

    Returns:
        Tokens (B, cells, context width), and qualities (B,) from 0 to 100, both on the device of `images`.

    Raises:
        ValueError: The network returned something that is no number.
    """
    compute = compute or Compute()
    prompts, qualities = [], []
    for index, image in enumerate(images.split(1)):
        report = part_of(on_progress, index, len(images))
        features = _encoded(model.network, image.to(model.compute_dtype), compute, report).to(compute.device)
        prompts.append(model(features).to(images))
        qualities.append(model.network.quality(features).to(images.device))
        report(1.0, None)
    return finite(torch.cat(prompts)), torch.cat(qualities)


def embed_with_saipe(
    model: SAIPEPrompt, images: Tensor, *, compute: Compute | None = None, on_progress: OnProgress | None = None
) -> tuple[Tensor, Tensor]:
    """The prompts that SODiff's SAIPE sees in images, and its own reconstructions of them.

    Args:
        model: SAIPE.
        images: (B, 3, H, W) in [0, 1]; each is looked at on its own.
        compute: Where the network runs; its tiler is not used, as SAIPE looks at the picture as a whole.
        on_progress: Called after each image; the last fraction is 1.

    Returns:
        Tokens (B, 77, context width) and reconstructions (B, 3, H, W) in [0, 1], both on the device of `images`.

    Raises:
        ValueError: The network returned something that is no number.
    """
    compute = compute or Compute()
    prompts, reconstructions = [], []
    for index, image in enumerate(images.split(1)):
        compute.check()
        reconstruction, tokens = model(image.to(compute.device, model.compute_dtype))
        prompts.append(tokens.to(images))
        reconstructions.append(finite(reconstruction.to(images)).clamp(0, 1))
        part_of(on_progress, index, len(images))(1.0, reconstructions[-1])
    return finite(torch.cat(prompts)), torch.cat(reconstructions)


def predict_timesteps(
    predictor: TimestepPredictor, images: Tensor, *, compute: Compute | None = None,
    calibration: Calibration | None = None, quality: Tensor | None = None, on_progress: OnProgress | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """At which timestep each image should be denoised, and its JPEG quality, as SODiff's predictor sees them.

    Without noise, so the same image gives the same timestep (SODiff, arXiv 2508.07346, Eq. 11). A quality that is given
    moves the timestep along the calibration, from what it says of the quality that is seen.

    Args:
        predictor: In evaluation mode, its weights in single precision, as it computes.
        images: (B, 3, H, W) in [0, 1]; each is looked at on its own.
        compute: Where the network runs; the tiles of its tiler save memory and change nothing.
        calibration: The predictor's mean timestep at each quality.
        quality: (B,) or (1,): given qualities from 0 to 100, or -1 for those that are seen.
        on_progress: Called after each tile; the last fraction is 1.

    Returns:
        Timesteps (B,) from 0 to 999, or None of a predictor of the quality alone, and the qualities (B,) from 0 to 100
        that the timesteps are for: given, or seen. Both in single precision on the device of `images`.

    Raises:
        ValueError: Qualities are given that are no such numbers, or without a calibration, or the network returned
            something that is no number.
    """
    given = _given_qualities(quality, images)
    if predictor.config.timesteps and calibration is None and bool((given >= 0).any()):
        raise ValueError(
            "expected no quality for a restorer without a calibration, which says how its timesteps follow the "
            "quality. Set quality to -1, and timestep in One-Step Denoise; or train and export the restorer again."
        )
    compute = compute or Compute()
    features = []
    for index, image in enumerate(images.split(1)):
        report = part_of(on_progress, index, len(images))
        features.append(_encoded(predictor, image.float(), compute, report).to(compute.device))
        report(1.0, None)
    pooled = finite(torch.cat(features))
    seen, logits = predictor.quality(pooled).to(given), predictor.logits(pooled)
    wanted = torch.where(given >= 0, given, seen)
    if logits is None:
        return None, wanted
    timesteps = finite(expected_timestep(logits)).to(given)
    if calibration is not None:
        timesteps = torch.where(given >= 0, calibration.shifted(timesteps, seen, wanted), timesteps)
    return timesteps.clamp(0, TIMESTEPS - 1), wanted


def _given_qualities(quality: Tensor | None, images: Tensor) -> Tensor:
    given = torch.full((1,), -1.0) if quality is None else quality.float().flatten()
    if len(given) not in (1, len(images)):
        raise ValueError(
            f"expected one quality for each of the {len(images)} images, or one for all, got {len(given)}. Connect the "
            "qualities of these images."
        )
    if not bool(((given == -1) | ((given >= 0) & (given <= 100))).all()):
        raise ValueError(f"expected qualities from 0 to 100, or -1, got {given.tolist()}. Change quality.")
    return given.to(images.device).expand(len(images))


def _encoded(network: CaVE | TimestepPredictor, image: Tensor, compute: Compute, report: Report) -> Tensor:
    """What a network encodes one image to, with smaller tiles from the start again when memory runs out."""
    tiler = compute.tiler

    def on_tile(done: int, total: int) -> None:
        compute.check()
        report(0.99 * done / total, None)

    while True:
        try:
            return network.encode_tiled(image, tiler.tile, device=compute.device, on_tile=on_tile)
        except Exception as error:
            smaller = max(min(tiler.tile or max(image.shape[-2:]), max(image.shape[-2:])) // 2, tiler.minimum)
            if not tiler.is_out_of_memory(error) or smaller == tiler.tile or smaller >= max(image.shape[-2:]):
                raise
        # Outside the handler the traceback, which keeps the failed attempt's tensors alive, is gone.
        tiler.tile = smaller
        if tiler.release is not None:
            tiler.release()
