"""DISTS, deep image structure and texture similarity (Ding et al. 2020, arXiv:2004.07728), from two plain files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions; stages are compared at their ends and joined by pooling."""
CHANNELS = (3, *(widths[-1] for widths in STAGES))
"""Channels that are compared: the picture's own, and those of each stage, 1475 in all."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_C1 = _C2 = 1e-6
_SMALLEST_SIDE = 16


class L2Pooling(nn.Module):
    """Half the size: the root of the average of squares, weighted by a Hann window of 3x3 (Hénaff and Simoncelli 2016).

    Against max pooling it does not alias. The picture is taken as zero outside.
    """

    def __init__(self) -> None:
        super().__init__()
        window = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("window", torch.outer(window, window)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        window = self.get_buffer("window").expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class DISTS(nn.Module):
    """Perceptual distance of pictures, about 0 to 1, 0 for equal ones; differentiable, its weights are not trained.

    The means and the correlations of feature maps are compared at the pictures' own resolution. The authors' example
    resizes them to 256 pixels first; as a loss, and in CODiff's tables, they are not.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        ends, channels = [], 3
        for number, widths in enumerate(STAGES):
            if number:
                layers.append(L2Pooling())
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # numbered as torchvision's, whose max pooling has L2Pooling's places
        self.stage_ends = tuple(ends)
        self.alpha = nn.Parameter(torch.empty(sum(CHANNELS)))
        self.beta = nn.Parameter(torch.empty(sum(CHANNELS)))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,), float32, of two batches (B,3,H,W) in [0,1]; sides of at least 16 pixels.

        Raises:
            ValueError: The batches have other shapes.
        """
        right = images.ndim == 4 and images.shape[1] == 3 and images.shape == reference.shape
        if not right or min(images.shape[-2:]) < _SMALLEST_SIDE:
            shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
            raise ValueError(
                f"DISTS: expected two batches of equal shape (B,3,H,W), sides >= {_SMALLEST_SIDE}, got {shapes}."
            )
        with torch.autocast(images.device.type, enabled=False):  # squares of features leave the range of float16
            return self._distance(images.float(), reference.float())

    def _distance(self, images: Tensor, reference: Tensor) -> Tensor:
        count, total = images.shape[0], self.alpha.sum() + self.beta.sum()
        weights = zip(self.alpha.split(CHANNELS), self.beta.split(CHANNELS), strict=True)
        similarity = images.new_zeros(count)
        for maps, (alpha, beta) in zip(self._maps(torch.cat([images, reference])), weights, strict=True):
            luminance, structure = _compare(maps[:count], maps[count:])
            similarity = similarity + (alpha * luminance + beta * structure).sum(dim=1) / total
        return 1 - similarity

    def _maps(self, x: Tensor) -> list[Tensor]:
        """The pictures themselves and the output of each stage."""
        maps = [x]
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.stage_ends:
                maps.append(x)
        return maps


def _compare(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's l (of means) and s (of covariances), (B,C) each, over the whole of each channel's map."""
    mean_x, mean_y = x.mean(dim=(2, 3), keepdim=True), y.mean(dim=(2, 3), keepdim=True)
    x, y = x - mean_x, y - mean_y
    mean_x, mean_y = mean_x[..., 0, 0], mean_y[..., 0, 0]
    variances = x.square().mean(dim=(2, 3)) + y.square().mean(dim=(2, 3))
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * (x * y).mean(dim=(2, 3)) + _C2) / (variances + _C2)
    return luminance, structure


def load_dists(vgg16: str | Path | Mapping[str, Tensor], weights: str | Path) -> DISTS:
    """Build DISTS from VGG16 and from its own alpha and beta.

    Args:
        vgg16: torchvision's weights of VGG16 for ImageNet, as a file (`.pth`, `.safetensors` or `.npz`) or as a state
            dict; `features.*` are taken, `classifier.*` is left.
        weights: The authors' `weights.pt`, or another such file with `alpha` and `beta`, 1475 numbers each.

    Raises:
        ValueError: A file cannot be read, or tensors are missing, unknown or of another shape. Nothing pickled but
            tensors is read.
    """
    named = vgg16 if isinstance(vgg16, Mapping) else read_tensors(vgg16)
    state = {key: value for key, value in named.items() if not key.startswith("classifier.")}
    own = read_tensors(weights)
    for key in ("alpha", "beta"):
        if key not in own or own[key].numel() != sum(CHANNELS) or not _is_weighting(own[key]):
            raise ValueError(
                f"{weights}: expected DISTS's own weights, {key} of {sum(CHANNELS)} numbers >= 0, got "
                f"{tuple(own[key].shape) if key in own else 'none'}. Give the authors' weights.pt."
            )
        state[key] = own[key].flatten()
    model = DISTS()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        name = "the given tensors" if isinstance(vgg16, Mapping) else vgg16
        details = " ".join(str(error).split())
        raise ValueError(f"{name} are not VGG16's weights by torchvision's names: {details}") from error
    return model


def _is_weighting(value: Tensor) -> bool:
    return value.is_floating_point() and bool((value >= 0).all()) and 0 < float(value.sum()) < float("inf")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.pt`, `.safetensors` or `.npz` file, on the CPU.

    Raises:
        ValueError: It is missing, cut, of another kind, or holds anything but tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file. Give the path of a .pth, .safetensors or .npz file.")
    try:
        tensors = _read(path)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, OSError, EOFError, ValueError, TypeError) as error:
        reason = _what_is_wrong(path, error)
        raise ValueError(
            f"{path}: not a whole file of tensors ({reason}). Download it again, or give a file of weights alone."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path}: expected tensors by name. Give a file of weights alone.")
    return tensors


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Without the advice of libraries to load pickled objects all the same, which may run any code."""
    said = str(error).split("\n", 1)[0]
    if isinstance(error, OSError):
        return said
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start:
        return "it is empty"
    if start.startswith(b"<"):
        return "it is a web page"
    return "it holds something else" if "pickle" in said or isinstance(error, pickle.UnpicklingError) else said


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix != ".npz":
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
