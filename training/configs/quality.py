"""What the training of the quality predictor can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from restoration.networks.timestep_predictor import TimestepPredictorConfig
from training import degradation as jpeg
from training.configs.common import DataConfig, OptimizerConfig, RunConfig, ValidationConfig

_DEGRADATION = replace(jpeg.PRESETS["wide"], grayscale_probability=0.05)


@dataclass(frozen=True)
class ViewConfig:
    """What of a compressed crop the network sees: as it is, shrunk after it, cut off the block grid, or no JPEG."""

    side: int = 128
    """Side of the square that the network sees, pixels; at most `data.crop`, which only shrunk crops need."""
    resized: float = 0.0
    """Share of crops that are shrunk after the compression, by a factor from side / crop to 1."""
    misaligned: float = 0.0
    """Share of the others that are cut out anywhere, not on the block grid."""
    uncompressed: float = 0.0
    """Share of crops that are no JPEG at all; their quality is 100."""

    def __post_init__(self) -> None:
        shares = (self.resized, self.misaligned, self.uncompressed)
        if self.side < 8 or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"view: expected a side of at least 8 and shares from 0 to 1, got {self}.")


@dataclass(frozen=True)
class QualityConfig:
    """`python -m training quality`: SODiff's predictor without its timesteps, which learns the JPEG quality."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(
            crop=512, augmentation="crop", flips=True, rotations=True, downscale=(1.0, 2.0), degradation=_DEGRADATION
        )
    )
    view: ViewConfig = field(default_factory=lambda: ViewConfig(256, resized=0.15, misaligned=0.1, uncompressed=0.08))
    network: TimestepPredictorConfig = field(default_factory=lambda: TimestepPredictorConfig(timesteps=0))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_images=2_000, gradient_clip=10.0, ema_decay=0.0
        )
    )
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(every=100_000, qualities=(5, 20, 35, 50, 65, 80, 95))
    )
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            output=Path("runs/quality"), images=1_000_000, batch=32, checkpoint_every=20_000, half=True
        )
    )

    def __post_init__(self) -> None:
        if self.network.timesteps:
            raise ValueError(
                f"network.timesteps: expected 0, got {self.network.timesteps}: only SODiff's second stage trains them."
            )
        if self.view.side > self.data.crop:
            raise ValueError(f"view.side: expected at most data.crop, {self.data.crop}, got {self.view.side}.")


_DEFAULT = QualityConfig()

PRESETS: dict[str, QualityConfig] = {
    "paper": _DEFAULT,
    "starter": replace(
        _DEFAULT,
        data=replace(_DEFAULT.data, crop=256, cache_mb=1000),
        view=replace(_DEFAULT.view, side=128),
        validation=ValidationConfig(every=20_000, images=8, crop=256, qualities=(5, 20, 35, 50, 65, 80, 95)),
        run=RunConfig(
            output=Path("runs/starter-quality"), images=80_000, batch=32, checkpoint_every=10_000, half=True
        ),
    ),
}  # fmt: skip
"""`paper` is the default, though the paper trains this network with its second stage only; `starter` is for a CPU."""
