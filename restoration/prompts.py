"""Prompts that are seen in the compressed image, in place of text: what conditions a one-step restorer."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from .networks.cave import CaVE, CaVEConfig, cave_tokens


class CaVEPrompt(nn.Module):
    """CODiff's compression-aware visual prompt: CaVE's cells, each projected to a token (Guo et al. 2025, section 3.2).

    Args:
        config: Of CaVE.
        context_dim: Width of the tokens, that of the base model's cross-attention.
        timestep: At which the restorer was trained to denoise, 0 to 999.
        operations: Namespace of the layers: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where they are made.
    """

    def __init__(
        self, config: CaVEConfig, context_dim: int, timestep: float, *, operations: ModuleType | type = nn,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.timestep = timestep
        self.network = CaVE(config, decoder=False, operations=operations, dtype=dtype, device=device)
        self.projection = operations.Linear(config.widths[-1], context_dim, dtype=dtype, device=device)
        self.compute_dtype = dtype or torch.float32

    def forward(self, features: Tensor) -> Tensor:
        """Tokens (B, cells, context_dim) of CaVE's features (B, C, rows, columns), row by row, without positions."""
        return self.projection(cave_tokens(features))
