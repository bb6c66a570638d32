"""8-bit images that a JPEG encoder, given the file's own tables and sampling, turns into the file's own coefficients.

The picture falls into pieces that no coefficient reaches across. Those that do not agree after rounding are clamped
into their cells, with a margin, rounded and really encoded again; what the rounding did is taken into account in the
next round, and the margin grows where a coefficient still left its cell. Where pixels are black or white a clamp leads
out of their range, and cells and range are projected onto in turn (von Neumann 1950), with over-relaxation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .cells import QuantizationCells, into_cell
from .layout import Layout

MAX_ROUNDS = 12

_PIXELS_AT_ONCE = 1_000_000
_CLAMPS, _RELAXATION, _NEAR = 40, 1.9, 0.02  # the range of pixels makes one inexact, and blocks filled in part
_FIRST_MARGIN, _LARGEST_MARGIN = 1.0, 0.35  # in levels, as is the noise of rounding (0.35); in steps of the table
_FEW_WRONG, _PIXELS_MENDED, _CANDIDATES = 400, 48, 64  # the last wrong coefficients are mended pixel by pixel
_LEVELS_MENDED = (1, 4, 12)
_SAFETY = 0.1  # in levels: libjpeg's integers differ from the exact transform by less

Check = Callable[[float], None]
"""Called after each round with the part that is done, 0..1; may raise to interrupt."""


Read = Callable[[slice, slice], Tensor]
"""The levels (1, 3, h, w) in a window, rows and columns, of a picture."""

Write = Callable[[Tensor, slice, slice], None]
"""Takes the levels (1, 3, h, w) of a window."""


@dataclass
class _Pieces:
    """Pieces (N, 3, h, w) in levels, their rounded form, coefficients to reach, margins, and places among all."""

    levels: Tensor
    rounded: Tensor
    planes: list[Tensor]
    margins: list[Tensor]
    places: Tensor

    def keep(self, chosen: Tensor) -> None:
        self.levels, self.rounded, self.places = self.levels[chosen], self.rounded[chosen], self.places[chosen]
        self.planes = [planes[chosen] for planes in self.planes]
        self.margins = [margins[chosen] for margins in self.margins]


def agreeing_levels(
    cells: QuantizationCells, read: Read, write: Write, max_rounds: int = MAX_ROUNDS,
    check: Check = lambda done: None,
) -> int:  # fmt: skip
    """Find whole levels near those given that agree with the file as far as `max_rounds` rounds get.

    Args:
        cells: Of the file.
        read: Gives levels 0..255 on the device of the cells, as stored and of the size of the file.
        write: Takes the levels found, each window once.
        max_rounds: At most; of each piece the round with the fewest wrong coefficients is kept.
        check: Called after each round.

    Returns:
        The number of rounds that were needed: 0 where rounding alone agrees.
    """
    parts = list(_parts(cells))
    rounds = 0
    for index, (rows, columns, size) in enumerate(parts):

        def on_round(done: float, index: int = index) -> None:
            check((index + done) / len(parts))

        levels = read(rows, columns)
        planes = _planes_of(cells, rows, columns, size)
        found, taken = _search(cells.layout, cells.steps, _cut(levels, *size), planes, max_rounds, on_round)
        rounds = max(rounds, taken)
        write(_joined(found, levels.shape), rows, columns)
        on_round(1.0)
    return rounds


def wrong_coefficients(cells: QuantizationCells, read: Read) -> tuple[int, int]:
    """The coefficients that libjpeg-turbo writes of levels, rounded, unlike the file, and all of them."""
    wrong = total = 0
    columns = slice(0, cells.jpeg.width)
    for rows in cells.strips():
        found = cells.layout.encode(read(rows, columns).round().clamp_(0, 255), cells.steps)
        for ours, theirs in zip(found, cells.planes_of(rows), strict=True):
            wrong, total = wrong + int((ours != theirs).sum()), total + theirs.numel()
    return wrong, total


def _search(
    layout: Layout, steps: list[Tensor], levels: Tensor, planes: list[Tensor], max_rounds: int, check: Check
) -> tuple[Tensor, int]:
    best = levels.round().clamp_(0, 255)
    fewest = _count(_wrong(layout, steps, best, planes))
    margins = [
        torch.clamp(step * _LARGEST_MARGIN, max=_FIRST_MARGIN).expand_as(q)
        for step, q in zip(steps, planes, strict=True)
    ]
    active = _Pieces(levels, best, planes, margins, torch.arange(len(levels), device=levels.device))
    active.keep(fewest > 0)
    for number in range(max_rounds):
        if not len(active.places):
            return best, number
        wrong = _round(layout, steps, active, cautious=number < max_rounds // 4)
        counts = _count(wrong)
        better = counts < fewest[active.places]
        best[active.places[better]] = active.rounded[better]
        fewest[active.places[better]] = counts[better]
        active.margins = [_grown(*each) for each in zip(active.margins, wrong, steps, strict=True)]
        active.keep(counts > 0)
        check((number + 1) / max_rounds)
    if fewest.sum() <= _FEW_WRONG:
        for place in active.places.tolist():
            one = slice(place, place + 1)
            own = [q[one] for q in planes]
            mended = _mended(layout, steps, best[one], own)
            if int(_count(_wrong(layout, steps, mended, own))) < int(fewest[place]):
                best[one] = mended
            check(1.0)
    return best, max_rounds


def _round(layout: Layout, steps: list[Tensor], pieces: _Pieces, cautious: bool) -> list[Tensor]:
    """Move pieces into their cells less the margins, round them, and say which coefficients are wrong now."""
    rounded, exact = layout.coefficients(pieces.rounded, rounded=True), layout.coefficients(pieces.levels)
    errors = [r.sub_(c) for r, c in zip(rounded, exact, strict=True)]  # of rounding: they are taken into account
    moving = torch.arange(len(pieces.levels), device=pieces.levels.device)
    for number in range(_CLAMPS):
        found = exact if not number else layout.coefficients(pieces.levels[moving])
        changes = []
        for c, error, q, step, margin in zip(found, errors, pieces.planes, steps, pieces.margins, strict=True):
            offset = c.add_(error[moving]).sub_(q[moving] * step)
            changes.append(into_cell(offset, step, margin[moving]))
        moving = _move(layout, pieces, moving, changes, cautious, 1.0 if number < 2 else _RELAXATION)
        if not len(moving):
            break
    pieces.rounded = pieces.levels.round()
    return _wrong(layout, steps, pieces.rounded, pieces.planes)


def _move(
    layout: Layout, pieces: _Pieces, moving: Tensor, changes: list[Tensor], cautious: bool, relaxation: float
) -> Tensor:
    """Change some pieces, within 0..255, and say which of them are not where the changes lead."""
    height, width = pieces.levels.shape[-2:]
    filled = (height, width) == layout.unit
    change = layout.spread(changes, height, width, cautious=cautious)
    aim = pieces.levels[moving].add_(change, alpha=relaxation if filled else 1.0)
    pieces.levels[moving] = reached = aim.clamp(0, 255)
    distance = (aim - reached if filled else change).abs_().flatten(1).amax(1)
    return moving[distance > _NEAR]


def _mended(layout: Layout, steps: list[Tensor], piece: Tensor, planes: list[Tensor]) -> Tensor:
    """Change single pixels by some levels, each time the one that helps most, until all agree or none helps."""
    left = float("inf")
    for _ in range(_PIXELS_MENDED):
        found = layout.coefficients(piece, rounded=True)
        changes = [_excess(c, q, step).neg_() for c, q, step in zip(found, planes, steps, strict=True)]
        wanted = layout.spread(changes, *piece.shape[-2:])
        aim = wanted.sign() + piece
        single = _single_pixels(wanted * (aim == aim.clamp(0, 255)))
        candidates = torch.cat([piece + levels * single for levels in _LEVELS_MENDED]).clamp_(0, 255)
        found = layout.coefficients(candidates, rounded=True)
        excess = [_excess(c, q, step).square_() for c, q, step in zip(found, planes, steps, strict=True)]
        totals = torch.stack([each.flatten(1).sum(1) for each in excess]).sum(0)
        least = int(totals.argmin())
        if float(totals[least]) >= left:
            break
        piece, left = candidates[least : least + 1], float(totals[least])
        if not int(_count(_wrong(layout, steps, piece, planes))):
            break
    return piece


def _excess(found: Tensor, planes: Tensor, steps: Tensor) -> Tensor:
    """How far coefficients lie outside of their cells, or too near to the border to be sure."""
    offset, half = found - planes * steps, steps / 2 - _SAFETY
    return offset - torch.clamp(offset, -half, half)


def _single_pixels(wanted: Tensor) -> Tensor:
    """Changes of a level (N, 3, h, w), of one channel or all three of a pixel, where most is wanted (1, 3, h, w)."""
    gray = wanted.mean(1, keepdim=True).expand_as(wanted)
    chosen = []
    for direction, channels in ((wanted, 1), (gray, 3)):
        flat = (direction if channels == 1 else direction[:, :1]).flatten()
        places = flat.abs().topk(min(_CANDIDATES, len(flat))).indices
        single = torch.zeros(len(places), len(flat), device=wanted.device)
        single[torch.arange(len(places), device=wanted.device), places] = flat[places].sign()
        chosen.append(single.view(len(places), -1, *wanted.shape[-2:]).expand(-1, 3, -1, -1))
    return torch.cat(chosen)


def _wrong(layout: Layout, steps: list[Tensor], levels: Tensor, planes: list[Tensor]) -> list[Tensor]:
    return [ours != theirs for ours, theirs in zip(layout.encode(levels, steps), planes, strict=True)]


def _count(wrong: list[Tensor]) -> Tensor:
    counts = [each.flatten(1).sum(1) for each in wrong]
    return torch.stack(counts).sum(0)


def _grown(margin: Tensor, wrong: Tensor, step: Tensor) -> Tensor:
    larger = torch.minimum(torch.maximum(1.6 * margin, margin + 0.5), step * _LARGEST_MARGIN)
    return torch.where(wrong, larger, margin)


def _parts(cells: QuantizationCells) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Rows, columns, and (height, width) of the equal pieces that they consist of: whole units, then the edges."""
    unit_height, unit_width = cells.layout.unit
    for columns, width in _spans(cells.jpeg.width, unit_width):
        for rows, height in _spans(cells.jpeg.height, unit_height):
            at_once = max(1, _PIXELS_AT_ONCE // ((columns.stop - columns.start) * height)) * height
            for top in range(rows.start, rows.stop, at_once):
                yield slice(top, min(top + at_once, rows.stop)), columns, (height, width)


def _spans(length: int, unit: int) -> Iterator[tuple[slice, int]]:
    whole = length // unit * unit
    if whole:
        yield slice(0, whole), unit
    if length > whole:
        yield slice(whole, length), length - whole


def _cut(picture: Tensor, height: int, width: int) -> Tensor:
    """(1, 3, H, W) -> (N, 3, height, width), row by row of pieces."""
    channels, rows, columns = picture.shape[1], picture.shape[-2] // height, picture.shape[-1] // width
    pieces = picture.reshape(channels, rows, height, columns, width).permute(1, 3, 0, 2, 4)
    return pieces.reshape(rows * columns, channels, height, width)


def _joined(pieces: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_cut`."""
    channels, height, width = pieces.shape[1:]
    grid = pieces.view(shape[-2] // height, shape[-1] // width, channels, height, width)
    return grid.permute(2, 0, 3, 1, 4).reshape(shape)


def _planes_of(cells: QuantizationCells, rows: slice, columns: slice, size: tuple[int, int]) -> list[Tensor]:
    """The file's coefficients of pieces, (N, C, hb, wb, 8, 8)."""
    cut = []
    for group, planes in zip(cells.layout.groups, cells.planes_of(rows), strict=True):
        across, down = 8 * group.ratio[0], 8 * group.ratio[1]
        planes = planes[0, :, :, columns.start // across : -(-columns.stop // across)]
        height, width = -(-size[0] // down), -(-size[1] // across)
        pieces = planes.unflatten(2, (-1, width)).unflatten(1, (-1, height)).permute(1, 3, 0, 2, 4, 5, 6)
        cut.append(pieces.flatten(0, 1))
    return cut
