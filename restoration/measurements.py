"""What is known of a picture, behind one small interface: what DDRM starts from, and how it is held to it.

Images are (B, 3, H, W) in [0, 1]; those that come from the prior are not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .diffusion.ddrm import Correction
from .jpeg.cells import QuantizationCells
from .jpeg.consistency import JPEGConstraint
from .jpeg.file import JPEGData
from .jpeg.sampling import sampling_factors
from .jpeg.tables import STANDARD_CHROMA, STANDARD_LUMA
from .pipelines import to_8bit
from .truncated_normal import mean_inside

# The rounded coefficients of the authors' code; their inverse is this matrix's, not the standard's.
_PAPER_YCBCR = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))
_FLOAT_SLACK = 2.0**-10  # levels by which a whole level may miss itself in float32


class Measurement(Correction, Protocol):
    """A measurement y of one picture, with its encoder Enc and decoder Dec."""

    @property
    def observed(self) -> Tensor:
        """The decoded measurement, (1, 3, H, W)."""
        ...

    def finish(self, images: Tensor) -> Tensor:
        """Images that agree, in whole 8-bit levels."""
        ...


class JPEGMeasurement:
    """A JPEG file: its own coefficients, tables and chroma sampling; any size, gray or colour, turned upright.

    Args:
        jpeg: The file.
        device: Of the images.
        strength: How far `finish` moves images into agreement, 0 to 1.
        closed_loop: Whether they agree in whole 8-bit levels, too.
        check: Called while the result is finished, with the part that is done; may raise to interrupt.
    """

    def __init__(
        self, jpeg: JPEGData, device: torch.device | str = "cpu", *, strength: float = 1.0, closed_loop: bool = True,
        check: Callable[[float], None] = lambda done: None,
    ) -> None:  # fmt: skip
        self.jpeg, self.device = jpeg, device
        self.constraint = JPEGConstraint(jpeg, strength, closed_loop, check)

    @cached_property
    def cells(self) -> QuantizationCells:
        """The file's cells, on the device."""
        return QuantizationCells(self.jpeg, self.device)

    @property
    def observed(self) -> Tensor:
        """The file's continuous decode, (1, 3, H, W); made anew each time."""
        return self.cells.decoded()

    def shift(self, images: Tensor) -> Tensor:
        """Every coefficient moved by whole quantisation steps into its cell; not clipped."""
        return self.cells.shift(images)

    def project(self, images: Tensor) -> Tensor:
        """Every coefficient clamped into its cell, the picture clipped to [0, 1]."""
        return self.cells.project(images)

    def expect(self, images: Tensor, spread: float) -> Tensor:
        """Every coefficient at its mean inside its cell, the picture clipped to [0, 1]."""
        return self.cells.expect(images, spread)

    def finish(self, images: Tensor) -> Tensor:
        """Whole 8-bit levels; in a closed loop they compress to this file again, as far as `make_consistent` gets."""
        return self.constraint.finish(images)


class PaperJPEGMeasurement:
    """JPEG as the authors of DDRM-JPEG simulate it: not the standard's, for reproducing their figures.

    Rounded YCbCr coefficients; chroma at half size by leaving out every second sample, and back by repetition; the
    scale of the tables is not rounded to whole percent; coefficients are rounded half to even; nothing is rounded to
    levels or clipped. It computes in the type of the images.

    Args:
        observed: The decoded picture y0, (1, 3, H, W).
        quality: Of the tables, above 0 and at most 100.

    Raises:
        ValueError: The picture is no square whose side is a multiple of 16, or there is no such quality.
    """

    def __init__(self, observed: Tensor, quality: float) -> None:
        _check_paper_shape(observed)
        self.observed, self.quality, self.tables = observed, quality, paper_tables(quality)
        self._codes = [units.round() for units in self._analyse(observed)]
        self._decoded = self._synthesise(self._codes)

    @classmethod
    def simulate(cls, clean: Tensor, quality: float) -> PaperJPEGMeasurement:
        """The measurement of a clean picture (1, 3, H, W): y0 = Dec(Enc(clean))."""
        return cls(cls(clean, quality)._decoded, quality)

    @staticmethod
    def check_file(jpeg: JPEGData) -> None:
        """Whether `of_file` takes the file; ValueError where it does not."""
        standard = jpeg.quality.exact and jpeg.color_space == "ycbcr"
        if not standard or jpeg.coefficients.sampling != sampling_factors("4:2:0") or jpeg.orientation != 1:
            raise ValueError(
                f"{jpeg.name}: the operator of the paper knows only 4:2:0 with standard tables, not turned; this file "
                f"is {jpeg.color_space} {jpeg.subsampling} of quality {jpeg.quality.quality:g}, orientation "
                f"{jpeg.orientation}. Use the measurement soft, which takes every file."
            )
        _check_paper_shape(torch.empty(1, 3, jpeg.height, jpeg.width, device="meta"))

    @classmethod
    def of_file(cls, jpeg: JPEGData, device: torch.device | str = "cpu") -> PaperJPEGMeasurement:
        """The authors' reading of a real file: y0 from its coefficients, the tables from its quality alone.

        Raises:
            ValueError: The file is not one that their code could stand for.
        """
        cls.check_file(jpeg)
        pairs = zip(jpeg.coefficients.planes, jpeg.tables, strict=True)
        luma, blue, red = (plane.to(device).float() * table.to(device)[:, None, None] for plane, table in pairs)
        return cls(_from_blocks([luma[:, None], torch.stack([blue, red], 1)]), jpeg.quality.quality)

    def shift(self, images: Tensor) -> Tensor:
        """x - Dec(Enc(x)) + Dec(Enc(y0)), the authors' line."""
        return images - self._synthesise([units.round() for units in self._analyse(images)]) + self._decoded.to(images)

    def project(self, images: Tensor) -> Tensor:
        """Coefficients clamped into their cells, the change of chroma repeated over its pixels; not clipped."""
        return self._moved(images, lambda offset, table: offset.clamp(-0.5, 0.5))

    def expect(self, images: Tensor, spread: float) -> Tensor:
        """Coefficients at their means inside their cells, else as `project`."""
        return self._moved(images, lambda offset, table: mean_inside(offset * table, table / 2, 255 * spread) / table)

    def finish(self, images: Tensor) -> Tensor:
        """Rounded to whole levels and clipped, as the authors' script ends."""
        return to_8bit(images)

    def _moved(self, images: Tensor, to: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Images whose offsets from the centres of their cells, in steps, became what `to` makes of them and tables."""
        changes = []
        for units, code, table in zip(self._analyse(images), self._codes, self.tables, strict=True):
            offset = units - code.to(units)
            changes.append(to(offset, table.to(units)) - offset)
        return images + self._synthesise(changes) - self._synthesise([torch.zeros_like(change) for change in changes])

    def _analyse(self, images: Tensor) -> list[Tensor]:
        """Coefficients of luma (B, 1, Hb, Wb, 8, 8) and chroma (B, 2, ...) in steps of the tables, not rounded."""
        matrix = torch.tensor(_PAPER_YCBCR, dtype=torch.float64).to(images.dtype).to(images.device)
        planes = torch.einsum("kc,bchw->bkhw", matrix, images * 255)
        dct = _dct_matrix(images)
        parts = (planes[:, :1] - 128, planes[:, 1:, ::2, ::2])  # chroma is centred on 0 here
        return [dct @ _blocks(part) @ dct.T / table.to(images) for part, table in zip(parts, self.tables, strict=True)]

    def _synthesise(self, units: list[Tensor]) -> Tensor:
        return _from_blocks([part * table.to(part) for part, table in zip(units, self.tables, strict=True)])


class BitDepthMeasurement:
    """A picture of few bits a channel, its levels the lower ends of their intervals: the paper's dequantisation.

    Args:
        observed: (1, 3, H, W); levels above the lower end of their interval are brought down to it.
        bits: 1 to 7; 3 in the paper.

    Raises:
        ValueError: Another number of bits.
    """

    def __init__(self, observed: Tensor, bits: int = 3) -> None:
        if bits not in range(1, 8):
            raise ValueError(f"expected 1 to 7 bits a channel, got {bits}.")
        self.step = 2 ** (8 - bits)
        self.observed = self._quantized(observed)

    def shift(self, images: Tensor) -> Tensor:
        """x - Enc(x) + y; where in its interval a value lies does not change."""
        return images - self._quantized(images) + self.observed.to(images)

    def project(self, images: Tensor) -> Tensor:
        """Clamped to the whole levels v to v + step - 1, every 8-bit picture that gives y lies between."""
        low = self.observed.to(images)
        return images.clamp(low, low + (self.step - 1) / 255)

    def expect(self, images: Tensor, spread: float) -> Tensor:
        """The mean, between these levels, of a normal distribution around each value."""
        half = (self.step - 1) / 255 / 2
        middle = self.observed.to(images) + half
        return middle + mean_inside(images - middle, half, spread)

    def finish(self, images: Tensor) -> Tensor:
        """The projection, rounded to whole levels: quantised again it is y."""
        return to_8bit(self.project(images))

    def _quantized(self, images: Tensor) -> Tensor:
        """floor(level / step) step of the whole level that the authors' cast, towards zero, makes of a value."""
        levels = (images * 255 + _FLOAT_SLACK).trunc()
        return (levels / self.step).floor() * self.step / 255


def paper_tables(quality: float) -> tuple[Tensor, Tensor]:
    """Luma and chroma tables (8, 8) float64 of the authors' code: the scale 5000 / quality is not rounded.

    Raises:
        ValueError: The quality is not above 0 and at most 100.
    """
    if not 0 < quality <= 100:
        raise ValueError(f"expected a quality above 0 and at most 100, got {quality:g}.")
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    luma, chroma = (
        ((scale * table.double() + 50) / 100).floor().clamp(1, 255) for table in (STANDARD_LUMA, STANDARD_CHROMA)
    )
    return luma, chroma


def _from_blocks(blocks: list[Tensor]) -> Tensor:
    """RGB of dequantised coefficients of luma (B, 1, Hb, Wb, 8, 8) and, at half size, chroma (B, 2, ...)."""
    dct = _dct_matrix(blocks[0])
    luma, chroma = (_plane(dct.T @ part @ dct) for part in blocks)
    chroma = chroma.repeat_interleave(2, -2).repeat_interleave(2, -1)
    inverse = torch.tensor(_PAPER_YCBCR, dtype=torch.float64).inverse().to(luma.dtype).to(luma.device)
    return torch.einsum("ck,bkhw->bchw", inverse, torch.cat([luma + 128, chroma], 1)) / 255


def _blocks(planes: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 8, W / 8, 8, 8)."""
    return planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)


def _plane(blocks: Tensor) -> Tensor:
    """The inverse of `_blocks`."""
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _dct_matrix(like: Tensor) -> Tensor:
    """The (8, 8) orthonormal DCT-II, row = frequency, in the type and on the device of `like`."""
    number = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi / 16 * torch.outer(number, 2 * number + 1)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.to(like.dtype).to(like.device)


def _check_paper_shape(images: Tensor) -> None:
    batch, channels, height, width = images.shape
    if (batch, channels) != (1, 3) or height != width or height % 16 or not height:
        raise ValueError(
            f"the operator of the paper knows only squares whose side is a multiple of 16, got {width}x{height}. Crop "
            "the picture before it is compressed, or use the measurement soft."
        )
