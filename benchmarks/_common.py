"""What the benchmarks share: where pictures and metric weights lie, the heading, the measures."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration import metrics
from restoration.diffusion.prediction import RegressionRestorer, ScoreDenoiser
from restoration.jpeg import decode_pixels, encode_with_pillow
from restoration.lpips import LPIPS, load_lpips_squeeze
from restoration.restorer_file import RestorerMetadata, read_restorer
from restoration.restorers import build_restorer, load_weights

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("JPEG_RESTORER_SHARED", ROOT.parent / "shared"))
WEIGHTS = ROOT / "weights"


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


def perceptual() -> LPIPS | None:
    """LPIPS-SqueezeNet where its weights are at hand."""
    path = SHARED / "weights" / "lpips_squeeze" / "lpips_squeeze_f32.npz"
    return load_lpips_squeeze(path).eval() if path.exists() else None


def measure(image: Tensor, clean: Tensor, lpips: LPIPS | None) -> dict[str, float]:
    """PSNR, SSIM, PSNR-B, blockiness (in 8-bit levels squared) and LPIPS of (1, 3, H, W)."""
    measured = {
        "psnr": float(metrics.psnr(image, clean)),
        "ssim": float(metrics.ssim(image, clean)),
        "psnr_b": float(metrics.psnr_b(image, clean)),
        "bef": float(metrics.blockiness(image)) * 255**2,
    }
    if lpips is not None:
        measured["lpips"] = float(lpips(image, clean))
    return measured


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
