"""What every training can be told: its data, optimiser, validation and run; and what the starters have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training import degradation as jpeg
from training.configs.ranges import check_ranges
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
        if len(set(self.qualities)) < len(self.qualities):
            raise ValueError(f"qualities: expected each once, got {' '.join(map(str, self.qualities))}.")


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


STARTER_DATA = DataConfig(
    crop=64, augmentation="crop", flips=True, rotations=True, downscale=(1.0, 2.0), degradation=jpeg.PRESETS["wide"],
    cache_mb=1000,
)  # fmt: skip
STARTER_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_images=2000, gradient_clip=1.0)
STARTER_VALIDATION = ValidationConfig(every=20_000, crop=128)
"""Of presets that are small enough for a CPU."""

ONE_STEP_DATA = replace(STARTER_DATA, crop=96)
"""What the one-step starters are trained on: crops of 12x12 blocks."""
ONE_STEP_OPTIMIZER = replace(STARTER_OPTIMIZER, learning_rate=5e-4)
ONE_STEP_VALIDATION = replace(STARTER_VALIDATION, every=16_000)
