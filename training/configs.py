"""What a training can be told: plain dataclasses, and presets as rows of one table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from restoration.diffusion.prediction import Prediction
from restoration.diffusion.sde import SDES
from restoration.networks.cave import CaVEConfig
from restoration.networks.ncsnpp import NCSNppConfig
from training import degradation as jpeg
from training.config_ranges import check_ranges
from training.degradation import Degradation


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from and what is done to them."""

    train: Path = Path("data/train")
    """Folder of clean pictures, searched with its sub-folders; or shards, in quotes: "shards-{000..127}.tar"."""
    validation: Path | None = None
    """Folder or shards of clean pictures for validation; without it some of the training pictures are set aside."""
    crop: int = 256
    """Side of the square training crops, pixels."""
    augmentation: Literal["paper", "crop"] = "paper"
    """`paper`: a random square of 20 to 100% of the picture, resized. `crop`: a random square at its own scale."""
    flips: bool = False
    """Mirror half of the crops."""
    rotations: bool = False
    """Turn crops by multiples of 90 degrees."""
    downscale: tuple[float, float] = (1.0, 1.0)
    """With `crop`: shrink pictures by a random factor in this range first."""
    degradation: Degradation = jpeg.PRESETS["paper"]
    """What JPEG compression the crops go through."""
    workers: int = 2
    """Processes that prepare crops, for each training process; 0 prepares them in the training process."""
    cache_mb: float = 256
    """Decoded pictures kept by each worker, MB."""
    shuffle_shards: int = 16
    """Shards whose pictures are shuffled among each other, and which are open at a time."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.downscale[0] > self.downscale[1]:
            raise ValueError(f"downscale: expected the smaller factor first, got {list(self.downscale)}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the average of the weights."""

    learning_rate: float = 1e-4
    """Step size after the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to 1% of the learning rate at the end."""
    warmup_images: int = 0
    """Images over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    gradient_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: float = 0.999
    """Decay of the averaged weights at each step, reached from below as min(decay, (1 + n) / (10 + n)); 0: none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of Adam's averages of the gradient and of its square."""
    eight_bit: bool = False
    """Keep those averages in 8 bits, a quarter of the memory; needs bitsandbytes."""
    fused: bool = False
    """Take the step in one kernel, which is faster; the last digits differ. CPU, CUDA, Metal and Intel GPUs have it."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured and shown while the training runs."""

    every: int = 100_000
    """Images between validations; one comes before the first step and one at the end."""
    images: int = 8
    """Pictures that are restored, each at every quality."""
    crop: int = 256
    """Side of the square in the middle of each picture that is used, pixels."""
    qualities: tuple[int, ...] = (5, 10, 20, 40)
    """JPEG qualities."""
    shown: int = 6
    """Pictures in the before/after grid."""
    lpips: Path | None = None
    """Weights of LPIPS-SqueezeNet (npz); without them LPIPS is not measured."""
    best: str | None = None
    """The measure, e.g. psnr, ssim, lpips or quality_error, whose mean over the qualities decides which weights stay
    as the best; null: the one that suits the training."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.qualities:
            raise ValueError("qualities: expected at least one, got none.")


@dataclass(frozen=True)
class RunConfig:
    """The run itself. Counts are in images, so that batch size and number of processes may change."""

    output: Path = Path("runs/run")
    """Folder of the run. Repeating the command with the same folder goes on where it stopped."""
    images: int = 8_000_000
    """Images to train on."""
    batch: int = 32
    """Images in each step, over all processes."""
    accumulate: int = 1
    """Parts that each process splits its share of a batch into, to save memory."""
    seed: int = 0
    """Everything random follows from it."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; `no` is float32."""
    checkpoint_every: int = 20_000
    """Images between checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes after which a checkpoint is due even so."""
    init_from: Path | None = None
    """A restorer file to start from, in place of random weights."""
    license: str = "unknown"
    """Licence of the weights, written into the file."""
    half: bool = False
    """Write the restorer file in half precision: half the size, the same pictures to within rounding."""
    keep_every: int = 0
    """Images between checkpoints that stay, in the folder `kept`, each with a restorer file of its weights; 0: none."""
    keep: int = 3
    """How many of those stay, the newest; 0: all."""
    wandb: str | None = None
    """A project of Weights & Biases that shows the figures and pictures as well; needs wandb."""
    compile: bool = False
    """Compile the networks (torch.compile): a slow start and faster steps; needs a C++ compiler."""
    channels_last: bool = False
    """Lay out pictures and convolutions channel by channel of each pixel, which most GPUs and CPUs work on faster."""
    fsdp: bool = False
    """Spread the frozen weights of a base model over the processes of torchrun, to save memory (codiff, sodiff)."""

    def __post_init__(self) -> None:
        check_ranges(self)


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


_UNSEEN_QUALITIES = (15, 25, 35, 45, 55, 75)
"""None of those that the published training draws most of the time."""

_STARTER_NETWORK = {
    "width": 32,
    "channel_multipliers": (1, 2, 2, 2),
    "attention_levels": (),
    "patch_size": 2,
    "fourier_scale": 1.0,
}
_STARTER_DATA = DataConfig(
    crop=64, augmentation="crop", flips=True, rotations=True, downscale=(1.0, 2.0), degradation=jpeg.PRESETS["wide"],
    cache_mb=1000,
)  # fmt: skip
_STARTER_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_images=2000, gradient_clip=1.0)
_STARTER_VALIDATION = ValidationConfig(every=20_000, crop=128)

ONE_STEP_DATA = replace(_STARTER_DATA, crop=96)
"""What the one-step starters are trained on: crops of 12x12 blocks."""
ONE_STEP_OPTIMIZER = replace(_STARTER_OPTIMIZER, learning_rate=5e-4)
ONE_STEP_VALIDATION = replace(_STARTER_VALIDATION, every=16_000)

PRESETS: dict[str, dict[str, DriftRecConfig | RegressionConfig | CaVETrainingConfig]] = {
    "driftrec": {
        "paper": DriftRecConfig(),
        "starter": DriftRecConfig(
            data=_STARTER_DATA,
            network=NCSNppConfig(**_STARTER_NETWORK),  # type: ignore[arg-type]
            prediction=Prediction("residual"),
            optimizer=_STARTER_OPTIMIZER,
            validation=_STARTER_VALIDATION,
            run=RunConfig(
                output=Path("runs/starter-driftrec"), images=100_000, batch=16, checkpoint_every=5_000, half=True
            ),
        ),
    },
    "regression": {
        "paper": RegressionConfig(),
        "starter": RegressionConfig(
            data=_STARTER_DATA,
            network=NCSNppConfig(in_channels=3, **_STARTER_NETWORK),  # type: ignore[arg-type]
            residual_scale=0.05,
            loss="l1",
            optimizer=_STARTER_OPTIMIZER,
            validation=_STARTER_VALIDATION,
            run=RunConfig(
                output=Path("runs/starter-regression"), images=100_000, batch=16, checkpoint_every=5_000, half=True
            ),
        ),
    },
    "cave": {
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
    },
}  # fmt: skip
"""Command -> preset -> configuration. `paper` is the publication's, `code` what its published code does where that
differs; `starter` and `small` are small enough for a CPU; `small` learns the quality alone, for
learning to restore beside it takes far longer to begin with."""
