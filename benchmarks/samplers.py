"""Quality against evaluations of the network for every sampler, on a DriftRec restorer (default: the starter).

Crops of LIVE1 at one JPEG quality, 4:2:0. The cost of a sampler is its number of network evaluations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._common import WEIGHTS, centre, evaluation_pictures, heading, jpeg_of, load, mean, measure, perceptual
from restoration.diffusion.prediction import ScoreDenoiser
from restoration.pipelines import Compute, DriftRecSettings, restore_driftrec

BUDGETS: dict[str, tuple[float, ...]] = {
    "ode_2m": (4, 6, 8, 10, 15, 20),
    "sde_2m": (10, 15, 20),
    "ode_1": (10, 20, 50),
    "sde_1": (20, 50, 100),
    "euler_maruyama": (30, 50, 100),
    "euler_heun": (50,),
    "rk45": (1e-1, 1e-2, 1e-3),
}
"""Steps, or tolerances for rk45."""


def main(arguments: list[str]) -> None:
    """Print a Markdown table, one row for each sampler, budget and t_eps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks samplers", description=__doc__)
    parser.add_argument("--restorer", type=Path, default=WEIGHTS / "starter-driftrec.safetensors")
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--quality", type=int, default=10)
    parser.add_argument("--crop", type=int, default=128, help="side of the square in the middle of each picture")
    parser.add_argument("--limit", type=int, default=12, help="pictures")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    metadata, model = load(options.restorer, options.device)
    if not isinstance(model, ScoreDenoiser):
        parser.error(f"{options.restorer.name} is of the family {metadata.family}, expected driftrec")
    clean = torch.stack(
        [centre(picture, options.crop) for _, picture in evaluation_pictures(options.data, options.limit)]
    )
    degraded = torch.cat([jpeg_of(picture, options.quality) for picture in clean])
    print(f"{heading(options.device)}, {options.restorer.name}")
    print(f"QF {options.quality}, {len(clean)} crops of {options.crop}x{options.crop}")
    print("| sampler | budget | t_eps | evaluations | PSNR | SSIM | LPIPS | BEF |\n|---|---|---|---|---|---|---|---|")
    print(_row("JPEG", "", "", 0, _measure(degraded, clean)), flush=True)
    for t_eps in (0.03, 0.01):
        for sampler, budgets in BUDGETS.items():
            for budget in budgets:
                settings = DriftRecSettings(sampler, steps=max(1, int(budget)), tolerance=budget, t_eps=t_eps)
                restored, evaluations = run(model, degraded, settings, options.device)
                print(_row(sampler, f"{budget:g}", f"{t_eps:g}", evaluations, _measure(restored, clean)), flush=True)


def run(model: ScoreDenoiser, degraded: Tensor, settings: DriftRecSettings, device: str) -> tuple[Tensor, float]:
    """Restored crops, and how often the network was evaluated for each."""
    calls = [0]
    compute = Compute(device=torch.device(device), check=lambda: calls.__setitem__(0, calls[0] + 1))
    with torch.inference_mode():
        restored = restore_driftrec(model, degraded, settings, compute=compute)
    return restored, calls[0] / len(degraded)


def _measure(images: Tensor, clean: Tensor) -> dict[str, float]:
    lpips = perceptual()
    return mean([measure(image[None], other[None], lpips) for image, other in zip(images, clean, strict=True)])


def _row(sampler: str, budget: str, t_eps: str, evaluations: float, row: dict[str, float]) -> str:
    lpips = f"{row['lpips']:.4f}" if "lpips" in row else "no weights"
    figures = f"{row['psnr']:.3f} | {row['ssim']:.4f} | {lpips} | {row['bef']:.2f}"
    return f"| {sampler} | {budget} | {t_eps} | {evaluations:g} | {figures} |"
