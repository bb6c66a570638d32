"""What `python -m training cave` can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from restoration.networks.cave import CaVEConfig
from training import degradation as jpeg
from training.configs.common import DataConfig, OptimizerConfig, RunConfig, ValidationConfig
from training.degradation import Degradation

_UNSEEN_QUALITIES = (15, 25, 35, 45, 55, 75)
"""None of those that the published training draws most of the time."""


@dataclass(frozen=True)
class CaVETrainingConfig:
    """`python -m training cave`: CODiff's first stage (Guo et al. 2025, section 3.2)."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(
            augmentation="crop", flips=True, rotations=True, degradation=jpeg.PRESETS["codiff_paper"]
        )
    )
    network: CaVEConfig = field(default_factory=CaVEConfig)
    implicit: bool = True
    """Learn to restore: the absolute error of the reconstruction."""
    explicit: bool = True
    """Learn to tell the quality: the absolute error of (100 - quality) / 100."""
    initialization: Literal["published", "whitened"] = "published"
    """`whitened`: the first filters start on decorrelated pixels of the training pictures. The quality lies in their
    finest differences, which the published start hardly sees: with it, minutes show nothing."""
    quality_weight: float = 1e-3
    """Weight of the quality's error; the reconstruction's is 1."""
    sides: tuple[int, ...] = ()
    """Each batch is cut to squares of one of these sides at random, multiples of 32 up to data.crop; empty: not cut.
    A network that saw one size learns how much of it is border, and is wrong about the quality of larger pictures."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-5, weight_decay=0.0, ema_decay=0.0)
    )
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(every=320_000, qualities=_UNSEEN_QUALITIES)
    )
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            output=Path("runs/cave"), images=25_600_000, batch=128, checkpoint_every=320_000
        )
    )

    def __post_init__(self) -> None:
        if not (self.implicit or self.explicit):
            raise ValueError("implicit, explicit: expected at least one of them to be on, got neither.")
        if any(side < 32 or side % 32 or side > self.data.crop for side in self.sides):
            raise ValueError(
                f"sides: expected multiples of 32 up to data.crop ({self.data.crop}), got {list(self.sides)}."
            )


PRESETS: dict[str, CaVETrainingConfig] = {
    "paper": CaVETrainingConfig(),
    "code": CaVETrainingConfig(
        data=DataConfig(
            augmentation="crop", flips=True, rotations=True, degradation=jpeg.PRESETS["codiff_code"]
        ),
        run=RunConfig(
            output=Path("runs/cave-code"), images=25_600_000, batch=128, checkpoint_every=320_000
        ),
    ),
    "small": CaVETrainingConfig(
        data=DataConfig(
            crop=192, augmentation="crop", flips=True, rotations=True, cache_mb=1000,
            degradation=Degradation(quality_min=5, quality_max=95),
        ),
        network=CaVEConfig(widths=(8, 16, 32, 64), blocks=1),
        initialization="whitened",
        sides=(64, 96, 128, 192),
        implicit=False,
        quality_weight=1.0,
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="cosine", warmup_images=1000, weight_decay=0.0, ema_decay=0.0
        ),
        validation=ValidationConfig(every=8_000, images=4, crop=128, qualities=_UNSEEN_QUALITIES),
        run=RunConfig(output=Path("runs/cave-small"), images=16_000, batch=16, checkpoint_every=4_000),
    ),
}  # fmt: skip
"""`paper` is the publication's, `code` what its published code does where that differs. `small` is small enough for a
CPU, and learns the quality alone, for learning to restore beside it takes far longer to begin with."""
