"""The node that restores with DriftRec, and with the regression baseline."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..restoration.color import COLOR_CORRECTIONS
from ..restoration.compute import OnProgress
from ..restoration.diffusion.prediction import RegressionRestorer
from ..restoration.diffusion.samplers import SAMPLERS
from ..restoration.jpeg import JPEGConstraint, JPEGData
from ..restoration.jpeg.cells import wrong_size
from ..restoration.pipelines import Compute, DriftRecSettings, restore_driftrec, restore_regression
from .images import join_image, split_image
from .inputs import closed_loop_input, overlap_input, samples_input, seed_input, tile_input, weight_input
from .runtime import ProgressReport, image_device, prepare_compute
from .types import JPEGDataSocket, Restorer, RestorerSocket, errors_of, expect_jpegs, expect_restorer

_DEFAULTS = DriftRecSettings()


class DriftRecSample(io.ComfyNode):
    """Restoration by sampling from DriftRec, or by one evaluation of its regression baseline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DriftRecSample",
            display_name="Restore JPEG with DriftRec",
            category="image/restoration",
            description="Restores JPEG-compressed images by diffusion in pixels (DriftRec). Any size; large images "
            "run in tiles that share one noise field. The same seed gives the same picture. Alpha is returned as it "
            "came.",
            search_aliases=["jpeg artifact removal", "deblock", "restore jpeg", "jpeg restoration", "remove artifacts"],
            inputs=[*_main_inputs(), *_advanced_inputs()],
            outputs=[
                io.Image.Output(
                    "IMAGE", tooltip="The restored images, of the same size, rounded to whole 8-bit levels."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        restorer: Restorer,
        image: Tensor,
        sampler: str,
        steps: int,
        seed: int,
        samples: int,
        color: str,
        jpeg: list[JPEGData] | None = None,
        t_eps: float = _DEFAULTS.t_eps,
        tolerance: float = _DEFAULTS.tolerance,
        tile: int = 1024,
        overlap: int = 64,
        consistency: float = 1.0,
        closed_loop: bool = True,
    ) -> io.NodeOutput:
        with errors_of("DriftRecSample"):
            settings = DriftRecSettings(sampler, steps, tolerance, t_eps, seed, samples, color)
            expect_restorer(restorer, "driftrec", "regression")
            pictures, alpha = split_image(image)
            jpegs = [] if jpeg is None else one_jpeg_each(jpeg, pictures)
            compute = prepare_compute(restorer, pictures.shape[-2], pictures.shape[-1], tile, overlap)
            constraints = constraints_of(jpegs, consistency, closed_loop, compute)
            restored = restore_pixels(restorer, pictures, settings, compute, constraints, ProgressReport())
        return io.NodeOutput(join_image(restored, alpha, image_device()))


def _main_inputs() -> list[io.Input]:
    return [
        RestorerSocket.Input(
            "restorer", tooltip="A restorer of the family driftrec or regression, from Load JPEG Restorer."
        ),
        io.Image.Input("image", tooltip="The compressed images, at the size that the JPEG has."),
        io.Combo.Input(
            "sampler",
            options=list(SAMPLERS),
            default=_DEFAULTS.sampler,
            tooltip="How the diffusion runs backwards. ode_2m is best at few steps; sde_2m adds texture; "
            "euler_maruyama is the paper's and needs about 100 steps. A regression restorer evaluates its network "
            "once and ignores this.",
        ),
        io.Int.Input(
            "steps",
            default=_DEFAULTS.steps,
            min=1,
            max=1000,
            tooltip="Steps of the sampler, each an evaluation of the network (two with euler_heun). rk45 chooses "
            "its own. Ignored by a regression restorer.",
        ),
        seed_input(
            "Of the noise. The same seed gives the same picture; another one gives another plausible "
            "picture. Ignored by a regression restorer."
        ),
        samples_input(
            _DEFAULTS.samples,
            "Restorations that are averaged: 1 keeps the most texture, more come closer to the original on "
            "average. The time grows with it. Ignored by a regression restorer.",
        ),
        io.Combo.Input(
            "color",
            options=list(COLOR_CORRECTIONS),
            default=_DEFAULTS.color,
            tooltip="How colours are brought back to those of the JPEG: mean shifts each channel, adain also "
            "matches its contrast, wavelet takes all coarse tones from the JPEG.",
        ),
        JPEGDataSocket.Input(
            "jpeg",
            optional=True,
            tooltip="Connect JPEG_DATA of the same picture, and the result is one that the file could have come from. "
            "consistency and closed_loop say how strictly.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "t_eps",
            default=_DEFAULTS.t_eps,
            min=0.001,
            max=0.5,
            step=0.001,
            round=0.0001,
            optional=True,
            advanced=True,
            tooltip="The time at which sampling ends: smaller keeps finer texture, larger is smoother. Not below "
            "the one that the restorer was trained with (0.01 for the starters).",
        ),
        io.Float.Input(
            "tolerance",
            default=_DEFAULTS.tolerance,
            min=1e-6,
            max=0.1,
            step=1e-4,
            round=1e-7,
            optional=True,
            advanced=True,
            tooltip="Error that the sampler rk45 allows itself; smaller takes more evaluations. Others ignore it.",
        ),
        tile_input(
            1024,
            "Side of the tiles that larger images are split into, pixels; 0 runs images whole. It is halved "
            "when memory runs out.",
        ),
        overlap_input("Pixels that neighbouring tiles share, at most half a tile; they are blended there."),
        weight_input(
            "consistency",
            1.0,
            "With jpeg connected: how far each prediction and the result are moved into what the file allows. "
            "1 all the way, 0 not at all.",
        ),
        closed_loop_input(
            True,
            "With jpeg connected: encode the rounded result again and mend it until it gives the file's own "
            "coefficients. Off, rounding to 8 bits moves some of them out again.",
        ),
    ]


def one_jpeg_each(jpegs: Any, pictures: Tensor) -> list[JPEGData]:
    """The JPEG of each picture (B, 3, H, W); one serves a whole batch.

    Raises:
        ValueError: It is no JPEG_DATA, or that of other pictures.
    """
    jpegs = expect_jpegs(jpegs)
    if len(jpegs) not in (1, len(pictures)):
        raise ValueError(
            f"expected one JPEG for each of the {len(pictures)} images, or one for all, got {len(jpegs)}. Connect "
            "the JPEG_DATA that belongs to these images."
        )
    for jpeg in jpegs:
        _check_size(jpeg, pictures.shape[-2], pictures.shape[-1])
    return jpegs * len(pictures) if len(jpegs) == 1 else jpegs


def constraints_of(
    jpegs: list[JPEGData], consistency: float, closed_loop: bool, compute: Compute
) -> list[JPEGConstraint]:  # fmt: skip
    """What pictures are held to; nothing where the weight is 0."""
    return [
        JPEGConstraint(one, consistency, closed_loop, check=lambda done: compute.check())
        for one in jpegs
        if consistency > 0
    ]


def restore_pixels(
    restorer: Restorer, pictures: Tensor, settings: DriftRecSettings, compute: Compute,
    constraints: list[JPEGConstraint], report: OnProgress,
) -> Tensor:  # fmt: skip
    """Pictures (B, 3, H, W) restored by a restorer of the family driftrec or regression, whichever it is."""
    if isinstance(restorer.module, RegressionRestorer):
        return restore_regression(
            restorer.module,
            pictures,
            compute=compute,
            color=settings.color,
            strength=settings.strength,
            constraints=constraints,
            on_progress=report,
        )
    return restore_driftrec(
        restorer.module, pictures, settings, compute=compute, constraints=constraints, on_progress=report
    )


def _check_size(jpeg: JPEGData, height: int, width: int) -> None:
    if (jpeg.upright_height, jpeg.upright_width) != (height, width):
        raise ValueError(wrong_size(jpeg, height, width, enlarged=False))
