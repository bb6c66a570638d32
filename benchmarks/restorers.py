"""Restorer files on LIVE1 (or any folder) at several JPEG qualities: PSNR, SSIM, PSNR-B, blockiness, LPIPS-squeeze.

Whole pictures, compressed 4:2:0 by libjpeg through Pillow; RGB measures on 8-bit results; means over the pictures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._common import WEIGHTS, evaluation_pictures, heading, jpeg_of, load, mean, measure, perceptual
from restoration.diffusion.prediction import RegressionRestorer, ScoreDenoiser
from restoration.pipelines import Compute, DriftRecSettings, restore_driftrec, restore_regression
from restoration.restorer_file import read_metadata


def main(arguments: list[str]) -> None:
    """Print a Markdown table, one row for each quality and restorer, the JPEG's own first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks restorers", description=__doc__)
    parser.add_argument(
        "--restorer", type=Path, action="append", help="a restorer file; may be repeated (default: the starters)"
    )
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--qualities", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--limit", type=int, default=0, help="use the first pictures only")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    files = options.restorer or [path for path in sorted(WEIGHTS.glob("*.safetensors")) if _restores(path)]
    restorers = [(path.stem, load(path, options.device)[1]) for path in files]
    pictures = evaluation_pictures(options.data, options.limit)
    lpips = perceptual()
    print(f"{heading(options.device)}, {len(pictures)} pictures")
    print("| QF | restorer | PSNR | SSIM | PSNR-B | BEF | LPIPS | s a picture |\n|---|---|---|---|---|---|---|---|")
    for quality in options.qualities:
        compressed = [(jpeg_of(picture, quality), picture[None]) for _, picture in pictures]
        rows = [measure(degraded, clean, lpips) for degraded, clean in compressed]
        print(_row(quality, "JPEG", mean(rows), None), flush=True)
        for name, restorer in restorers:
            start = time.perf_counter()
            restored = [restore(restorer, degraded, options.device) for degraded, _ in compressed]
            seconds = (time.perf_counter() - start) / len(restored)
            rows = [measure(image, clean, lpips) for image, (_, clean) in zip(restored, compressed, strict=True)]
            print(_row(quality, name, mean(rows), seconds), flush=True)


def restore(restorer: ScoreDenoiser | RegressionRestorer, degraded: Tensor, device: str) -> Tensor:
    """Restore (1, 3, H, W) with the nodes' default settings."""
    compute = Compute(device=torch.device(device))
    with torch.inference_mode():
        if isinstance(restorer, RegressionRestorer):
            return restore_regression(restorer, degraded, compute=compute, color="mean")
        return restore_driftrec(restorer, degraded, DriftRecSettings(), compute=compute)


def _restores(path: Path) -> bool:
    return read_metadata(path).family in ("driftrec", "regression")


def _row(quality: int, name: str, row: dict[str, float], seconds: float | None) -> str:
    lpips = f"{row['lpips']:.4f}" if "lpips" in row else "no weights"
    figures = f"{row['psnr']:.3f} | {row['ssim']:.4f} | {row['psnr_b']:.3f} | {row['bef']:.2f} | {lpips}"
    time_taken = "" if seconds is None else f"{seconds:.1f}"
    return f"| {quality} | {name} | {figures} | {time_taken} |"
