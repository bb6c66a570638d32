"""A JPEG codec in torch: batched, on any device, for any size, tables and sampling; its stages are libjpeg's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .integer_dct import integer_forward_dct, integer_quantize
from .sampling import (
    Sampling,
    box_downsample,
    component_ratios,
    sampling_factors,
    subsampling_name,
    upsample,
)
from .tables import tables_for_quality

# libjpeg's 16-bit fixed-point constants (jccolor.c, jdcolor.c); every product below stays exact in float32.
_FIXED_RGB_TO_YCBCR = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
_FIXED_OFFSETS = (32768, 128 * 65536 + 32767, 128 * 65536 + 32767)
_FIXED_CR_TO_R, _FIXED_CB_TO_G, _FIXED_CR_TO_G, _FIXED_CB_TO_B = 91881, -22554, -46802, 116130
_TIE = 0.5 + 2.0**-10  # rounds half up although the float DCT may miss a half by its own error


@dataclass(frozen=True)
class Coefficients:
    """Quantized DCT coefficients of a batch of JPEGs of one size.

    `planes`: per component (B, Hb, Wb, 8, 8) whole numbers, as the file stores them, in natural order: [vertical,
    horizontal] frequency. `tables`: per component (B or 1, 8, 8) quantization steps. `height`, `width`: in pixels.
    `sampling`: per component (horizontal, vertical) factors. `color_space`: "ycbcr", "rgb" or "gray".
    """

    planes: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    height: int
    width: int
    sampling: Sampling
    color_space: str = "ycbcr"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Coefficients:
        """The same coefficients with planes and tables on `device`; `dtype` converts the planes only."""
        planes = tuple(plane.to(device=device, dtype=dtype) for plane in self.planes)
        return replace(self, planes=planes, tables=tuple(table.to(device) for table in self.tables))

    def __len__(self) -> int:
        return len(self.planes[0])

    def __getitem__(self, index: int) -> Coefficients:
        """One picture of the batch, as a batch of one."""
        pick = range(len(self))[index]
        planes = tuple(plane[pick : pick + 1] for plane in self.planes)
        tables = tuple(table if len(table) == 1 else table[pick : pick + 1] for table in self.tables)
        return replace(self, planes=planes, tables=tables)

    @property
    def subsampling(self) -> str:
        """Name of the sampling, such as "4:2:0", "gray" or "2x2,2x1,1x2"."""
        return subsampling_name(self.sampling)


def encode(
    images: Tensor,
    tables: Sequence[Tensor],
    subsampling: str,
    *,
    color_space: str = "ycbcr",
    round_to_8bit: bool = True,
) -> Coefficients:
    """Compress images (B, 3, H, W) or (B, 1, H, W) in [0, 1] to quantized coefficients.

    `tables` are (luma, chroma) or one per component, each (8, 8) or (B, 8, 8), so that a batch may mix qualities.
    `subsampling` is a name of `SUBSAMPLINGS`, "gray" or a list such as "2x2,2x1,1x2"; a gray image, like "gray", gives
    one component. `color_space` is "ycbcr", or "rgb" to store RGB planes as they are. With `round_to_8bit` the pixels
    are rounded to 8-bit levels and every stage is libjpeg-turbo's, in whole numbers: the coefficients are the very ones
    that it writes. Without, only the coefficients are rounded. Raises ValueError for another shape, sampling, colour
    space or number of tables. Source: ITU-T T.81, JFIF 1.02, libjpeg.
    """
    _check_images(images)
    if color_space not in ("ycbcr", "rgb"):
        raise ValueError(f"color_space expected 'ycbcr' or 'rgb', got {color_space!r}: choose one of these")
    sampling = sampling_factors("gray" if images.shape[1] == 1 else subsampling)
    steps = _per_component(tables, len(sampling), images)
    samples = _image_to_samples(images, sampling, color_space, round_to_8bit)
    planes = tuple(_quantized(plane, table, round_to_8bit) for plane, table in zip(samples, steps, strict=True))
    space = "gray" if len(sampling) == 1 else color_space
    return Coefficients(planes, steps, images.shape[-2], images.shape[-1], sampling, space)


def decode(coefficients: Coefficients, *, round_to_8bit: bool = True) -> Tensor:
    """Decompress to float32 RGB (B, 3, H, W) in [0, 1]; a gray file gives three equal channels.

    With `round_to_8bit` planes, upsampling and colours are rounded to 8-bit levels where libjpeg-turbo rounds them, so
    that the result is Pillow's to within rounding of the DCT; without, everything after the coefficients stays
    continuous and only the range is clipped. Raises ValueError for fractional sampling ratios.
    """
    pairs = zip(coefficients.planes, coefficients.tables, strict=True)
    blocks = (plane * table.to(plane.device).float()[:, None, None] for plane, table in pairs)
    return dct_to_image(blocks, coefficients, round_to_8bit=round_to_8bit)


def round_trip(
    images: Tensor,
    quality: int | Tensor | Sequence[Tensor],
    subsampling: str = "4:2:0",
    *,
    round_to_8bit: bool = True,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as they look after JPEG compression.

    `quality` is an int in 0..100, an integer tensor (B,), or the quantization tables as for `encode`.
    """
    tables = tables_for_quality(quality) if isinstance(quality, int | Tensor) else quality
    coefficients = encode(images, tables, subsampling, round_to_8bit=round_to_8bit)
    return decode(coefficients, round_to_8bit=round_to_8bit)


def image_to_dct(
    images: Tensor, sampling: Sampling, *, color_space: str = "ycbcr", round_to_8bit: bool = True
) -> tuple[Tensor, ...]:
    """DCT coefficients before quantization, per component (B, Hb, Wb, 8, 8), of images (B, 1 or 3, H, W) in [0, 1]."""
    samples = _image_to_samples(images, sampling, color_space, round_to_8bit)
    return tuple(forward_dct(plane) for plane in samples)


def dct_to_image(blocks: Iterable[Tensor], like: Coefficients, *, round_to_8bit: bool = True) -> Tensor:
    """RGB (B, 3, H, W) in [0, 1] of dequantized coefficients, per component (B, Hb, Wb, 8, 8), shaped as `like` is."""
    planes = []
    for block, ratio in zip(blocks, component_ratios(like.sampling), strict=True):
        plane = inverse_dct(block)[..., : -(-like.height // ratio[1]), : -(-like.width // ratio[0])]
        plane = plane.add(128 + _TIE).floor_() if round_to_8bit else plane.add(128)
        plane = upsample(plane.clamp_(0, 255), ratio, round_to_8bit=round_to_8bit)
        planes.append(plane[..., : like.height, : like.width])
    if like.color_space == "ycbcr":
        planes = _to_rgb(planes, round_to_8bit)
    return torch.stack(planes * 3 if len(planes) == 1 else planes, 1).clamp_(0, 255).div_(255)


def forward_dct(plane: Tensor) -> Tensor:
    """Orthonormal 8x8 DCT-II of a (B, 8 Hb, 8 Wb) plane -> (B, Hb, Wb, 8, 8) with [vertical, horizontal] frequency."""
    batch, height, width = plane.shape
    matrix = _dct_matrix(plane.device)
    with torch.autocast(plane.device.type, enabled=False):
        rows = plane.to(matrix.dtype).reshape(-1, 8) @ matrix.T
        both = matrix @ rows.reshape(batch * height // 8, 8, width)
    return both.float().view(batch, height // 8, 8, width // 8, 8).transpose(2, 3)


def inverse_dct(blocks: Tensor) -> Tensor:
    """Inverse of `forward_dct`: blocks (B, Hb, Wb, 8, 8) -> plane (B, 8 Hb, 8 Wb)."""
    batch, rows, columns = blocks.shape[:3]
    matrix = _dct_matrix(blocks.device)
    with torch.autocast(blocks.device.type, enabled=False):
        across = blocks.to(matrix.dtype).transpose(2, 3).reshape(-1, 8) @ matrix
        both = matrix.T @ across.view(batch * rows, 8, columns * 8)
    return both.float().view(batch, rows * 8, columns * 8)


def quantize(blocks: Tensor, table: Tensor) -> Tensor:
    """Whole multiples of the steps (B or 1, 8, 8) nearest to blocks (B, Hb, Wb, 8, 8), as libjpeg rounds them.

    libjpeg's DCT has eighths of a level as its unit, and halves go away from zero (jfdctint.c, jcdctmgr.c).
    """
    steps = 8 * table.to(blocks.device).float()[:, None, None]
    eighths = (blocks * 8).round()
    return eighths.abs().add_(steps / 2).div_(steps).floor_().mul_(eighths.sign())


def rgb_to_ycbcr(levels: Tensor, *, round_to_8bit: bool = True) -> Tensor:
    """JFIF YCbCr (B, 3, H, W), chroma centred on 128, of RGB levels 0..255; `round_to_8bit` as libjpeg rounds."""
    if round_to_8bit:
        rows, offsets, unit = _FIXED_RGB_TO_YCBCR, _FIXED_OFFSETS, 65536.0
    else:
        blue, red = 0.5 / (1 - 0.114), 0.5 / (1 - 0.299)
        rows = (
            (0.299, 0.587, 0.114),
            (-0.299 * blue, -0.587 * blue, 0.5),
            (0.5, -0.587 * red, -0.114 * red),
        )
        offsets, unit = (0.0, 128.0, 128.0), 1.0
    red_plane, green_plane, blue_plane = levels.unbind(1)
    planes = [
        (red_plane * r).add_(green_plane, alpha=g).add_(blue_plane, alpha=b).add_(offset)
        for (r, g, b), offset in zip(rows, offsets, strict=True)
    ]
    return torch.stack([plane.div_(unit).floor_() if round_to_8bit else plane for plane in planes], 1)


def ycbcr_to_rgb(levels: Tensor, *, round_to_8bit: bool = True) -> Tensor:
    """RGB levels (B, 3, H, W), not clipped, of JFIF YCbCr levels 0..255; `round_to_8bit` as libjpeg rounds."""
    return torch.stack(_to_rgb(levels.unbind(1), round_to_8bit), 1)


def _image_to_samples(images: Tensor, sampling: Sampling, color_space: str, round_to_8bit: bool) -> Iterator[Tensor]:
    """Samples of each component less 128, padded to whole blocks, (B, 8 Hb, 8 Wb)."""
    levels = images.float() * 255
    if round_to_8bit:
        levels = levels.round_().clamp_(0, 255)
    if len(sampling) == 1:
        planes = levels if levels.shape[1] == 1 else rgb_to_ycbcr(levels, round_to_8bit=round_to_8bit)[:, :1]
    else:
        planes = rgb_to_ycbcr(levels, round_to_8bit=round_to_8bit) if color_space == "ycbcr" else levels
    tallest = max(v for _, v in sampling)
    for plane, ratio in zip(planes.unbind(1), component_ratios(sampling), strict=True):
        yield box_downsample(plane, ratio, tallest, round_to_8bit=round_to_8bit) - 128


def _quantized(samples: Tensor, table: Tensor, exact: bool) -> Tensor:
    if exact:
        return integer_quantize(integer_forward_dct(samples), table[:, None, None])
    return quantize(forward_dct(samples), table)


def _to_rgb(ycbcr: Sequence[Tensor], round_to_8bit: bool) -> list[Tensor]:
    luma, cb, cr = ycbcr[0], ycbcr[1] - 128, ycbcr[2] - 128
    if round_to_8bit:
        red, blue = cr * _FIXED_CR_TO_R, cb * _FIXED_CB_TO_B
        green = cb.mul_(_FIXED_CB_TO_G).add_(cr, alpha=_FIXED_CR_TO_G)
        return [chroma.add_(32768).div_(65536).floor_().add_(luma) for chroma in (red, green, blue)]
    red, blue = cr * 1.402, cb * 1.772
    green = cb.mul_(-0.114 * 1.772 / 0.587).add_(cr, alpha=-0.299 * 1.402 / 0.587)
    return [chroma.add_(luma) for chroma in (red, green, blue)]


def _dct_matrix(device: torch.device) -> Tensor:
    """The (8, 8) orthonormal DCT-II, row = frequency; float64 on CUDA, where float32 products may be cut to TF32."""
    rows = [
        [math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * n + 1) * k / 16) for n in range(8)]
        for k in range(8)
    ]
    return torch.tensor(rows, dtype=torch.float64 if device.type == "cuda" else torch.float32, device=device)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"encode expected images (B, 3 or 1, H, W), got {tuple(images.shape)}: reorder the dimensions")


def _per_component(tables: Sequence[Tensor], components: int, images: Tensor) -> tuple[Tensor, ...]:
    if (len(tables) != 2 and len(tables) < components) or not len(tables):
        raise ValueError(f"encode expected (luma, chroma) or {components} tables, got {len(tables)}: pass that many")
    chosen = tuple(tables)[:components] if len(tables) >= components else (tables[0],) + (tables[1],) * (components - 1)
    steps = tuple(table.to(images.device).float().reshape(-1, 8, 8) for table in chosen)
    for step in steps:
        if len(step) not in (1, len(images)):
            raise ValueError(
                f"encode expected tables for 1 or {len(images)} images, got {len(step)}: pass one per image"
            )
    return steps
