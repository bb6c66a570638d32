"""SDXL's UNet at its full size as a description, and one small enough for tests, with the same kinds of parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

FULL_SDXL: dict[str, Any] = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SMALL_SDXL: dict[str, Any] = {
    **FULL_SDXL, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "cross_attention_dim": 48, "attention_head_dim": (2, 4),
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
"""Prompts of 48, pooled prompts of 20."""
SMALL_SD21: dict[str, Any] = {
    **SMALL_SDXL, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "transformer_layers_per_block": 1,
    "addition_embed_type": None, "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None,
}  # fmt: skip


def small_unet(config: dict[str, Any] | None = None, seed: int = 0) -> UNet2DConditionModel:
    """A UNet with random weights, SDXL's kind by default."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**(config or SMALL_SDXL)).eval()


def write_sdxl(folder: Path, seed: int = 0) -> UNet2DConditionModel:
    """The small SDXL in `folder`/unet, in diffusers' layout; it is returned as well."""
    unet = small_unet(seed=seed)
    unet.save_pretrained(folder / "unet")
    return unet
