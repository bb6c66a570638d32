"""DDRM with a diffusion prior: quality for each measurement and weight, and what the in-loop JPEG operator costs.

Crops of LIVE1 (or any folder), compressed 4:2:0 by libjpeg through Pillow; RGB measures on 8-bit results. A step is one
evaluation of the network and one call of the operator, on one picture whose side is that of the crop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._common import WEIGHTS, centre, evaluation_pictures, heading, load, mean, measure, perceptual
from restoration.compute import Compute
from restoration.diffusion.prior import DiffusionPrior, NoiseSchedule
from restoration.jpeg import JPEGData, decode_pixels, encode_with_pillow, read_jpeg
from restoration.measurements import JPEGMeasurement
from restoration.networks.adm_unet import ADMUNet, ADMUNetConfig
from restoration.prior_pipeline import MEASUREMENTS, DDRMSettings, restore_ddrm
from restoration.tiling import Tiler

REPETITIONS = 5


def main(arguments: list[str]) -> None:
    """Print Markdown tables: the operator's share of a step, and a row for each quality, measurement and weight."""
    options = _options(arguments)
    metadata, prior = load(options.restorer, options.device)
    if not isinstance(prior, DiffusionPrior):
        raise SystemExit(f"{options.restorer.name} is of the family {metadata.family}, expected prior")
    prior.compute_dtype = options.dtype
    prior.network.to(options.dtype)
    pictures = [centre(picture, options.crop) for _, picture in evaluation_pictures(options.data, options.limit)]
    print(f"{heading(options.device)}, {options.restorer.name}, {str(options.dtype).removeprefix('torch.')}\n")
    if "operator" in options.tables:
        priors = {options.restorer.stem: prior}
        if options.adm:
            priors["ADM 256x256, random weights"] = _published_shape(options)
        _print_shares(priors, pictures[0], options.device)
    if "quality" in options.tables:
        _print_quality(prior, pictures, options)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ddrm", description=__doc__)
    parser.add_argument("--restorer", type=Path, default=WEIGHTS / "starter-prior.safetensors")
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--tables", nargs="+", choices=["operator", "quality"], default=["operator", "quality"])
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=["soft", "projection", "shift"])
    parser.add_argument("--eta-b", type=float, nargs="+", default=[0.4, 1.0], help="weights of the correction")
    parser.add_argument("--start", type=int, nargs="+", default=[300])
    parser.add_argument("--qualities", type=int, nargs="+", default=[5, 10, 30])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--inconsistent", action="store_true", help="leave the results as they are sampled")
    parser.add_argument("--crop", type=int, default=256, help="side of the square in each middle; 0: whole pictures")
    parser.add_argument("--limit", type=int, default=0, help="use the first pictures only")
    parser.add_argument("--at-once", type=int, default=1, help="samples that run as one batch")
    parser.add_argument("--adm", action="store_true", help="the operator beside the published network, too (2.2 GB)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    return parser.parse_args(arguments)


def _print_shares(priors: dict[str, DiffusionPrior], picture: Tensor, device: str) -> None:
    print("| prior | size | network, ms | operator | ms | share of a step |\n|---|---|---|---|---|---|")
    jpeg = _compressed(picture, 10)
    measurement = JPEGMeasurement(jpeg, device)
    observed = measurement.observed
    for name, prior in priors.items():
        padded = torch.zeros(1, 3, *(-(-side // 64) * 64 for side in observed.shape[-2:]), device=device)
        network = _seconds(lambda prior=prior, padded=padded: prior(padded, 150, 0 if prior.classes else None), device)
        operators = {
            "soft": lambda: measurement.expect(observed, 0.1),
            "projection": lambda: measurement.project(observed),
            "shift": lambda: measurement.shift(observed),
        }
        for operator, call in operators.items():
            seconds = _seconds(call, device)
            size = f"{observed.shape[-1]}x{observed.shape[-2]}"
            share = seconds / (seconds + network)
            print(
                f"| {name} | {size} | {1000 * network:.1f} | {operator} | {1000 * seconds:.2f} | {share:.1%} |",
                flush=True,
            )
    print()


def _print_quality(prior: DiffusionPrior, pictures: list[Tensor], options: argparse.Namespace) -> None:
    lpips = perceptual()
    print(f"{len(pictures)} pictures, crop {options.crop}, {options.steps} steps")
    print("| QF | measurement | eta_b | start | samples | PSNR | SSIM | LPIPS | s a picture |\n" + "|---" * 9 + "|")
    for quality in options.qualities:
        files = [_compressed(picture, quality) for picture in pictures]
        decoded = [
            decode_pixels(encode_with_pillow(picture, quality), name="benchmark.jpg")[None] for picture in pictures
        ]
        rows = [measure(image, picture[None], lpips) for image, picture in zip(decoded, pictures, strict=True)]
        print(_row((quality, "JPEG", "", "", ""), mean(rows), ""), flush=True)
        for settings in _settings(options):
            start, rows = time.perf_counter(), []
            for file, picture in zip(files, pictures, strict=True):
                restored = _restored(prior, file, settings, options)
                rows.append(measure(restored, picture[None], lpips))
            seconds = (time.perf_counter() - start) / len(pictures)
            named = (quality, settings.measurement, settings.eta_b, settings.start, settings.samples)
            print(_row(named, mean(rows), f"{seconds:.1f}"), flush=True)


def _settings(options: argparse.Namespace) -> Iterator[DDRMSettings]:
    grid = product(options.measurements, options.eta_b, options.start, options.samples)
    for measurement, eta_b, start, samples in grid:
        yield DDRMSettings(
            options.steps, start, eta_b=eta_b, measurement=measurement, samples=samples,
            consistency=0.0 if options.inconsistent else 1.0,
        )  # fmt: skip


def _restored(prior: DiffusionPrior, file: JPEGData, settings: DDRMSettings, options: argparse.Namespace) -> Tensor:
    compute = Compute(torch.device(options.device), Tiler(prior.tile, overlap=64, align=64))
    with torch.inference_mode():
        return restore_ddrm(prior, [file], settings, compute=compute, samples_at_once=options.at_once)


def _seconds(function: Callable[[], Tensor], device: str) -> float:
    """The fastest of some calls; the first is not counted."""
    times = []
    with torch.inference_mode():
        for _ in range(REPETITIONS + 1):
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _published_shape(options: argparse.Namespace) -> DiffusionPrior:
    network = ADMUNet(ADMUNetConfig(), dtype=options.dtype, device=options.device)
    prior = DiffusionPrior(network.eval().requires_grad_(False), NoiseSchedule(), tile=256)
    prior.compute_dtype = options.dtype
    return prior


def _compressed(picture: Tensor, quality: int) -> JPEGData:
    return read_jpeg(encode_with_pillow(picture, quality), name="benchmark.jpg")


def _row(named: tuple[object, ...], row: dict[str, float], seconds: str) -> str:
    lpips = f"{row['lpips']:.4f}" if "lpips" in row else "no weights"
    return f"| {' | '.join(map(str, named))} | {row['psnr']:.3f} | {row['ssim']:.4f} | {lpips} | {seconds} |"
