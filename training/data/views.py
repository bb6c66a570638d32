"""Training pairs as a configuration describes them; of some, squares that were shrunk since, or no JPEG at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from training.configs.common import DataConfig
from training.configs.quality import ViewConfig
from training.data.crops import CropSettings
from training.data.pairs import PairDataset, pair_options
from training.degradation import DegradedCrop

GRID = 16
"""Block grids of JPEGs start at multiples of this, with subsampled colours as well."""
UNCOMPRESSED = 100
"""The quality of what is no JPEG."""


@dataclass(frozen=True)
class View:
    """One draw. `kind`: "aligned" is cut out on the block grid, "misaligned" anywhere, "resized" after it was shrunk.

    `scale`: its sides after that, of those before. `top` and `left`, in [0, 1): where it is cut out. `uncompressed`:
    of the clean picture.
    """

    kind: Literal["aligned", "misaligned", "resized"]
    uncompressed: bool
    scale: float
    top: float
    left: float


def draw_view(config: ViewConfig, crop: int, seed: int | Sequence[int]) -> View:
    """The view that follows from the settings, the side of whole crops and a seed alone."""
    untouched, kind, amount, top, left = np.random.default_rng(seed).random(5).tolist()
    if kind < config.resized:
        scale = (config.side + amount * (crop - config.side)) / crop
        return View("resized", untouched < config.uncompressed, scale, top, left)
    misaligned = kind < config.resized + (1 - config.resized) * config.misaligned
    return View("misaligned" if misaligned else "aligned", untouched < config.uncompressed, 1.0, top, left)


def see(image: np.ndarray, view: View, side: int) -> np.ndarray:
    """The square (side, side, 3) of a picture (S, S, 3), uint8, that a view shows.

    Shrunk ones are as a JPEG is that somebody scaled and saved as a PNG: bicubic, in 8 bits.
    """
    step = GRID if view.kind == "aligned" else 1
    if view.kind == "resized":
        small = max(side, round(view.scale * len(image)))
        image = np.asarray(Image.fromarray(image).resize((small, small), Image.Resampling.BICUBIC))
    places = (len(image) - side) // step + 1
    row, column = (min(int(draw * places), places - 1) * step for draw in (view.top, view.left))
    return image[row : row + side, column : column + side]


def pairs_of(config: Any, paths: Sequence[Path]) -> PairDataset:
    """The pairs that a training's configuration describes, of some pictures; views of them where it has a `view`."""
    if view := getattr(config, "view", None):
        return ViewedPairs(paths, config.data, config.run.seed, view)
    return PairDataset(paths, **pair_options(config.data, config.run.seed))


def seen_side(config: Any) -> int:
    """Side in pixels of those pairs."""
    view = getattr(config, "view", None)
    return config.data.crop if view is None else view.side


class ViewedPairs(PairDataset):
    """Pairs of `view.side`, of which `degraded` is what the network sees and `quality` what it is to say; `clean` is no
    part of an item.

    Only what is shrunk to `view.side` needs a crop of `data.crop`. The others are cut out of one that is about `GRID`
    pixels larger than what is seen of it, so that some edges are the JPEG's and some are not: a quarter of the work.
    """

    def __init__(self, paths: Sequence[Path], data: DataConfig, seed: int, view: ViewConfig) -> None:
        super().__init__(paths, **pair_options(data, seed))
        self.view = view

    def pair(self, index: int) -> tuple[Path, DegradedCrop]:
        path, pair = super().pair(index)
        view = self.view_of(index)
        image, clean = (see(part, view, self.view.side) for part in (pair.image, pair.clean))
        drawn = {**pair.description, "view": asdict(view)}
        if view.uncompressed:
            return path, DegradedCrop(clean, clean, UNCOMPRESSED, drawn)
        return path, DegradedCrop(image, clean, pair.quality, drawn)

    def settings_of(self, index: int) -> CropSettings:
        """What is done to the picture of this index before the view is cut out."""
        needed = self.view.side / self.view_of(index).scale + GRID
        return replace(self.settings, crop=min(self.settings.crop, math.ceil(needed / GRID) * GRID))

    def view_of(self, index: int) -> View:
        """What of the pair is seen."""
        return draw_view(self.view, self.settings.crop, [self.seed, 2, index])

    def _item(self, index: int, path: Path, pair: DegradedCrop) -> dict[str, Any]:
        item = super()._item(index, path, pair._replace(clean=pair.clean[:0]))
        del item["clean"]
        return item
