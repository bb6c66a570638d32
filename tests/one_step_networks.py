"""Restorer files of one-step restorers with a small backbone of their own, tiny and random; no base model is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from skimage import data
from torch import Tensor

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.dct_codec import DCTCodec
from restoration.networks.saipe_config import SAIPEConfig
from restoration.networks.small_unet import SmallUNetConfig
from restoration.networks.timestep_predictor import TimestepPredictorConfig
from restoration.restorer_file import RestorerMetadata, write_restorer
from restoration.restorers import DCT_SMALL
from tests.prior_networks import randomized
from tests.reduced_sd21 import CALIBRATION, TINY_PREDICTOR, cave_tensors, predictor_tensors, saipe_tensors
from training.networks.backbone import make_unet

TINY_UNET = SmallUNetConfig(widths=(32,), layers=1, context_dim=32)
TWO_LEVELS = SmallUNetConfig(
    widths=(32, 64), layers=1, attention=(False, True), self_attention=True, head_dim=16, context_dim=32
)  # fmt: skip
TINY_SAIPE = SAIPEConfig(
    dim=24, down_depths=(1,), up_depths=(1,), heads=2, image_side=64, performer_depth=1, performer_heads=2,
    performer_dim_head=8, features=16, context_dim=32, tokens=9,
)  # fmt: skip
# What the random layers are multiplied with, so that timestep and prompt are felt, and the results are pictures still.
_GAINS = {"conv_out": 0.6, "attn2.to_out": 6.0, "time_emb_proj": 3.0}


def write_tiny_codiff(
    path: Path, *, unet: SmallUNetConfig = TINY_UNET, cave: CaVEConfig | None = None, timestep: float = 299.5,
    most_tokens: int | None = 16, seed: int = 0, **changes: Any,
) -> Path:  # fmt: skip
    """A self-contained restorer of the family `codiff`; `changes` are made to its configuration at the end."""
    cave = cave or CaVEConfig(widths=(4, 8, 8, 16), blocks=1)
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "prompt": cave_tensors(CaVE(cave, decoder=False, device="meta"), generator),
        "projection": {
            "weight": torch.randn((unet.context_dim, cave.widths[-1]), generator=generator) / cave.widths[-1] ** 0.5,
            "bias": torch.randn(unet.context_dim, generator=generator) * 0.1,
        },
    }
    config = {"cave": cave.to_dict(), "timestep": timestep, "most_tokens": most_tokens}
    return _write(path, "codiff", {**config, **_backbone(unet), **changes}, {**parts, **backbone_tensors(unet, seed)})


def write_tiny_sodiff(
    path: Path, *, unet: SmallUNetConfig = TINY_UNET, saipe: SAIPEConfig = TINY_SAIPE,
    predictor: TimestepPredictorConfig | None = TINY_PREDICTOR, timestep: float | None = None, seed: int = 0,
    **changes: Any,
) -> Path:  # fmt: skip
    """A self-contained restorer of the family `sodiff`; `changes` are made to its configuration at the end.

    Its predictor really tells qualities apart, and starts at a timestep of 840 - 8 quality.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "prompt": saipe_tensors(saipe, generator),
        "timestep": {} if predictor is None else predictor_tensors(predictor, generator),
    }
    config = {
        "saipe": saipe.to_dict(), "timestep_predictor": None if predictor is None else predictor.to_dict(),
        "timestep": timestep, "calibration": None if predictor is None else CALIBRATION, "tells_quality": True,
    }  # fmt: skip
    return _write(path, "sodiff", {**config, **_backbone(unet), **changes}, {**parts, **backbone_tensors(unet, seed)})


def backbone_tensors(unet: SmallUNetConfig, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The parts `unet` and `codec`: each layer is felt, and the results are pictures still."""
    return {"unet": diffusers_unet(unet, seed).state_dict(), "codec": {"scale": photographic_scale()}}


def diffusers_unet(unet: SmallUNetConfig, seed: int = 0) -> UNet2DConditionModel:
    """diffusers' network of that shape, its weights random, what it returns a sixth of a usual coefficient."""
    network = randomized(make_unet(unet), seed)
    for name, parameter in network.named_parameters():
        parameter.data *= next((gain for layer, gain in _GAINS.items() if layer in name), 1.0)
    network.conv_out.bias.data *= 0.1
    return network.requires_grad_(False)


def photographic_scale() -> Tensor:
    """The scale of the DCT codec as one photograph has it."""
    photo = torch.from_numpy(data.astronaut().copy()).movedim(-1, 0)[None].float() / 255
    codec = DCTCodec()
    codec.measure(photo)
    return codec.scale


def _backbone(unet: SmallUNetConfig) -> dict[str, Any]:
    return {"context_dim": unet.context_dim, "backbone": {"kind": DCT_SMALL, **unet.to_dict()}}


def _write(path: Path, family: str, config: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> Path:
    tensors = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    write_restorer(path, RestorerMetadata(family, config, license="Apache-2.0"), tensors)
    return path
