"""CODiff's second stage on eight patches: a run short enough for a test, and what it gave."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.restorer_file import RestorerMetadata, write_restorer
from training.configs.codiff import PRESETS, AdversarialConfig, CoDiffConfig, CoDiffLossConfig
from training.configs.common import OptimizerConfig, RunConfig, ValidationConfig
from training.configs.one_step import BaseConfig, LoRAConfig
from training.degradation import Degradation, compress
from training.loop.session import Session
from training.losses import PerceptualConfig

CROP, QUALITY, PATCHES = 64, 10, 8


@dataclass(frozen=True)
class Overfit:
    """What a run gave.

    Args:
        file: The exported restorer.
        degraded: The compressed patches, (8, 3, 64, 64) in [0, 1].
        clean: What they were before.
        restored: By the task at the end of its training.
        losses: The generator's, one a step.
    """

    file: Path
    degraded: Tensor
    clean: Tensor
    restored: Tensor
    losses: list[float]


def overfit(
    base: Path,
    folder: Path,
    *,
    steps: int = 18,
    perceptual: PerceptualConfig | None = None,
    seed: int = 0,
    clamp_gradient: bool = False,
) -> Overfit:
    """Train on eight patches with everything that CODiff trains with, the discriminator included.

    Args:
        base: A (reduced) SD 2.1-base in diffusers' layout.
        folder: Where patches, CaVE and the run are written.
        steps: Of two patches each.
        perceptual: None for no perceptual loss.
        seed: Of the patches and of the run.
    """
    patches = make_patches(folder / "patches", np.random.default_rng(seed))
    config = PRESETS["paper"]
    config = replace(
        config,
        data=replace(
            config.data, train=folder / "patches", crop=CROP, flips=False, rotations=False, workers=0,
            degradation=Degradation(QUALITY, QUALITY),
        ),
        base=BaseConfig(str(base)),
        cave=write_cave(folder / "cave.safetensors", seed=seed),
        unet_lora=LoRAConfig(rank=8, alpha=8.0),
        vae_lora=LoRAConfig(rank=8, alpha=8.0),
        loss=CoDiffLossConfig(
            perceptual=perceptual or PerceptualConfig("none"), adversarial=AdversarialConfig(rank=4, alpha=2.0),
            clamp_gradient=clamp_gradient,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-5, gradient_clip=1.0, ema_decay=0.0),
        critic_optimizer=OptimizerConfig(learning_rate=2e-5, gradient_clip=1.0),
        validation=ValidationConfig(every=10**9, images=1, crop=CROP, qualities=(QUALITY,)),
        run=RunConfig(folder / "run", images=2 * steps, batch=2, seed=seed),
    )  # fmt: skip
    session = Session("codiff", config)
    session.train()
    degraded = torch.stack([_tensor(compress(patch, QUALITY)) for patch in patches])
    session.task.model.eval()
    with torch.no_grad():
        restored = session.task.restore(degraded, seed=0)
    lines = [json.loads(line) for line in (folder / "run" / "stats.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    clean = torch.stack([_tensor(patch) for patch in patches])
    return Overfit(folder / "run" / "codiff.safetensors", degraded, clean, restored, losses)


def make_patches(folder: Path, rng: np.random.Generator) -> list[np.ndarray]:
    """Eight patches (64, 64, 3) of waves and a rectangle each, written as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:CROP, 0:CROP] / CROP
    patches = []
    for number in range(PATCHES):
        angles, phases = rng.uniform(0, 12, (2, 3)), rng.uniform(0, 6, 3)
        waves = np.sin(rows[..., None] * angles[0] + columns[..., None] * angles[1] + phases)
        top, left = rng.integers(4, CROP // 2, 2)
        waves[top : top + 20, left : left + 24] = rng.uniform(-1, 1, 3)
        patches.append((128 + 100 * waves).astype(np.uint8))
        Image.fromarray(patches[-1]).save(folder / f"{number}.png")
    return patches


def write_cave(path: Path, *, widths: tuple[int, ...] = (8, 16, 16, 32), seed: int = 0) -> Path:
    """A first stage with random weights, as `python -m training cave` would write it."""
    config = CaVEConfig(widths=widths, blocks=1)
    cave = CaVE(config)
    cave.initialize(torch.Generator().manual_seed(seed))
    tensors = {f"prompt.{key}": value for key, value in cave.state_dict().items()}
    write_restorer(path, RestorerMetadata("cave", {"cave": config.to_dict()}, license="Apache-2.0"), tensors)
    return path


def tiny_config(base: Path, folder: Path) -> CoDiffConfig:
    """CODiff small enough for quick tests: crops of 64 pixels, no perceptual loss, no discriminator, a tiny CaVE."""
    cave = folder / "cave.safetensors"
    config = PRESETS["paper"]
    return replace(
        config,
        data=replace(config.data, crop=CROP, workers=0, train=folder / "patches"),
        base=BaseConfig(str(base)),
        cave=cave if cave.exists() else write_cave(cave),
        unet_lora=LoRAConfig(rank=4, alpha=2.0),
        vae_lora=LoRAConfig(rank=4, alpha=2.0),
        loss=CoDiffLossConfig(perceptual=PerceptualConfig("none"), adversarial=AdversarialConfig("none")),
        validation=ValidationConfig(every=10**9, images=1, crop=CROP, qualities=(QUALITY,)),
        run=RunConfig(folder / "run", images=2, batch=1),
    )


def _tensor(patch: np.ndarray) -> Tensor:
    return torch.from_numpy(patch.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
