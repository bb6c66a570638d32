"""A sheet of training pairs to look at, and the recipe of each in a file beside it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from training.command_line.files import to_plain
from training.data.pairs import PairDataset
from training.degradation import DegradedCrop
from training.files import replace_file, replace_text

_GAP, _LINE = 6, 14
_WIDEST = 2000
_LEAST = 192
"""Side in pixels that small crops are enlarged to, about, so that artefacts can be seen."""
_LETTER = 6
"""Width of a letter in Pillow's own font, pixels, about."""


def write_sheet(dataset: PairDataset, count: int, folder: Path) -> Path:
    """Write the first pairs of a run, clean on the left and degraded on the right; small ones several times as large.

    Args:
        dataset: Of the run.
        count: Pairs.
        folder: Gets `pairs.png`, and `pairs.json` with the settings of all pairs, and of each the picture, the index,
            the side of its crop, its own side, and all draws: what `training.data.crops.draw_pair`, and where a view
            was drawn `training.data.views.see`, make it again of.

    Returns:
        The path of the sheet.

    Raises:
        RuntimeError: No picture can be decoded.
        OSError: The folder cannot be written to.
    """
    cells: list[tuple[DegradedCrop, list[str]]] = []
    recipes: list[dict[str, Any]] = []
    for index in range(count):
        path, pair = dataset.pair(index)
        cells.append((pair, [_caption(index, pair.description), path.name]))
        sides = {"crop": dataset.settings_of(index).crop, "side": len(pair.clean)}
        recipes.append({"index": index, "path": str(path), **sides, "drawn": pair.description})
    folder.mkdir(parents=True, exist_ok=True)
    sheet = folder / "pairs.png"
    picture = Image.fromarray(_grid(_drawn(cells)))
    replace_file(sheet, lambda file: picture.save(file, "PNG"))
    recipe = {"seed": dataset.seed, "settings": to_plain(dataset.settings), "pairs": recipes}
    replace_text(folder / "pairs.json", json.dumps(recipe, indent=1))
    return sheet


def _drawn(cells: list[tuple[DegradedCrop, list[str]]]) -> list[np.ndarray]:
    """Pairs with what is said of them below, all of one size."""
    times = -(-_LEAST // cells[0][0].clean.shape[1])
    letters = (2 * times * cells[0][0].clean.shape[1] + _GAP) // _LETTER
    wrapped = [[part for line in lines for part in textwrap.wrap(line, letters)] for _, lines in cells]
    most = max(map(len, wrapped))
    return [
        _cell(_enlarged(pair.clean, times), _enlarged(pair.image, times), lines, most)
        for (pair, _), lines in zip(cells, wrapped, strict=True)
    ]


def _enlarged(picture: np.ndarray, times: int) -> np.ndarray:
    return picture.repeat(times, 0).repeat(times, 1)


def _cell(clean: np.ndarray, degraded: np.ndarray, lines: list[str], room: int) -> np.ndarray:
    """A pair with its lines below, and room for so many."""
    gap = np.full((clean.shape[0], _GAP, 3), 255, np.uint8)
    pair = np.concatenate([clean, gap, degraded], axis=1)
    label = Image.new("RGB", (pair.shape[1], _LINE * room + _GAP), "white")
    drawing = ImageDraw.Draw(label)
    for number, line in enumerate(lines):
        drawing.text((2, 2 + _LINE * number), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return np.concatenate([pair, np.asarray(label)])


def _grid(cells: list[np.ndarray]) -> np.ndarray:
    """Cells of equal size in rows, from left to right."""
    height, width = cells[0].shape[:2]
    columns = min(len(cells), max(1, _WIDEST // (width + _GAP)))
    rows = -(-len(cells) // columns)
    sheet = np.full((rows * (height + _GAP), columns * (width + _GAP), 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = cell
    return sheet


def _caption(index: int, drawn: dict[str, Any]) -> str:
    view = drawn.get("view")
    if view and view["uncompressed"]:
        return f"{index}: no JPEG; {view['kind']}"
    parts = [f"{index}: QF {drawn['quality']} {'gray' if drawn['grayscale'] else drawn['subsampling']}"]
    if drawn["decoder"] != "pillow":
        parts.append(drawn["decoder"])
    if first := drawn["first"]:
        resized = f" x{first['scale']:.2f} {first['filter']}" if first["filter"] else ""
        place = ",".join(map(str, first["offset"]))
        parts.append(f"before: {first['codec']} {first['quality']} at {place}{resized}")
    if any(drawn["cut"]):
        parts.append(f"cut at {drawn['cut'][0]},{drawn['cut'][1]}")
    return "; ".join([*parts, *([view["kind"]] if view else [])])
