"""Seconds and peak memory against megapixels, for every family, in tiles and whole; what tiles change, and where.

Pictures are LIVE1's (or any folder's) side by side, compressed 4:2:0 by libjpeg through Pillow. Each row is a process
of its own, the peak that of all its memory; loading and a first small picture are not timed. The slope is that of log
seconds over log megapixels: 1 is linear. Results are compared in whole 8-bit levels, at seams (where tiles overlap) and
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks._common import ROOT, WEIGHTS, evaluation_pictures, heading
from restoration.jpeg import encode_with_pillow, read_jpeg_and_pixels
from restoration.restorer_file import read_restorer
from restoration.tiling import TileGrid
from training.restore.families import Loading, load_restorer
from training.restore.settings import RestoreSettings

_ALIGN = 16
_WARM_UP = 0.06
"""Megapixels of a picture that is restored first, untimed: what is made once is made then."""
_LEAST_SECONDS, _MOST_RUNS = 3.0, 5
"""Short runs are repeated, and their median taken."""
_HEADER = "| family | MP | tiles | s | s / MP | peak GB | max, mean at seams | max, mean elsewhere |"


@dataclass(frozen=True)
class Family:
    """A row's restorer, and settings that differ from the usual."""

    file: str
    steps: int | None = None
    samples: int | None = None


FAMILIES = {
    "regression": Family("starter-regression.safetensors"),
    "driftrec, 1 step": Family("starter-driftrec.safetensors", steps=1, samples=1),
    "prior, 1 step": Family("starter-prior.safetensors", steps=1, samples=1),
    "codiff": Family("starter-onestep-faithful.safetensors"),
    "sodiff": Family("starter-onestep-vivid.safetensors"),
}


@dataclass(frozen=True)
class Row:
    """What one process measured: seconds, and bytes at the most, with what it began with."""

    megapixels: float
    seconds: float
    peak: int
    start: int


def main(arguments: list[str]) -> None:
    """Print a Markdown table, and the slopes below."""
    options = _options(arguments)
    if options.row is not None:
        print(json.dumps(_measured(options)))
        return
    print(f"{heading(options.device)}, QF {options.quality}, tiles of {options.tile} pixels, overlap {options.overlap}")
    print(f"{_HEADER}\n|{'---|' * 8}", flush=True)
    slopes = []
    for name in options.families:
        path = options.restorer or WEIGHTS / FAMILIES[name].file
        if not path.exists():
            print(f"| {name} | | | not run: there is no {path.name} | | | | |")
            continue
        slopes += _family(name, path, options)
    print("\n".join(["", *slopes]))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--restorer", type=Path, help="this file in place of the starter, for every family that is named"
    )
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.25, 1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=600, help="leave out rows that would take longer")
    parser.add_argument("--gigabytes", type=float, default=8, help="leave out rows that would take more memory")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--quality", type=int, default=10)
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _family(name: str, path: Path, options: argparse.Namespace) -> list[str]:
    """Print the rows of a family; its slopes in words."""
    done: dict[int, list[Row]] = {0: [], options.tile: []}
    for megapixels in options.megapixels:
        with tempfile.TemporaryDirectory() as folder:
            results = {tile: Path(folder, f"{tile}.npy") for tile in done}
            cells = {}
            for tile, rows in done.items():
                reason = _too_much(rows, megapixels, options, grows=not tile)
                if reason:
                    cells[tile] = f"not run: {reason} | | "
                    continue
                rows.append(_run(name, path, megapixels, tile, results[tile], options))
                last = rows[-1]
                cells[tile] = f"{last.seconds:.1f} | {last.seconds / megapixels:.2f} | {last.peak / 2**30:.2f}"
            print(f"| {name} | {megapixels:g} | whole | {cells[0]} | | |")
            print(
                f"| {name} | {megapixels:g} | tiles | {cells[options.tile]} | {_difference(results, options)} |",
                flush=True,
            )
    return [f"{name}, {'tiles' if tile else 'whole'}: slope {_slope(rows)}" for tile, rows in done.items()]


def _too_much(rows: list[Row], megapixels: float, options: argparse.Namespace, grows: bool) -> str:
    """Why a row is left out, by what its predecessors took.

    Where seconds for each pixel may grow, the last two tell how; in tiles they only do where one tile becomes several.
    """
    if not rows:
        return ""
    seconds = rows[-1].seconds * megapixels / rows[-1].megapixels
    peak = rows[-1].start + (rows[-1].peak - rows[-1].start) * megapixels / rows[-1].megapixels
    if len(rows) > 1:
        if grows:
            seconds *= (megapixels / rows[-1].megapixels) ** min(max(0.0, _exponent(rows[-2:]) - 1), 1)
        growth = (rows[-1].peak - rows[-2].peak) / (rows[-1].megapixels - rows[-2].megapixels)
        peak = rows[-1].peak + max(0.0, growth) * (megapixels - rows[-1].megapixels)
    if seconds > options.seconds:
        return f"about {seconds:.0f} s"
    return f"about {peak / 2**30:.1f} GB" if peak > options.gigabytes * 2**30 else ""


def _run(name: str, path: Path, megapixels: float, tile: int, result: Path, options: argparse.Namespace) -> Row:
    shared = [f"--{key}={getattr(options, key)}" for key in ("overlap", "quality", "device")]
    shared += [f"--restorer={path}", *([f"--data={options.data}"] if options.data else [])]
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "scaling",
        *shared,
        "--row",
        name,
        str(megapixels),
        str(tile),
        str(result),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{name} at {megapixels:g} megapixels failed:\n{process.stderr[-2000:]}")
    return Row(megapixels, **json.loads(process.stdout.splitlines()[-1]))


def _measured(options: argparse.Namespace) -> dict[str, float]:
    """What the process of one row does."""
    name, megapixels, tile, result = options.row
    family, device = FAMILIES[name], torch.device(options.device)
    settings = RestoreSettings(
        steps=family.steps, samples=family.samples, tile=int(tile), overlap=options.overlap, consistency=False
    )
    restore = load_restorer(read_restorer(options.restorer), Loading(settings, device, torch.float32))
    jpeg, pixels = read_jpeg_and_pixels(encode_with_pillow(_mosaic(options.data, float(megapixels)), options.quality))
    small, small_pixels = read_jpeg_and_pixels(encode_with_pillow(_mosaic(options.data, _WARM_UP), options.quality))
    start, seconds = _peak(device), []
    with torch.inference_mode():
        restore(small_pixels[None], small, None)
        while sum(seconds) < _LEAST_SECONDS and len(seconds) < _MOST_RUNS:
            before = time.perf_counter()
            restored = restore(pixels[None], jpeg, None).cpu()
            seconds.append(time.perf_counter() - before)
    np.save(result, (restored[0] * 255).round().byte().numpy())
    return {"seconds": float(np.median(seconds)), "peak": _peak(device), "start": start}


def _peak(device: torch.device) -> int:
    """Most bytes so far: of the device's memory where it has its own, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _mosaic(folder: Path | None, megapixels: float) -> Tensor:
    """A square (3, S, S) of pictures side by side, row by row; S is a multiple of 16."""
    side = round(math.sqrt(megapixels * 2**20) / _ALIGN) * _ALIGN
    pictures = [picture for _, picture in evaluation_pictures(folder)]
    height = min(picture.shape[1] for picture in pictures)
    mosaic, number = torch.empty(3, side, side), 0
    for top in range(0, side, height):
        left = 0
        while left < side:
            picture = pictures[number % len(pictures)][:, : min(height, side - top), : side - left]
            mosaic[:, top : top + height, left : left + picture.shape[2]] = picture
            left, number = left + picture.shape[2], number + 1
    return mosaic


def _difference(results: dict[int, Path], options: argparse.Namespace) -> str:
    """Levels between the results, at seams and elsewhere."""
    if not all(path.exists() for path in results.values()):
        return " | "
    whole, tiled = (np.load(results[tile]) for tile in (0, options.tile))
    difference = np.abs(whole.astype(np.int16) - tiled).max(0)
    grid = TileGrid(*difference.shape, options.tile, options.overlap, _ALIGN)
    if len(grid) == 1:
        return f"one tile | {difference.max()}, {difference.mean():.3f}"
    covered = np.zeros(difference.shape, np.uint8)
    for rows, columns, _ in grid:
        covered[rows, columns] += 1
    parts = (difference[covered > 1], difference[covered == 1])
    return " | ".join(f"{part.max()}, {part.mean():.3f}" for part in parts)


def _slope(rows: list[Row]) -> str:
    return f"{_exponent(rows):.2f}" if len(rows) > 1 else "unknown"


def _exponent(rows: list[Row]) -> float:
    """By least squares over log megapixels."""
    sizes, seconds = (np.log([getattr(row, key) for row in rows]) for key in ("megapixels", "seconds"))
    return float(np.polyfit(sizes, seconds, 1)[0])
