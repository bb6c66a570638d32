"""The quality predictor on LIVE1 (or any folder): mean absolute error of the JPEG quality, by quality and history.

Whole pictures, 4:2:0 by libjpeg through Pillow. Double compression: a first quality of 30 to 95, drawn for each picture
and quality, its grid on the second one's or displaced by 1 to 15 pixels; the second quality is the one asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks._common import WEIGHTS, evaluation_pictures, heading
from restoration.networks.timestep_predictor import TimestepPredictor, TimestepPredictorConfig
from restoration.restorer_file import load_part, read_restorer
from training.degradation import MAX_SHIFT, Decoder, compress

History = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def main(arguments: list[str]) -> None:
    """Print a Markdown table, one row for each quality, one column for each history, the mean last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("--restorer", type=Path, default=WEIGHTS / "starter-quality.safetensors")
    parser.add_argument("--data", type=Path, help="folder of lossless pictures (default: LIVE1)")
    parser.add_argument("--qualities", type=int, nargs="+", default=list(range(5, 100, 5)))
    parser.add_argument("--histories", nargs="+", choices=list(HISTORIES), default=list(HISTORIES))
    parser.add_argument("--limit", type=int, default=0, help="use the first pictures only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    network = load(options.restorer).to(options.device, dtype)
    pictures = [_levels(picture) for _, picture in evaluation_pictures(options.data, options.limit)]
    print(f"{heading(options.device)}, {len(pictures)} pictures, {options.restorer.name}, {options.dtype}")
    print(f"| QF | {' | '.join(options.histories)} |\n|{'---|' * (len(options.histories) + 1)}")
    table = []
    for quality in options.qualities:
        table.append([errors(network, pictures, quality, HISTORIES[name], dtype) for name in options.histories])
        print(_row(str(quality), [f"{np.abs(cell).mean():.1f} ({cell.mean():+.1f})" for cell in table[-1]]), flush=True)
    means = [np.abs(np.stack(column)).mean() for column in zip(*table, strict=True)]
    print(_row("mean", [f"{mean:.2f}" for mean in means]))


def load(path: Path) -> TimestepPredictor:
    """The predictor of a file of the families `quality` or `sodiff`."""
    file = read_restorer(path)
    network = TimestepPredictor(TimestepPredictorConfig(**file.metadata.config["timestep_predictor"]))
    load_part(network, file, "timestep")
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def errors(
    network: TimestepPredictor, pictures: list[np.ndarray], quality: int, history: History, dtype: torch.dtype
) -> np.ndarray:
    """Estimated minus true quality of each picture."""
    device = next(network.parameters()).device
    found = []
    for number, picture in enumerate(pictures):
        seen = history(picture, quality, np.random.default_rng([quality, number]))
        estimated, _ = network(_tensor(seen).to(device, dtype))
        found.append(float(estimated) - quality)
    return np.array(found)


def _plain(
    picture: np.ndarray, quality: int, _: np.random.Generator, *, decoder: Decoder = "pillow", sampling: str = "4:2:0"
) -> np.ndarray:
    return compress(picture, quality, sampling, decoder)


def _double(picture: np.ndarray, quality: int, rng: np.random.Generator, *, shift: bool) -> np.ndarray:
    first = compress(picture, int(rng.integers(30, 95, endpoint=True)))
    row, column = rng.integers(1, MAX_SHIFT, 2, endpoint=True) if shift else (0, 0)
    return compress(np.ascontiguousarray(first[row:, column:]), quality)


def _resized(picture: np.ndarray, quality: int, _: np.random.Generator, *, factor: float) -> np.ndarray:
    small = Image.fromarray(compress(picture, quality))
    return np.array(small.resize([round(side * factor) for side in small.size], Image.Resampling.BICUBIC))


def _cut(picture: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    row, column = rng.integers(1, MAX_SHIFT, 2, endpoint=True)
    return np.ascontiguousarray(compress(picture, quality)[row:, column:])


HISTORIES: dict[str, History] = {
    "Pillow": _plain,
    "ffmpeg": partial(_plain, decoder="ffmpeg"),
    "4:4:4": partial(_plain, sampling="4:4:4"),
    "double": partial(_double, shift=False),
    "double, shifted": partial(_double, shift=True),
    "resized 0.9": partial(_resized, factor=0.9),
    "resized 0.5": partial(_resized, factor=0.5),
    "cut off the grid": _cut,
}


def _levels(picture: Tensor) -> np.ndarray:
    return (picture * 255).round().byte().permute(1, 2, 0).numpy()


def _tensor(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
