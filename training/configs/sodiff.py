"""What `python -m training sodiff` can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from restoration.diffusion.one_step import TIMESTEPS
from restoration.networks.saipe import SAIPEConfig
from restoration.networks.small_unet import SmallUNetConfig
from restoration.networks.timestep_predictor import TimestepPredictorConfig
from training.configs.common import (
    ONE_STEP_DATA,
    ONE_STEP_OPTIMIZER,
    ONE_STEP_VALIDATION,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from training.configs.one_step import (
    SDXL_BASE,
    Backbone,
    BaseConfig,
    LoRAConfig,
    check_discriminator,
    check_precision,
    check_timestep,
    check_width,
)
from training.degradation import Degradation
from training.losses import PerceptualConfig

SMALL_SAIPE = SAIPEConfig(
    dim=36, down_depths=(2, 2), up_depths=(2,), heads=4, drop_path=0.0, performer_depth=1, performer_heads=4,
    performer_dim_head=24, performer_mult=2, features=76, context_dim=128, image_side=128,
)  # fmt: skip
"""A SAIPE of 0.7 million weights, for the small UNet's prompt."""


@dataclass(frozen=True)
class PromptedAdversarialConfig:
    """The discriminator on the latents: the first half of a UNet with adapters and a small head, which sees latents
    with noise at random timesteps, under the prompt of the picture."""

    discriminator: Literal["sdxl", "sd21", "dct", "none"] = "sdxl"
    """`sdxl`: SDXL's UNet (the paper). `sd21`: that of the base model, for cards under 48 GB. `dct`: a small network,
    for --backbone dct-small. `none` trains without."""
    sdxl: str = SDXL_BASE
    """For `sdxl`: a folder in diffusers' layout with `unet`, or a name on the Hugging Face hub."""
    weight: float = 1e-2
    """Weight of softplus(-D) in the generator's loss."""
    rank: int = 16
    """Of its adapters."""
    alpha: float = 16.0
    """Of its adapters."""
    width: int = 96
    """Channels of the discriminator `dct`, a multiple of 8; rank and alpha are not its own."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or self.weight < 0:
            raise ValueError(
                f"adversarial: expected a rank of at least 1, an alpha above 0 and a weight of at least 0, got {self}."
            )
        check_width(self.width)


@dataclass(frozen=True)
class SODiffLossConfig:
    """The restorer's loss, a weighted sum (section 3.4)."""

    mse: float = 1.0
    """Weight of the mean squared error of pictures in [0, 1]."""
    l1: float = 0.0
    """Weight of the mean absolute error."""
    chroma: float = 0.0
    """Weight of the mean squared error of Cb and Cr: blocks of colour, which weigh little in RGB, are seen at once."""
    embedder: float = 0.1
    """With --backbone dct-small, where SAIPE is trained as well: weight of the absolute error of its reconstruction. 0
    leaves its encoder and decoder as they are and trains only what makes tokens: for a SAIPE that has learnt."""
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(edges=True))
    """Edge-aware DISTS in the paper: of the pictures and of their Sobel edges."""
    adversarial: PromptedAdversarialConfig = field(default_factory=PromptedAdversarialConfig)
    quality: float = 1e-3
    """Weight of the absolute error of the predicted JPEG quality, which counts from 0 to 100."""
    clamp_gradient: bool = False
    """Pictures are clamped to [0, 1] before the loss; true hands a value outside the gradient of the clamped one."""

    def __post_init__(self) -> None:
        for name in ("mse", "l1", "chroma", "quality", "embedder"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}: expected a weight of at least 0, got {getattr(self, name):g}.")


@dataclass(frozen=True)
class SODiffConfig:
    """`python -m training sodiff`: SODiff's second stage ("Semantic-Oriented Diffusion Model for JPEG Compression
    Artifacts Removal", 2025)."""

    data: DataConfig = field(default_factory=DataConfig)
    backbone: Backbone = "sd2.1-base"
    """`sd2.1-base`: Stable Diffusion 2.1-base is adapted. `dct-small`: a small UNet on DCT latents and its SAIPE are
    trained whole; base, adapters and latents are not used then."""
    unet: SmallUNetConfig = field(default_factory=SmallUNetConfig)
    """For dct-small: the UNet."""
    unet_from: Path | None = None
    """For dct-small: a CODiff or SODiff file with a UNet of this shape, to start from; null for random weights."""
    embedder: SAIPEConfig = field(default_factory=lambda: SMALL_SAIPE)
    """For dct-small: SAIPE, where --saipe gives none."""
    base: BaseConfig = field(default_factory=BaseConfig)
    saipe: Path | None = None
    """The first stage: a file that `python -m training saipe` wrote, or a SODiff file, whose SAIPE is taken.
    Required, but for dct-small."""
    unet_lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(16, 16.0))
    """Adapters of the UNet; the VAE stays as it is."""
    predictor: TimestepPredictorConfig = field(default_factory=TimestepPredictorConfig)
    """The network that chooses the timestep."""
    predictor_from: Path | None = None
    """Where it starts: a file of `python -m training quality`, a SODiff file, or null for random weights."""
    timestep: float | None = None
    """A fixed timestep in place of the predictor; null: predicted."""
    gumbel: bool = True
    """Add Gumbel noise to the logits of the timestep while training (Eq. 11)."""
    latents: Literal["sample", "mode"] = "sample"
    """What is trained on: a draw from the VAE's posterior, or its mode, as ComfyUI encodes."""
    loss: SODiffLossConfig = field(default_factory=SODiffLossConfig)
    gradient_checkpointing: bool = False
    """Compute activations twice, to keep fewer of them."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of the discriminator; its `ema_decay` does nothing."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/sodiff")))

    def __post_init__(self) -> None:
        check_precision(self.base, self.run)
        check_discriminator(self.backbone, self.loss.adversarial.discriminator)
        if self.backbone == "dct-small" and self.saipe is None and self.embedder.context_dim != self.unet.context_dim:
            raise ValueError(
                f"embedder.context_dim: expected unet.context_dim ({self.unet.context_dim}), got "
                f"{self.embedder.context_dim}. Give both the same."
            )
        if self.timestep is not None:
            check_timestep("timestep", self.timestep)
        if self.timestep is None and not 2 <= self.predictor.timesteps <= TIMESTEPS:
            raise ValueError(
                f"predictor.timesteps: expected 2 to {TIMESTEPS} to choose from, got {self.predictor.timesteps}. "
                "Change it, or give a fixed --timestep."
            )


_BATCH, _STEPS = 2, 150_000
_DATA = DataConfig(
    crop=512, augmentation="crop", flips=True, rotations=True, degradation=Degradation(5, 95), workers=8
)  # fmt: skip
_OPTIMIZER = OptimizerConfig(learning_rate=1e-5, weight_decay=1e-2, gradient_clip=1.0, ema_decay=0.0)
_VALIDATION = ValidationConfig(every=20_000, crop=512, qualities=(5, 10, 20))
_PAPER = SODiffConfig(
    data=_DATA, optimizer=_OPTIMIZER, critic_optimizer=_OPTIMIZER, validation=_VALIDATION,
    run=RunConfig(
        output=Path("runs/sodiff"), images=_STEPS * _BATCH, batch=_BATCH, precision="bf16", checkpoint_every=5_000
    ),
)  # fmt: skip


def _one_card(name: str, *, gradient_checkpointing: bool) -> SODiffConfig:
    return replace(
        _PAPER,
        base=BaseConfig(dtype="bf16"),
        loss=SODiffLossConfig(adversarial=PromptedAdversarialConfig("sd21")),
        gradient_checkpointing=gradient_checkpointing,
        run=replace(_PAPER.run, output=Path("runs") / name, accumulate=2),
    )


PRESETS = {
    "paper": _PAPER,
    "24gb": _one_card("sodiff-24gb", gradient_checkpointing=False),
    "12gb": _one_card("sodiff-12gb", gradient_checkpointing=True),
    "small": replace(
        _one_card("sodiff-small", gradient_checkpointing=True),
        data=replace(_DATA, crop=256),
        validation=replace(_VALIDATION, every=4_000, crop=256),
        run=RunConfig(
            output=Path("runs/sodiff-small"), images=8_000, batch=2, accumulate=2, precision="bf16",
            checkpoint_every=1_000,
        ),
    ),
    "starter": SODiffConfig(
        data=ONE_STEP_DATA,
        backbone="dct-small",
        loss=SODiffLossConfig(
            mse=0.0, l1=1.0, chroma=100.0, perceptual=PerceptualConfig("lpips", weight=0.5),
            adversarial=PromptedAdversarialConfig("dct", weight=1e-3),
        ),
        gumbel=False,
        optimizer=replace(ONE_STEP_OPTIMIZER, learning_rate=2e-4),
        critic_optimizer=OptimizerConfig(learning_rate=2e-4, gradient_clip=1.0),
        validation=ONE_STEP_VALIDATION,
        run=RunConfig(
            output=Path("runs/starter-onestep-vivid"), images=24_000, batch=8, precision="bf16",
            checkpoint_every=8_000, half=True,
        ),
    ),
}  # fmt: skip
"""`paper`: the publication's, two pictures at a time (one on each of two cards of 48 GB), with SDXL's discriminator;
weight decay, clipping and precision are not in the paper. `24gb`, `12gb`: on one card, one picture at a time,
everything frozen in bfloat16, the discriminator that of SD 2.1; `12gb` computes activations twice. Not measured on such
cards; counted as CODiff's presets are: 11.2 and 7.5 GiB. `small`: `12gb` with crops of 256 pixels and 8,000 pictures,
to compare settings with (`ablate`)."""
