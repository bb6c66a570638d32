"""What the benchmarks share: where pictures and metric weights lie, the heading, the measures."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration import metrics
from restoration.diffusion.prediction import RegressionRestorer, ScoreDenoiser
from restoration.jpeg import JPEGData, decode_pixels, encode_with_pillow, read_jpeg_and_pixels
from restoration.lpips import LPIPS, load_lpips_squeeze
from restoration.niqe import BLOCK, LEAST_BLOCKS, NIQE, load_niqe
from restoration.restorer_file import RestorerMetadata, read_restorer
from restoration.restorers import build_restorer, load_weights

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("JPEG_RESTORER_SHARED", ROOT.parent / "shared"))
WEIGHTS = ROOT / "weights"
MEASURES = {
    "psnr": ("PSNR", ".3f"),
    "psnr_y": ("luma PSNR", ".3f"),
    "ssim": ("SSIM", ".4f"),
    "psnr_b": ("PSNR-B", ".3f"),
    "bef": ("BEF", ".2f"),
    "lpips": ("LPIPS", ".4f"),
    "niqe": ("NIQE", ".3f"),
}
"""Measure -> its heading in tables and its format."""


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    for line in information.read_text(encoding="utf-8").splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device | str) -> str:
    """A device in words."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def heading(device: torch.device | str) -> str:
    """Date, device and torch version."""
    return f"{datetime.date.today()}, {device_name(device)}, torch {torch.__version__}"


def evaluation_pictures(folder: Path | None, limit: int = 0) -> list[tuple[str, Tensor]]:
    """Names and (3, H, W) pictures in [0, 1] of a folder, by default LIVE1."""
    folder = folder or SHARED / "data" / "eval" / "LIVE1"
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".webp", ".png", ".bmp"))
    if not paths:
        print(f"skipped: no lossless pictures in {folder}; give a folder with --data, or set JPEG_RESTORER_SHARED")
        sys.exit(0)
    return [(path.stem, _read(path)) for path in paths[: limit or None]]


def centre(picture: Tensor, side: int) -> Tensor:
    """The square in the middle of a picture (3, H, W), as large as it allows; all of it where the side is 0."""
    if not side:
        return picture
    top, left = (max(0, length - side) // 2 for length in picture.shape[-2:])
    return picture[:, top : top + side, left : left + side]


def jpeg_of(picture: Tensor, quality: int, subsampling: str = "4:2:0") -> Tensor:
    """A picture (3, H, W) after libjpeg's compression, as Pillow decodes it, (1, 3, H, W)."""
    return decode_pixels(encode_with_pillow(picture, quality, subsampling), name="benchmark.jpg")[None]


@dataclass(frozen=True)
class Compressed:
    """A JPEG, what libjpeg decodes from it, and the picture that it was made from, both (1, 3, H, W)."""

    jpeg: JPEGData
    pixels: Tensor
    clean: Tensor


def compressed(picture: Tensor, quality: int, subsampling: str = "4:2:0") -> Compressed:
    """A picture (3, H, W) compressed by libjpeg."""
    data = encode_with_pillow(picture, quality, subsampling)
    jpeg, pixels = read_jpeg_and_pixels(data, name="benchmark.jpg")
    return Compressed(jpeg, pixels[None], picture[None])


def perceptual() -> LPIPS | None:
    """LPIPS-SqueezeNet where its weights are at hand."""
    path = SHARED / "weights" / "lpips_squeeze" / "lpips_squeeze_f32.npz"
    return load_lpips_squeeze(path).eval() if path.exists() else None


def naturalness(pictures: Sequence[Tensor]) -> NIQE | None:
    """NIQE where its weights are at hand, and pictures (3, H, W) are large enough for it."""
    path = SHARED / "weights" / "niqe" / "niqe_pris_params.npz"
    shapes = [picture.shape for picture in pictures]
    large = all((height // BLOCK) * (width // BLOCK) >= LEAST_BLOCKS for _, height, width in shapes)
    return load_niqe(path) if path.exists() and large else None


def measure(image: Tensor, clean: Tensor, lpips: LPIPS | None, niqe: NIQE | None = None) -> dict[str, float]:
    """PSNR of RGB and of luma, SSIM, PSNR-B, blockiness (in 8-bit levels squared), LPIPS and NIQE of (1, 3, H, W)."""
    measured = {
        "psnr": float(metrics.psnr(image, clean)),
        "psnr_y": float(metrics.psnr_y(image, clean)),
        "ssim": float(metrics.ssim(image, clean)),
        "psnr_b": float(metrics.psnr_b(image, clean)),
        "bef": float(metrics.blockiness(image)) * 255**2,
    }
    if lpips is not None:
        measured["lpips"] = float(lpips(image, clean))
    if niqe is not None:
        measured["niqe"] = float(niqe(image))
    return measured


def header(*columns: str) -> str:
    """The first two lines of a table."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def cells(measured: dict[str, float], names: Sequence[str]) -> list[str]:
    """Measures as they stand in tables; a dash for what could not be measured."""
    return [f"{measured[name]:{MEASURES[name][1]}}" if name in measured else "-" for name in names]


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def load(path: Path, device: torch.device | str = "cpu") -> tuple[RestorerMetadata, ScoreDenoiser | RegressionRestorer]:
    """A restorer from its file, ready on a device."""
    file = read_restorer(path)
    restorer = build_restorer(file.metadata, file.name)
    load_weights(restorer, file)
    return file.metadata, restorer.eval().requires_grad_(False).to(device)


def _read(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
