"""Pictures for the report: for each restorer and condition the first ones, and those it does the least good."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from training.evaluate.metrics import Metric
from training.evaluate.pictures import Degraded
from training.evaluate.store import Measurement

_SIDE = 560
"""Larger pictures are shown by a square in their middle: shrunk, they would not show what happened."""
_WEBP_QUALITY = 85
_NAME = "examples"
_PREFERRED = ("lpips_alex", "lpips_squeeze", "psnr", "niqe", "bef")


@dataclass(frozen=True)
class Example:
    """One picture of the report, as WebP files.

    Args:
        picture: Its name.
        first: Whether it is one of the first.
        worst: Whether it is one of those that the restorer did the least good to.
        metric: The name of the one that chose the worst.
        gain: By how much it is better than the JPEG, in that metric; above 0 is better.
        before: The JPEG.
        after: Restored.
        clean: The original, where there is one.
    """

    picture: str
    first: bool
    worst: bool
    metric: str
    gain: float
    before: bytes
    after: bytes
    clean: bytes | None


def choosing_metric(metrics: Sequence[Metric], wanted: str | None) -> Metric | None:
    """The metric by which pictures are the worst; None where nothing is measured.

    Raises:
        ValueError: The wanted one is not measured.
    """
    known = {metric.name: metric for metric in metrics}
    if wanted is not None and wanted not in known:
        raise ValueError(f"--worst-by: expected a metric that is measured ({', '.join(known)}), got {wanted}.")
    names = [wanted] if wanted is not None else [name for name in _PREFERRED if name in known]
    return known[names[0]] if names else None


class Examples:
    """A folder of them, kept small while an evaluation runs.

    Args:
        parent: Of the folder, which is made when the first one comes.
        count: For each restorer and condition; the odd one is a worst one.
        metric: Chooses the worst; None: none are kept.
        rank: Of this process; each keeps its own, and `chosen` looks at those of all.
    """

    def __init__(self, parent: Path, count: int, metric: Metric | None, rank: int = 0) -> None:
        self.parent, self.metric = parent, metric
        self.folder = parent / (f"{_NAME}-{rank}" if rank else _NAME)
        self.first, self.worst = (count // 2, count - count // 2) if metric is not None else (0, 0)

    def consider(self, measurement: Measurement, jpeg: Measurement | None, degraded: Degraded, image: Tensor) -> None:
        """Keep a restored picture (1, 3, H, W) if it is one of the first or of the worst so far."""
        gain = self.gain(measurement, jpeg)
        if gain is None or measurement.key == (jpeg.key if jpeg else None):
            return
        folder = self.folder / _place(measurement.key.system, measurement.key.condition)
        there = _index(folder)
        first = sum(not entry["worst"] for entry in there.values()) < self.first
        worst = sorted((entry["gain"], name) for name, entry in there.items() if entry["worst"])
        if not first and len(worst) >= self.worst:
            if not worst or gain >= worst[-1][0]:
                return
            _remove(folder, worst[-1][1])
        _write(folder, measurement.key.picture, gain, worst=not first, pictures={
            "before": degraded.pixels, "after": image, **({} if degraded.clean is None else {"clean": degraded.clean}),
        })  # fmt: skip

    def chosen(self, system: str, condition: str, gains: Mapping[str, float]) -> list[Example]:
        """The examples of a system under a condition, the first ones first, then from the worst on.

        Where some of the first are among the worst, too, the next worst fill up the number.

        Args:
            system: Its identity.
            condition: Its label.
            gains: Name -> `gain` of every picture that was measured; others are not shown.
        """
        if self.metric is None:
            return []
        folders = [folder / _place(system, condition) for folder in sorted(self.parent.glob(f"{_NAME}*"))]
        found = [(folder, name, entry) for folder in folders for name, entry in _index(folder).items()
                 if entry["picture"] in gains]  # fmt: skip
        first = sorted((item for item in found if not item[2]["worst"]), key=lambda item: item[2]["picture"])
        taken = {entry["picture"] for _, _, entry in first[: self.first]}
        least = sorted(gains, key=lambda picture: gains[picture])[: self.worst]
        worst = sorted((item for item in found if item[2]["picture"] not in taken),
                       key=lambda item: gains[item[2]["picture"]])  # fmt: skip
        return [
            Example(picture := entry["picture"], picture in taken, picture in least, self.metric.name, gains[picture],
                    _bytes(folder, name, "before"), _bytes(folder, name, "after"), _clean(folder, name))
            for folder, name, entry in (*first[: self.first], *worst[: self.worst])
        ]  # fmt: skip

    def gain(self, measurement: Measurement, jpeg: Measurement | None) -> float | None:
        """By how much a picture is better than the JPEG, in the metric that chooses; None where nobody knows."""
        if self.metric is None or jpeg is None:
            return None
        values = [found.values.get(self.metric.name) for found in (measurement, jpeg)]
        if values[0] is None or values[1] is None:
            return None
        difference = values[0] - values[1]
        return difference if self.metric.better == "higher" else -difference


def _place(system: str, condition: str) -> Path:
    return Path(system) / re.sub(r"[^0-9A-Za-z]+", "-", condition)


def _index(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def _write(folder: Path, picture: str, gain: float, *, worst: bool, pictures: dict[str, Tensor]) -> None:
    """The pictures first, the entry that makes them count last."""
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(picture.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    for kind, image in pictures.items():
        (folder / f"{name}.{kind}.webp").write_bytes(_webp(image))
    temporary = folder / f"{name}.part"
    temporary.write_text(json.dumps({"picture": picture, "worst": worst, "gain": gain}), encoding="utf-8")
    os.replace(temporary, folder / f"{name}.json")


def _remove(folder: Path, name: str) -> None:
    for kind in ("json", "before.webp", "after.webp", "clean.webp"):
        (folder / f"{name}.{kind}").unlink(missing_ok=True)


def _bytes(folder: Path, name: str, kind: str) -> bytes:
    return (folder / f"{name}.{kind}.webp").read_bytes()


def _clean(folder: Path, name: str) -> bytes | None:
    return _bytes(folder, name, "clean") if (folder / f"{name}.clean.webp").exists() else None


def _webp(image: Tensor) -> bytes:
    """The middle of a picture (1, 3, H, W)."""
    top, left = (max(0, length - _SIDE) // 2 for length in image.shape[-2:])
    window = image[0, :, top : top + _SIDE, left : left + _SIDE].cpu()
    levels: np.ndarray = (window * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "WEBP", quality=_WEBP_QUALITY, method=4)
    return buffer.getvalue()
