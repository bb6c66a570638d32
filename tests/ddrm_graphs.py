"""Graphs with DDRMJPEGRestore, and priors of random weights for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from restoration.diffusion.prior import NoiseSchedule
from restoration.networks.adm_unet import ADMUNet, ADMUNetConfig
from restoration.restorer_file import RestorerMetadata, half, write_restorer
from tests.graphs import Graph

PRIOR = "test-prior.safetensors"
CLASSES = "test-prior-classes.safetensors"
SMALL = "test-prior-small.safetensors"


def write_prior(path: Path, *, classes: int = 0, tile: int = 0, max_timestep: int = 999) -> Path:
    """A prior whose output is not zero."""
    config = ADMUNetConfig(
        width=8, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(), middle_attention=False,
        head_channels=8, classes=classes, image_size=None, patch_size=2, norm_groups=4,
    )  # fmt: skip
    network, generator = ADMUNet(config), torch.Generator().manual_seed(0)
    network.initialize(generator)
    for parameter in network.parameters():
        if parameter.dim() > 1 and float(parameter.detach().abs().max()) < 1e-3:
            parameter.data.normal_(0, 0.05, generator=generator)
    settings = {
        "network": {"architecture": "adm", **config.to_dict()},
        "schedule": NoiseSchedule().to_dict(),
        "max_timestep": max_timestep,
        "tile": tile,
    }
    tensors = {f"unet.{key}": value for key, value in half(network.state_dict()).items()}
    write_restorer(path, RestorerMetadata("prior", settings, license="Apache-2.0"), tensors)
    return path


def write_priors(folder: Path) -> None:
    """The three above: unconditional, with ten classes, trained in tiles of 64 at timesteps up to 200."""
    write_prior(folder / PRIOR)
    write_prior(folder / CLASSES, classes=10)
    write_prior(folder / SMALL, tile=64, max_timestep=200)


def add_ddrm(graph: Graph, jpeg: list, restorer: str = PRIOR, dtype: str = "default", **settings: Any) -> str:
    """DDRMJPEGRestore with two samples of two steps, and its restorer; `settings` are its inputs."""
    loader = graph.add("LoadJPEGRestorer", restorer=restorer, dtype=dtype)
    inputs = {"measurement": "soft", "steps": 2, "seed": 0, "samples": 2}
    return graph.add("DDRMJPEGRestore", restorer=[loader, 0], jpeg=jpeg, **{**inputs, **settings})
