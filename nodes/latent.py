"""The node that makes a latent of a JPEG without ever making its pixels."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..restoration.jpeg import JPEGData
from .dct_latent import guarded
from .dct_vae import DCTVAE
from .types import JPEGDataSocket, errors_of, expect_jpegs, expect_one_size

_REMEDY = "Encode its IMAGE with VAE Encode."


class JPEGToLatent(io.ComfyNode):
    """A file's own coefficients as the latent of a restorer that works on those of 8x8 blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JPEGToLatent",
            display_name="JPEG to Latent",
            category="model/latent",
            description="Takes the latent straight from a JPEG's coefficients, for restorers that bring their own "
            "VAE, whose latent consists of such coefficients. Like VAE Encode of the decoded picture, but without "
            "what decoding rounds and clips.",
            search_aliases=["encode jpeg", "jpeg latent", "dct latent", "coefficients to latent", "vae encode jpeg"],
            inputs=[
                JPEGDataSocket.Input(
                    "jpeg", tooltip="JPEG_DATA of one or more JPEGs of the same size, from Load JPEG."
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The VAE of Load JPEG Restorer, for a restorer with a backbone of its own, such as "
                    "starter-onestep-faithful. Others cannot take coefficients.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "LATENT",
                    tooltip="For One-Step Denoise. Sides that are no multiples of 8 pixels are rounded up.",
                )
            ],
        )

    @classmethod
    def execute(cls, jpeg: list[JPEGData], vae: Any) -> io.NodeOutput:
        with errors_of("JPEGToLatent"):
            if not isinstance(vae, DCTVAE):
                raise ValueError(
                    "expected the VAE of a restorer with a backbone of its own, got one whose latents are no JPEG "
                    "coefficients. Choose such a restorer in Load JPEG Restorer, or use VAE Encode."
                )
            jpegs = expect_jpegs(jpeg, _REMEDY)
            size = expect_one_size(jpegs, "Connect one at a time.")
            latents = [vae.first_stage_model.encode_jpeg(one).to(mm.intermediate_device()) for one in jpegs]
        return io.NodeOutput({"samples": guarded(torch.cat(latents), size)})
