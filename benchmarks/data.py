"""Training pairs a second on one core, beside the bare JPEG encode and decode of the same crops."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._common import processor
from training.data.pairs import PairDataset
from training.data.pictures import find_images, scan_images
from training.degradation import PRESETS, compress

AUGMENTATIONS = {"paper": "paper"}
"""Of presets; the others' is "crop"."""
CROPS = (64, 128, 256)


def main(argv: list[str]) -> None:
    """`python -m benchmarks data [--data FOLDER] [--seconds S]`; without a folder, scikit-image's photographs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of pictures (default: those that scikit-image carries)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    paths = scan_images(find_images(arguments.data or bundled_folder()))[0]
    print(f"{date.today()}, {processor()}, 1 process, {torch.get_num_threads()} thread, {len(paths)} pictures")
    print("pairs a second; cached: every picture already decoded; cold: a picture decoded for every pair")
    print("| preset | crop | cached | cold | bare encode + decode (Pillow, 4:2:0) |\n|---|---|---|---|---|")
    for preset in PRESETS:
        for crop in CROPS:
            figures = [measure(paths, preset, crop, megabytes, arguments.seconds) for megabytes in (4096, 0)]
            floor = measure_floor(paths[0], crop, arguments.seconds)
            print(f"| {preset} | {crop} | {figures[0]:.0f} | {figures[1]:.0f} | {floor:.0f} |")


def bundled_folder() -> Path:
    """The folder of pictures inside scikit-image."""
    import skimage.data

    return Path(skimage.data.__file__).parent


def measure(paths: list[Path], preset: str, crop: int, cache_mb: float, seconds: float) -> float:
    """Pairs a second from the data set, after one untimed epoch where pictures are cached."""
    options: dict[str, Any] = {"augmentation": AUGMENTATIONS.get(preset, "crop"), "cache_mb": cache_mb}
    dataset = PairDataset(paths, crop, PRESETS[preset], **options)
    start = len(paths) if cache_mb else 0
    for index in range(start):
        dataset[index]
    return _rate(lambda count: dataset[start + count], seconds)


def measure_floor(path: Path, crop: int, seconds: float) -> float:
    """Crops a second through Pillow's encoder and decoder alone, qualities 0 to 100 in turn."""
    with Image.open(path) as picture:
        image = np.array(picture.convert("RGB").resize((crop, crop)))
    return _rate(lambda count: compress(image, count % 101), seconds)


def _rate(step: Callable[[int], object], seconds: float) -> float:
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step(count)
        count += 1
    return count / elapsed
