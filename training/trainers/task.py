"""What the training loop needs to know of a network: its loss, how it restores, and how it is written to a file."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from restoration.restorer_file import RestorerMetadata


class Task(Protocol):
    """One kind of training."""

    @property
    def model(self) -> nn.Module:
        """What is trained; its parameters are averaged, stored and exported."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of a batch (`clean`, `degraded` of shape (B, 3, H, W)); `model` is `self.model`, perhaps wrapped."""
        ...

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """Restore (B, 3, H, W) as the nodes would by default."""
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
