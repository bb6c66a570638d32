"""What the training loop needs to know of a network: its loss, how it restores, and how it is written to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from restoration.jpeg import JPEGData
from restoration.restorer_file import RestorerFileError, RestorerMetadata
from training.configs.common import OptimizerConfig
from training.data.pairs import PairDataset


class Task(Protocol):
    """One kind of training. `TaskDefaults` has what most of them need not say."""

    @property
    def model(self) -> nn.Module:
        """What is trained: those of its parameters that require a gradient are optimised, averaged and stored.

        The loop calls `train()` and `eval()` on it; parts that must stay in evaluation mode override `train`.
        """
        ...

    @property
    def size_multiple(self) -> int:
        """Sides of training and validation crops are multiples of this."""
        ...

    @property
    def what_next(self) -> str:
        """What is done with the exported file, as the last words of a training."""
        ...

    @property
    def stores_frozen(self) -> bool:
        """Whether checkpoints hold the model's frozen weights, too: where they come from nowhere else."""
        ...

    @property
    def critic(self) -> nn.Module | None:
        """A second network, trained against the first with its own optimiser; None for none.

        Its parameters are frozen while `loss` runs, where it may be called directly, and free while `critic_loss` does.
        """
        ...

    @property
    def critic_optimizer(self) -> OptimizerConfig:
        """The critic's optimiser; its weights are never averaged."""
        ...

    @property
    def noted(self) -> dict[str, Tensor]:
        """Numbers of the last call of `loss` for the logs, without gradients, e.g. `loss/pixels` or `quality_error`."""
        ...

    @property
    def judged_by(self) -> tuple[str, ...]:
        """Measures of the validation, the first of which that is measured tells the best weights."""
        ...

    @property
    def restores(self) -> bool:
        """Whether `restore` changes pictures at all; else only `measure` tells how well it is trained."""
        ...

    def frozen_blocks(self) -> list[nn.Module]:
        """Modules of the model and the critic that hold the frozen weights of a base model, each called as a module."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of a batch (`clean`, `degraded` (B, 3, H, W), `quality` (B,)); `model` is `self.model`, perhaps
        wrapped."""
        ...

    def critic_loss(self, critic: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The critic's loss, asked for right after `loss` of the same batch; `critic` is `self.critic`, perhaps
        wrapped. What `loss` kept for it must be detached."""
        ...

    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """Fit the first weights to crops (N, 3, H, W) of the training, and what they were before their compression,
        where a run begins with new ones."""
        ...

    def dataset(self, paths: Sequence[Path], validation: Sequence[Path]) -> PairDataset | None:
        """What is trained on, of the pictures for training and for validation; None for the usual pairs."""
        ...

    def take_validation(self, pictures: list[np.ndarray]) -> None:
        """The clean pictures (H, W, 3), uint8, of the validation, for what the export measures; before the first
        step."""
        ...

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """Restore (B, 3, H, W) as the nodes would by default."""
        ...

    def restore_file(self, degraded: Tensor, jpeg: JPEGData, seed: int) -> Tensor:
        """`restore` of one picture (1, 3, H, W) whose file is known; what the validation calls."""
        ...

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """Further figures for the validation: of images (B, 3, H, W) and their JPEG quality (B,)."""
        ...

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        """The description of the exported file."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The exported weights under their full names."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Start from the tensors of a restorer file."""
        ...


COPY_IT = "copy it into ComfyUI/models/jpeg_restorers (this pack makes that folder when ComfyUI starts)"
"""What is done with a restorer file."""


class TaskDefaults:
    """A task without a critic, without frozen weights to store and without figures of its own."""

    what_next: str = COPY_IT
    stores_frozen: bool = False
    critic: nn.Module | None = None
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    judged_by: tuple[str, ...] = ("psnr",)
    restores: bool = True

    @property
    def noted(self) -> dict[str, Tensor]:
        """What `note` was told last."""
        return self.__dict__.get("_noted", {})

    def note(self, numbers: dict[str, Tensor]) -> None:
        """Keep numbers of this loss for the logs."""
        self.__dict__["_noted"] = {key: value.detach() for key, value in numbers.items()}

    def frozen_blocks(self) -> list[nn.Module]:
        """There is no base model."""
        return []

    def critic_loss(self, critic: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        raise NotImplementedError("this task has no critic")

    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """Nothing depends on the pictures."""

    def dataset(self, paths: Sequence[Path], validation: Sequence[Path]) -> PairDataset | None:
        """The usual pairs."""
        return None

    def take_validation(self, pictures: list[np.ndarray]) -> None:
        """The export measures nothing."""

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        raise NotImplementedError("this task restores from the file")

    def restore_file(self, degraded: Tensor, jpeg: JPEGData, seed: int) -> Tensor:
        """The pixels are all that is looked at."""
        return self.restore(degraded, seed)

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        return {}


def load_whole(model: nn.Module, tensors: dict[str, Tensor], expected: str, command: str) -> None:
    """Put weights into a network of the very same shape.

    Args:
        model: The network.
        tensors: By their names in it.
        expected: What it is, for the message.
        command: The training that writes such files.

    Raises:
        RestorerFileError: Something is missing, left over or of another shape.
    """
    state = model.state_dict()
    wrong = sorted(
        key for key in state.keys() | tensors.keys()
        if key not in state or key not in tensors or state[key].shape != tensors[key].shape
    )  # fmt: skip
    if wrong:
        raise RestorerFileError(
            f"expected {expected}, got a file where {wrong[0]} is missing, left over or of another shape. Choose one "
            f"of `python -m training {command}` with the same network."
        )
    model.load_state_dict(tensors)
