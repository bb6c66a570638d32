"""The nodes of SODiff: the prompt that is seen in the JPEG, and where denoising starts."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..restoration import prompts
from ..restoration.calibration import Calibration
from ..restoration.networks.timestep_predictor import TimestepPredictor
from ..restoration.pipelines import embed_with_saipe, predict_timesteps
from .images import join_image, split_image
from .one_step import TIMESTEP_KEY, exact_tile_input
from .runtime import ProgressReport, image_device, prepare_exact, prepare_whole, show_text
from .types import Restorer, RestorerSocket, errors_of, expect_restorer

_UNKNOWN = -1.0


class SAIPEPrompt(io.ComfyNode):
    """SODiff's prompt: what SAIPE sees in a compressed image, in the space of the text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SAIPEPrompt",
            display_name="SAIPE Prompt (SODiff)",
            category="model/conditioning/jpeg",
            description="Looks at compressed images and makes the prompt that a SODiff restorer needs: 77 tokens in "
            "the space of Stable Diffusion 2's text encoder, as if somebody had described the picture. Also gives "
            "its own, plain reconstruction.",
            search_aliases=["sodiff", "jpeg prompt", "image prompt", "semantic prompt", "saipe"],
            inputs=[
                RestorerSocket.Input(
                    "restorer", tooltip="A restorer of the family sodiff or saipe, from Load JPEG Restorer."
                ),
                io.Image.Input("image", tooltip="The compressed images, at the size at which they are encoded."),
            ],
            outputs=[
                io.Conditioning.Output(
                    "CONDITIONING",
                    tooltip="For One-Step Denoise, or wherever a text prompt of Stable Diffusion 2 goes.",
                ),
                io.Image.Output(
                    "IMAGE",
                    tooltip="The images as SAIPE reconstructs them on the way: smooth, without invented texture.",
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer: Restorer, image: Tensor) -> io.NodeOutput:
        with errors_of("SAIPEPrompt"):
            module: prompts.SAIPEPrompt = expect_restorer(restorer, "sodiff", "saipe")
            pictures, alpha = split_image(image)
            compute = prepare_whole(restorer, module.network, pictures.shape)
            tokens, seen = embed_with_saipe(module, pictures, compute=compute, on_progress=ProgressReport())
        tokens = tokens.to(mm.intermediate_device(), torch.float32)
        carried = {} if module.timestep is None else {TIMESTEP_KEY: module.timestep}
        return io.NodeOutput([[tokens, carried]], join_image(seen, alpha, image_device()))


class QFTimestepPredict(io.ComfyNode):
    """SODiff's quality-aware predictor of the timestep."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QFTimestepPredict",
            display_name="QF Timestep Predict",
            category="model/conditioning/jpeg",
            description="Looks at compressed images and says at which timestep a SODiff restorer should start, one "
            "for each image, and how strongly they are compressed. A quality of your own moves the timestep.",
            search_aliases=["sodiff", "jpeg quality", "estimate quality", "timestep", "quality factor", "strength"],
            inputs=[
                RestorerSocket.Input(
                    "restorer", tooltip="A restorer of the family sodiff or quality, from Load JPEG Restorer."
                ),
                io.Image.Input("image", tooltip="The compressed images as they were decoded, not resized."),
                io.Float.Input(
                    "quality",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=1.0,
                    round=0.01,
                    optional=True,
                    tooltip="-1 takes the quality that is seen in the pixels. A number from 0 to 100 takes its place: "
                    "connect the quality of Load JPEG, which knows it, or set it lower to restore as if the picture "
                    "were worse. A list gives one for each image.",
                ),
                exact_tile_input(),
                io.Boolean.Input(
                    "same_for_batch",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For frames of a film: all images of the batch get the mean of their timesteps, so that "
                    "none is restored more than its neighbours.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "timestep",
                    display_name="timestep",
                    tooltip="For One-Step Denoise, not rounded: a number, or a list with one for each image of a "
                    "batch. -1 from a restorer of the family quality, which knows no timesteps.",
                ),
                io.Float.Output(
                    "quality",
                    display_name="quality",
                    tooltip="The JPEG quality that was taken, 0 to 100; the mean of a batch. -1 from a restorer that "
                    "does not look for it.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, restorer: Restorer, image: Tensor, quality: float | Sequence[float] = -1.0, tile: int = 1024,
        same_for_batch: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        with errors_of("QFTimestepPredict"):
            module = expect_restorer(restorer, "sodiff", "quality")
            pictures, _ = split_image(image)
            given = torch.as_tensor(quality, dtype=torch.float32, device="cpu").flatten()
            timesteps, qualities = _predict(restorer, module, pictures, given, tile)
            if same_for_batch:
                timesteps = torch.tensor(timesteps).mean().expand(len(timesteps)).tolist()
        text = _described(timesteps, qualities, given.expand(len(pictures)).tolist())
        show_text(cls.hidden.unique_id, text)
        timestep = timesteps[0] if len(timesteps) == 1 or timesteps[0] == _UNKNOWN else timesteps
        return io.NodeOutput(timestep, sum(qualities) / len(qualities), ui=ui.PreviewText(text))


def _predict(
    restorer: Restorer, module: prompts.SAIPEPrompt | prompts.QualityEstimator, pictures: Tensor, given: Tensor,
    tile: int,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """A timestep and a quality for each picture, -1 for what the restorer does not know."""
    fixed = module.timestep if isinstance(module, prompts.SAIPEPrompt) else None
    if fixed is not None:
        if given.tolist() != [_UNKNOWN]:
            raise ValueError(
                f"expected no quality for {restorer.name}, which restores everything from one timestep, "
                f"{fixed:g}. Set quality to -1, and timestep in One-Step Denoise."
            )
        return [fixed] * len(pictures), [_UNKNOWN] * len(pictures)
    predictor, calibration = _parts(module)
    tells = not isinstance(module, prompts.SAIPEPrompt) or module.tells_quality
    if not tells and given.tolist() != [_UNKNOWN]:
        raise ValueError(
            f"expected no quality for {restorer.name}, which was trained without telling it. Set quality to -1."
        )
    compute = prepare_exact(restorer, predictor, pictures.shape, tile, torch.float32)
    timesteps, qualities = predict_timesteps(
        predictor, pictures, compute=compute, calibration=calibration, quality=given, on_progress=ProgressReport()
    )
    if not tells:
        qualities = torch.full_like(qualities, _UNKNOWN)
    return [_UNKNOWN] * len(pictures) if timesteps is None else timesteps.tolist(), qualities.tolist()


def _parts(
    module: prompts.SAIPEPrompt | prompts.QualityEstimator,
) -> tuple[TimestepPredictor, Calibration | None]:
    if isinstance(module, prompts.QualityEstimator):
        return module.network, None
    assert module.predictor is not None
    return module.predictor, module.calibration


def _described(timesteps: Sequence[float], qualities: Sequence[float], given: Sequence[float]) -> str:
    """A line for each image."""
    lines = []
    for number, (timestep, quality, wanted) in enumerate(zip(timesteps, qualities, given, strict=True), 1):
        parts = [] if quality == _UNKNOWN else [f"quality {quality:.1f}{'' if wanted == _UNKNOWN else ' (given)'}"]
        parts += [] if timestep == _UNKNOWN else [f"timestep {timestep:.1f}"]
        lines.append((f"{number}: " if len(timesteps) > 1 else "") + ", ".join(parts))
    return "\n".join(lines)
