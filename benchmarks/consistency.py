"""Holding restored pictures to their JPEG: agreement, PSNR and SSIM before and after, rounds, seconds.

Pictures compressed by libjpeg through Pillow, restored, rounded to 8 bits, and held to the file by the closed loop.
Agreement: coefficients that libjpeg-turbo writes of the 8-bit picture just as the file has them. RGB measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from benchmarks._common import WEIGHTS, centre, evaluation_pictures, heading, load, mean
from restoration.compute import Compute
from restoration.diffusion.prediction import RegressionRestorer, ScoreDenoiser
from restoration.diffusion.prior import DiffusionPrior
from restoration.jpeg import JPEGData, QuantizationCells, encode_with_pillow, make_consistent, read_jpeg_and_pixels
from restoration.jpeg.closed_loop import wrong_coefficients
from restoration.metrics import psnr, ssim
from restoration.pipelines import DriftRecSettings, restore_driftrec, restore_regression, to_8bit
from restoration.prior_pipeline import DDRMSettings, restore_ddrm

Restore = Callable[[JPEGData, Tensor], Tensor]
"""From a file and its decode (1, 3, H, W) to a picture of the same size that is not held to the file."""

STARTERS = ("starter-regression", "starter-driftrec", "starter-prior")
COLUMNS = (
    "QF | sampling | restorer | pictures | agree before, % | after, % | all agree after | least after, % | PSNR before "
    "| after | least gain, dB | SSIM before | after | rounds, mean (most) | s a picture"
)


def main(arguments: list[str]) -> None:
    """Print a Markdown table, one row for each quality, sampling and restorer."""
    options = _options(arguments)
    restorers = {name: FILTERS[name] for name in options.restorers if name in FILTERS}
    for name in options.restorers:
        if name in STARTERS and (path := WEIGHTS / f"{name}.safetensors").exists():
            restorers[name] = _restorer(path, options.device)
    pictures = [centre(picture, options.crop) for _, picture in evaluation_pictures(options.data, options.limit)]
    size = f"crops of {options.crop}" if options.crop else "whole"
    print(f"{heading(options.device)}, {len(pictures)} pictures, {size}\n\n| {COLUMNS} |")
    print("|" + "---|" * len(COLUMNS.split(" | ")), flush=True)
    for quality in options.qualities:
        for subsampling in options.subsamplings:
            for name, restore in restorers.items():
                rows = [_measured(picture, quality, subsampling, restore, options.device) for picture in pictures]
                print(f"| {quality} | {subsampling} | {name} | {_row(rows)} |", flush=True)


def blur(jpeg: JPEGData, pixels: Tensor) -> Tensor:
    """A Gaussian blur, sigma 1 pixel."""
    return _filtered(pixels, lambda image: scipy.ndimage.gaussian_filter(image, (1, 1, 0)))


def bilateral(jpeg: JPEGData, pixels: Tensor) -> Tensor:
    """A bilateral filter: 7x7 pixels, sigma 2 pixels and 0.1 of the range."""
    from skimage.restoration import denoise_bilateral

    return _filtered(
        pixels, lambda image: denoise_bilateral(image, 7, sigma_color=0.1, sigma_spatial=2, channel_axis=-1)
    )


def nlm(jpeg: JPEGData, pixels: Tensor) -> Tensor:
    """Non-local means, skimage's fast mode: patches of 5x5 in 13x13 pixels, h = 0.05."""
    from skimage.restoration import denoise_nl_means

    return _filtered(
        pixels,
        lambda image: denoise_nl_means(image, 5, 6, h=0.05, fast_mode=True, channel_axis=-1),
    )


FILTERS: dict[str, Restore] = {"blur": blur, "bilateral": bilateral, "nlm": nlm}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks consistency", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--qualities", type=int, nargs="+", default=[5, 10, 20, 40, 75, 90])
    parser.add_argument("--subsamplings", nargs="+", default=["4:2:0", "4:4:4"])
    known = [*FILTERS, *STARTERS]
    parser.add_argument("--restorers", nargs="+", choices=known, default=known, help="starters where they are there")
    parser.add_argument("--limit", type=int, default=0, help="use the first pictures only")
    parser.add_argument("--crop", type=int, default=0, help="side of the squares cut from the middle; 0: whole")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def _restorer(path: Path, device: str) -> Restore:
    model = load(path, device)[1]
    compute = Compute(torch.device(device))
    if isinstance(model, RegressionRestorer):
        return lambda jpeg, pixels: restore_regression(model, pixels, compute=compute, color="mean")
    if isinstance(model, ScoreDenoiser):
        return lambda jpeg, pixels: restore_driftrec(model, pixels, DriftRecSettings(), compute=compute)
    assert isinstance(model, DiffusionPrior)
    return lambda jpeg, pixels: restore_ddrm(model, [jpeg], DDRMSettings(consistency=0.0), compute=compute)


def _measured(picture: Tensor, quality: int, subsampling: str, restore: Restore, device: str) -> dict[str, float]:
    jpeg, pixels = read_jpeg_and_pixels(encode_with_pillow(picture, quality, subsampling), name="benchmark.jpg")
    with torch.inference_mode():
        before = to_8bit(restore(jpeg, pixels[None]).cpu())
        wrong, total = wrong_coefficients(
            QuantizationCells(jpeg), lambda rows, columns: before[..., rows, columns] * 255
        )
        start = time.perf_counter()
        result = make_consistent(before.to(device), [jpeg])
        seconds = time.perf_counter() - start
    measured = {"before": 1 - wrong / total, "after": result.fraction, "rounds": result.rounds, "seconds": seconds}
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        measured |= {f"{name}_before": float(measure(before, picture[None]))}
        measured |= {f"{name}_after": float(measure(result.images.cpu(), picture[None]))}
    return measured


def _row(rows: list[dict[str, float]]) -> str:
    means = mean(rows)
    complete = sum(row["after"] == 1 for row in rows)
    gain = min(row["psnr_after"] - row["psnr_before"] for row in rows)
    return (
        f"{len(rows)} | {means['before']:.4%} | {means['after']:.5%} | {complete} of {len(rows)} "
        f"| {min(row['after'] for row in rows):.5%} | {means['psnr_before']:.3f} | {means['psnr_after']:.3f} "
        f"| {gain:+.5f} | {means['ssim_before']:.4f} | {means['ssim_after']:.4f} "
        f"| {means['rounds']:.1f} ({max(row['rounds'] for row in rows)}) | {means['seconds']:.2f}"
    ).replace("%", "")


def _filtered(pixels: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    image = function(pixels[0].permute(1, 2, 0).numpy())
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().clamp(0, 1)
