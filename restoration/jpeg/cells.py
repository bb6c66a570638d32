"""The quantisation cells of a JPEG file, [(q - 1/2) Q, (q + 1/2) Q], and how images are moved into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..truncated_normal import mean_inside
from .codec import decode
from .file import JPEGData, apply_orientation
from .layout import Layout
from .stored import StoredPicture

FLOAT_TOLERANCE = 0.01
"""How far outside of its cell a coefficient of a float image still counts as inside, in 8-bit levels."""

_PIXELS_AT_ONCE = 1_000_000

Move = Callable[[Tensor, Tensor], Tensor]
"""From the offsets of coefficients from their cells' centres, and the steps of the tables, to wanted changes."""


class QuantizationCells:
    """The cells of one JPEG file, prepared once on a device.

    Each component is sampled down as the file's encoder does; changes of its samples are repeated over the pixels that
    they span, which keeps the box means exact. Blocks that the picture fills in part only come nearer to their cells.
    In the file's own components, coefficient by coefficient, `project` never leads away from any picture that the file
    allows. RGB mixes the components, and errors of luma and chroma can cancel there: PSNR of RGB rises on average, and
    can fall.

    Images are (B, 3, H, W) in [0, 1] on that device, upright (the file's EXIF orientation has been applied), of the
    file's size or larger by a whole factor, the same in both directions: then their box means are held to the file.
    Every method raises ValueError for another shape or size.
    """

    def __init__(self, jpeg: JPEGData, device: torch.device | str = "cpu") -> None:
        self.jpeg = jpeg
        self.device = torch.device(device)
        self.layout = Layout(jpeg.coefficients.sampling, jpeg.color_space)
        self.planes = [planes.to(self.device) for planes in self.layout.planes(jpeg.coefficients)]
        self.steps = [steps.to(self.device) for steps in self.layout.steps(jpeg.coefficients)]

    def project(self, images: Tensor, *, strength: float = 1.0) -> Tensor:
        """Clamp every coefficient into its cell, without rounding to levels, and clip to [0, 1].

        The clip can move some coefficients out of their cells again by a little, and so can blocks that the picture
        fills in part only. `strength` in [0, 1] blends linearly from the images to their projection. Returns images of
        the same shape, type and device.
        """
        return self._moved(images, into_cell, strength, clip=True)

    def shift(self, images: Tensor) -> Tensor:
        """Move every coefficient by whole cells to its own: x - Dec(Enc(x)) + Dec(y) of DDRM-JPEG, eq. 13.

        Where in its cell a coefficient lies does not change, and nothing is clipped. Returns images of the same shape,
        type and device.
        """
        return self._moved(images, to_cell, 1.0, clip=False)

    def expect(self, images: Tensor, spread: float) -> Tensor:
        """Replace every coefficient by its mean inside its cell, if it is off by `spread`, and clip to [0, 1].

        `spread` is the standard deviation of a normal error of the coefficients, in units of the images: 0 projects, a
        large one decodes the file. Returns images of the same shape, type and device.
        """

        def to_mean(offset: Tensor, steps: Tensor) -> Tensor:
            return mean_inside(offset, steps / 2, 255 * spread).sub_(offset)

        return self._moved(images, to_mean, 1.0, clip=True)

    def decoded(self) -> Tensor:
        """The file's continuous decode, (1, 3, H, W) float32, upright, clipped to [0, 1], on the device."""
        whole = decode(self.jpeg.coefficients.to(self.device), round_to_8bit=False)
        return apply_orientation(whole, self.jpeg.orientation)

    def agreement(self, images: Tensor, *, tolerance: float = FLOAT_TOLERANCE) -> float:
        """The fraction of coefficients of the file in whose cells those of the images lie, in 0..1.

        `tolerance` widens the cells, in 8-bit levels (the unit of an orthonormal DCT of levels 0..255). Nothing is
        rounded to whole levels; `make_consistent` says how many coefficients a file of 8-bit pixels keeps.
        """
        stored, scale = self.stored(images)
        inside = total = 0
        for rows in self.strips(len(images), scale):
            for offset, steps in zip(self._offsets(stored, rows, scale), self.steps, strict=True):
                found = offset.abs_() <= steps / 2 + tolerance
                inside, total = inside + int(found.sum()), total + found.numel()
        return inside / total

    def stored(self, images: Tensor) -> tuple[StoredPicture, int]:
        """Images, to be seen as the file stores them, and by which factor they are larger than the file."""
        jpeg = self.jpeg
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(f"expected float images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        scale = height // jpeg.upright_height
        if scale < 1 or (height, width) != (scale * jpeg.upright_height, scale * jpeg.upright_width):
            raise ValueError(wrong_size(jpeg, height, width, enlarged=True))
        return StoredPicture(images, jpeg.orientation), scale

    def strips(self, batch: int = 1, scale: int = 1) -> Iterator[slice]:
        """Rows of the file's pixels, whole blocks of every component at a time, to bound the memory."""
        span = self.layout.unit[0]
        pixels = batch * self.jpeg.width * scale**2
        rows = max(1, _PIXELS_AT_ONCE // (pixels * span)) * span
        for top in range(0, self.jpeg.height, rows):
            yield slice(top, min(top + rows, self.jpeg.height))

    def planes_of(self, rows: slice) -> list[Tensor]:
        """The file's coefficients of some rows of pixels, a slice that begins at a boundary of blocks."""
        spans = [8 * group.ratio[1] for group in self.layout.groups]
        return [
            planes[:, :, rows.start // span : -(-rows.stop // span)]
            for planes, span in zip(self.planes, spans, strict=True)
        ]

    def _offsets(self, stored: StoredPicture, rows: slice, scale: int) -> list[Tensor]:
        """How far from their cells' centres the coefficients of some rows of the file's pixels lie."""
        part = stored.read(slice(rows.start * scale, rows.stop * scale)).float()
        levels = (part if scale == 1 else F.avg_pool2d(part, scale)) * 255
        found = self.layout.coefficients(levels)
        return [c - q * step for c, q, step in zip(found, self.planes_of(rows), self.steps, strict=True)]

    def _moved(self, images: Tensor, move: Move, strength: float, clip: bool) -> Tensor:
        stored, scale = self.stored(images)
        result = StoredPicture(torch.empty_like(images), self.jpeg.orientation)
        for rows in self.strips(len(images), scale):
            offsets = self._offsets(stored, rows, scale)
            changes = [move(offset, steps) for offset, steps in zip(offsets, self.steps, strict=True)]
            height, cautious = rows.stop - rows.start, move is not to_cell
            change = self.layout.spread(changes, height, self.jpeg.width, cautious=cautious).div_(255)
            part = slice(rows.start * scale, rows.stop * scale)
            result.write(_added(stored.read(part), change, scale, strength, clip), part)
        return result.upright


def into_cell(offset: Tensor, steps: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """The smallest change that brings coefficients into their cells, and `margin` levels away from the border."""
    half = steps / 2 - margin
    return torch.clamp(offset, -half, half).sub_(offset)


def to_cell(offset: Tensor, steps: Tensor) -> Tensor:
    """The change by whole steps that brings coefficients into their cells; a `Move`."""
    return (offset / steps).round_().mul_(-steps)


def _added(images: Tensor, change: Tensor, scale: int, strength: float, clip: bool) -> Tensor:
    if scale > 1:
        change = change.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    moved = change.add_(images)
    if clip:
        moved.clamp_(0, 1)
    return (moved if strength == 1 else torch.lerp(images.float(), moved, strength)).to(images.dtype)


def wrong_size(jpeg: JPEGData, height: int, width: int, *, enlarged: bool) -> str:
    """What to say of images of another size than the file's; `enlarged` tells that whole factors are accepted."""
    expected = f"{jpeg.upright_width}x{jpeg.upright_height}"
    sentence = f"expected images of the JPEG's size, {expected}, got {width}x{height}. "
    if (width, height) == (jpeg.upright_height, jpeg.upright_width):
        once = f"apply the EXIF orientation of {jpeg.name} ({jpeg.orientation}) once" if jpeg.orientation > 1 else ""
        return sentence + f"The picture looks turned: {once or 'turn it back'}."
    remedy = ", or enlarged by a whole factor, the same in both directions" if enlarged else ""
    return sentence + f"Connect the picture that belongs to {jpeg.name}, not resized{remedy}."
