"""Two ways in which a one-step restorer may do less: a blend with what it got, or a smaller timestep."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._common import (
    Compressed,
    cells,
    compressed,
    header,
    load,
    mean,
    measure,
    naturalness,
    perceptual,
)
from restoration.compute import Compute
from restoration.jpeg import JPEGConstraint
from restoration.one_step_pipeline import OneStepSettings, SeenImages, restore_one_step, see_images
from restoration.prompts import CaVEPrompt, SAIPEPrompt
from restoration.restorer_file import read_restorer
from restoration.tiling import Tiler
from training.networks.backbone import DCTModel, load_latent_model

SHOWN = ("psnr", "lpips", "niqe")
WAYS: dict[str, Callable[[SeenImages, float], tuple[SeenImages, OneStepSettings]]] = {
    "blend": lambda seen, strength: (seen, OneStepSettings(strength=strength)),
    "timestep": lambda seen, strength: (replace(seen, timesteps=strength * seen.timesteps), OneStepSettings()),
}
"""How what was seen and the settings change with the strength; the restorer's own timestep is the whole."""


@dataclass(frozen=True)
class OneStep:
    """A self-contained one-step restorer."""

    prompt: CaVEPrompt | SAIPEPrompt
    model: DCTModel
    compute: Compute


def print_strengths(paths: Sequence[Path], pictures: list[Tensor], options: argparse.Namespace) -> None:
    """Print a Markdown table, a row for each quality, restorer, strength and way."""
    restorers = {path.stem: _load(path, options.device) for path in paths}
    meters = (perceptual(), naturalness(pictures))
    print(header("QF", "restorer", "strength", "way", "PSNR", "LPIPS", "NIQE"))
    for quality in options.qualities:
        files = [compressed(picture, quality) for picture in pictures]
        rows = [measure(file.pixels, file.clean, *meters) for file in files]
        print(_row(quality, "JPEG", "", "", mean(rows)), flush=True)
        for name, restorer in restorers.items():
            with torch.inference_mode():
                seen = [see_images(restorer.prompt, file.pixels, OneStepSettings(), compute=restorer.compute)
                        for file in files]  # fmt: skip
            for strength in options.strengths:
                for way in WAYS if strength != 1 else ("blend",):
                    images = [_restored(restorer, file, one, (way, strength), options.consistency)
                              for file, one in zip(files, seen, strict=True)]  # fmt: skip
                    rows = [measure(x, file.clean, *meters) for x, file in zip(images, files, strict=True)]
                    label = way if strength != 1 else "either"
                    print(_row(quality, name, f"{strength:g}", label, mean(rows)), flush=True)


def _restored(
    restorer: OneStep, file: Compressed, seen: SeenImages, how: tuple[str, float], consistency: bool
) -> Tensor:
    way, strength = how
    changed, settings = WAYS[way](seen, strength)
    constraints = [JPEGConstraint(file.jpeg)] if consistency else None
    with torch.inference_mode():
        return restore_one_step(
            restorer.model, file.pixels, changed, settings, compute=restorer.compute, constraints=constraints
        )


def _load(path: Path, device: str) -> OneStep:
    metadata, prompt = load(path, device)
    if not isinstance(prompt, CaVEPrompt | SAIPEPrompt):
        raise SystemExit(f"{path.name} is of the family {metadata.family}: --strengths is for codiff and sodiff")
    model = load_latent_model(read_restorer(path), device)
    return OneStep(prompt, model, Compute(torch.device(device), Tiler(1024, 64, math.lcm(16, model.size_multiple))))


def _row(quality: int, name: str, strength: str, way: str, measured: dict[str, float]) -> str:
    return f"| {' | '.join([str(quality), name, strength, way, *cells(measured, SHOWN)])} |"
