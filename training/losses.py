"""The perceptual part of a loss: which distance, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from restoration.dists import load_dists
from restoration.lpips import load_lpips_squeeze

_OTHERS = {
    "dists": "choose --loss.perceptual.kind lpips with --loss.perceptual.lpips lpips_squeeze_f32.npz, or kind none",
    "lpips": "choose --loss.perceptual.kind dists with --loss.perceptual.dists weights.pt, or kind none",
}


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

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"perceptual.weight: expected a number >= 0, got {self.weight}. Use kind none for none.")


def make_perceptual(config: PerceptualConfig) -> nn.Module | None:
    """The distance that a configuration asks for, on the CPU, frozen.

    Returns:
        A module that takes pictures and their reference, (B,3,H,W) in [0,1], to distances (B,), without `weight`; None
        for the kind `none`.

    Raises:
        ValueError: Its weights are not named, are missing or do not fit, or cannot be downloaded.
    """
    if config.kind == "none":
        return None
    if config.kind == "lpips":
        return load_lpips_squeeze(_existing(config.lpips, "lpips", "lpips", "the weights of LPIPS with SqueezeNet"))
    dists = _existing(config.dists, "dists", "dists", "its authors' weights.pt (alpha and beta)")
    vgg16 = download_vgg16() if config.vgg16 is None else _existing(config.vgg16, "vgg16", "dists", "VGG16's weights")
    return load_dists(vgg16, dists)


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
