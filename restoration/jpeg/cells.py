"""The quantisation cells of a JPEG file, [(q - 1/2) Q, (q + 1/2) Q], and how images are moved into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import Coefficients, decode, forward_dct, inverse_dct, rgb_to_ycbcr
from .file import JPEGData, apply_orientation, undo_orientation
from .sampling import box_downsample, component_ratios

FLOAT_TOLERANCE = 0.01
"""How far outside of its cell a coefficient of a float image still counts as inside, in 8-bit levels."""

_PIXELS_AT_ONCE = 1_000_000

Move = Callable[[Tensor, Tensor], Tensor]
"""From the offsets of coefficients from their cells' centres, and the steps of the tables, to wanted changes."""


@dataclass(frozen=True)
class ComponentGroup:
    """Components of equal sampling: their places in the file, the pixels that a sample spans, (horizontal, vertical),
    whole numbers q (C, Hb, Wb, 8, 8) and steps Q (C, 1, 1, 8, 8)."""

    places: tuple[int, ...]
    ratio: tuple[int, int]
    planes: Tensor
    steps: Tensor

    def rows(self, start: int, stop: int) -> ComponentGroup:
        """The part that some rows of pixels span; `start` lies on a boundary of blocks."""
        span = 8 * self.ratio[1]
        return ComponentGroup(self.places, self.ratio, self.planes[:, start // span : -(-stop // span)], self.steps)


class QuantizationCells:
    """The cells of one JPEG file, prepared once on a device.

    Each component is sampled down as the file's encoder does; changes of its samples are repeated over the pixels that
    they span, which keeps the box means exact, and averaged where the encoder repeats the last row or column.

    Images are (B, 3, H, W) in [0, 1] on that device, upright (the file's EXIF orientation has been applied), of the
    file's size or larger by a whole factor, the same in both directions: then their box means are held to the file.
    Every method raises ValueError for another shape or size.
    """

    def __init__(self, jpeg: JPEGData, device: torch.device | str = "cpu") -> None:
        self.jpeg = jpeg
        self.device = torch.device(device)
        self.groups = _grouped(jpeg.coefficients, self.device)
        self._tallest = max(vertical for _, vertical in jpeg.coefficients.sampling)

    def project(self, images: Tensor, *, strength: float = 1.0) -> Tensor:
        """Clamp every coefficient into its cell, without rounding to levels, and clip to [0, 1].

        The clip can move some coefficients out of their cells again by a little, and so can blocks that the picture
        fills in part only. `strength` in [0, 1] blends linearly from the images to their projection. Returns images of
        the same shape, type and device.
        """
        return self._moved(images, into_cell, strength, clip=True)

    def shift(self, images: Tensor, *, clip: bool = False) -> Tensor:
        """Move every coefficient by whole cells to its own: x - Dec(Enc(x)) + Dec(y) of DDRM-JPEG, eq. 13.

        Where in its cell a coefficient lies does not change. Returns images of the same shape, type and device.
        """
        return self._moved(images, to_cell, 1.0, clip)

    def decoded(self, *, clip: bool = True) -> Tensor:
        """The file's continuous decode, (1, 3, H, W) float32, upright, on the device.

        Without `clip` nothing is clipped, so that it is linear in the coefficients; chroma is then repeated over its
        pixels, as the changes of `project` and `shift` are.
        """
        if clip:
            whole = decode(self.jpeg.coefficients.to(self.device), round_to_8bit=False)
        else:
            whole = self._decoded_by_repetition()
        return apply_orientation(whole, self.jpeg.orientation)

    def agreement(self, images: Tensor, *, tolerance: float = FLOAT_TOLERANCE) -> float:
        """The fraction of coefficients of the file in whose cells those of the images lie, in 0..1.

        `tolerance` widens the cells, in 8-bit levels (the unit of an orthonormal DCT of levels 0..255). Nothing is
        rounded to whole levels; `make_consistent` says how many coefficients a file of 8-bit pixels keeps.
        """
        stored, scale = self.stored(images)
        inside = total = 0
        for rows in self._strips(stored, scale):
            for offset, group in self.offsets(self.levels_of(stored, rows, scale), rows):
                found = offset.abs_() <= group.steps / 2 + tolerance
                inside, total = inside + int(found.sum()), total + found.numel()
        return inside / total

    def stored(self, images: Tensor) -> tuple[Tensor, int]:
        """Images as the file stores them, not upright, and by which factor they are larger than the file."""
        jpeg = self.jpeg
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(f"expected float images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        scale = height // jpeg.upright_height
        if scale < 1 or (height, width) != (scale * jpeg.upright_height, scale * jpeg.upright_width):
            raise ValueError(_wrong_size(jpeg, height, width))
        return undo_orientation(images, jpeg.orientation), scale

    def offsets(self, levels: Tensor, rows: slice) -> Iterator[tuple[Tensor, ComponentGroup]]:
        """How far from their cells' centres coefficients (B, C, Hb, Wb, 8, 8) lie, of some rows of the file's pixels.

        `levels` are these rows of the images as stored, (B, 3, h, W) in 0..255.
        """
        planes = self._planes(levels)
        for whole in self.groups:
            group = whole.rows(rows.start, rows.stop)
            chosen = planes if len(group.places) == planes.shape[1] else planes[:, list(group.places)]
            samples = box_downsample(chosen.flatten(0, 1), group.ratio, self._tallest, round_to_8bit=False)
            blocks = forward_dct(samples - 128)
            yield blocks.unflatten(0, chosen.shape[:2]) - group.planes * group.steps, group

    def spread(self, changes: list[tuple[Tensor, ComponentGroup]], height: int) -> Tensor:
        """RGB changes (B, 3, height, W), in levels, that changes of coefficients make, by group as in `offsets`."""
        wide: dict[int, Tensor] = {}
        for change, group in changes:
            samples = inverse_dct(change.flatten(0, 1))
            pixels = self._over_pixels(samples, group.ratio, height).unflatten(0, change.shape[:2])
            wide |= dict(zip(group.places, pixels.unbind(1), strict=True))
        return _rgb_change([wide[place] for place in sorted(wide)], self.jpeg.color_space)

    def levels_of(self, stored: Tensor, rows: slice, scale: int) -> Tensor:
        """Rows of the file's pixels of images as stored, in levels 0..255, box means where the images are larger."""
        part = stored[..., rows.start * scale : rows.stop * scale, :].float()
        return (part if scale == 1 else F.avg_pool2d(part, scale)) * 255

    def _moved(self, images: Tensor, move: Move, strength: float, clip: bool) -> Tensor:
        stored, scale = self.stored(images)
        result = torch.empty_like(stored)
        for rows in self._strips(stored, scale):
            levels = self.levels_of(stored, rows, scale)
            changes = [(move(offset, group.steps), group) for offset, group in self.offsets(levels, rows)]
            change = self.spread(changes, rows.stop - rows.start).div_(255)
            part = slice(rows.start * scale, rows.stop * scale)
            result[..., part, :] = _added(stored[..., part, :], change, scale, strength, clip)
        return apply_orientation(result, self.jpeg.orientation)

    def _decoded_by_repetition(self) -> Tensor:
        stored = torch.empty(1, 3, self.jpeg.height, self.jpeg.width, device=self.device)
        for rows in self._strips(stored, 1):
            groups = [group.rows(rows.start, rows.stop) for group in self.groups]
            changes = [((group.planes * group.steps)[None], group) for group in groups]
            stored[..., rows, :] = (self.spread(changes, rows.stop - rows.start) + 128) / 255
        return stored

    def _strips(self, stored: Tensor, scale: int) -> Iterator[slice]:
        """Rows of the file's pixels, whole blocks of every component at a time, to bound the memory."""
        span = 8 * max(group.ratio[1] for group in self.groups)
        pixels = len(stored) * self.jpeg.width * scale**2
        rows = max(1, _PIXELS_AT_ONCE // (pixels * span)) * span
        for top in range(0, self.jpeg.height, rows):
            yield slice(top, min(top + rows, self.jpeg.height))

    def _planes(self, levels: Tensor) -> Tensor:
        if self.jpeg.color_space == "rgb":
            return levels
        planes = rgb_to_ycbcr(levels, round_to_8bit=False)
        return planes[:, :1] if self.jpeg.color_space == "gray" else planes

    def _over_pixels(self, samples: Tensor, ratio: tuple[int, int], height: int) -> Tensor:
        across, down = ratio
        rows = min(-(-height // self._tallest) * self._tallest // down, samples.shape[-2])
        samples = _fold(samples, -2, rows)
        if down > 1:
            samples = samples.repeat_interleave(down, -2)
        if across > 1:
            samples = samples.repeat_interleave(across, -1)
        return _fold(_fold(samples, -2, height), -1, self.jpeg.width)


def into_cell(offset: Tensor, steps: Tensor) -> Tensor:
    """The smallest change that brings coefficients into their cells; a `Move`."""
    half = steps / 2
    return torch.clamp(offset, -half, half).sub_(offset)


def to_cell(offset: Tensor, steps: Tensor) -> Tensor:
    """The change by whole steps that brings coefficients into their cells; a `Move`."""
    return (offset / steps).round_().mul_(-steps)


def _grouped(coefficients: Coefficients, device: torch.device) -> list[ComponentGroup]:
    ratios = component_ratios(coefficients.sampling)
    groups = []
    for ratio in dict.fromkeys(ratios):
        places = tuple(place for place, other in enumerate(ratios) if other == ratio)
        planes = torch.cat([coefficients.planes[place] for place in places])
        planes = planes.transpose(2, 3).to(device).contiguous().transpose(2, 3)  # in memory as `forward_dct` has it
        steps = torch.cat([coefficients.tables[place].reshape(1, 1, 1, 8, 8) for place in places])
        groups.append(ComponentGroup(places, ratio, planes, steps.float().to(device)))
    return groups


def _fold(samples: Tensor, dim: int, length: int) -> Tensor:
    """Replace what lies from `length - 1` on by its mean: the transpose, scaled, of repeating the last sample."""
    surplus = samples.shape[dim] - length
    if not surplus:
        return samples
    last = samples.narrow(dim, length - 1, surplus + 1).mean(dim, keepdim=True)
    return torch.cat([samples.narrow(dim, 0, length - 1), last], dim)


def _rgb_change(planes: list[Tensor], color_space: str) -> Tensor:
    if color_space == "gray":
        return torch.stack(planes * 3, 1)
    if color_space == "rgb":
        return torch.stack(planes, 1)
    luma, cb, cr = planes
    red, blue = luma.add(cr, alpha=1.402), luma.add(cb, alpha=1.772)
    green = luma.add(cb, alpha=-0.114 * 1.772 / 0.587).add_(cr, alpha=-0.299 * 1.402 / 0.587)
    return torch.stack([red, green, blue], 1)


def _added(images: Tensor, change: Tensor, scale: int, strength: float, clip: bool) -> Tensor:
    if scale > 1:
        change = change.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    moved = change.add_(images)
    if clip:
        moved.clamp_(0, 1)
    return (moved if strength == 1 else torch.lerp(images.float(), moved, strength)).to(images.dtype)


def _wrong_size(jpeg: JPEGData, height: int, width: int) -> str:
    expected = f"{jpeg.upright_width}x{jpeg.upright_height}"
    sentence = f"expected images of the JPEG's size, {expected}, got {width}x{height}. "
    if (width, height) == (jpeg.upright_height, jpeg.upright_width):
        return (
            sentence + f"The picture looks turned: apply the EXIF orientation of {jpeg.name} ({jpeg.orientation}) once."
        )
    return sentence + (
        f"Connect the picture that was restored from {jpeg.name}, not resized, or enlarged by a whole factor, the same "
        "in both directions."
    )
