"""LPIPS with SqueezeNet 1.1 (Zhang et al. 2018, version 0.1), built from one plain array file."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dists import read_tensors

HEAD_AFTER = (1, 4, 7, 9, 10, 11, 12)
"""Indices of the SqueezeNet layers whose outputs are compared."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Fire(nn.Module):
    """SqueezeNet's fire module: a 1x1 squeeze, then 1x1 and 3x3 expansions side by side, each followed by ReLU."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class LPIPS(nn.Module):
    """Perceptual distance between pictures, 0 for equal ones; differentiable, its weights are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (64, 128, 256, 384, 384, 512, 512))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,) of two batches (B,3,H,W) in [0,1]; sides of at least 16 pixels."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape != reference.shape or min(images.shape[-2:]) < 16:
            shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
            raise ValueError(f"expected two batches of equal shape (B,3,H,W), sides >= 16, got {shapes}")
        count = images.shape[0]
        x = (torch.cat([images, reference]) - self.get_buffer("mean")) / self.get_buffer("std")
        distance = images.new_zeros(count)
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in HEAD_AFTER:
                unit = F.normalize(x, dim=1, eps=1e-10)
                distance = distance + next(heads)((unit[:count] - unit[count:]).square()).mean(dim=(1, 2, 3))
        return distance


def load_lpips_squeeze(path: str | Path) -> LPIPS:
    """Builds LPIPS from a `.npz` with torchvision's names (`features.*`) and LPIPS's heads (`linK.model.1.weight`).

    Raises:
        ValueError: It cannot be read, or arrays are missing, unknown or of another shape; nothing pickled is read.
    """
    state = {_own_name(name): tensor for name, tensor in read_tensors(path).items()}
    model = LPIPS()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} does not hold the weights of LPIPS with SqueezeNet 1.1. Give lpips_squeeze_f32.npz: {details}"
        ) from error
    return model


def _own_name(name: str) -> str:
    if name.startswith("lin") and name.endswith(".model.1.weight"):
        return f"heads.{name.removeprefix('lin').removesuffix('.model.1.weight')}.weight"
    return name
