"""The node that restores with a diffusion prior: DDRM-JPEG."""

from __future__ import annotations

from comfy_api.latest import io

from ..restoration.diffusion.prior import DiffusionPrior
from ..restoration.jpeg import JPEGData
from ..restoration.prior_pipeline import MEASUREMENTS, DDRMSettings, restore_ddrm
from .images import join_image
from .inputs import closed_loop_input, overlap_input, samples_input, seed_input, tile_input, weight_input
from .runtime import ProgressReport, image_device, prepare_prior
from .types import JPEGDataSocket, Restorer, RestorerSocket, errors_of, expect_jpegs, expect_one_size, expect_restorer

_DEFAULTS = DDRMSettings()
_AUTOMATIC = -1
JPEG_REMEDY = (
    "If it once was a JPEG, connect Compress to JPEG, which makes one of it, or restore it with a restorer that needs "
    "pixels only, such as DriftRec."
)
ONE_SIZE_REMEDY = "One IMAGE holds pictures of one size; restore them with a node for each."


class DDRMJPEGRestore(io.ComfyNode):
    """Restoration by an unconditional diffusion model that is held to the JPEG file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DDRMJPEGRestore",
            display_name="Restore JPEG with DDRM",
            category="image/restoration",
            description="Restores JPEGs with a diffusion model that has never seen one (DDRM-JPEG): it draws pictures "
            "that are likely, and is held to the file at each step. Any size; large pictures run in tiles that are "
            "blended at each step. The same seed gives the same picture.",
            search_aliases=[
                *("ddrm", "diffusion prior", "jpeg artifact removal", "deblock", "restore jpeg"),
                "jpeg restoration",
            ],
            inputs=[*_main_inputs(), *_advanced_inputs()],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    tooltip="The restored pictures, upright, at the size of the JPEG, in whole 8-bit levels.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        restorer: Restorer,
        jpeg: list[JPEGData],
        measurement: str,
        steps: int,
        seed: int,
        samples: int,
        start: int = _DEFAULTS.start,
        eta: float = _DEFAULTS.eta,
        eta_b: float = _AUTOMATIC,
        tile: int = 0,
        overlap: int = 64,
        consistency: float = _DEFAULTS.consistency,
        closed_loop: bool = _DEFAULTS.closed_loop,
        class_label: int = _AUTOMATIC,
    ) -> io.NodeOutput:
        with errors_of("DDRMJPEGRestore"):
            settings = DDRMSettings(
                steps,
                start,
                eta,
                None if eta_b == _AUTOMATIC else eta_b,
                measurement,
                seed,
                samples,
                consistency,
                closed_loop,
                None if class_label < 0 else class_label,
            )
            prior: DiffusionPrior = expect_restorer(restorer, "prior")
            jpegs = expect_jpegs(jpeg, JPEG_REMEDY)
            height, width = expect_one_size(jpegs, ONE_SIZE_REMEDY)
            compute, at_once = prepare_prior(restorer, height, width, samples, tile, overlap)
            restored = restore_ddrm(
                prior, jpegs, settings, compute=compute, samples_at_once=at_once, on_progress=ProgressReport()
            )
        return io.NodeOutput(join_image(restored, None, image_device()))


def _main_inputs() -> list[io.Input]:
    return [
        RestorerSocket.Input("restorer", tooltip="A restorer of the family prior, from Load JPEG Restorer."),
        JPEGDataSocket.Input(
            "jpeg",
            tooltip="JPEG_DATA of Load JPEG or Compress to JPEG. It holds the picture itself; no IMAGE is needed.",
        ),
        io.Combo.Input(
            "measurement",
            options=list(MEASUREMENTS),
            default=_DEFAULTS.measurement,
            tooltip="How predictions are held to the file. soft: moved to what the file makes likely, the less so the "
            "surer the prediction is. projection: moved no further than the file demands. shift: moved by whole "
            "quantisation steps, as in the paper. paper: with the authors' own simulation of JPEG, too; only for 4:2:0 "
            "squares with sides that are multiples of 16.",
        ),
        io.Int.Input(
            "steps",
            default=_DEFAULTS.steps,
            min=1,
            max=1000,
            tooltip="Evaluations of the network for each sample. More than 20 change little.",
        ),
        seed_input("Of the noise. The same seed gives the same picture; another one another plausible picture."),
        samples_input(
            _DEFAULTS.samples,
            "Restorations that are averaged: 1 keeps the most texture, more come closer to the original on "
            "average. The time grows with it.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "start",
            default=_DEFAULTS.start,
            min=1,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="How much noise sampling starts with, a timestep of the prior: more lets it invent more.",
        ),
        weight_input(
            "eta",
            _DEFAULTS.eta,
            "Share of fresh noise at each step; below 1 the prediction's own noise is kept in part.",
        ),
        weight_input(
            "eta_b",
            float(_AUTOMATIC),
            "Weight of the file at each step, 0 to 1. -1 takes what suits the measurement: 0.4 for shift and paper, "
            "1 for the others.",
            lowest=-1.0,
        ),
        tile_input(
            0,
            "Side of the tiles that larger pictures are split into, pixels; 0 takes the size that the prior "
            "was trained on, or 1024 where it takes any. It is halved when memory runs out.",
        ),
        overlap_input(
            "Pixels that neighbouring tiles share, at most half a tile; they are blended there at each step."
        ),
        weight_input(
            "consistency",
            _DEFAULTS.consistency,
            "How far the result, the average, is moved into what the file allows: 1 all the way, 0 not at all. "
            "Not with the measurement paper.",
        ),
        closed_loop_input(
            _DEFAULTS.closed_loop,
            "Encode the rounded result again and mend it until it gives the file's own coefficients. Off, "
            "rounding to 8 bits moves some of them out again.",
        ),
        io.Int.Input(
            "class_label",
            default=_AUTOMATIC,
            min=-1,
            max=9999,
            optional=True,
            advanced=True,
            tooltip="What the picture shows, for priors that were trained on classes (ImageNet's 0 to 999); -1 for "
            "others.",
        ),
    ]
