"""What `python -m training saipe` can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from restoration.networks.saipe import SAIPEConfig
from training.configs.common import DataConfig, OptimizerConfig, RunConfig, ValidationConfig
from training.configs.one_step import SD21_BASE_COPIES
from training.degradation import Degradation


@dataclass(frozen=True)
class TextEncoderConfig:
    """What the prompt is aligned to: the text encoder of the base model."""

    path: str = SD21_BASE_COPIES[0]
    """A folder in diffusers' layout (text_encoder, tokenizer), or a name on the Hugging Face hub."""
    cache: Path = Path("runs/text-states")
    """Folder for what it makes of the captions, 158 kB each; several trainings may share it."""


@dataclass(frozen=True)
class SAIPETrainingConfig:
    """`python -m training saipe`: SODiff's first stage ("Semantic-Oriented Diffusion Model for JPEG Compression
    Artifacts Removal", 2025)."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(crop=512, augmentation="crop", degradation=Degradation(5, 95), workers=8)
    )
    network: SAIPEConfig = field(default_factory=SAIPEConfig)
    align: Literal["text", "none"] = "text"
    """`text`: the tokens learn to be those of a caption. `none`: only the restoration is learnt, and what makes tokens
    of it keeps its random weights; the paper's ablation, and for pictures without captions."""
    captions: Path | None = None
    """What `python -m training prepare captions` wrote; its boxes and JPEG qualities are used as they are. Null: the
    captions.jsonl in data.train or, without it, a .txt beside each picture, whose crops are free."""
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    alignment_weight: float = 0.5
    """Weight of the squared error of the tokens; that of the reconstruction's absolute error is 1."""
    redraw_every: int = 1000
    """Steps between new random features for the Performer; 0: never."""
    gradient_checkpointing: bool = False
    """Compute activations twice, to keep fewer of them."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-4, weight_decay=0.0, ema_decay=0.0)
    )
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(every=40_000, crop=512, qualities=(5, 10, 20, 40))
    )
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            output=Path("runs/saipe"), images=50_000 * 16, batch=16, checkpoint_every=16_000
        )
    )

    def __post_init__(self) -> None:
        if self.align == "none" and self.captions is not None:
            raise ValueError("captions: they are not used with align none. Leave one of the two out.")
        if self.redraw_every < 0 or self.alignment_weight < 0:
            raise ValueError(
                "expected redraw_every and alignment_weight of at least 0, got "
                f"{self.redraw_every} and {self.alignment_weight:g}."
            )


PRESETS = {
    "paper": SAIPETrainingConfig(),
    "small": SAIPETrainingConfig(
        data=DataConfig(crop=64, augmentation="crop", degradation=Degradation(5, 95), cache_mb=1000),
        network=SAIPEConfig(
            dim=48, down_depths=(2, 2), up_depths=(2,), heads=4, drop_path=0.0, performer_depth=2, performer_heads=4,
            performer_dim_head=24, performer_mult=2, features=76, image_side=64,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_images=400, weight_decay=0.0, gradient_clip=1.0, ema_decay=0.0
        ),
        validation=ValidationConfig(every=4_000, images=4, crop=64, qualities=(5, 10, 20, 40)),
        run=RunConfig(output=Path("runs/saipe-small"), images=8_000, batch=8, checkpoint_every=2_000),
    ),
}  # fmt: skip
"""`paper`: the publication's, in batches of 16 (4 on each of four cards); flips and rotations are off, for captions say
left and right. Counted from the shapes of what the backward pass needs, a picture takes 7.8 GiB, and 1.2 with
`gradient_checkpointing`; `run.accumulate` makes the pictures at a time fewer. `small`: a narrow network on small crops,
for a CPU; its tokens have the shape that SD 2.1 takes."""
