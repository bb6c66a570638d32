"""The drawing of a degraded crop: pure functions over uint8 arrays and an explicit random generator.

A crop passes through: turned gray (some) -> compressed before, on a displaced grid, as JPEG or WebP, resized since
(some) -> compressed as JPEG -> decoded by Pillow or FFmpeg -> cut off the block grid (some).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from training.degradation.codecs import Decoder, check_image, compress, compress_webp
from training.degradation.law import MAX_SHIFT, Degradation


class DegradedCrop(NamedTuple):
    """A training pair of equal size (H,W,3), uint8, aligned pixel by pixel."""

    image: np.ndarray
    clean: np.ndarray
    quality: int
    description: dict[str, Any]


def degrade(image: np.ndarray, degradation: Degradation, rng: np.random.Generator, *, margin: int = 0) -> DegradedCrop:
    """Compresses a crop as `degradation` draws it; the last compression's block grid starts at the crop's corner, or up
    to `misaligned_max` pixels before it.

    `image` is uint8 (margin+H+m, margin+W+m, 3) with m = `misaligned_max`: the crop with `margin` rows above and
    columns to the left, which only an earlier, displaced compression looks at, and the rest of what the crop is cut
    out of. Where the displacement exceeds the margin, edge pixels are repeated. `quality` of the result is the last
    compression's; `description` holds every draw. What is off by default draws nothing, so that the draws of a setting
    stay the same when others come to exist.
    """
    check_image(image)
    if min(image.shape[:2]) <= margin + degradation.misaligned_max or margin < 0:
        raise ValueError(
            f"image {image.shape} must be larger than its margin {margin}, which must not be negative, and "
            f"misaligned_max {degradation.misaligned_max}"
        )
    if rng.random() < degradation.grayscale_probability:
        image = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
        gray = True
    else:
        gray = False
    clean = np.ascontiguousarray(image[margin:, margin:])
    first = _draw_first(degradation, rng)
    quality = _draw_quality(degradation, rng)
    subsampling = _draw_subsampling(degradation, rng)
    decoder: Decoder = "ffmpeg" if rng.random() < degradation.ffmpeg_probability else "pillow"
    cut = _draw_cut(degradation, rng)
    source = _compressed_before(image, margin, first, gray=gray) if first else clean
    degraded = compress(source, quality, subsampling, decoder, grayscale=gray)
    drawn = {
        "quality": quality, "subsampling": subsampling, "decoder": decoder, "grayscale": gray, "first": first,
        "cut": cut,
    }  # fmt: skip
    spare = degradation.misaligned_max
    return DegradedCrop(_cut_out(degraded, cut, spare), _cut_out(clean, cut, spare), quality, drawn)


def _draw_first(degradation: Degradation, rng: np.random.Generator) -> dict[str, Any] | None:
    """The earlier compression; None for none. `scale` is the later side over the earlier one."""
    if rng.random() >= degradation.double_probability:
        return None
    quality = int(rng.integers(degradation.double_quality_min, degradation.double_quality_max, endpoint=True))
    subsampling = _draw_subsampling(degradation, rng)
    offset = (
        tuple(int(value) for value in rng.integers(0, MAX_SHIFT, 2, endpoint=True)) if degradation.shift else (0, 0)
    )
    first = {"codec": "jpeg", "quality": quality, "subsampling": subsampling, "offset": offset}
    if degradation.webp_probability and rng.random() < degradation.webp_probability:
        quality = int(rng.integers(degradation.webp_quality_min, degradation.webp_quality_max, endpoint=True))
        first |= {"codec": "webp", "quality": quality, "subsampling": "4:2:0"}
    return {**first, **_draw_resize(degradation, rng)}


def _draw_resize(degradation: Degradation, rng: np.random.Generator) -> dict[str, Any]:
    if not degradation.resize_probability or rng.random() >= degradation.resize_probability:
        return {"scale": 1.0, "filter": None}
    low, high = np.log(degradation.resize_range)
    scale = float(np.exp(rng.uniform(low, high)))
    return {"scale": scale, "filter": degradation.resize_filters[int(rng.integers(len(degradation.resize_filters)))]}


def _draw_quality(degradation: Degradation, rng: np.random.Generator) -> int:
    law = degradation.qualities
    if law.choice_probability and rng.random() < law.choice_probability:
        return int(rng.choice(law.choices))
    return int(rng.integers(law.low, law.high, endpoint=True))


def _draw_cut(degradation: Degradation, rng: np.random.Generator) -> tuple[int, int]:
    """Where the crop starts in what is compressed: row and column."""
    if not degradation.misaligned_probability or rng.random() >= degradation.misaligned_probability:
        return (0, 0)
    row, column = rng.integers(0, degradation.misaligned_max, 2, endpoint=True)
    return (int(row), int(column))


def _cut_out(image: np.ndarray, start: tuple[int, int], spare: int) -> np.ndarray:
    """The crop that is `spare` rows and columns smaller."""
    if not spare:
        return image
    rows, columns = (slice(first, side - spare + first) for first, side in zip(start, image.shape[:2], strict=True))
    return np.ascontiguousarray(image[rows, columns])


def _draw_subsampling(degradation: Degradation, rng: np.random.Generator) -> str:
    names = list(degradation.subsampling)
    bounds = np.cumsum([degradation.subsampling[name] for name in names])
    return names[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]


def _compressed_before(image: np.ndarray, margin: int, first: dict[str, Any], *, gray: bool) -> np.ndarray:
    """The crop alone, out of a compression whose grid starts `offset` (rows, columns) before it, at that size.

    The earlier picture of another size is made from this one, with Lanczos: an enlarged one has no finer details.
    """
    offset = first["offset"]
    missing = [(max(0, shift - margin), 0) for shift in offset]
    start = [max(0, margin - shift) for shift in offset]
    window = np.ascontiguousarray(np.pad(image[start[0] :, start[1] :], (*missing, (0, 0)), mode="edge"))
    height, width = window.shape[:2]
    scale = first["scale"]
    earlier = (max(1, round(height / scale)), max(1, round(width / scale)))
    compressed = _compressed(_resized(window, earlier, "lanczos"), first, gray=gray)
    return np.ascontiguousarray(_resized(compressed, (height, width), first["filter"])[offset[0] :, offset[1] :])


def _compressed(image: np.ndarray, first: dict[str, Any], *, gray: bool) -> np.ndarray:
    if first["codec"] == "webp":
        return compress_webp(image, first["quality"])
    return compress(image, first["quality"], first["subsampling"], grayscale=gray)


def _resized(image: np.ndarray, size: tuple[int, int], name: str | None) -> np.ndarray:
    """The picture in (rows, columns), by one of Pillow's filters; itself where it has that size."""
    if image.shape[:2] == size or name is None:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling[name.upper()]))
