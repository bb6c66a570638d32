"""The torch JPEG codec against Pillow: encode and decode four 1024x1024 photographs, 4:2:0.

Pillow's side is its encoder and decoder on the same pictures, one after another, as bytes in memory.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks._common import SHARED, heading
from restoration.jpeg import round_trip

SIDE, PICTURES, QUALITIES = 1024, 4, (10, 50, 90)


def main(arguments: list[str]) -> None:
    """Print a table of milliseconds per batch, median of several runs, for each quality."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks codec", description=__doc__)
    parser.add_argument("--device", default="cpu", help="device of the torch codec, such as cpu, cuda or mps")
    parser.add_argument("--runs", type=int, default=5, help="timed runs, of which the median is printed")
    options = parser.parse_args(arguments)
    pictures, origin = photographs()
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).to(options.device)
    print(heading(options.device))
    print(f"{PICTURES} pictures of {SIDE}x{SIDE} ({origin}), 4:2:0, median of {options.runs} runs, ms per batch")
    print("quality    torch   Pillow    ratio   mean |difference| in levels")
    for quality in QUALITIES:
        print_row(images, pictures, quality, options.runs)


def print_row(images: torch.Tensor, pictures: list[np.ndarray], quality: int, runs: int) -> None:
    """Time both sides at one quality and print their line."""
    ours = median_ms(lambda: round_trip(images, quality), images.device, runs)
    theirs = median_ms(lambda: pillow_round_trip(pictures, quality), torch.device("cpu"), runs)
    reference = torch.from_numpy(np.stack(pillow_round_trip(pictures, quality))).permute(0, 3, 1, 2)
    error = (round_trip(images, quality).cpu() * 255 - reference).abs().mean()
    print(f"{quality:7d} {ours:8.1f} {theirs:8.1f} {ours / theirs:8.2f}   {error:.4f}")


def pillow_round_trip(pictures: list[np.ndarray], quality: int) -> list[np.ndarray]:
    """Each (H, W, 3) uint8 picture after Pillow's JPEG."""
    results = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        results.append(np.array(Image.open(buffer)))
    return results


def median_ms(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median wall time of `work` after one warm-up run, in milliseconds."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def photographs() -> tuple[list[np.ndarray], str]:
    """Four (1024, 1024, 3) uint8 pictures, tiled from the shared photographs, or else from those of scikit-image."""
    paths = sorted((SHARED / "data" / "train" / "photos").glob("*.jpg"))[: 20 * PICTURES : 20]
    if paths:
        sources, origin = [np.array(Image.open(path).convert("RGB")) for path in paths], "training photographs, tiled"
    else:
        from skimage import data

        sources, origin = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()], "scikit-image, tiled"
    return [tiled(source) for source in sources], origin


def tiled(picture: np.ndarray) -> np.ndarray:
    """The picture repeated in mirrored tiles, cut to the benchmark's size."""
    pad = [(0, max(0, SIDE - length)) for length in picture.shape[:2]] + [(0, 0)]
    return np.ascontiguousarray(np.pad(picture, pad, mode="symmetric")[:SIDE, :SIDE])


if __name__ == "__main__":
    main([])
