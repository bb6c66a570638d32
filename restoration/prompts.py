"""What a one-step restorer sees in the compressed image: prompts in place of text, the quality, the timestep."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .networks.cave import CaVE, CaVEConfig, cave_tokens
from .networks.saipe import SAIPE
from .networks.timestep_predictor import TimestepPredictor


class CaVEPrompt(nn.Module):
    """CODiff's compression-aware visual prompt: CaVE's cells, each projected to a token (Guo et al. 2025, section 3.2).

    Args:
        config: Of CaVE.
        context_dim: Width of the tokens, that of the base model's cross-attention.
        timestep: At which the restorer was trained to denoise, 0 to 999.
        most_tokens: Larger pictures' cells are averaged over their neighbours to so many tokens at most, so that time
            grows with the pixels and not with their square; None for a token for each cell, as published.
        operations: Namespace of the layers: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where they are made.
    """

    def __init__(
        self, config: CaVEConfig, context_dim: int, timestep: float, most_tokens: int | None = None, *,
        operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.timestep, self.most_tokens = timestep, most_tokens
        self.network = CaVE(config, decoder=False, operations=operations, dtype=dtype, device=device)
        self.projection = operations.Linear(config.widths[-1], context_dim, dtype=dtype, device=device)
        self.compute_dtype = dtype or torch.float32

    def forward(self, features: Tensor) -> Tensor:
        """Tokens (B, cells, context_dim) of CaVE's features (B, C, rows, columns), row by row, without positions."""
        return self.projection(cave_tokens(self._pooled(features)))

    def _pooled(self, features: Tensor) -> Tensor:
        rows, columns = features.shape[-2:]
        if self.most_tokens is None or rows * columns <= self.most_tokens:
            return features
        shrink = math.sqrt(self.most_tokens / (rows * columns))
        down, across = (
            averaging(length, min(max(1, int(length * shrink)), self.most_tokens)).to(features)
            for length in (rows, columns)
        )
        return down @ features @ across.T


def averaging(length: int, parts: int) -> Tensor:
    """The matrix (parts, length) that averages a side over so many parts, which may share what lies between them.

    What `adaptive_avg_pool2d` does along each side, which not every device can for all sizes.
    """
    matrix = torch.zeros(parts, length)
    for part in range(parts):
        start, stop = part * length // parts, -(-(part + 1) * length // parts)
        matrix[part, start:stop] = 1 / (stop - start)
    return matrix


class SAIPEPrompt(nn.Module):
    """SODiff's semantic-aligned image prompt and, unless it is the first stage alone, where denoising starts.

    SODiff, arXiv 2508.07346. A second stage has a predictor of the timestep or a fixed one, a first stage neither.

    Args:
        network: What sees the prompt.
        predictor: Of quality and timestep; it computes in single precision, whatever `compute_dtype` is.
        timestep: The fixed one, 0 to 999, where there is no predictor.
        calibration: The predictor's mean timestep at each quality.
        tells_quality: Whether the predictor has learnt to tell it; without, it means nothing.
    """

    def __init__(
        self, network: SAIPE, predictor: TimestepPredictor | None = None, timestep: float | None = None,
        calibration: Calibration | None = None, *, tells_quality: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self.predictor = predictor
        self.timestep = timestep if predictor is None else None
        self.calibration = calibration
        self.tells_quality = tells_quality
        self.compute_dtype = torch.float32

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, 3, H, W) and the tokens (B, 77, context width) of images (B, 3, H, W) in [0, 1]."""
        return self.network(images)


class QualityEstimator(nn.Module):
    """The JPEG quality of images by their pixels alone: the predictor of SODiff without its timesteps.

    Args:
        network: The predictor; it computes in single precision, whatever `compute_dtype` is.
    """

    def __init__(self, network: TimestepPredictor) -> None:
        super().__init__()
        self.network = network
        self.compute_dtype = torch.float32

    def forward(self, images: Tensor) -> Tensor:
        """The quality (B,), 0 to 100, of images (B, 3, H, W) in [0, 1]."""
        return self.network(images)[0]
