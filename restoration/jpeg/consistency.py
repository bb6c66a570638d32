"""What a JPEG says for certain: every DCT coefficient lies in its quantisation cell, [(q - 1/2) Q, (q + 1/2) Q]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strips import is_finite, round_to_8bit_, strips_of
from .cells import FLOAT_TOLERANCE, QuantizationCells
from .closed_loop import MAX_ROUNDS, Check, agreeing_levels, wrong_coefficients
from .file import JPEGData
from .stored import StoredPicture


@dataclass(frozen=True)
class ConsistencyResult:
    """Images, the fraction 0..1 of the coefficients of their files that agree, and the rounds of the slowest image."""

    images: Tensor
    fraction: float
    rounds: int


def make_consistent(
    images: Tensor,
    jpegs: Sequence[JPEGData],
    *,
    strength: float = 1.0,
    closed_loop: bool = True,
    max_rounds: int = MAX_ROUNDS,
    check: Check = lambda done: None,
) -> ConsistencyResult:
    """Images among those that the files could have come from, near the given ones.

    With `closed_loop` the images are whole 8-bit levels, and the fraction that of coefficients which libjpeg-turbo
    writes just as the file has them, given the file's tables and sampling. Without, the images are continuous, and the
    fraction that of coefficients which lie inside of their cells, or outside by at most 0.01 levels (clipping to
    [0, 1] moves some). Of images larger than the file these are their box means, rounded to whole levels.

    Args:
        images: (B, 3, H, W) in [0, 1], upright, of the file's size or larger by a whole factor.
        jpegs: One for each image, or one for all.
        strength: 0..1: how far to go from the images, linearly; at 0 they are returned as they are, not rounded. The
            fraction is that of what is returned, rounded with `closed_loop`.
        closed_loop: 8-bit images that agree after rounding.
        max_rounds: Of the closed loop, for each piece of the picture.
        check: Called after each round with the part that is done; may raise to interrupt.

    Returns:
        Images of the same shape and device, float32, the fraction, and the number of rounds.

    Raises:
        ValueError: The sizes or the number of files do not fit, a value is outside of its range, or an image holds
            something that is NaN or infinite.
    """
    _check(images, jpegs, strength, max_rounds)
    results = torch.empty_like(images, dtype=torch.float32)
    agreed, rounds = 0.0, 0
    cells = None
    for index, image in enumerate(images.split(1)):
        if cells is None or len(jpegs) > 1:
            cells = QuantizationCells(jpegs[index], images.device)

        def on_round(done: float, index: int = index) -> None:
            check((index + done) / len(images))

        one = _into(results[index : index + 1], cells, image, strength, closed_loop, max_rounds, on_round)
        agreed, rounds = agreed + one[0] / len(images), max(rounds, one[1])
        on_round(1.0)
    return ConsistencyResult(results, agreed, rounds)


class JPEGConstraint:
    """One file as a constraint of a sampler: `project` inside of its loop, `finish` on its result.

    Args:
        jpeg: The file.
        strength: 0..1: how far estimates are moved.
        closed_loop: Whether the result agrees after rounding, too.
        check: Called while the result is finished, with the part that is done; may raise to interrupt.
    """

    def __init__(
        self, jpeg: JPEGData, strength: float = 1.0, closed_loop: bool = True, check: Check = lambda done: None
    ) -> None:
        self.jpeg, self.strength, self.closed_loop, self.check = jpeg, strength, closed_loop, check
        self._cells: QuantizationCells | None = None

    def project(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), upright, moved into the cells; continuous, of the same type, clipped to [0, 1]."""
        if self._cells is None or self._cells.device != images.device:
            self._cells = QuantizationCells(self.jpeg, images.device)
        return self._cells.project(images, strength=self.strength)

    def finish(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32 in whole 8-bit levels, held to the file as `make_consistent` does.

        What `project` keeps for the sampler is let go: the constraints of a film's frames live on together.
        """
        self._cells = None
        result = make_consistent(
            images, [self.jpeg], strength=self.strength, closed_loop=self.closed_loop, check=self.check
        )
        return round_to_8bit_(result.images)


def _into(
    result: Tensor, cells: QuantizationCells, image: Tensor, strength: float, closed_loop: bool, max_rounds: int,
    check: Check,
) -> tuple[float, int]:  # fmt: skip
    """Hold an image to its file, put it into `result`, and say which fraction agrees, after how many rounds."""
    image = image.to(cells.device)
    if not closed_loop:
        projected = cells.project(image.float(), strength=strength)
        result.copy_(projected)
        return cells.agreement(projected, tolerance=FLOAT_TOLERANCE), 0
    stored, scale = cells.stored(image)
    if strength == 0:
        result.copy_(image)
        return (_agreeing(cells, stored) if scale == 1 else _agreeing_means(cells, stored, scale)), 0
    if scale > 1:
        return _closed_enlarged(result, cells, stored, scale, strength, max_rounds, check)
    return _closed(result, cells, stored, strength, max_rounds, check)


def _closed(
    result: Tensor, cells: QuantizationCells, stored: StoredPicture, strength: float, max_rounds: int, check: Check
) -> tuple[float, int]:
    mended = StoredPicture(result, cells.jpeg.orientation)

    def write(levels: Tensor, rows: slice, columns: slice) -> None:
        if strength < 1:
            levels = torch.lerp(_levels(stored, rows, columns), levels, strength).round_().clamp_(0, 255)
        mended.write(levels / 255, rows, columns)

    rounds = agreeing_levels(cells, lambda *window: _levels(stored, *window), write, max_rounds, check)
    return _agreeing(cells, mended), rounds


def _closed_enlarged(
    result: Tensor, cells: QuantizationCells, stored: StoredPicture, scale: int, strength: float, max_rounds: int,
    check: Check,
) -> tuple[float, int]:  # fmt: skip
    given = _levels(stored, slice(0, scale * cells.jpeg.height))
    means = F.avg_pool2d(given, scale)
    found = torch.empty_like(means)

    def write(levels: Tensor, rows: slice, columns: slice) -> None:
        found[..., rows, columns] = levels

    rounds = agreeing_levels(cells, lambda *window: means[..., window[0], window[1]], write, max_rounds, check)
    levels = _enlarged(given, found, scale)
    if strength < 1:
        levels = torch.lerp(given, levels, strength).round_().clamp_(0, 255)
    mended = StoredPicture(result, cells.jpeg.orientation)
    mended.write(levels / 255, slice(0, levels.shape[-2]))
    return _agreeing_means(cells, mended, scale), rounds


def _agreeing(cells: QuantizationCells, picture: StoredPicture) -> float:
    wrong, total = wrong_coefficients(cells, lambda *window: _levels(picture, *window))
    return 1 - wrong / total


def _agreeing_means(cells: QuantizationCells, picture: StoredPicture, scale: int) -> float:
    """Of a larger picture the box means of its whole levels count, rounded."""

    def means(rows: slice, columns: slice) -> Tensor:
        window = (slice(span.start * scale, span.stop * scale) for span in (rows, columns))
        return F.avg_pool2d(_levels(picture, *window).round_().clamp_(0, 255), scale)

    wrong, total = wrong_coefficients(cells, means)
    return 1 - wrong / total


def _levels(picture: StoredPicture, rows: slice, columns: slice | None = None) -> Tensor:
    return picture.read(rows, columns).float() * 255


def _enlarged(given: Tensor, means: Tensor, scale: int) -> Tensor:
    """Whole levels near the given ones whose box means round to those, which are whole levels."""
    levels = given.round().clamp_(0, 255)
    for _ in range(scale**2):  # pixels at the end of the range stay; the others share what is left
        left = _over_boxes(means - F.avg_pool2d(levels, scale), scale)
        free = torch.where(left > 0, levels < 255, levels > 0) & (left != 0)
        share = F.avg_pool2d(free.float(), scale)
        if not bool(free.any()):
            break
        levels = torch.where(free, levels + left / _over_boxes(share, scale), levels).clamp_(0, 255)
    return _rounded_boxes(levels, means, scale)


def _rounded_boxes(levels: Tensor, means: Tensor, scale: int) -> Tensor:
    """Levels rounded so that the mean of each box is the given one: those that lose most by it are rounded up."""
    boxes = F.pixel_unshuffle(levels, scale).unflatten(1, (levels.shape[1], -1))
    down = boxes.floor()
    order = (down - boxes).argsort(2).argsort(2)
    more = (means * scale**2).round().unsqueeze(2) - down.sum(2, keepdim=True)
    return F.pixel_shuffle((down + (order < more)).clamp_(0, 255).flatten(1, 2), scale)


def _over_boxes(means: Tensor, scale: int) -> Tensor:
    return means.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def _check(images: Tensor, jpegs: Sequence[JPEGData], strength: float, max_rounds: int) -> None:
    if len(jpegs) not in (1, len(images)):
        raise ValueError(
            f"expected one JPEG for each of the {len(images)} images, or one for all, got {len(jpegs)}. Connect the "
            "JPEG_DATA that belongs to these images."
        )
    if not 0 <= strength <= 1 or max_rounds < 1:
        raise ValueError(f"expected a strength of 0 to 1 and at least 1 round, got {strength} and {max_rounds}.")
    for number, image in enumerate(images, 1):
        if not is_finite(image):
            missing = sum(int(strip.isfinite().logical_not_().sum()) for strip in strips_of(image))
            raise ValueError(
                f"image {number} holds something that is no number (NaN or infinite) in {missing} of its values, so it "
                f"can not be held to {jpegs[(number - 1) % len(jpegs)].name}. Look at the node that made it: a network "
                "in half precision often does this; run it in float32."
            )
