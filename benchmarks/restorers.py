"""Restorer files of every family on LIVE1 (or any folder) at several JPEG qualities: fidelity, blocks, looks, time.

Whole pictures, compressed 4:2:0 by libjpeg through Pillow; means over the pictures, of 8-bit results: PSNR of RGB and
of BT.601 studio-range luma, SSIM, PSNR-B, blockiness, LPIPS with SqueezeNet, NIQE. Default settings of the families;
without the file's own data, but for priors, unless --consistency asks for it. With --strengths another table instead:
two ways in which one-step restorers may do less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._common import (
    MEASURES,
    WEIGHTS,
    Compressed,
    cells,
    compressed,
    evaluation_pictures,
    header,
    heading,
    mean,
    measure,
    naturalness,
    perceptual,
)
from benchmarks._strengths import print_strengths
from restoration.jpeg import JPEGConstraint
from restoration.restorer_file import read_metadata, read_restorer
from training.restore.families import Loading, load_restorer
from training.restore.picture import RestorePicture
from training.restore.settings import RestoreSettings

QUALITIES, STRENGTH_QUALITIES = (5, 10, 20, 40), (10, 40)
_UNNAMED = ("codiff", "driftrec", "regression", "sodiff")
"""Families that are measured where no file is named; priors take minutes a picture."""


def main(arguments: list[str]) -> None:
    """Print a Markdown table, one row for each quality and restorer, the JPEG's own first."""
    options = _options(arguments)
    pictures = [picture for _, picture in evaluation_pictures(options.data, options.limit)]
    held = ", held to the JPEG" if options.consistency else ""
    print(f"{heading(options.device)}, {len(pictures)} pictures{held}")
    if options.strengths:
        print_strengths(options.restorer, pictures, options)
    else:
        _print_restorers(pictures, options)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks restorers", description=__doc__)
    parser.add_argument(
        "--restorer", type=Path, action="append", help="a file; repeatable (default: starters, no prior)"
    )
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--qualities", type=int, nargs="+", help="of the JPEGs (default: 5 10 20 40; strengths: 10 40)")
    parser.add_argument("--consistency", action="store_true", help="hold results to the JPEG, as Restore JPEG does")
    parser.add_argument("--strengths", type=float, nargs="+", help="blending beside smaller timesteps, e.g. 0.25 0.5 1")
    parser.add_argument("--limit", type=int, default=0, help="use the first pictures only")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.qualities = options.qualities or (STRENGTH_QUALITIES if options.strengths else QUALITIES)
    families = ("codiff", "sodiff") if options.strengths else _UNNAMED
    options.restorer = options.restorer or [p for p in sorted(WEIGHTS.glob("*.safetensors")) if _is_of(p, families)]
    if not options.restorer:
        raise SystemExit(f"no starter of {', '.join(families)} in {WEIGHTS}: name files with --restorer")
    return options


def _is_of(path: Path, families: Sequence[str]) -> bool:
    metadata = read_metadata(path)
    return metadata.family in families and metadata.base is None


def _print_restorers(pictures: list[Tensor], options: argparse.Namespace) -> None:
    restorers = {path.stem: _load(path, options) for path in options.restorer}
    lpips, niqe = perceptual(), naturalness(pictures)
    print(header("QF", "restorer", *(name for name, _ in MEASURES.values()), "s a picture"))
    for quality in options.qualities:
        files = [compressed(picture, quality) for picture in pictures]
        rows = [measure(file.pixels, file.clean, lpips, niqe) for file in files]
        print(_row(quality, "JPEG", mean(rows), ""), flush=True)
        for name, restore in restorers.items():
            start = time.perf_counter()
            restored = [_restored(restore, file, options.consistency) for file in files]
            seconds = (time.perf_counter() - start) / len(files)
            rows = [measure(image, file.clean, lpips, niqe) for image, file in zip(restored, files, strict=True)]
            print(_row(quality, name, mean(rows), f"{seconds:.1f}"), flush=True)


def _load(path: Path, options: argparse.Namespace) -> RestorePicture:
    settings = RestoreSettings(consistency=options.consistency)
    return load_restorer(read_restorer(path), Loading(settings, torch.device(options.device), torch.float32))


def _restored(restore: RestorePicture, file: Compressed, consistency: bool) -> Tensor:
    constraint = JPEGConstraint(file.jpeg) if consistency else None
    with torch.inference_mode():
        return restore(file.pixels, file.jpeg, constraint)


def _row(quality: int, name: str, measured: dict[str, float], seconds: str) -> str:
    return f"| {' | '.join([str(quality), name, *cells(measured, list(MEASURES)), seconds])} |"
