"""What `python -m training codiff` can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from restoration.networks.cave import CaVEConfig
from restoration.networks.small_unet import SmallUNetConfig
from training import degradation as jpeg
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
    Backbone,
    BaseConfig,
    LoRAConfig,
    check_discriminator,
    check_precision,
    check_timestep,
    check_width,
)
from training.configs.ranges import check_ranges
from training.losses import PerceptualConfig


@dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator on the latents: the first half of another SD 2.1-base UNet, with adapters and a small head."""

    discriminator: Literal["sd", "dct", "none"] = "sd"
    """`sd`: as said. `dct`: a small network, for --backbone dct-small. `none` trains without."""
    weight: float = 5e-3
    """Weight of softplus(-D(x0)) in the generator's loss."""
    rank: int = 16
    """Of its adapters."""
    alpha: float = 8.0
    """Of its adapters."""
    timestep: float = 199.0
    """The timestep it is told; no noise is added."""
    width: int = 96
    """Channels of the discriminator `dct`, a multiple of 8; of the other settings only the weight is its own."""
    frozen_backbone: bool = False
    """As the authors' code ran it: without gradients through the UNet. Then only the head learns, and the generator is
    taught nothing by it."""

    def __post_init__(self) -> None:
        check_timestep("adversarial.timestep", self.timestep)
        if self.rank < 1 or self.alpha <= 0 or self.weight < 0:
            raise ValueError(
                f"adversarial: expected a rank of at least 1, an alpha above 0 and a weight of at least 0, got {self}."
            )
        check_width(self.width)


@dataclass(frozen=True)
class CoDiffLossConfig:
    """The restorer's loss, a weighted sum (paper Eq. 9)."""

    mse: float = 1.0
    """Weight of the mean squared error of pictures in [0, 1]."""
    l1: float = 0.0
    """Weight of the mean absolute error."""
    chroma: float = 0.0
    """Weight of the mean squared error of Cb and Cr: blocks of colour, which weigh little in RGB, are seen at once."""
    embedder: float = 0.1
    """With --backbone dct-small, where CaVE is trained as well: weight of the error of the quality, from 0 to 1."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """DISTS in the paper."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    clamp_gradient: bool = False
    """Pictures are clamped to [0, 1] before the loss. As published, a value outside gets no gradient then; true hands
    it that of the clamped value."""

    def __post_init__(self) -> None:
        for name in ("mse", "l1", "chroma", "embedder"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}: expected a weight of at least 0, got {getattr(self, name):g}.")


@dataclass(frozen=True)
class CoDiffConfig:
    """`python -m training codiff`: CODiff's second stage (Guo et al., "Compression-Aware One-Step Diffusion Model for
    JPEG Artifact Removal", 2025)."""

    data: DataConfig = field(default_factory=DataConfig)
    backbone: Backbone = "sd2.1-base"
    """`sd2.1-base`: Stable Diffusion 2.1-base is adapted. `dct-small`: a small UNet on DCT latents and its CaVE are
    trained whole; base, adapters and latents are not used then."""
    unet: SmallUNetConfig = field(default_factory=SmallUNetConfig)
    """For dct-small: the UNet."""
    embedder: CaVEConfig = field(default_factory=lambda: CaVEConfig((8, 16, 32, 64), 1))
    """For dct-small: CaVE, where --cave gives none."""
    most_tokens: int = 256
    """For dct-small: tokens of larger pictures are averaged until there are so many."""
    base: BaseConfig = field(default_factory=BaseConfig)
    cave: Path | None = None
    """The first stage: a file that `python -m training cave` wrote, or a CODiff file, whose CaVE is taken.
    Required, but for dct-small."""
    unet_lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters of the UNet; its first convolution is trained whole as well."""
    vae_lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters of the VAE's encoder."""
    timestep: float = 499.0
    """The timestep at which the JPEG's latent is denoised; the paper gives no number, this is the code's."""
    latents: Literal["sample", "mode"] = "sample"
    """What is trained on: a draw from the VAE's posterior, as the authors do, or its mode, as ComfyUI encodes."""
    loss: CoDiffLossConfig = field(default_factory=CoDiffLossConfig)
    gradient_checkpointing: bool = False
    """Compute activations twice, to keep fewer of them."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of the discriminator; its `ema_decay` does nothing."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/codiff")))

    def __post_init__(self) -> None:
        check_ranges(self)
        check_timestep("timestep", self.timestep)
        check_precision(self.base, self.run)
        check_discriminator(self.backbone, self.loss.adversarial.discriminator)


_BATCH, _STEPS = 32, 100_000
_DATA = DataConfig(
    augmentation="crop", flips=True, rotations=True, degradation=jpeg.PRESETS["codiff_paper"], workers=8
)  # fmt: skip
_OPTIMIZER = OptimizerConfig(learning_rate=5e-5, weight_decay=1e-5, gradient_clip=1.0, ema_decay=0.0)
_CODE_OPTIMIZER = replace(_OPTIMIZER, weight_decay=1e-2)
_VALIDATION = ValidationConfig(qualities=(5, 10, 20))


def _run(name: str, precision: Literal["bf16", "fp16"], batch: int = _BATCH, accumulate: int = 1) -> RunConfig:
    return RunConfig(
        output=Path("runs") / name, images=_STEPS * batch, batch=batch, accumulate=accumulate, precision=precision
    )


def _one_card(name: str, gradient_checkpointing: bool) -> CoDiffConfig:
    return CoDiffConfig(
        data=_DATA,
        base=BaseConfig(dtype="bf16"),
        gradient_checkpointing=gradient_checkpointing,
        optimizer=_OPTIMIZER,
        critic_optimizer=_OPTIMIZER,
        validation=_VALIDATION,
        run=_run(name, "bf16", accumulate=4),
    )


PRESETS = {
    "paper": CoDiffConfig(
        data=_DATA,
        optimizer=_OPTIMIZER,
        critic_optimizer=_OPTIMIZER,
        validation=_VALIDATION,
        run=_run("codiff", "bf16"),
    ),
    "code": CoDiffConfig(
        data=replace(_DATA, degradation=jpeg.PRESETS["codiff_code"]),
        loss=CoDiffLossConfig(adversarial=AdversarialConfig(frozen_backbone=True)),
        optimizer=_CODE_OPTIMIZER,
        critic_optimizer=_CODE_OPTIMIZER,
        validation=_VALIDATION,
        run=_run("codiff-code", "fp16", batch=64),
    ),
    "24gb": _one_card("codiff-24gb", gradient_checkpointing=False),
    "12gb": _one_card("codiff-12gb", gradient_checkpointing=True),
    "starter": CoDiffConfig(
        data=ONE_STEP_DATA,
        backbone="dct-small",
        loss=CoDiffLossConfig(
            mse=20.0, chroma=200.0, embedder=0.5, perceptual=PerceptualConfig("none"),
            adversarial=AdversarialConfig("none"),
        ),
        optimizer=ONE_STEP_OPTIMIZER,
        validation=ONE_STEP_VALIDATION,
        run=RunConfig(
            output=Path("runs/starter-onestep-faithful"), images=160_000, batch=4, precision="bf16",
            checkpoint_every=8_000, half=True,
        ),
    ),
}  # fmt: skip
"""`paper`: the publication's, in batches of 32 (8 on each of four cards); its precision is not in the paper.
`code`: what the authors' scripts do: batches of 64, weight decay 0.01, fp16, a discriminator that teaches nothing.
`starter`: a small restorer from scratch, for a CPU, that stays true to the picture; 20 brings the squared errors, some
0.002, to the size of CaVE's; 200 those of chroma, some 0.0002.
`24gb`, `12gb`: `paper` on one card, 8 pictures at a time, everything frozen in bfloat16; `12gb` computes activations
twice. Not measured on such cards, but counted from the shapes of all tensors that are alive at once: 17.5 and 7.4 GiB
(22 for 8 pictures of `paper`), and in a later count, with the losses' own networks, 19.8 and 8.5; CUDA adds one or two.
Optimisers in 8 bits would save 0.4."""
