"""JPEG compression of training crops: pure functions over uint8 arrays and an explicit random generator."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from PIL import Image

Decoder = Literal["pillow", "ffmpeg"]
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
MAX_SHIFT = 15
"""Largest offset between two block grids: one less than the 16 pixels of a 4:2:0 macroblock."""


def _check_qualities(name: str, low: int, high: int) -> None:
    if not 0 <= low <= high <= 100:
        raise ValueError(f"{name}_min and {name}_max must satisfy 0 <= min <= max <= 100, got {low} and {high}")


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an RGB picture (H,W,3) of dtype uint8, got {image.shape} of {image.dtype}")


@dataclass(frozen=True)
class Degradation:
    """How a clean crop becomes a JPEG; each property is drawn anew for every crop."""

    quality_min: int = 0
    """Lowest quality factor of the last compression (0 to 100; libjpeg treats 0 as 1)."""
    quality_max: int = 100
    """Highest quality factor of the last compression, inclusive; the draw is uniform over integers."""
    subsampling: dict[str, float] = field(default_factory=lambda: {"4:2:0": 1.0})
    """Weight of each chroma subsampling, not necessarily summing to one (in YAML, quote the names)."""
    double_probability: float = 0.0
    """Share of crops that had been a JPEG once before."""
    double_quality_min: int = 5
    """Lowest quality factor of that earlier compression."""
    double_quality_max: int = 95
    """Highest quality factor of that earlier compression, inclusive."""
    shift: bool = False
    """Whether the earlier compression's grid is displaced by 0 to 15 pixels a side, as after cropping."""
    ffmpeg_probability: float = 0.0
    """Share of crops decoded by ffmpeg, as ComfyUI's LoadImage does, and not by Pillow (libjpeg)."""
    grayscale_probability: float = 0.0
    """Share of crops stored as one-component JPEGs; their clean crop turns gray as well."""
    quality_choices: tuple[int, ...] = ()
    """Quality factors that `choice_probability` of the crops have one of; the others are drawn from the range."""
    choice_probability: float = 0.0
    """Share of crops whose quality factor is one of `quality_choices`."""
    misaligned_probability: float = 0.0
    """Share of crops that are cut out of a larger JPEG anywhere, so that its block grid is displaced."""
    misaligned_max: int = 0
    """Rows and columns that such a JPEG is larger than the crop, and the largest displacement. All crops are cut out of
    a JPEG of that size, the others from its corner."""

    def __post_init__(self) -> None:
        _check_qualities("quality", self.quality_min, self.quality_max)
        _check_qualities("double_quality", self.double_quality_min, self.double_quality_max)
        for name in (
            *("double_probability", "ffmpeg_probability", "grayscale_probability"),
            *("choice_probability", "misaligned_probability"),
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        unknown = set(self.subsampling) - set(SUBSAMPLINGS)
        if unknown:
            raise ValueError(f"subsampling names must be among {SUBSAMPLINGS}, got {sorted(map(str, unknown))}")
        if min(self.subsampling.values(), default=0) < 0 or sum(self.subsampling.values()) <= 0:
            raise ValueError(f"subsampling weights must be >= 0 and have a positive sum, got {self.subsampling}")
        object.__setattr__(self, "quality_choices", tuple(self.quality_choices))
        if any(not 0 <= quality <= 100 for quality in self.quality_choices):
            raise ValueError(f"quality_choices must lie in 0..100, got {self.quality_choices}")
        if self.choice_probability and not self.quality_choices:
            raise ValueError("choice_probability needs quality_choices, got none")
        if self.misaligned_max < 0 or (self.misaligned_probability and not self.misaligned_max):
            raise ValueError(
                "misaligned_max must not be negative, and positive with misaligned_probability, "
                f"got {self.misaligned_max}"
            )

    @property
    def margin(self) -> int:
        """Rows and columns of context above and left of a crop that `degrade` can make use of."""
        return MAX_SHIFT if self.shift and self.double_probability > 0 else 0

    @property
    def window(self) -> int:
        """Rows and columns that `degrade` takes more than it gives back, the margin included."""
        return self.margin + self.misaligned_max


PRESETS: dict[str, Degradation] = {
    "paper": Degradation(),
    "wide": Degradation(
        quality_min=5,
        quality_max=95,
        subsampling={"4:2:0": 0.7, "4:4:4": 0.2, "4:2:2": 0.1},
        double_probability=0.2,
        shift=True,
        ffmpeg_probability=0.3,
    ),
    "codiff_paper": Degradation(quality_min=8, quality_max=95),
    "codiff_code": Degradation(
        quality_min=8,
        quality_max=96,
        quality_choices=(10, 20, 30, 40, 50, 60),
        choice_probability=0.75,
        misaligned_probability=0.5,
        misaligned_max=8,
    ),
}
"""`paper`: DriftRec's training data (quality uniform over 0..100, 4:2:0, Pillow, one compression).
`wide`: a superset for pictures from the internet.
`codiff_paper`: what CODiff's paper says of its training data; `codiff_code`: what its published code does."""


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
    compression's; `description` holds every draw.
    """
    _check_image(image)
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
    source = _compress_displaced(image, margin, gray=gray, **first) if first else clean
    degraded = compress(source, quality, subsampling, decoder, grayscale=gray)
    drawn = {
        "quality": quality, "subsampling": subsampling, "decoder": decoder, "grayscale": gray, "first": first,
        "cut": cut,
    }  # fmt: skip
    spare = degradation.misaligned_max
    return DegradedCrop(_cut_out(degraded, cut, spare), _cut_out(clean, cut, spare), quality, drawn)


def compress(
    image: np.ndarray,
    quality: int,
    subsampling: str = "4:2:0",
    decoder: Decoder = "pillow",
    *,
    grayscale: bool = False,
) -> np.ndarray:
    """Encodes (H,W,3) uint8 RGB as baseline JPEG with Pillow and decodes it again to the same shape.

    `decoder="ffmpeg"` gives the pixels ComfyUI's LoadImage shows: FFmpeg's MJPEG decoder, then swscale's yuvj to rgb24.
    """
    data = encode(image, quality, subsampling, grayscale=grayscale)
    if decoder == "pillow":
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    if decoder == "ffmpeg":
        return decode_ffmpeg(data)
    raise ValueError(f"decoder must be 'pillow' or 'ffmpeg', got {decoder!r}")


def encode(image: np.ndarray, quality: int, subsampling: str = "4:2:0", *, grayscale: bool = False) -> bytes:
    """The bytes of a baseline JPEG by Pillow with the standard tables (quality 0 to 100, 0 as libjpeg's 1)."""
    _check_image(image)
    if subsampling not in SUBSAMPLINGS:
        raise ValueError(f"subsampling must be one of {SUBSAMPLINGS}, got {subsampling!r}")
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if grayscale:
        picture.convert("L").save(buffer, "JPEG", quality=quality)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def decode_ffmpeg(data: bytes) -> np.ndarray:
    """Decodes one JPEG with FFmpeg to (H,W,3) uint8 RGB; the same pixels as opening the file as a video."""
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    packet = av.Packet(data)
    frames = decoder.decode(packet) or decoder.decode(None)
    if not frames:
        raise ValueError(f"FFmpeg found no picture in these {len(data)} bytes: expected one complete JPEG")
    return frames[0].to_ndarray(format="rgb24")


def _draw_first(degradation: Degradation, rng: np.random.Generator) -> dict[str, Any] | None:
    if rng.random() >= degradation.double_probability:
        return None
    quality = int(rng.integers(degradation.double_quality_min, degradation.double_quality_max, endpoint=True))
    subsampling = _draw_subsampling(degradation, rng)
    offset = (
        tuple(int(value) for value in rng.integers(0, MAX_SHIFT, 2, endpoint=True)) if degradation.shift else (0, 0)
    )
    return {"quality": quality, "subsampling": subsampling, "offset": offset}


def _draw_quality(degradation: Degradation, rng: np.random.Generator) -> int:
    if degradation.choice_probability and rng.random() < degradation.choice_probability:
        return int(rng.choice(degradation.quality_choices))
    return int(rng.integers(degradation.quality_min, degradation.quality_max, endpoint=True))


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


def _compress_displaced(
    image: np.ndarray, margin: int, *, quality: int, subsampling: str, offset: tuple[int, int], gray: bool
) -> np.ndarray:
    """Compresses with a grid that starts `offset` (rows, columns) before the crop, and returns the crop alone."""
    missing = [(max(0, shift - margin), 0) for shift in offset]
    start = [max(0, margin - shift) for shift in offset]
    window = np.pad(image[start[0] :, start[1] :], (*missing, (0, 0)), mode="edge")
    compressed = compress(np.ascontiguousarray(window), quality, subsampling, grayscale=gray)
    return np.ascontiguousarray(compressed[offset[0] :, offset[1] :])
