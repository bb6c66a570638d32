"""The nodes of the one-step restorers: what is seen in the JPEG as a prompt, and one step of denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as mm
import comfy.sampler_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..restoration.diffusion.one_step import TIMESTEPS
from ..restoration.pipelines import embed_with_cave
from ..restoration.prompts import CaVEPrompt
from .dct_latent import guarded
from .images import split_image
from .runtime import ProgressReport, prepare_exact
from .types import Restorer, RestorerSocket, errors_of, expect_restorer
from .unet import TILINGS, Tiling, denoise_once

TIMESTEP_KEY = "jpeg_restorer_timestep"
"""Entry of a CONDITIONING: the timestep that its restorer was trained at."""

_SMALLEST_IMAGE = 32
_LATENT_PIXEL = 8


def exact_tile_input() -> io.Int.Input:
    """The side of the parts that a network is run in where that changes nothing but memory."""
    return io.Int.Input(
        "tile",
        default=1024,
        min=0,
        max=16384,
        step=64,
        optional=True,
        advanced=True,
        tooltip="Larger images are looked at in parts of this side, in pixels, to save memory; the result "
        "is the same. 0 takes them whole.",
    )


class CaVEEmbed(io.ComfyNode):
    """CODiff's prompt: what CaVE sees in a compressed image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CaVEEmbed",
            display_name="CaVE Prompt (CODiff)",
            category="model/conditioning/jpeg",
            description="Looks at compressed images and makes the prompt that a CODiff restorer needs, one token for "
            "each 32x32 pixels. Also estimates the JPEG quality. Embed the whole image, also when it is denoised in "
            "tiles.",
            search_aliases=["codiff", "jpeg prompt", "visual prompt", "compression aware embedding", "jpeg quality"],
            inputs=[
                RestorerSocket.Input("restorer", tooltip="A restorer of the family codiff, from Load JPEG Restorer."),
                io.Image.Input("image", tooltip="The compressed images, at the size at which they are encoded."),
                exact_tile_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "CONDITIONING", tooltip="For One-Step Denoise; it also carries the restorer's own timestep."
                ),
                io.Float.Output(
                    "quality",
                    display_name="quality",
                    tooltip="The estimated JPEG quality, 0 to 100; the mean of a batch.",
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer: Restorer, image: Tensor, tile: int = 1024) -> io.NodeOutput:
        with errors_of("CaVEEmbed"):
            module: CaVEPrompt = expect_restorer(restorer, "codiff")
            pictures, _ = split_image(image)
            _check_size(pictures)
            compute = prepare_exact(restorer, module.network, pictures.shape, tile, restorer.dtype)
            tokens, quality = embed_with_cave(module, pictures, compute=compute, on_progress=ProgressReport())
        tokens = tokens.to(mm.intermediate_device(), torch.float32)
        return io.NodeOutput([[tokens, {TIMESTEP_KEY: module.timestep}]], float(quality.mean()))


class OneStepDenoise(io.ComfyNode):
    """The clean latent from a compressed one, by one evaluation of the network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepDenoise",
            display_name="One-Step Denoise",
            category="model/sampling/jpeg",
            description="Restores a latent in one step: it is read as a noisy one at the given timestep, and what the "
            "model predicts to be noise is taken away. Nothing is random.",
            search_aliases=["codiff", "sodiff", "one step diffusion", "restore latent", "osediff"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that Load JPEG Restorer gives, adapted or its own."),
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt, from CaVE Prompt, SAIPE Prompt or any other node."
                ),
                io.Latent.Input(
                    "latent", tooltip="The compressed images, encoded with the VAE that Load JPEG Restorer gives."
                ),
                io.Float.Input(
                    "timestep",
                    default=-1.0,
                    min=-1.0,
                    max=TIMESTEPS - 1.0,
                    step=1.0,
                    round=0.0001,
                    tooltip="How much is restored, from 0 to 999; -1 takes the restorer's own, where it comes with its "
                    "prompt. Connect QF Timestep Predict for SODiff. Not rounded. A list gives one for each image.",
                ),
                io.Combo.Input(
                    "tiling",
                    options=list(TILINGS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto splits a latent when the whole would not fit into memory; always splits what is "
                    "larger than a tile, as CODiff was published.",
                ),
                io.Int.Input(
                    "tile",
                    default=96 * _LATENT_PIXEL,
                    min=32 * _LATENT_PIXEL,
                    max=8192,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Side of the tiles in pixels of the image (8 for each of the latent). Halved when memory "
                    "runs out.",
                ),
                io.Int.Input(
                    "overlap",
                    default=32 * _LATENT_PIXEL,
                    min=0,
                    max=4096,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Pixels that neighbouring tiles share, at most half a tile; they are blended there.",
                ),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="The restored latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        conditioning: Any,
        latent: dict[str, Any],
        timestep: float | Sequence[float] | Tensor,
        tiling: str = "auto",
        tile: int = 96 * _LATENT_PIXEL,
        overlap: int = 32 * _LATENT_PIXEL,
    ) -> io.NodeOutput:
        with errors_of("OneStepDenoise"):
            samples = _checked_latent(model, latent)
            _check_conditioning(model, conditioning, len(samples))
            timesteps = _timesteps(timestep, conditioning, len(samples))
            plan = _tiling(tiling, tile, overlap)
            restored = denoise_once(model, conditioning, samples, timesteps, plan)
            restored = _of_same_size(latent["samples"], _inside_mask(latent, samples, restored))
        return io.NodeOutput({**latent, "samples": restored.to(mm.intermediate_device(), torch.float32).contiguous()})


def _check_size(pictures: Tensor) -> None:
    height, width = pictures.shape[-2:]
    if min(height, width) < _SMALLEST_IMAGE:
        raise ValueError(
            f"expected an image of at least {_SMALLEST_IMAGE}x{_SMALLEST_IMAGE} pixels, got {width}x{height}. Resize "
            "or pad it first."
        )


def _tiling(mode: str, tile: int, overlap: int) -> Tiling:
    if overlap > tile // 2:
        raise ValueError(
            f"expected an overlap of at most half the tile, {tile // 2} pixels, got {overlap}. Lower the overlap."
        )
    return Tiling(mode, tile // _LATENT_PIXEL, overlap // _LATENT_PIXEL)


def _checked_latent(model: Any, latent: Any) -> Tensor:
    samples = latent.get("samples") if isinstance(latent, dict) else None
    channels = model.get_model_object("latent_format").latent_channels
    if not isinstance(samples, Tensor) or samples.dim() != 4 or samples.shape[1] != channels or 0 in samples.shape:
        found = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"expected a latent (batch, {channels}, height, width) of this model's VAE, got {found}. Encode the image "
            "with VAE Encode and the VAE output of Load JPEG Restorer."
        )
    return samples.float()


def _check_conditioning(model: Any, conditioning: Any, images: int) -> None:
    if not isinstance(conditioning, list) or not conditioning:
        raise ValueError(
            "expected a CONDITIONING with at least one prompt, got none. Connect CaVE Prompt or SAIPE Prompt."
        )
    context_dim = model.model.model_config.unet_config.get("context_dim")
    for tokens, _ in conditioning:
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.shape[-1] != context_dim:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"expected prompts (batch, tokens, {context_dim}) as this model takes them, got {found}. Connect the "
                "prompt node of the same restorer, and the MODEL that Load JPEG Restorer gives."
            )
        if tokens.shape[0] not in (1, images):
            raise ValueError(
                f"expected one prompt for each of the {images} images, or one for all, got {tokens.shape[0]}. Connect "
                "the prompt of these images."
            )


def _timesteps(timestep: Any, conditioning: Any, images: int) -> Tensor:
    """One timestep for each image: those given, or where that is -1, the one that the prompt carries."""
    given = torch.as_tensor(timestep, dtype=torch.float32, device="cpu").flatten()
    if len(given) not in (1, images):
        raise ValueError(
            f"expected one timestep for each of the {images} images, or one for all, got {len(given)}. Connect the "
            "timesteps of these images."
        )
    given = given.expand(images)
    if bool((given == -1).any()):
        given = torch.where(given == -1, _own_timestep(conditioning), given)
    if not bool(((given >= 0) & (given <= TIMESTEPS - 1)).all()):
        raise ValueError(f"expected timesteps from 0 to {TIMESTEPS - 1}, or -1, got {given.tolist()}. Change timestep.")
    return given


def _own_timestep(conditioning: Any) -> float:
    carried = {float(extra[TIMESTEP_KEY]) for _, extra in conditioning if TIMESTEP_KEY in extra}
    if len(carried) != 1:
        found = "none" if not carried else " and ".join(f"{value:g}" for value in sorted(carried))
        raise ValueError(
            f"expected a prompt that carries its restorer's timestep, got {found}. Set timestep to a number from 0 to "
            f"{TIMESTEPS - 1} (CODiff: 499), connect QF Timestep Predict to it (SODiff), or connect CaVE Prompt."
        )
    return carried.pop()


def _of_same_size(latent: Tensor, restored: Tensor) -> Tensor:
    """The result, its picture as large as that of the input where the input knows."""
    size = getattr(latent, "picture_size", None)
    return restored if size is None else guarded(restored, size)


def _inside_mask(latent: dict[str, Any], samples: Tensor, restored: Tensor) -> Tensor:
    mask = latent.get("noise_mask")
    if mask is None:
        return restored
    mask = comfy.sampler_helpers.prepare_mask(mask, samples.shape, restored.device)
    return torch.lerp(samples.to(restored), restored, mask.to(restored))
