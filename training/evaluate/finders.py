"""From the name of a metric to the function that measures it, or to what it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from restoration import metrics
from restoration.dists import load_dists
from restoration.lpips import load_lpips_squeeze
from restoration.niqe import load_niqe
from training.evaluate.alexnet_lpips import load_alexnet_lpips
from training.evaluate.digests import weights_variant
from training.evaluate.distributions import fid, kid
from training.evaluate.inception import WEIGHTS, load_inception
from training.evaluate.metrics import (
    LABELS,
    Metric,
    MetricFiles,
    Metrics,
    MissingMetric,
    NotMeasuredError,
    SetMetric,
)
from training.evaluate.paper_metrics import gaussian_ssim, luma_psnr_b
from training.evaluate.pyiqa_metrics import Unavailable, create

Compare = Callable[[Tensor, Tensor], Tensor]
"""From a picture and the clean one (1,3,H,W) to one number; the clean one may be left alone."""
Better = Literal["higher", "lower"]
_LEVELS = 255**2
_BEF = (
    "mean of the RGB channels, in squared levels of 8 bits; DriftRec's Table III has the sum of the channels, times "
    "1e4 of [0, 1]"
)


class _Row(NamedTuple):
    """What is known of a metric before its network is there."""

    variant: str
    better: Better
    digits: int
    reference: bool = True


def _blocking(picture: Tensor, _: Tensor) -> Tensor:
    return _LEVELS * metrics.blockiness(picture)


_PIXELS: dict[str, tuple[Compare, _Row]] = {
    "psnr": (metrics.psnr, _Row("RGB", "higher", 3)),
    "psnr_y": (metrics.psnr_y, _Row("BT.601 luma of 16 to 235, as MATLAB's rgb2ycbcr, not rounded", "higher", 3)),
    "ssim": (metrics.ssim, _Row("RGB, uniform window of 7, as scikit-image", "higher", 4)),
    "ssim_9": (partial(metrics.ssim, win_size=9), _Row("RGB, uniform window of 9, as DriftRec", "higher", 4)),
    "ssim_gauss": (gaussian_ssim, _Row("RGB, Gaussian window of 11, as Wang et al. and FBCNN", "higher", 4)),
    "psnr_b": (metrics.psnr_b, _Row("RGB, mean of the channels' dB", "higher", 3)),
    "psnr_b_luma": (luma_psnr_b, _Row("RGB, with the blocking of luma, as FBCNN", "higher", 3)),
    "bef": (_blocking, _Row(_BEF, "lower", 2, reference=False)),
}
_OWN = {
    "lpips_squeeze": _Row("SqueezeNet 1.1, v0.1", "lower", 4),
    "lpips_alex": _Row("AlexNet, v0.1", "lower", 4),
    "dists": _Row("VGG16, whole picture", "lower", 4),
    "niqe": _Row("luma, blocks of 96 as the authors, float64", "lower", 3, reference=False),
}
_PYIQA = {
    "lpips_alex": _Row("AlexNet, v0.1", "lower", 4),
    "dists": _Row("VGG16, whole picture", "lower", 4),
    "niqe": _Row("luma, blocks of 96", "lower", 3, reference=False),
    "musiq": _Row("koniq10k", "higher", 2, reference=False),
    "maniqa": _Row("koniq10k", "higher", 4, reference=False),
    "clipiqa": _Row("RN50", "higher", 4, reference=False),
}
_SETS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], _Row]] = {
    "fid": (fid, _Row("2048 features, resized to 299x299 as pytorch-fid", "lower", 2)),
    "kid": (kid, _Row("2048 features, resized to 299x299 as pytorch-fid, cubic kernel, unbiased", "lower", 5)),
}
SETS = tuple(_SETS)
"""Names of the metrics of sets."""


def find_single(name: str, files: MetricFiles, device: torch.device) -> Metric | MissingMetric:
    """A metric of single pictures, with its network on a device: from its file, else through pyiqa.

    Raises:
        ValueError: A given file is not what it should be.
    """
    if name in _PIXELS:
        compare, row = _PIXELS[name]
        return _metric(name, row, compare)
    compare, reasons = None, []
    if name in _OWN:
        compare = _own(name, files, device)
        if compare is not None:
            row, weights = _OWN[name], weights_variant(_weights_of(name, files))
            return _metric(name, row._replace(variant=f"{row.variant}, {weights}"), compare)
        reasons.append(_LACKING[name])
    if name in _PYIQA:
        found = create(name, device)
        if not isinstance(found, Unavailable):
            row = _PYIQA[name]
            return _metric(name, row._replace(variant=f"pyiqa {found.version}, {row.variant}"), found.compare)
        reasons.append(found.reason)
    return MissingMetric(LABELS[name], "; or ".join(reasons))


def find_sets(names: Sequence[str], files: MetricFiles, device: torch.device) -> list[SetMetric | MissingMetric]:
    """Metrics of sets, which share one network on a device.

    Raises:
        ValueError: The given file is not what it should be.
    """
    if not names:
        return []
    if files.inception is None:
        return [MissingMetric(LABELS[name], f"give --weights.inception {WEIGHTS}") for name in names]
    network, weights = load_inception(files.inception).to(device), weights_variant([files.inception])

    @torch.inference_mode()
    def features(picture: Tensor) -> np.ndarray:
        _check_shapes("Inception-v3", picture, None)
        return network(picture)[0].double().cpu().numpy()

    rows = ((name, *_SETS[name]) for name in names)
    return [
        SetMetric(name, LABELS[name], f"{row.variant}, {weights}", row.better, row.digits, features, distance,
                  f"inception-{weights.split()[-1]}")
        for name, distance, row in rows
    ]  # fmt: skip


def without_clean(metrics: Metrics) -> Metrics:
    """What can be measured of pictures whose originals nobody has; the rest is missing."""
    gone = [metric for metric in (*metrics.single, *metrics.sets) if isinstance(metric, SetMetric) or metric.reference]
    missing = [MissingMetric(metric.label, "it compares with clean pictures: give --data") for metric in gone]
    single = tuple(metric for metric in metrics.single if not metric.reference)
    return Metrics(single, (), (*metrics.missing, *missing))


_LACKING = {
    "lpips_squeeze": "give --weights.lpips lpips_squeeze_f32.npz",
    "lpips_alex": "give both --weights.lpips-alex alex.pth and --weights.alexnet alexnet-owt-7be5be79.pth",
    "dists": "give both --weights.dists weights.pt and --weights.vgg16 vgg16-397923af.pth",
    "niqe": "give --weights.niqe niqe_pris_params.npz",
}


def _weights_of(name: str, files: MetricFiles) -> list[Path]:
    """The files of the pack's own network."""
    found = {"lpips_squeeze": [files.lpips], "lpips_alex": [files.lpips_alex, files.alexnet],
             "dists": [files.dists, files.vgg16], "niqe": [files.niqe]}  # fmt: skip
    return [path for path in found[name] if path is not None]


def _own(name: str, files: MetricFiles, device: torch.device) -> Compare | None:
    """The pack's own network, where its files are given."""
    if name == "lpips_squeeze" and files.lpips is not None:
        return load_lpips_squeeze(files.lpips).to(device)
    if name == "lpips_alex" and files.lpips_alex is not None and files.alexnet is not None:
        return load_alexnet_lpips(files.alexnet, files.lpips_alex).to(device)
    if name == "dists" and files.dists is not None and files.vgg16 is not None:
        return load_dists(files.vgg16, files.dists).to(device)
    if name == "niqe" and files.niqe is not None:
        niqe = load_niqe(files.niqe)
        if device.type != "mps":  # which has no float64
            niqe = niqe.to(device)
        return lambda picture, _: niqe(picture)
    return None


def _metric(name: str, row: _Row, compare: Compare) -> Metric:
    label = LABELS[name]

    @torch.inference_mode()
    def measure(picture: Tensor, clean: Tensor | None) -> float:
        if row.reference and clean is None:
            raise ValueError(f"{label}: expected the clean picture as well, got none.")
        _check_shapes(label, picture, clean if row.reference else None)
        try:
            value = float(compare(picture, picture if clean is None else clean))
        except ValueError as error:  # of the right shape, so its size or its content does not do
            raise NotMeasuredError(f"{label}: {str(error).removeprefix(f'{label}: ')}") from error
        if not math.isfinite(value):
            why = "the picture equals the clean one" if value > 0 and row.better == "higher" else "no number"
            raise NotMeasuredError(f"{label} is {value}: {why}.")
        return value

    return Metric(name, label, row.variant, row.better, row.digits, row.reference, measure)


def _check_shapes(label: str, picture: Tensor, clean: Tensor | None) -> None:
    if picture.ndim != 4 or picture.shape[:2] != (1, 3):
        raise ValueError(f"{label}: expected one picture (1,3,H,W), got {tuple(picture.shape)}.")
    if clean is not None and clean.shape != picture.shape:
        shapes = f"{tuple(picture.shape)} and {tuple(clean.shape)}"
        raise ValueError(f"{label}: expected the clean picture to have the same size, got {shapes}.")
