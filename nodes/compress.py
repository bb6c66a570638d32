"""The node that compresses images to JPEG."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..restoration.jpeg import (
    Coefficients,
    JPEGData,
    decode,
    encode,
    jpeg_data_from,
    round_trip,
    tables_for_quality,
)
from ..restoration.tiling import crop_to
from .images import join_image, split_image
from .runtime import each_chunk, image_device
from .types import JPEGDataSocket, errors_of

_PIXELS_AT_ONCE = 8_000_000
_SUBSAMPLINGS = ["4:2:0", "4:2:2", "4:4:4", "4:4:0", "4:1:1", "gray"]


class JPEGCompress(io.ComfyNode):
    """JPEG compression of a batch, once or twice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JPEGCompress",
            display_name="Compress to JPEG",
            category="image/restoration",
            description="Shows images as they look after JPEG compression, once or twice. Nothing is saved. Alpha "
            "is kept.",
            search_aliases=["jpeg artifacts", "jpg compression", "degrade", "compress image", "double jpeg"],
            inputs=[
                io.Image.Input("image", tooltip="The images to compress, of any size."),
                io.Int.Input(
                    "quality",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Quality of the first compression, from 1 to 100, as in libjpeg and Pillow.",
                ),
                io.Combo.Input(
                    "subsampling",
                    options=_SUBSAMPLINGS,
                    default="4:2:0",
                    tooltip="How colour is stored: 4:4:4 in full, 4:2:0 at half the size in both directions, gray "
                    "not at all.",
                ),
                io.Int.Input(
                    "second_quality",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Quality of a second compression of the result; 0 for none.",
                ),
                io.Int.Input(
                    "shift_x",
                    default=0,
                    min=0,
                    max=15,
                    optional=True,
                    advanced=True,
                    tooltip="With a second compression: pixels by which the first one's block grid lies further "
                    "left, as if the picture had been cropped in between.",
                ),
                io.Int.Input(
                    "shift_y",
                    default=0,
                    min=0,
                    max=15,
                    optional=True,
                    advanced=True,
                    tooltip="With a second compression: pixels by which the first one's block grid lies further up.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The images after the last compression, of the same size."),
                JPEGDataSocket.Output(
                    "JPEG_DATA", tooltip="What the JPEGs of the last compression hold, one for each image."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, quality: int, subsampling: str, second_quality: int = 0, shift_x: int = 0, shift_y: int = 0
    ) -> io.NodeOutput:
        with errors_of("JPEGCompress"):
            pictures, alpha = split_image(image)
            jpegs: list[JPEGData] = []

            def compress(chunk: Tensor) -> Tensor:
                if second_quality:
                    chunk = _compressed_with_shift(chunk, quality, subsampling, shift_x, shift_y)
                coefficients = encode(chunk, tables_for_quality(second_quality or quality), subsampling)
                jpegs.extend(_described(coefficients, len(jpegs)))
                return decode(coefficients)

            compressed = torch.cat(each_chunk(compress, pictures, _PIXELS_AT_ONCE))
        return io.NodeOutput(join_image(compressed, alpha, image_device()), jpegs)


def _compressed_with_shift(pictures: Tensor, quality: int, subsampling: str, shift_x: int, shift_y: int) -> Tensor:
    """Pictures (B, 3, H, W) compressed on a block grid that starts `shift` pixels left of and above their corner."""
    larger = torch.nn.functional.pad(pictures, (shift_x, 0, shift_y, 0), mode="replicate")
    return crop_to(round_trip(larger, quality, subsampling)[..., shift_y:, shift_x:], tuple(pictures.shape[-2:]))


def _described(coefficients: Coefficients, start: int) -> list[JPEGData]:
    return [jpeg_data_from(coefficients[i], f"image {start + i + 1}") for i in range(len(coefficients))]
