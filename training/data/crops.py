"""From a clean picture to a training pair: where the crop is cut, how it is turned, and its compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from training.degradation import Degradation, DegradedCrop, degrade


@dataclass(frozen=True)
class CropSettings:
    """What is done to a picture. `augmentation` "paper": a square of 0.2 to 1 of its area, resized to the crop
    (DriftRec). "crop": a square at any offset, first shrunk by a factor drawn log-uniformly from `downscale`, limited
    by the picture's size. Pictures smaller than the crop are mirrored outwards.

    Args:
        crop: Side of the pair, pixels, at least 8.
        degradation: What may be drawn for its compression.
        augmentation: As said.
        flips: Whether half of the crops are mirrored.
        rotations: Whether crops are turned by multiples of 90 degrees.
        downscale: Lowest and highest factor, 1 or more.

    Raises:
        ValueError: A setting is out of its range.
    """

    crop: int
    degradation: Degradation = field(default_factory=Degradation)
    augmentation: Literal["paper", "crop"] = "crop"
    flips: bool = True
    rotations: bool = True
    downscale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.crop < 8:
            raise ValueError(f"crop must be at least 8 pixels, got {self.crop}")
        if self.augmentation not in ("paper", "crop"):
            raise ValueError(f"augmentation must be 'paper' or 'crop', got {self.augmentation!r}")
        if not 1.0 <= self.downscale[0] <= self.downscale[1]:
            raise ValueError(f"downscale must be (low, high) with 1 <= low <= high, got {self.downscale}")


def draw_pair(picture: np.ndarray, settings: CropSettings, seed: int | Sequence[int]) -> DegradedCrop:
    """The pair that follows from a picture, the settings and a seed alone: every call gives the same pixels.

    Item `index` of a run with the seed `s` is `draw_pair(picture, settings, [s, 1, index])`, where `picture` is
    what `load_image` gives of the file that `PairDataset.picture_of(index)` names.

    Args:
        picture: (H, W, 3), uint8.
        settings: What is done to it.
        seed: One number or several, not negative.
    """
    rng = np.random.default_rng(seed)
    law = settings.degradation
    window = _augmented(_window(picture, settings.crop + law.window, settings, rng), settings, rng)
    return degrade(window, law, rng, margin=law.margin)


def _window(picture: np.ndarray, side: int, settings: CropSettings, rng: np.random.Generator) -> np.ndarray:
    if settings.augmentation == "paper":
        return _random_resized_crop(picture, side, rng)
    low, high = np.log(settings.downscale)
    factor = float(np.exp(rng.uniform(low, high)))
    source = max(side, min(round(side * factor), *picture.shape[:2]))
    window = _random_crop(_pad_to(picture, source), source, rng)
    return window if source == side else _resize(window, side, Image.Resampling.LANCZOS)


def _augmented(window: np.ndarray, settings: CropSettings, rng: np.random.Generator) -> np.ndarray:
    flip, turns = int(rng.integers(2)), int(rng.integers(4))
    if settings.flips and flip:
        window = window[:, ::-1]
    if settings.rotations:
        window = np.rot90(window, turns)
    return _laid_out(window)


def _laid_out(window: np.ndarray) -> np.ndarray:
    """The same in an order of memory of its own; channel by channel, which numpy copies several times faster."""
    copy = np.empty(window.shape, window.dtype)
    for channel in range(window.shape[2]):
        copy[..., channel] = window[..., channel]
    return copy


def _random_resized_crop(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """RandomResizedCrop(scale (0.2, 1), ratio 1, bilinear with antialiasing), a centred square if ten draws fail."""
    height, width = picture.shape[:2]
    for _ in range(10):
        source = round((height * width * rng.uniform(0.2, 1.0)) ** 0.5)
        if 0 < source <= min(height, width):
            return _resize(_random_crop(picture, source, rng), side, Image.Resampling.BILINEAR)
    source = min(height, width)
    top, left = (height - source) // 2, (width - source) // 2
    return _resize(picture[top : top + source, left : left + source], side, Image.Resampling.BILINEAR)


def _random_crop(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(picture.shape[0] - side, endpoint=True)
    left = rng.integers(picture.shape[1] - side, endpoint=True)
    return picture[top : top + side, left : left + side]


def _pad_to(picture: np.ndarray, side: int) -> np.ndarray:
    missing = [max(0, side - length) for length in picture.shape[:2]]
    if not any(missing):
        return picture
    widths = [(count // 2, count - count // 2) for count in missing]
    return np.pad(picture, (*widths, (0, 0)), mode="symmetric")


def _resize(picture: np.ndarray, side: int, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), resampling))
