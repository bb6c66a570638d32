"""LPIPS with AlexNet (Zhang et al. 2018, version 0.1), the variant that papers print, from two plain files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.dists import read_tensors
from restoration.lpips import MEAN, STD

HEAD_AFTER = (1, 4, 7, 9, 11)
"""Indices of the layers whose outputs are compared: each ReLU."""
CHANNELS = (64, 192, 384, 256, 256)
LEAST_SIDE = 31
"""In pixels; below, nothing is left for the third layer."""


class AlexNetLPIPS(nn.Module):
    """Perceptual distance between pictures, 0 for equal ones; its weights are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(  # numbered as torchvision's
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in CHANNELS)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,) of two batches (B,3,H,W) in [0,1].

        Raises:
            ValueError: Shapes differ, or a side is below 31 pixels.
        """
        if images.ndim != 4 or images.shape != reference.shape or min(images.shape[-2:]) < LEAST_SIDE:
            shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
            raise ValueError(f"expected two batches of equal shape (B,3,H,W), sides >= {LEAST_SIDE}, got {shapes}")
        count = images.shape[0]
        x = (torch.cat([images, reference]).float() - self.get_buffer("mean")) / self.get_buffer("std")
        distance = torch.zeros(count, device=images.device)
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in HEAD_AFTER:
                unit = F.normalize(x, dim=1, eps=1e-10)
                distance = distance + next(heads)((unit[:count] - unit[count:]).square()).mean(dim=(1, 2, 3))
        return distance


def load_alexnet_lpips(alexnet: str | Path, heads: str | Path) -> AlexNetLPIPS:
    """Build LPIPS from AlexNet and from its own heads.

    Args:
        alexnet: torchvision's weights of AlexNet for ImageNet (`.pth`, `.safetensors` or `.npz`); `features.*` are
            taken, `classifier.*` is left.
        heads: The authors' `v0.1/alex.pth`: `linK.model.1.weight`.

    Raises:
        ValueError: A file cannot be read, or tensors are missing, unknown or of another shape. Nothing pickled but
            tensors is read.
    """
    state = {name: tensor for name, tensor in read_tensors(alexnet).items() if not name.startswith("classifier.")}
    for name, tensor in read_tensors(heads).items():
        state[f"heads.{name.removeprefix('lin').removesuffix('.model.1.weight')}.weight"] = tensor
    model = AlexNetLPIPS()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:300]
        raise ValueError(f"{alexnet} and {heads} are not AlexNet and its heads for LPIPS 0.1: {details}") from error
    return model
