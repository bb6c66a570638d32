"""What `python -m training prior` can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from restoration.diffusion.prior import NoiseSchedule
from restoration.networks.adm_unet import ADMUNetConfig
from training import degradation as jpeg
from training.configs.common import DataConfig, OptimizerConfig, RunConfig, ValidationConfig


@dataclass(frozen=True)
class PriorConfig:
    """`python -m training prior`: a prior for DDRM, trained to predict noise (Ho et al. 2020, Eq. 14)."""

    data: DataConfig = field(default_factory=lambda: DataConfig(augmentation="crop", flips=True))
    network: ADMUNetConfig = field(default_factory=lambda: ADMUNetConfig(out_channels=3))
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    max_timestep: int = 999
    """Largest timestep that is trained. DDRM starts at 300: a small network learns more where it is used."""
    any_size: bool = False
    """The network may see pictures of any size; otherwise it gets tiles of the size of the training crops."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, weight_decay=0.0, ema_decay=0.9999)
    )
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(every=500_000))
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            output=Path("runs/prior"), images=512_000_000, batch=256, checkpoint_every=100_000
        )
    )

    def __post_init__(self) -> None:
        if (self.network.in_channels, self.network.out_channels, self.network.classes) != (3, 3, 0):
            raise ValueError(
                "network: expected 3 channels in and out and no classes, for noise is all that is learnt here, got "
                f"{self.network.in_channels}, {self.network.out_channels} and {self.network.classes} classes."
            )
        if not 0 < self.max_timestep < self.schedule.steps:
            raise ValueError(f"max_timestep: expected 1 to {self.schedule.steps - 1}, got {self.max_timestep}.")


PRESETS = {
    "paper": PriorConfig(),
    "starter": PriorConfig(
        data=DataConfig(
            crop=64, augmentation="crop", flips=True, rotations=True, downscale=(1.0, 2.0),
            degradation=jpeg.Degradation(quality_min=5, quality_max=95), cache_mb=1000,
        ),
        network=ADMUNetConfig(
            out_channels=3, width=48, channel_multipliers=(1, 1, 2, 2), attention_levels=(), middle_attention=False,
            image_size=None, patch_size=2, norm_groups=8,
        ),
        max_timestep=399,
        any_size=True,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_images=2000, weight_decay=0.0, gradient_clip=1.0
        ),
        validation=ValidationConfig(every=20_000, crop=128),
        run=RunConfig(output=Path("runs/starter-prior"), images=100_000, batch=16, checkpoint_every=5_000, half=True),
    ),
}  # fmt: skip
"""Preset -> configuration. `paper` is guided diffusion's unconditional network for 256 pixels (Dhariwal & Nichol 2021,
Table 11), which learnt its variance besides; `starter` is small enough for a CPU."""
