"""SODiff's second stage on four patches of photographs: a run short enough for a test, and what it gave."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration.networks.saipe import SAIPE, SAIPEConfig
from restoration.networks.timestep_predictor import TimestepPredictorConfig
from restoration.restorer_file import RestorerMetadata, write_restorer
from tests.shared import shared_path
from training.configs.common import OptimizerConfig, RunConfig, ValidationConfig
from training.configs.one_step import BaseConfig, LoRAConfig
from training.configs.sodiff import PRESETS, PromptedAdversarialConfig, SODiffConfig, SODiffLossConfig
from training.degradation import Degradation, compress
from training.loop.session import Session
from training.losses import PerceptualConfig

CROP, PATCHES, QUALITY = 64, 4, 10
SAIPE_CONFIG = SAIPEConfig(
    dim=24, down_depths=(1,), up_depths=(1,), heads=2, image_side=64, performer_depth=1, performer_heads=2,
    performer_dim_head=8, features=16,
)  # fmt: skip
PREDICTOR = TimestepPredictorConfig(stem=32, width=16, blocks=4, hidden=32)


@dataclass(frozen=True)
class Overfit:
    """What a run gave.

    Args:
        file: The exported restorer.
        degraded: The compressed patches, (4, 3, 64, 64) in [0, 1].
        clean: What they were before.
        begun: As the task restored them before its training.
        restored: By the task at the end of it.
        losses: The generator's, one a step.
    """

    file: Path
    degraded: Tensor
    clean: Tensor
    begun: Tensor
    restored: Tensor
    losses: list[float]


def tiny_config(base: Path, folder: Path) -> SODiffConfig:
    """SODiff small enough for quick tests: crops of 64 pixels, no perceptual loss, no discriminator, a tiny SAIPE."""
    saipe = folder / "saipe.safetensors"
    config = PRESETS["paper"]
    return replace(
        config,
        data=replace(config.data, crop=CROP, workers=0, train=folder / "patches"),
        base=BaseConfig(str(base)),
        saipe=saipe if saipe.exists() else write_saipe(saipe),
        unet_lora=LoRAConfig(rank=4, alpha=4.0),
        predictor=PREDICTOR,
        loss=SODiffLossConfig(
            perceptual=PerceptualConfig("none"), adversarial=PromptedAdversarialConfig("none", rank=4, alpha=4.0)
        ),
        validation=ValidationConfig(every=10**9, images=1, crop=CROP, qualities=(QUALITY,)),
        run=RunConfig(folder / "run", images=2, batch=1),
    )


def overfit(base: Path, folder: Path, *, steps: int = 64, discriminator: str = "sd21") -> Overfit:
    """Train on four patches with all of SODiff but the perceptual loss and the noise of the timestep, which
    a base with random weights takes long to bear.

    Args:
        base: A (reduced) SD 2.1-base in diffusers' layout.
        folder: Where patches, SAIPE and the run are written.
        steps: Of two patches each.
        discriminator: `sd21` or `none`.
    """
    patches = write_patches(folder / "patches")
    config = tiny_config(base, folder)
    adversarial = replace(config.loss.adversarial, discriminator=discriminator)
    config = replace(
        config,
        data=replace(
            config.data, flips=False, rotations=False,
            degradation=Degradation(QUALITY, QUALITY),
        ),
        unet_lora=LoRAConfig(rank=32, alpha=32.0),
        gumbel=False,
        loss=replace(config.loss, adversarial=adversarial, clamp_gradient=True),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-2, gradient_clip=1.0, ema_decay=0.0),
        critic_optimizer=OptimizerConfig(learning_rate=2e-5, gradient_clip=1.0),
        run=replace(config.run, images=2 * steps, batch=2, precision="no"),
    )  # fmt: skip
    degraded = torch.stack([tensor(compress(patch, QUALITY)) for patch in patches])
    session = Session("sodiff", config)
    begun = _restored(session, degraded)
    session.train()
    restored = _restored(session, degraded)
    lines = [json.loads(line) for line in (folder / "run" / "stats.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    clean = torch.stack([tensor(patch) for patch in patches])
    return Overfit(folder / "run" / "sodiff.safetensors", degraded, clean, begun, restored, losses)


@torch.no_grad()
def _restored(session: Session, degraded: Tensor) -> Tensor:
    session.task.model.eval()
    return session.task.restore(degraded, seed=0)


def write_patches(folder: Path) -> list[np.ndarray]:
    """Four patches (64, 64, 3) of photographs, written as PNG; the calling test is skipped without the photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    patches = []
    for number, path in enumerate(sorted(shared_path("data", "eval", "LIVE1").glob("*.webp"))[:PATCHES]):
        picture = np.asarray(Image.open(path).convert("RGB"))
        top, left = (side // 2 - CROP // 2 for side in picture.shape[:2])
        patches.append(np.ascontiguousarray(picture[top : top + CROP, left : left + CROP]))
        Image.fromarray(patches[-1]).save(folder / f"{number}.png")
    return patches


def write_saipe(path: Path, *, config: SAIPEConfig = SAIPE_CONFIG, seed: int = 0) -> Path:
    """A first stage with random weights, as `python -m training saipe` would write it."""
    saipe = SAIPE(config)
    saipe.initialize(torch.Generator().manual_seed(seed))
    tensors = {f"prompt.{key}": value for key, value in saipe.state_dict().items()}
    write_restorer(path, RestorerMetadata("saipe", {"saipe": config.to_dict()}, license="Apache-2.0"), tensors)
    return path


def tensor(patch: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (3, H, W) in [0, 1]."""
    return torch.from_numpy(patch.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
