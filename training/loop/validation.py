"""Validation on fixed crops at fixed qualities."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from restoration import metrics
from restoration.jpeg import read_jpeg_and_pixels
from restoration.lpips import load_lpips_squeeze
from training.configs.common import ValidationConfig
from training.data.pictures import DECODE_ERRORS, load_image
from training.degradation import encode
from training.loop.grid import make_grid
from training.trainers.task import Task

HELD_OUT_EVERY = 25
LOWER_IS_BETTER = ("lpips", "quality_error", "alignment")
"""Measures of which less is better."""
_SECONDS = 10.0
"""Between two lines that say how far a long validation is."""


def split_pictures(
    paths: Sequence[Path], wanted: int, before: Sequence[Path] = ()
) -> tuple[list[Path], list[Path]]:  # fmt: skip
    """Training and validation pictures where no validation folder is given: every 25th of the sorted list is set aside.

    Of fewer than 25 pictures all are trained on, and the first serves for validation as well.

    Args:
        paths: Of all pictures.
        wanted: Pictures to set aside.
        before: Those that were set aside when the run began: it stays with them, where they still are there, whatever
            is wanted now.
    """
    aside = set(before)
    if stays := [path for path in paths if path in aside]:
        return [path for path in paths if path not in aside], stays[:wanted]
    held_out = list(paths[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])[:wanted]
    if not held_out:
        return list(paths), list(paths[:1])
    return [path for path in paths if path not in set(held_out)], held_out


class Validation:
    """Restores fixed pictures at fixed JPEG qualities and measures the result.

    Args:
        config: Which qualities, how many pictures, how large.
        paths: The validation pictures; those that cannot be decoded are named and left out.
        size_multiple: Sides of the crops are multiples of this, as the network needs.
        show: Takes the images seen and the before/after grid (3, H, W).
        say: Prints lines.
    """

    def __init__(
        self,
        config: ValidationConfig,
        paths: Sequence[Path],
        size_multiple: int,
        show: Callable[[int, Tensor], None],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.show, self.say = config, show, say
        self.pictures = [_centre(picture, config.crop, size_multiple) for picture in self._decoded(paths)]
        self.lpips = load_lpips_squeeze(config.lpips) if config.lpips else None

    def _decoded(self, paths: Sequence[Path]) -> list[np.ndarray]:
        pictures: list[np.ndarray] = []
        for path in paths:
            if len(pictures) == self.config.images:
                break
            try:
                pictures.append(load_image(path))
            except DECODE_ERRORS as error:
                self.say(f"validation leaves out {path}, which cannot be decoded: {error}")
        if not pictures:
            raise ValueError(f"none of the {len(paths)} validation pictures can be decoded, e.g. {paths[0]}")
        return pictures

    def __call__(
        self, task: Task, images: int, cut_short: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The mean of each measure at each quality, as `psnr/qf10`, the JPEG's own as `jpeg_psnr/qf10`.

        What `task.measure` adds is there under its own names, e.g. as `quality_error/qf10`; of what restores nothing,
        that alone. None where `cut_short`, which is asked before each picture, said so.
        """
        device = next(task.model.parameters()).device
        if self.lpips is not None:
            self.lpips.to(device)
        qualities, pictures = self.config.qualities, self.pictures
        shown_quality = qualities[min(1, len(qualities) - 1)]
        figures: dict[str, float] = {}
        rows: list[list[Tensor]] = []
        told = time.monotonic()
        for place, (quality, number) in enumerate((q, n) for q in qualities for n in range(len(pictures))):
            if cut_short():
                return None
            if time.monotonic() - told > _SECONDS:
                told = time.monotonic()
                self.say(f"validation at {images} images: {place} of {len(qualities) * len(pictures)} pictures")
            seen, measured = self._one(task, quality, number, device)
            for key, value in measured.items():
                figures[f"{key}/qf{quality}"] = figures.get(f"{key}/qf{quality}", 0.0) + value / len(pictures)
            if quality == shown_quality and number < self.config.shown:
                rows.append(seen)
        titles = [f"JPEG, quality {shown_quality}", *(["restored"] if task.restores else []), "original"]
        self.show(images, make_grid(rows, titles))
        self.say(_table(figures, images, qualities))
        return figures

    def _one(
        self, task: Task, quality: int, number: int, device: torch.device
    ) -> tuple[list[Tensor], dict[str, float]]:
        """What is shown of a picture at a quality, side by side, and what is measured."""
        picture = self.pictures[number]
        clean = _tensor(picture).to(device)
        jpeg, pixels = read_jpeg_and_pixels(encode(picture, quality), name=f"picture {number + 1}")
        degraded = pixels[None].to(device)
        measured = task.measure(degraded, torch.tensor([float(quality)], device=device))
        if not task.restores:
            return [degraded[0], clean[0]], measured
        restored = task.restore_file(degraded, jpeg, seed=number)
        measured = {**self._measured(restored, clean, ""), **self._measured(degraded, clean, "jpeg_"), **measured}
        return [degraded[0], restored[0], clean[0]], measured

    def _measured(self, image: Tensor, clean: Tensor, prefix: str) -> dict[str, float]:
        measured = {
            "psnr": metrics.psnr(image, clean).clamp(max=100),
            "ssim": metrics.ssim(image, clean),
            "psnr_b": metrics.psnr_b(image, clean).clamp(max=100),
        }
        if self.lpips is not None:
            measured["lpips"] = self.lpips(image, clean)
        return {prefix + key: float(value) for key, value in measured.items()}


def is_better(
    figures: dict[str, float], before: dict[str, float] | None, wanted: str | None, judged_by: Sequence[str]
) -> bool:
    """Whether figures are better than earlier ones, by one measure's mean over the qualities.

    Args:
        figures: Of a `Validation`.
        before: The earlier ones; None, or without this measure: anything is better.
        wanted: The measure; None for the first of `judged_by` that was measured.
        judged_by: What the training itself goes by.

    Raises:
        ValueError: `wanted` was not measured.
    """
    names = {key.split("/")[0] for key in figures if not key.startswith("jpeg_")}
    if wanted is not None and wanted not in names:
        raise ValueError(f"validation.best: expected one of {', '.join(sorted(names))}, got {wanted!r}.")
    measure = wanted or next((name for name in judged_by if name in names), "psnr")
    before = before or {}
    common = [key for key in figures.keys() & before.keys() if key.split("/")[0] == measure]
    if common:  # where other qualities are asked for now, those that both have
        figures, before = ({key: group[key] for key in common} for group in (figures, before))
    now, then = _mean(figures, measure), _mean(before, measure)
    if math.isnan(now) or math.isnan(then):
        return not math.isnan(now)
    return now < then if measure in LOWER_IS_BETTER else now > then


def _mean(figures: dict[str, float], measure: str) -> float:
    values = [value for key, value in figures.items() if key.split("/")[0] == measure]
    return sum(values) / len(values) if values else math.nan


def _table(figures: dict[str, float], images: int, qualities: Sequence[int]) -> str:
    """One row a quality; measures that the JPEG has as well are shown as before -> after."""
    names = list(dict.fromkeys(key.split("/")[0] for key in figures))
    arrow = " (JPEG -> restored)" if "jpeg_psnr" in names else ""
    lines = [f"validation at {images} images{arrow}"]
    for quality in qualities:
        cells = []
        for name in (name for name in names if not name.startswith("jpeg_")):
            before = f"{figures[f'jpeg_{name}/qf{quality}']:.3f} -> " if f"jpeg_{name}" in names else ""
            cells.append(f"{name.replace('_', ' ')} {before}{figures[f'{name}/qf{quality}']:.3f}")
        lines.append(f"  QF {quality:>3}: " + ", ".join(cells))
    return "\n".join(lines)


def _centre(picture: np.ndarray, side: int, multiple: int) -> np.ndarray:
    """The square in the middle, in multiples of `multiple`, as large as wanted or as the picture allows."""
    height, width = picture.shape[:2]
    side = max(multiple, min(side, height, width) // multiple * multiple)
    picture = np.pad(picture, ((0, max(0, side - height)), (0, max(0, side - width)), (0, 0)), mode="edge")
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    window = picture[top : top + side, left : left + side]
    return np.ascontiguousarray(window)


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32) / np.float32(255))[None]
