"""Pictures for the report: for each restorer and condition the first ones, and those it does the least good.

Which ones is chosen from the figures when the report is written. What restored pictures look like is kept for those
that may be chosen, under the key of their measurement; the rest of a picture can be made again at any time.
"""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from training.evaluate.metrics import Metric
from training.evaluate.store import Key, Measurement

_SIDE = 320
"""Larger pictures are shown by a square in their middle: shrunk, they would not show what happened."""
_FOLDER = "crops"
_PREFERRED = ("lpips_alex", "lpips_squeeze", "psnr", "niqe", "bef")
_MOST_CONDITIONS = 6
_MOST_EXAMPLES = 64
"""In one report: without loss each takes about half a MB of it."""


@dataclass(frozen=True)
class Example:
    """One picture of the report, as WebP files without loss.

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


@dataclass(frozen=True)
class Choice:
    """A measurement whose picture the report shows; the rest as in `Example`."""

    measurement: Measurement
    first: bool
    worst: bool
    gain: float


def choosing_metric(metrics: Sequence[Metric], wanted: str | None) -> Metric | None:
    """The metric by which pictures are the worst; None where nothing is measured.

    Raises:
        ValueError: The wanted one is not measured.
    """
    known = {metric.name: metric for metric in metrics}
    if wanted is not None and wanted not in known:
        raise ValueError(f"--worst-by: expected a metric that is measured ({', '.join(known)}), got {wanted}.")
    names = [wanted] if wanted is not None else [*(name for name in _PREFERRED if name in known), *known]
    return known[names[0]] if names else None


def shown_conditions(labels: Sequence[str], restorers: int, count: int) -> list[str]:
    """The conditions that have pictures in the report, spread over all of them, so that its size is bounded.

    Args:
        labels: Of all conditions, in their order.
        restorers: How many have pictures under each.
        count: Pictures for each restorer and condition.
    """
    fitting = _MOST_EXAMPLES // max(1, restorers * count)
    most = min(len(labels), _MOST_CONDITIONS, max(1, fitting))
    return [labels[int(index)] for index in np.linspace(0, len(labels) - 1, most).round()]


class Examples:
    """Chooses pictures, and keeps what restored ones look like.

    Args:
        parent: Of the folder, which is made when the first one comes.
        count: For each restorer and condition; the odd one is a worst one.
        metric: Chooses the worst; None: there are no pictures.
    """

    def __init__(self, parent: Path, count: int, metric: Metric | None) -> None:
        self.folder, self.metric = parent / _FOLDER, metric
        self.count = count if metric is not None else 0
        self._gains: dict[tuple[str, str], list[float]] = {}

    def consider(self, measurement: Measurement, jpeg: Measurement | None, image: Tensor) -> None:
        """Keep a restored picture (1, 3, H, W) that may be chosen: until now few gained less."""
        gain = self.gain(measurement, jpeg)
        if gain is None:
            return
        gains = self._gains.setdefault((measurement.key.system, measurement.key.condition), [])
        if bisect.bisect_right(gains, gain) < self.count:
            self.keep(measurement.key, image)
        bisect.insort(gains, gain)

    def choose(self, measurements: Sequence[Measurement], jpegs: Mapping[str, Measurement]) -> list[Choice]:
        """What the report shows of a restorer under a condition: the first ones, then from the worst on.

        Where some of the first are among the worst, too, the next worst fill up the number.

        Args:
            measurements: Of all its pictures, in their order.
            jpegs: Picture -> the measurement of the JPEG.
        """
        known = [(found, gain) for found in measurements
                 if (gain := self.gain(found, jpegs.get(found.key.picture))) is not None]  # fmt: skip
        by_gain = sorted(range(len(known)), key=lambda index: known[index][1])
        first = range(min(self.count // 2, len(known)))
        worst = self.count - self.count // 2
        indices = [*first, *[index for index in by_gain if index not in first][:worst]]
        return [Choice(known[index][0], index in first, index in by_gain[:worst], known[index][1]) for index in indices]

    def gain(self, measurement: Measurement, jpeg: Measurement | None) -> float | None:
        """By how much a picture is better than the JPEG, in the metric that chooses; None where nobody knows."""
        if self.metric is None or jpeg is None:
            return None
        values = [found.values.get(self.metric.name) for found in (measurement, jpeg)]
        if values[0] is None or values[1] is None:
            return None
        difference = values[0] - values[1]
        return difference if self.metric.better == "higher" else -difference

    def keep(self, key: Key, image: Tensor) -> None:
        """Keep what a restored picture (1, 3, H, W) looks like."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_bytes(as_webp(image))
        os.replace(temporary, path)

    def kept(self, key: Key) -> bytes | None:
        """What a restored picture looks like, if that was kept."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key.short()}.webp"


def as_webp(image: Tensor) -> bytes:
    """The middle of a picture (1, 3, H, W), without loss."""
    top, left = (max(0, length - _SIDE) // 2 for length in image.shape[-2:])
    window = image[0, :, top : top + _SIDE, left : left + _SIDE].cpu()
    levels: np.ndarray = (window * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "WEBP", lossless=True, method=4)
    return buffer.getvalue()
