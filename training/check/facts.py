"""What one picture tells of itself: size, decodability, traces of compression, and how to know it again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from restoration.jpeg import estimate_quality
from restoration.prompts import QualityEstimator
from restoration.restorer_file import read_restorer
from restoration.restorers import build_restorer, load_weights
from training.data.pictures import BrokenPictureError, opened, read_picture, upright_rgb
from training.data.reading import ForbiddenFileError

ESTIMATOR = Path(__file__).parents[2] / "weights" / "starter-quality.safetensors"
"""Tells the JPEG quality of pixels."""
_BLOCK, _GRID = 8, 16
_SEEN, _LEAST_SEEN = 384, 128
"""Side of the square in the middle that is looked at for traces of compression, pixels; and the least for a network."""
_THUMBNAIL = 16
_HASHED, _FREQUENCIES = 32, 8


@dataclass(frozen=True)
class PictureFacts:
    """One picture.

    Args:
        path: Of the file, or through a shard.
        reason: Why it cannot be decoded; None where it can, and then the rest is known.
        width: Upright, pixels.
        height: Upright, pixels.
        file_quality: Of JPEG files, 1 to 100, from their tables.
        seen_quality: Of other files, what their pixels look like, 0 to 100; None without the estimator, or of
            pictures with less than 128 pixels a side.
        steps: How much larger differences are across the steps of an 8x8 grid, wherever it lies, than elsewhere; about
            1 where there is no grid.
        fingerprint: 64 bits that stay when a picture is scaled or compressed.
        thumbnail: Its colours, 16x16x3 bytes.
    """

    path: Path
    reason: str | None = None
    width: int = 0
    height: int = 0
    file_quality: float | None = None
    seen_quality: float | None = None
    steps: float = 1.0
    fingerprint: int = 0
    thumbnail: bytes = b""


def look_at(path: Path) -> PictureFacts:
    """Decode a picture and find out about it.

    Raises:
        UnreadableError: The disk does not give it, also after some seconds.
    """
    try:
        data = read_picture(path)
        with warnings.catch_warnings(), opened(data) as picture:
            warnings.simplefilter("ignore")  # of odd metadata, which does not matter here
            tables = getattr(picture, "quantization", None) or None  # of JPEGs; lossless ones have none
            pixels = upright_rgb(picture)
    except (BrokenPictureError, ForbiddenFileError) as error:
        return PictureFacts(path, str(error))
    middle = _middle(pixels)
    steps, grid = find_grid(middle)
    return PictureFacts(
        path,
        None,
        pixels.shape[1],
        pixels.shape[0],
        None if tables is None else file_quality(tables),
        _seen_quality(middle, grid) if tables is None else None,
        steps,
        fingerprint(pixels),
        np.asarray(Image.fromarray(pixels).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)).tobytes(),
    )


def file_quality(tables: dict[int, list[int]]) -> float:
    """The IJG quality, 1 to 100, of the quantisation tables that Pillow gives of a JPEG."""
    return estimate_quality([torch.tensor(tables[number]).reshape(8, 8) for number in sorted(tables)[:2]]).quality


def _seen_quality(pixels: np.ndarray, grid: tuple[int, int]) -> float | None:
    """What the shipped network says, of what begins where the grid does, as it was trained on."""
    estimator = _estimator()
    if estimator is None or min(pixels.shape[:2]) < _LEAST_SEEN:
        return None
    aligned = pixels[grid[0] :, grid[1] :].astype(np.float32) / 255
    with torch.no_grad():
        return float(estimator.network(torch.from_numpy(aligned).permute(2, 0, 1)[None])[0])


@cache
def _estimator() -> QualityEstimator | None:
    """The shipped network, loaded once in each process, of which there are several."""
    if not ESTIMATOR.exists():
        return None
    torch.set_num_threads(1)
    file = read_restorer(ESTIMATOR)
    estimator = build_restorer(file.metadata, file.name)
    load_weights(estimator, file)
    assert isinstance(estimator, QualityEstimator)
    return estimator.float().eval()


def _middle(pixels: np.ndarray) -> np.ndarray:
    """The square in the middle, on the block grid of a JPEG that begins in the corner."""
    top, left = (max(0, side - _SEEN) // 2 // _GRID * _GRID for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + _SEEN, left : left + _SEEN])


def find_grid(pixels: np.ndarray) -> tuple[float, tuple[int, int]]:
    """How visible an 8x8 grid is, and where it begins: row and column, 0 to 7.

    The absolute difference of neighbours across the strongest of the eight places, over the median of the other seven;
    of the two directions, and of mean and median over the picture, the one with less of it.

    Args:
        pixels: (H, W, 3), uint8. Pictures with less than 32 pixels a side give 1.
    """
    if min(pixels.shape[:2]) < 4 * _BLOCK:
        return 1.0, (0, 0)
    luma = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    ratios, places = [], []
    for plane in (luma.T, luma):
        steps = np.minimum(np.abs(np.diff(plane, axis=1)), 32).mean(axis=0)  # edges of things weigh no more than this
        for typical in (np.median, np.mean):  # the edges of windows and text are in few columns, a grid is in all
            by_place = np.array([typical(steps[place::_BLOCK]) for place in range(_BLOCK)])
            strongest = int(by_place.argmax())
            others = float(np.median(np.delete(by_place, strongest)))
            ratios.append(float(by_place[strongest]) / others if others > 0.05 else 1.0)
        places.append((strongest + 1) % _BLOCK)
    return min(ratios), (places[0], places[1])


def fingerprint(pixels: np.ndarray) -> int:
    """A perceptual hash of 64 bits: the signs of the lowest 8x8 frequencies of a 32x32 luma, about their median.

    Two versions of a picture, scaled, recompressed or slightly edited, differ in few bits; others in about 32.
    """
    small = Image.fromarray(pixels).convert("L").resize((_HASHED, _HASHED), Image.Resampling.LANCZOS)
    low = (_COSINES @ np.asarray(small, np.float64) @ _COSINES.T).ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines(count: int, length: int) -> np.ndarray:
    """The first basis functions of the DCT-II, (count, length)."""
    place = np.arange(length) + 0.5
    return np.cos(np.pi / length * np.arange(count)[:, None] * place)


_COSINES = _cosines(_FREQUENCIES, _HASHED)
