"""The before/after grid of a validation: rows of pictures under titles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

_LINE = 16
"""Height of the titles, pixels."""


def make_grid(rows: Sequence[Sequence[Tensor]], titles: Sequence[str]) -> Tensor:
    """Rows of pictures side by side, narrower rows filled with black on the right, under a line of titles.

    Args:
        rows: Pictures (3, H, W) in [0, 1], of equal size within a row.
        titles: One for each picture of a row; cut off where the pictures are narrower.

    Returns:
        (3, H, W) in [0, 1], on the CPU.
    """
    joined = [torch.cat(list(row), dim=-1).float().cpu() for row in rows]
    widest = max(row.shape[-1] for row in joined)
    width = rows[0][0].shape[-1]
    return torch.cat([_titles(titles, width, widest), *(F.pad(row, (0, widest - row.shape[-1])) for row in joined)], -2)


def _titles(titles: Sequence[str], width: int, whole: int) -> Tensor:
    """A line (3, 16, whole) of white words on black, one each `width` pixels."""
    line = Image.new("RGB", (whole, _LINE))
    for number, title in enumerate(titles):
        place = Image.new("RGB", (width, _LINE))
        ImageDraw.Draw(place).text((3, 2), title, fill="white")
        line.paste(place, (number * width, 0))
    return torch.from_numpy(np.array(line)).permute(2, 0, 1).float() / 255
