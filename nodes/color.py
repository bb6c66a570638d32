"""The node that gives a restored image the colours of its JPEG."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..restoration.color import COLOR_CORRECTIONS
from .images import join_image, split_image
from .runtime import image_device
from .types import errors_of

_METHODS = [name for name in COLOR_CORRECTIONS if name != "none"]


class JPEGMatchColor(io.ComfyNode):
    """CODiff's colour corrections, which core's Transfer Color has not."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JPEGMatchColor",
            display_name="Match Color to JPEG",
            category="image/restoration",
            description="Gives a restored image the colours of the JPEG that it was made from; use it after VAE "
            "Decode. Alpha is returned as it came.",
            search_aliases=["color correction", "adain", "wavelet color fix", "color shift", "color fix"],
            inputs=[
                io.Image.Input("image", tooltip="The restored images."),
                io.Image.Input(
                    "jpeg_image",
                    tooltip="The compressed images that they were made from: as many or one, of the same size or "
                    "up to 7 pixels larger, which VAE Encode cuts off.",
                ),
                io.Combo.Input(
                    "method",
                    options=_METHODS,
                    default="adain",
                    tooltip="mean shifts each channel, adain also matches its contrast (CODiff's own), wavelet takes "
                    "all coarse tones from the JPEG.",
                ),
            ],
            outputs=[io.Image.Output("IMAGE", tooltip="The images with corrected colours.")],
        )

    @classmethod
    def execute(cls, image: Tensor, jpeg_image: Tensor, method: str) -> io.NodeOutput:
        with errors_of("JPEGMatchColor"):
            pictures, alpha = split_image(image)
            reference, _ = split_image(jpeg_image)
            reference = _matching(reference, pictures).to(pictures.device)
            corrected = [
                COLOR_CORRECTIONS[method](*pair) for pair in zip(pictures.split(1), reference.split(1), strict=True)
            ]
        return io.NodeOutput(join_image(torch.cat(corrected), alpha, image_device()))


def _matching(reference: Tensor, pictures: Tensor) -> Tensor:
    """The reference cut as core's VAE Encode cuts images: to multiples of 8, around the middle."""
    height, width = pictures.shape[-2:]
    above, beside = reference.shape[-2] - height, reference.shape[-1] - width
    if not (0 <= above < 8 and 0 <= beside < 8) or len(reference) not in (1, len(pictures)):
        raise ValueError(
            f"expected a JPEG's image for each of the {len(pictures)} images of {width}x{height} pixels, or one for "
            f"all, got {len(reference)} of {reference.shape[-1]}x{reference.shape[-2]}. Connect the image that was "
            "encoded, neither resized nor cropped."
        )
    cut = reference[..., above // 2 : above // 2 + height, beside // 2 : beside // 2 + width]
    return cut.expand(len(pictures), -1, -1, -1)
