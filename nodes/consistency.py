"""The node that holds any restored image to its JPEG."""

from __future__ import annotations

import math

from comfy_api.latest import io, ui
from torch import Tensor

from ..restoration.compute import Progress
from ..restoration.jpeg import ConsistencyResult, JPEGData, make_consistent
from .images import join_image, split_image
from .inputs import share_input
from .runtime import ProgressReport, image_device, show_text
from .types import JPEGDataSocket, errors_of, expect_jpegs

_REMEDY = "Leave this node out, or use the IMAGE and JPEG_DATA of Compress to JPEG before the restorer."


class JPEGConsistency(io.ComfyNode):
    """The projection onto a file's quantisation cells, after any restorer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JPEGConsistency",
            display_name="Hold to JPEG",
            category="image/restoration",
            description="Moves a restored image as little as possible, until it is one that the JPEG could have come "
            "from: saved again in the same way it gives the same file. Takes away blur and colour shift that the file "
            "rules out, and keeps all that it leaves open. Works after any restorer, also after an upscaler by a whole "
            "factor. Alpha is returned as it came.",
            search_aliases=[
                *("jpeg consistency", "data consistency", "quantization constraint", "projection"),
                *("color shift", "faithful", "hallucination"),
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The restored images, upright, at the size that the JPEG has, or enlarged by a whole "
                    "factor (2, 3, ...), the same in both directions.",
                ),
                JPEGDataSocket.Input(
                    "jpeg",
                    tooltip="JPEG_DATA of the JPEGs that they were restored from: one for each image, or one for all.",
                ),
                share_input(
                    "strength",
                    1.0,
                    "How far the images are moved: 1 until they agree with the file, 0 not at all (they are "
                    "returned as they are, not rounded either).",
                ),
                io.Boolean.Input(
                    "closed_loop",
                    default=True,
                    tooltip="On: whole 8-bit levels, encoded again and mended until they give the file's own "
                    "coefficients. Off: continuous levels, for further work before the picture is saved.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The images, held to their JPEGs; of the same size."),
                io.Float.Output(
                    "fraction",
                    display_name="fraction",
                    tooltip="Of the coefficients of the JPEGs, how many agree now, from 0 to 1; the mean of a batch.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image: Tensor, jpeg: list[JPEGData], strength: float, closed_loop: bool) -> io.NodeOutput:
        with errors_of("JPEGConsistency"):
            jpegs = expect_jpegs(jpeg, _REMEDY)
            pictures, alpha = split_image(image)
            report = ProgressReport()
            result = make_consistent(
                pictures,
                jpegs,
                strength=strength,
                closed_loop=closed_loop,
                check=lambda done: report(Progress(done, None)),
            )
        text = _described(result, closed_loop)
        show_text(cls.hidden.unique_id, text)
        restored = join_image(result.images, alpha, image_device())
        return io.NodeOutput(restored, result.fraction, ui=ui.PreviewText(text))


def _described(result: ConsistencyResult, closed_loop: bool) -> str:
    share = math.floor(result.fraction * 1e6) / 1e4  # 100 means all of them
    rounds = f" after {result.rounds} {'round' if result.rounds == 1 else 'rounds'}" if closed_loop else ""
    return f"{share:.4f} % of the coefficients agree{rounds}"
