"""Training pairs with the text states of their captions: still pure functions of the seed and the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from training.configs.common import DataConfig
from training.data.captions import DEFAULT_NAME, CaptionedCrop, CaptionError, cut_crop, read_captions, read_texts
from training.data.pairs import PairDataset, pair_options
from training.data.pictures import find_images
from training.data.text_states import TextStates
from training.degradation import DegradedCrop, degrade


@dataclass(frozen=True)
class Captions:
    """What is known of a folder's pictures.

    Args:
        folder: Of the pictures.
        crops: Crops with their boxes and qualities, from a caption file; empty where captions are of whole pictures.
        texts: Captions of whole pictures, from `.txt` files; their crops are free.
        origin: Where they come from, for messages.
    """

    folder: Path
    crops: tuple[CaptionedCrop, ...]
    texts: dict[Path, str]
    origin: str

    def of(self, paths: Sequence[Path]) -> Captions:
        """Those of some pictures."""
        wanted = set(paths)
        crops = tuple(crop for crop in self.crops if self.folder / crop.path in wanted)
        return replace(self, crops=crops, texts={path: self.texts[path] for path in paths if path in self.texts})

    def pictures(self) -> int:
        """How many pictures have one."""
        return len({crop.path for crop in self.crops}) + len(self.texts)

    def all(self) -> list[str]:
        """The captions themselves."""
        return [*(crop.caption for crop in self.crops), *self.texts.values()]

    def dataset(self, data: DataConfig, seed: int, states: TextStates) -> PairDataset:
        """Pairs of these pictures alone, with `text`, float16 (tokens, width), in each item."""
        if self.crops:
            return CaptionedCrops(self.folder, self.crops, data, seed, states)
        return CaptionedPictures(self.texts, data, seed, states)


def find_captions(folder: Path, file: Path | None) -> Captions | None:
    """The captions of a folder: those of `file`, else of the folder's own caption file, else of its `.txt` files.

    Raises:
        CaptionError: A file is missing or broken.
        FileNotFoundError: The folder has no pictures.
    """
    if file is None and (folder / DEFAULT_NAME).is_file():
        file = folder / DEFAULT_NAME
    if file is not None:
        crops = tuple(read_captions(file))
        return Captions(folder, crops, {}, str(file)) if crops else None
    texts = read_texts(find_images(folder))
    return Captions(folder, (), texts, f"the .txt files in {folder}") if texts else None


def check_crops_fit(captions: Captions, data: DataConfig) -> None:
    """Refuse a configuration that would change crops whose captions are fixed.

    Raises:
        CaptionError: Crops of another size, or crops that are turned, mirrored or displaced.
    """
    other = next((crop for crop in captions.crops if crop.side != data.crop), None)
    if other is not None:
        raise CaptionError(
            f"{captions.origin} describes crops of {other.side} pixels, data.crop is {data.crop}. Set it to "
            f"{other.side}, or caption others: python -m training prepare captions --crop {data.crop}."
        )
    if captions.crops and (data.flips or data.rotations):
        raise CaptionError(
            f"data.flips, data.rotations: {captions.origin} describes crops as they are, where left is left. Turn both "
            "off."
        )
    if captions.crops and data.degradation.misaligned_max:
        raise CaptionError(
            f"data.degradation.misaligned_max: the boxes of {captions.origin} are fixed, no crop can be displaced. Set "
            "it to 0, with misaligned_probability."
        )


class _Captioned(PairDataset):
    """Pairs of some pictures as a configuration describes them."""

    def __init__(self, paths: Sequence[Path], data: DataConfig, seed: int, states: TextStates) -> None:
        super().__init__(paths, **pair_options(data, seed))
        self.states = states


class CaptionedPictures(_Captioned):
    """Free crops of pictures with a caption each: an item's `text` is that of its whole picture."""

    def __init__(self, texts: dict[Path, str], data: DataConfig, seed: int, states: TextStates) -> None:
        super().__init__(list(texts), data, seed, states)
        self.texts = texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "text": self.states[self.texts[Path(item["path"])]]}


class CaptionedCrops(_Captioned):
    """The crops of a caption file, each with its own box and JPEG quality; an epoch goes through all of them.

    The rest of the degradation (chroma subsampling, an earlier compression, the decoder) is drawn as for other pairs.
    """

    def __init__(
        self, folder: Path, crops: Sequence[CaptionedCrop], data: DataConfig, seed: int, states: TextStates
    ) -> None:
        super().__init__([folder / crop.path for crop in crops], data, seed, states)
        self.crops = list(crops)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, pair = self._numbered_pair(index)
        return {**self._item(index, self.paths[number], pair), "text": self.states[self.crops[number].caption]}

    def pair(self, index: int) -> tuple[Path, DegradedCrop]:
        number, pair = self._numbered_pair(index)
        return self.paths[number], pair

    def _numbered_pair(self, index: int) -> tuple[int, DegradedCrop]:
        number, picture = self._decoded(index)
        crop, margin = self.crops[number], self.degradation.margin
        left, top, right, bottom = crop.box
        window = cut_crop(picture, (left - margin, top - margin, right, bottom))
        law = replace(
            self.degradation, quality_law="range", quality_min=crop.quality, quality_max=crop.quality,
            choice_probability=0.0,
        )  # fmt: skip
        return number, degrade(window, law, np.random.default_rng([self.seed, 1, index]), margin=margin)
