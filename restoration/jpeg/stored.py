"""Upright pictures read and written as their files store them, a window at a time: nothing is turned as a whole."""

from __future__ import annotations

from torch import Tensor

from .file import FLIPPED, apply_orientation, undo_orientation


class StoredPicture:
    """A picture, seen as its file stores it.

    Args:
        upright: (B, C, H, W); written in place.
        orientation: EXIF orientation of the file, 1 to 8.
    """

    def __init__(self, upright: Tensor, orientation: int) -> None:
        self.upright, self.orientation = upright, orientation

    @property
    def width(self) -> int:
        """As stored."""
        return self.upright.shape[-2 if self.orientation >= 5 else -1]

    def read(self, rows: slice, columns: slice | None = None) -> Tensor:
        """A window (B, C, h, w); it may be a view. Without columns, whole rows."""
        return undo_orientation(self._window(rows, columns), self.orientation)

    def write(self, part: Tensor, rows: slice, columns: slice | None = None) -> None:
        """Put (B, C, h, w) in the place of a window."""
        self._window(rows, columns).copy_(apply_orientation(part, self.orientation))

    def _window(self, rows: slice, columns: slice | None) -> Tensor:
        spans = (rows, slice(0, self.width) if columns is None else columns)
        if self.orientation >= 5:
            spans = spans[::-1]
        flipped = FLIPPED.get(self.orientation, ())
        down, across = (
            slice(length - span.stop, length - span.start) if dim in flipped else span
            for dim, span, length in zip((-2, -1), spans, self.upright.shape[-2:], strict=True)
        )
        return self.upright[..., down, across]
