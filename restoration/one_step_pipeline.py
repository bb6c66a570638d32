"""One-step restoration from images to restored images, whatever runs the network: ComfyUI's MODEL, or diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .compute import Compute, OnProgress, Report, finite, part_of
from .diffusion.one_step import TIMESTEPS
from .embedding import embed_with_cave, embed_with_saipe, predict_timesteps
from .pipelines import Constraint, batch_of, finished
from .prompts import CaVEPrompt, SAIPEPrompt


class LatentModel(Protocol):
    """A base model with a restorer's weights in it, on latents (B, C, h, w).

    It may have a `network` (torch.nn.Module), which `denoise` evaluates: then its group norms take their statistics
    from a sample of the whole picture. Without, or where it is None, each tile has its own.
    """

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images (B, 3, H, W) in [0, 1] whose sides fit."""
        ...

    def denoise(self, latents: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents, from compressed ones, tokens (B, K, context) and timesteps (B,)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents; what lies outside of [0, 1] may be cut."""
        ...


@dataclass(frozen=True)
class OneStepSettings:
    """How a one-step restorer is used.

    Args:
        strength: 0 gives the input back, 1 the restoration; in between they are blended.
        timestep: In place of the restorer's own, 0 to 999.
        quality: In place of what its predictor sees, 0 to 100; moves the timestep of a SODiff restorer.
        same_timestep: Whether the images of a batch are frames of one film, and get the mean of their timesteps.

    Raises:
        ValueError: A number is out of range.
    """

    strength: float = 1.0
    timestep: float | None = None
    quality: float | None = None
    same_timestep: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"expected a strength from 0 to 1, got {self.strength:g}.")
        if self.timestep is not None and not 0 <= self.timestep <= TIMESTEPS - 1:
            raise ValueError(f"expected a timestep from 0 to {TIMESTEPS - 1}, got {self.timestep:g}.")


@dataclass(frozen=True)
class SeenImages:
    """Prompts (B, K, context) and timesteps (B,) of images, float32 on the CPU."""

    tokens: Tensor
    timesteps: Tensor


def see_images(
    prompt: CaVEPrompt | SAIPEPrompt, images: Tensor, settings: OneStepSettings, *, compute: Compute | None = None,
    on_progress: OnProgress | None = None,
) -> SeenImages:  # fmt: skip
    """What a restorer's own networks see in whole images: prompts, and where denoising starts.

    Args:
        prompt: Of a CODiff or SODiff restorer.
        images: (B, 3, H, W) in [0, 1].
        settings: What is given in place of what is seen.
        compute: Where these networks run.
        on_progress: Called after each image and tile.

    Raises:
        ValueError: The restorer is a first stage alone, or does not know what to do with a quality.
    """
    if isinstance(prompt, CaVEPrompt):
        tokens, _ = embed_with_cave(prompt, images, compute=compute, on_progress=on_progress)
        own: Tensor | float | None = prompt.timestep
    else:
        tokens, _ = embed_with_saipe(prompt, images, compute=compute, on_progress=on_progress)
        own = _predicted(prompt, images, settings, compute)
    timestep = own if settings.timestep is None else settings.timestep
    if timestep is None:
        raise ValueError("expected a whole restorer, got a first stage, which knows no timestep. Give one.")
    timesteps = torch.as_tensor(timestep, dtype=torch.float32).cpu().expand(len(images))
    if settings.same_timestep:
        timesteps = timesteps.mean().expand(len(images))
    return SeenImages(tokens.float().cpu(), timesteps)


def restore_one_step(
    model: LatentModel, images: Tensor, seen: SeenImages, settings: OneStepSettings, *, compute: Compute | None = None,
    constraints: Sequence[Constraint] | None = None, on_progress: OnProgress | None = None,
) -> Tensor:  # fmt: skip
    """Restore images by one evaluation of a network on their latents (CODiff, SODiff).

    Args:
        model: What encodes, denoises and decodes; it has its own device.
        images: Compressed images, (B, 3, H, W) in [0, 1], of any size from 1x1.
        seen: What `see_images` saw in them.
        settings: How to use it.
        compute: How large images are split; the whole of encoding, denoising and decoding runs tile by tile.
        constraints: One for each image, which the result is finished with.
        on_progress: Called after each tile; the last fraction is 1.

    Returns:
        (B, 3, H, W) float32 in [0, 1] in whole 8-bit levels, rounded.

    Raises:
        ValueError: The network returned something that is no number.
    """
    compute = compute or Compute()

    def restored() -> Iterator[Tensor]:
        for index, image in enumerate(images.split(1)):
            image, report = image.float(), part_of(on_progress, index, len(images))
            one = SeenImages(seen.tokens[index : index + 1], seen.timesteps[index : index + 1])
            result = _restored(model, image, one, compute, report)
            yield (result := finished(image, result, settings.strength, constraints[index] if constraints else None))
            report(1.0, result)

    return batch_of(restored(), images)


def _restored(model: LatentModel, image: Tensor, seen: SeenImages, compute: Compute, report: Report) -> Tensor:
    network: nn.Module | None = getattr(model, "network", None)

    def restore(tile: Tensor) -> Tensor:
        return model.decode(model.denoise(model.encode(tile), seen.tokens, seen.timesteps)).to(image)

    def on_tile(done: int, total: int) -> None:
        compute.check()
        report(0.99 * done / total, None)

    return finite(compute.tiler(restore, image, on_tile=on_tile, network=network))


def _predicted(
    prompt: SAIPEPrompt, images: Tensor, settings: OneStepSettings, compute: Compute | None
) -> Tensor | float | None:
    if prompt.predictor is None:
        return prompt.timestep
    quality = None if settings.quality is None else torch.tensor([settings.quality])
    timesteps, _ = predict_timesteps(
        prompt.predictor, images, compute=compute, calibration=prompt.calibration, quality=quality
    )
    return timesteps
