"""What `python -m training driftrec` and `regression` can be told, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from restoration.diffusion.prediction import Prediction
from restoration.diffusion.sde import SDES
from restoration.networks.ncsnpp import NCSNppConfig
from training.configs.common import (
    STARTER_DATA,
    STARTER_OPTIMIZER,
    STARTER_VALIDATION,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from training.configs.ranges import check_ranges


@dataclass(frozen=True)
class SDEConfig:
    """The stochastic differential equation of DriftRec."""

    name: Literal["ouve", "tsdve", "cosve"] = "ouve"
    """Which of the paper's three."""
    sigma_min: float = 0.01
    """Noise at its start, in units of the image range [0, 1]."""
    sigma_max: float = 1.0
    """Noise at t = 1."""
    gamma: float | None = None
    """Stiffness of the drift; null is the paper's, 2 for tsdve and 1 for the others."""
    t_eps: float = 0.01
    """Smallest time that is trained."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {self.sigma_min:g} and "
                f"{self.sigma_max:g}."
            )
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma: expected a number above 0, or null, got {self.gamma:g}.")

    @property
    def drift(self) -> float:
        """`gamma`, resolved."""
        return self.gamma if self.gamma is not None else SDES[self.name].gamma


@dataclass(frozen=True)
class DriftRecConfig:
    """`python -m training driftrec`: a score network (Welker et al., "DriftRec", 2024)."""

    data: DataConfig = field(default_factory=DataConfig)
    network: NCSNppConfig = field(default_factory=NCSNppConfig)
    sde: SDEConfig = field(default_factory=SDEConfig)
    prediction: Prediction = field(default_factory=Prediction)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/driftrec")))


@dataclass(frozen=True)
class RegressionConfig:
    """`python -m training regression`: the paper's baseline, the same network evaluated once."""

    data: DataConfig = field(default_factory=DataConfig)
    network: NCSNppConfig = field(default_factory=lambda: NCSNppConfig(in_channels=3))
    residual_scale: float = 0.0
    """0: the network returns the picture (the paper). Above 0: its output times this is added to the JPEG."""
    loss: Literal["l2", "l1"] = "l2"
    """Squared (the paper) or absolute error."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/regression")))


_STARTER_NETWORK = {
    "width": 32,
    "channel_multipliers": (1, 2, 2, 2),
    "attention_levels": (),
    "patch_size": 2,
    "fourier_scale": 1.0,
}

PRESETS: dict[str, DriftRecConfig] = {
    "paper": DriftRecConfig(),
    "starter": DriftRecConfig(
        data=STARTER_DATA,
        network=NCSNppConfig(**_STARTER_NETWORK),  # type: ignore[arg-type]
        prediction=Prediction("residual"),
        optimizer=STARTER_OPTIMIZER,
        validation=STARTER_VALIDATION,
        run=RunConfig(
            output=Path("runs/starter-driftrec"), images=100_000, batch=16, checkpoint_every=5_000, half=True
        ),
    ),
}  # fmt: skip
REGRESSION_PRESETS: dict[str, RegressionConfig] = {
    "paper": RegressionConfig(),
    "starter": RegressionConfig(
        data=STARTER_DATA,
        network=NCSNppConfig(in_channels=3, **_STARTER_NETWORK),  # type: ignore[arg-type]
        residual_scale=0.05,
        loss="l1",
        optimizer=STARTER_OPTIMIZER,
        validation=STARTER_VALIDATION,
        run=RunConfig(
            output=Path("runs/starter-regression"), images=100_000, batch=16, checkpoint_every=5_000, half=True
        ),
    ),
}  # fmt: skip
"""`paper` is the publication's; `starter` is small enough for a CPU."""
