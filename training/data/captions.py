"""Captions of training pictures: one line of JSON for each crop, or a `.txt` beside each picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from training.data.shards import read_beside

DEFAULT_NAME = "captions.jsonl"
"""Where captions of a folder's pictures are written to, and looked for, when nothing else is said: in that folder."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the upright picture, as Pillow's `crop` takes it."""


class CaptionError(ValueError):
    """Captions are missing, broken or cannot be made; the message says what to do."""


@dataclass(frozen=True)
class CaptionedCrop:
    """One line of a caption file: a crop of a picture, the JPEG quality that it is compressed at, and what it shows.

    Args:
        path: Of the picture, below the folder of pictures, with forward slashes.
        number: Which crop of the picture, from 0.
        box: The crop; it may reach beyond a picture that is smaller, whose pixels are mirrored there.
        quality: 1 to 100.
        caption: One line of text.
        model: What wrote it.
    """

    path: str
    number: int
    box: Box
    quality: int
    caption: str
    model: str

    @property
    def side(self) -> int:
        """Width and height, pixels."""
        return self.box[2] - self.box[0]

    def to_line(self) -> str:
        """A line of JSON with its end."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> CaptionedCrop:
        """Read a line of JSON.

        Raises:
            ValueError: It is no such line; the message says what is wrong with it.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")
        kinds: dict[str, Any] = {"path": str, "number": int, "box": list, "quality": int, "caption": str, "model": str}
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise ValueError(f"expected {key} of type {kind.__name__}, got {values.get(key)!r}")
        box, quality = values["box"], values["quality"]
        if len(box) != 4 or not all(isinstance(value, int) for value in box):
            raise ValueError(f"expected a box of four whole numbers, got {box}")
        if box[2] - box[0] != box[3] - box[1] or box[2] <= box[0]:
            raise ValueError(f"expected a square box (left, top, right, bottom), got {box}")
        if not 1 <= quality <= 100:
            raise ValueError(f"expected a quality from 1 to 100, got {quality}")
        known = {field.name for field in fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        return cls(**{**kept, "box": tuple(box)})


def draw_crop(
    path: str, number: int, shape: Sequence[int], side: int, qualities: tuple[int, int], seed: int
) -> tuple[Box, int]:
    """The box and the quality of a crop: they follow from the seed, the picture's name and size, and the crop's number.

    Args:
        path: As `CaptionedCrop.path`.
        number: Which crop of the picture.
        shape: Rows and columns of the picture.
        side: Of the square, pixels. Where the picture is smaller, it lies in the middle of the box.
        qualities: Lowest and highest, both included; uniform.
        seed: Of the whole caption file.
    """
    name = np.frombuffer(hashlib.sha256(path.encode(errors="surrogateescape")).digest()[:16], dtype="<u4")
    rng = np.random.default_rng([seed, number, *(int(word) for word in name)])
    quality = int(rng.integers(qualities[0], qualities[1], endpoint=True))
    top, left = (_draw_start(rng, length, side) for length in shape[:2])
    return (left, top, left + side, top + side), quality


def _draw_start(rng: np.random.Generator, length: int, side: int) -> int:
    start = int(rng.integers(max(0, length - side), endpoint=True))
    return start if length >= side else -((side - length) // 2)


def cut_crop(picture: np.ndarray, box: Box) -> np.ndarray:
    """The pixels (bottom - top, right - left, 3) of a box of a picture (H, W, 3), mirrored where it reaches beyond."""
    left, top, right, bottom = box
    height, width = picture.shape[:2]
    if min(left, top) >= 0 and bottom <= height and right <= width:
        return np.ascontiguousarray(picture[top:bottom, left:right])
    return picture[_mirrored(top, bottom, height)][:, _mirrored(left, right, width)]


def _mirrored(start: int, stop: int, length: int) -> np.ndarray:
    """The indices start ... stop - 1 of a sequence that is reflected at its ends, its last elements twice."""
    index = np.arange(start, stop) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def whole_lines(file: Path) -> list[str]:
    """The lines of a file that is written line by line; a last one without an end, which a kill leaves, is dropped."""
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    return [line for line in lines[:-1] if line.strip()]


def read_captions(file: Path) -> list[CaptionedCrop]:
    """All captions of a file that `python -m training prepare captions` wrote, in its order.

    Raises:
        CaptionError: A line is broken; it is named.
    """
    if not file.is_file():
        raise CaptionError(f"there is no file {file}: write it with `python -m training prepare captions`.")
    crops: list[CaptionedCrop] = []
    for number, line in enumerate(whole_lines(file), 1):
        try:
            crops.append(CaptionedCrop.from_line(line))
        except ValueError as error:
            raise CaptionError(
                f"{file}, line {number}: not a line of captions ({error}). Remove this line, and repeat "
                "`python -m training prepare captions` to write it anew."
            ) from error
    return crops


def read_texts(paths: Iterable[Path]) -> dict[Path, str]:
    """The caption of each picture that has one in a `.txt` beside it, of the same name; empty ones are left out.

    Raises:
        CaptionError: A file is not UTF-8.
    """
    texts: dict[Path, str] = {}
    for path in paths:
        data = read_beside(path, ".txt")
        if data is None:
            continue
        try:
            text = one_line(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise CaptionError(f"{path.with_suffix('.txt')}: expected UTF-8 text. Save it as UTF-8.") from error
        if text:
            texts[path] = text
    return texts


def one_line(text: str) -> str:
    """The text with every run of spaces and line ends as one space."""
    return " ".join(text.split())
