"""Comparison pictures: side by side with a zoomed detail, and split thumbnails for workflows. Pillow only."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LARGEST_PANEL = 900
_ZOOM_PANEL = 480
_BAR = 40
_GAP = 8
_MARK = (255, 200, 0)
_PAPER = (24, 24, 24)


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Both pictures side by side, labelled, above the detail that changed most, enlarged."""
    box = most_changed(before, after)
    scale = min(1.0, _LARGEST_PANEL / max(before.size))
    panels = [_marked(picture, box, scale) for picture in (before, after)]
    width = max(panels[0].width, _ZOOM_PANEL)
    details = [
        picture.crop(box).resize(_detail_size(box, width), Image.Resampling.NEAREST) for picture in (before, after)
    ]
    height = _BAR + panels[0].height + _BAR + details[0].height
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, height + 3 * _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    enlarged = details[0].width / (box[2] - box[0])
    for index, title in enumerate(("Before: JPEG", "After: restored")):
        left, below = _GAP + index * (width + _GAP), _BAR + panels[0].height + _GAP
        draw.text((left + 4, _BAR // 2), title, "white", font, anchor="lm")
        sheet.paste(panels[index], (left, _BAR))
        draw.text((left + 4, below + _BAR // 2), f"{title}, {enlarged:.3g} x", _MARK, font, anchor="lm")
        sheet.paste(details[index], (left, below + _BAR))
    return sheet


def split_thumbnail(before: Image.Image, after: Image.Image, side: int = 512) -> Image.Image:
    """A square picture whose left half is the one before and whose right half is the one after."""
    small = [_square(picture, side) for picture in (before, after)]
    small[1].paste(small[0].crop((0, 0, side // 2, side)), (0, 0))
    draw, font = ImageDraw.Draw(small[1]), ImageFont.load_default(side // 18)
    draw.line((side // 2, 0, side // 2, side), "white", 3)
    for text, anchor, x in (("JPEG", "ls", 12), ("restored", "rs", side - 12)):
        draw.text((x, side - 14), text, "white", font, anchor=anchor, stroke_width=3, stroke_fill="black")
    return small[1]


def most_changed(before: Image.Image, after: Image.Image, side: int = 96) -> tuple[int, int, int, int]:
    """The square (left, top, right, bottom) with the largest mean absolute difference; smaller for small pictures."""
    difference = np.abs(
        np.asarray(before.convert("RGB"), np.float64) - np.asarray(after.convert("RGB"), np.float64)
    ).sum(2)
    height, width = difference.shape
    side = min(side, height, width)
    total = np.pad(difference.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = (int(index) for index in np.unravel_index(sums.argmax(), sums.shape))
    return left, top, left + side, top + side


def _marked(picture: Image.Image, box: tuple[int, int, int, int], scale: float) -> Image.Image:
    size = [max(1, round(length * scale)) for length in picture.size]
    panel = picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
    ImageDraw.Draw(panel).rectangle([round(edge * scale) for edge in box], outline=_MARK, width=2)
    return panel


def _detail_size(box: tuple[int, int, int, int], width: int) -> tuple[int, int]:
    side = max(1, min(width, _ZOOM_PANEL) // (box[2] - box[0])) * (box[2] - box[0])
    return side, side


def _square(picture: Image.Image, side: int) -> Image.Image:
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return (
        picture.convert("RGB").crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    )
