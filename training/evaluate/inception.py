"""Inception-v3 as FID and KID have it: TensorFlow's network of 2015 with its peculiarities, by torchvision's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from restoration.dists import read_tensors

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""The file as pytorch-fid, piq and pyiqa download it; torch-fidelity's `weights-inception-...` holds the same."""
SIDE = 299
_CLASSES = 1008


def _average(x: Tensor) -> Tensor:
    """Means of 3x3 neighbours, at the border of those that there are, as TensorFlow's."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _Pooling(nn.Module):
    """Gives a block of torchvision's another pooling in its last branch."""

    pool: Callable[[Tensor], Tensor] = staticmethod(_average)

    def _forward(self, x: Tensor) -> list[Tensor]:
        block: Any = super()
        branches: Any = self
        return [*block._forward(x)[:-1], branches.branch_pool(self.pool(x))]


class _A(_Pooling, InceptionA):
    pass


class _C(_Pooling, InceptionC):
    pass


class _E(_Pooling, InceptionE):
    pass


class InceptionFeatures(nn.Module):
    """The 2048 features before the classifier, of pictures that are resized to 299x299 pixels."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[Callable[..., nn.Module]] = [BasicConv2d, _A, InceptionB, _C, InceptionD, _E, InceptionAux]
        network: Any = Inception3(_CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
        network.Mixed_7c.pool = _maximum  # an oversight of the network's authors, kept by every FID
        network.fc = nn.Identity()
        self.network = network
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, 2048) of pictures (B, 3, H, W) in [0, 1] of any size.

        Resized bilinearly without antialiasing, whatever their shape, as by pytorch-fid and piq.
        """
        resized = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.network(2 * resized - 1)


def load_inception(path: str | Path) -> InceptionFeatures:
    """Build the network from its file.

    Raises:
        ValueError: It cannot be read, or tensors are missing, unknown or of another shape. Nothing pickled but tensors
            is read.
    """
    model = InceptionFeatures()
    expected = model.network.state_dict()
    state = {name: tensor for name, tensor in read_tensors(path).items() if not name.startswith(("fc.", "AuxLogits."))}
    counters = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")}
    try:
        model.network.load_state_dict({**counters, **state})
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold Inception-v3 of FID. Give {WEIGHTS}: {details[:300]}") from error
    return model
