"""What may be drawn for a training crop: the settings, the laws of the quality by name, and presets of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from training.degradation.codecs import SUBSAMPLINGS

MAX_SHIFT = 15
"""Largest offset between two block grids: one less than the 16 pixels of a 4:2:0 macroblock."""

ResizeFilter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
"""Pillow's."""
RESIZE_FILTERS: tuple[ResizeFilter, ...] = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class QualityLaw(NamedTuple):
    """Which quality factors are drawn: `choice_probability` of them are one of `choices`, each alike, and the others
    whole numbers from `low` to `high`, both included, each alike."""

    low: int
    high: int
    choices: tuple[int, ...] = ()
    choice_probability: float = 0.0


QUALITY_LAWS: dict[str, QualityLaw] = {
    "driftrec": QualityLaw(0, 100),
    "codiff_paper": QualityLaw(8, 95),
    "codiff_code": QualityLaw(8, 96, (10, 20, 30, 40, 50, 60), 0.75),
    "sodiff": QualityLaw(5, 95),
    "ddrm": QualityLaw(5, 30, (5, 10, 30), 1.0),
}
"""`driftrec`: as its code draws them (Welker et al. 2024). `codiff_paper`, `codiff_code`: what the paper of CODiff (Guo
et al. 2025) says, and what its code does. `sodiff`: SODiff's range (arXiv 2508.07346). `ddrm`: the fixed qualities of
the table of DDRM-JPEG (Kawar et al. 2022), which is evaluated at them and trained without JPEGs."""


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
    """Share of crops that had been compressed once before."""
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
    quality_law: Literal["range", "driftrec", "codiff_paper", "codiff_code", "sodiff", "ddrm"] = "range"
    """How the quality factor of the last compression is drawn. `range`: from quality_min to quality_max, and of
    quality_choices. A publication's name: as it does, and those four settings are not used."""
    resize_probability: float = 0.0
    """Share of the crops compressed before that were resized between the two compressions."""
    resize_range: tuple[float, float] = (0.5, 1.0)
    """The later picture's side as a multiple of the earlier one's, smallest and largest; uniform in its logarithm.
    Above 1 the earlier picture was smaller, and what it had lost of details is to be restored, too."""
    resize_filters: tuple[ResizeFilter, ...] = ("bilinear", "bicubic", "lanczos")
    """What it was resized with, each alike."""
    webp_probability: float = 0.0
    """Share of the earlier compressions that were WebP, not JPEG."""
    webp_quality_min: int = 30
    """Lowest quality of a WebP (0 to 100)."""
    webp_quality_max: int = 95
    """Highest quality of a WebP, inclusive."""

    def __post_init__(self) -> None:
        for name in ("quality", "double_quality", "webp_quality"):
            _check_qualities(name, getattr(self, f"{name}_min"), getattr(self, f"{name}_max"))
        for name in (
            *("double_probability", "ffmpeg_probability", "grayscale_probability"),
            *("choice_probability", "misaligned_probability", "resize_probability", "webp_probability"),
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("quality_choices", "resize_range", "resize_filters"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_subsampling()
        self._check_choices()
        self._check_resize()

    def _check_subsampling(self) -> None:
        unknown = set(self.subsampling) - set(SUBSAMPLINGS)
        if unknown:
            raise ValueError(f"subsampling names must be among {SUBSAMPLINGS}, got {sorted(map(str, unknown))}")
        if min(self.subsampling.values(), default=0) < 0 or sum(self.subsampling.values()) <= 0:
            raise ValueError(f"subsampling weights must be >= 0 and have a positive sum, got {self.subsampling}")

    def _check_choices(self) -> None:
        if any(not 0 <= quality <= 100 for quality in self.quality_choices):
            raise ValueError(f"quality_choices must lie in 0..100, got {self.quality_choices}")
        if self.choice_probability and not self.quality_choices:
            raise ValueError("choice_probability needs quality_choices, got none")
        if self.misaligned_max < 0 or (self.misaligned_probability and not self.misaligned_max):
            raise ValueError(
                "misaligned_max must not be negative, and positive with misaligned_probability, "
                f"got {self.misaligned_max}"
            )
        if self.quality_law != "range" and self.quality_law not in QUALITY_LAWS:
            raise ValueError(f"quality_law must be range or one of {', '.join(QUALITY_LAWS)}, got {self.quality_law!r}")

    def _check_resize(self) -> None:
        if len(self.resize_range) != 2 or not 0.125 <= self.resize_range[0] <= self.resize_range[1] <= 8:
            raise ValueError(f"resize_range must be (low, high) with 1/8 <= low <= high <= 8, got {self.resize_range}")
        unknown = set(self.resize_filters) - set(RESIZE_FILTERS)
        if unknown or not self.resize_filters:
            raise ValueError(f"resize_filters must be some of {RESIZE_FILTERS}, got {self.resize_filters}")

    @property
    def qualities(self) -> QualityLaw:
        """How the quality factor of the last compression is drawn, `quality_law` resolved."""
        if self.quality_law != "range":
            return QUALITY_LAWS[self.quality_law]
        return QualityLaw(self.quality_min, self.quality_max, self.quality_choices, self.choice_probability)

    @property
    def margin(self) -> int:
        """Rows and columns of context above and left of a crop that `degrade` can make use of."""
        return MAX_SHIFT if self.shift and self.double_probability > 0 else 0

    @property
    def window(self) -> int:
        """Rows and columns that `degrade` takes more than it gives back, the margin included."""
        return self.margin + self.misaligned_max


def _check_qualities(name: str, low: int, high: int) -> None:
    if not 0 <= low <= high <= 100:
        raise ValueError(f"{name}_min and {name}_max must satisfy 0 <= min <= max <= 100, got {low} and {high}")


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
    "sodiff": Degradation(quality_min=5, quality_max=95),
    "web": Degradation(
        quality_min=5,
        quality_max=95,
        subsampling={"4:2:0": 0.7, "4:4:4": 0.2, "4:2:2": 0.1},
        double_probability=0.5,
        shift=True,
        ffmpeg_probability=0.3,
        resize_probability=0.5,
        webp_probability=0.2,
    ),
}
"""`paper`: DriftRec's training data (quality uniform over 0..100, 4:2:0, Pillow, one compression).
`wide`: a superset for pictures from the internet.
`codiff_paper`: what CODiff's paper says of its training data; `codiff_code`: what its published code does.
`sodiff`: SODiff's. `web`: `wide` with more that was compressed before, also as WebP, and resized since."""
