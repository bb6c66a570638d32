"""The errors of pixels, and the perceptual part of a loss: which distance, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.dists import load_dists
from restoration.jpeg.codec import rgb_to_ycbcr
from restoration.lpips import load_lpips_squeeze

_OTHERS = {
    "dists": "choose --loss.perceptual.kind lpips with --loss.perceptual.lpips lpips_squeeze_f32.npz, or kind none",
    "lpips": "choose --loss.perceptual.kind dists with --loss.perceptual.dists weights.pt, or kind none",
}
_GRAY = (0.2989, 0.587, 0.114)
"""Red, green and blue in torchvision's gray."""
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


@dataclass(frozen=True)
class PerceptualConfig:
    """A distance of pictures as eyes see it, which is added to the loss."""

    kind: Literal["dists", "lpips", "none"] = "dists"
    """`dists`: VGG16's features, their means and correlations (the papers). `lpips`: SqueezeNet's. `none`: without."""
    vgg16: Path | None = None
    """For `dists`: torchvision's weights of VGG16 (.pth, .safetensors or .npz); null has torchvision download them."""
    dists: Path | None = None
    """For `dists`: its authors' weights.pt, alpha and beta. Required."""
    lpips: Path | None = None
    """For `lpips`: weights of LPIPS with SqueezeNet (.npz). Required."""
    weight: float = 1.0
    """What the distance is multiplied with."""
    edges: bool = False
    """Edge-aware (SODiff): the same distance of the pictures' Sobel edges is added to it."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"perceptual.weight: expected a number >= 0, got {self.weight}. Use kind none for none.")


class PixelWeights(Protocol):
    """What the errors of pixels are multiplied with."""

    @property
    def mse(self) -> float: ...
    @property
    def l1(self) -> float: ...
    @property
    def chroma(self) -> float: ...


def pixel_loss(restored: Tensor, clean: Tensor, weights: PixelWeights) -> Tensor:
    """The weighted sum of squared and absolute errors, and of the squared errors of Cb and Cr, each a mean.

    Args:
        restored: Pictures (B, 3, H, W); 1 is white.
        clean: What they should be.
        weights: Of the three.
    """
    error = restored - clean
    total = weights.mse * error.square().mean()
    if weights.l1:
        total = total + weights.l1 * error.abs().mean()
    if weights.chroma:
        ours, theirs = (rgb_to_ycbcr(pictures, round_to_8bit=False)[:, 1:] for pictures in (restored, clean))
        total = total + weights.chroma * (ours - theirs).square().mean()
    return total


def make_perceptual(config: PerceptualConfig) -> nn.Module | None:
    """The distance that a configuration asks for, on the CPU, frozen.

    Returns:
        A module that takes pictures and their reference, (B,3,H,W) in [0,1], to distances (B,), without `weight`; an
        `EdgeAware` one where the configuration says `edges`; None for the kind `none`.

    Raises:
        ValueError: Its weights are not named, are missing or do not fit, or cannot be downloaded.
    """
    if config.kind == "none":
        return None
    distance = _load_distance(config)
    return EdgeAware(distance) if config.edges else distance


def _load_distance(config: PerceptualConfig) -> nn.Module:
    if config.kind == "lpips":
        return load_lpips_squeeze(_existing(config.lpips, "lpips", "lpips", "the weights of LPIPS with SqueezeNet"))
    dists = _existing(config.dists, "dists", "dists", "its authors' weights.pt (alpha and beta)")
    vgg16 = download_vgg16() if config.vgg16 is None else _existing(config.vgg16, "vgg16", "dists", "VGG16's weights")
    return load_dists(vgg16, dists)


class EdgeAware(nn.Module):
    """Distance of pictures plus distance of their edges, d(x, y) + d(S(x), S(y)), S `sobel_edges` in three channels.

    With DISTS it is SODiff's edge-aware loss.

    Args:
        distance: Takes two batches (B,3,H,W) to distances (B,).
    """

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,) of two batches (B,3,H,W) in [0,1]."""
        edges = [sobel_edges(pictures).expand(-1, 3, -1, -1) for pictures in (images, reference)]
        return self.distance(images, reference) + self.distance(*edges)


def sobel_edges(images: Tensor) -> Tensor:
    """How steep pictures are: the magnitude of Sobel's two derivatives of their gray.

    sqrt(gx^2 + gy^2 + 1e-6), of kernels of 3x3 whose weights are 1 and 2; the picture is taken as zero outside. SODiff
    gives no formula; this is the one in the code of OSDFace, HAODiff and OSCAR, by the same group.

    Args:
        images: (B,3,H,W) in [0,1].

    Returns:
        (B,1,H,W), float32, from 0.001 (flat) to 4.47, not clamped; differentiable also where a picture is flat.

    Raises:
        ValueError: The pictures have not three channels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Sobel edges: expected pictures (B,3,H,W), got {tuple(images.shape)}.")
    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        gray = (images * images.new_tensor(_GRAY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        horizontal = images.new_tensor(_SOBEL)
        derivatives = F.conv2d(gray, torch.stack([horizontal, horizontal.T])[:, None], padding=1)
        return (derivatives.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()


def download_vgg16() -> Mapping[str, Tensor]:
    """VGG16 trained on ImageNet, by torchvision: from its cache, else from its server (528 MB).

    Raises:
        ValueError: torchvision is not installed, or the download failed.
    """
    what, elsewhere = (
        "VGG16's weights for DISTS",
        f"Give --loss.perceptual.vgg16 a file of them, or {_OTHERS['dists']}.",
    )
    try:
        from torchvision.models import VGG16_Weights
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        raise ValueError(f"{what}: torchvision cannot be imported ({error}). {elsewhere}") from error
    try:
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{what}: torchvision cannot download them ({error}). {elsewhere}") from error


def _existing(path: Path | None, option: str, kind: str, what: str) -> Path:
    if path is not None and path.is_file():
        return path
    found = "none was given" if path is None else f"{path} does not exist"
    raise ValueError(
        f"perceptual loss {kind}: --loss.perceptual.{option} must name {what}, but {found}. "
        f"Give it, or {_OTHERS[kind]}."
    )
