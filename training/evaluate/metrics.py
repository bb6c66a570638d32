"""What pictures are measured with: the kinds of metrics, where their weights are, and which can be had here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from training.restore.settings import unsaid

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

LABELS = {
    "psnr": "PSNR",
    "psnr_y": "luma PSNR",
    "ssim": "SSIM",
    "ssim_9": "SSIM (window 9)",
    "ssim_gauss": "SSIM (Gaussian)",
    "psnr_b": "PSNR-B",
    "psnr_b_luma": "PSNR-B (luma)",
    "bef": "BEF",
    "lpips_squeeze": "LPIPS (SqueezeNet)",
    "lpips_alex": "LPIPS (AlexNet)",
    "dists": "DISTS",
    "niqe": "NIQE",
    "musiq": "MUSIQ",
    "maniqa": "MANIQA",
    "clipiqa": "CLIPIQA",
    "fid": "FID",
    "kid": "KID",
}
"""Every metric there is, in the order of tables -> its heading."""
_NETWORKS_EYE = "difference from the original as a network sees it, which is closer to what people see"
_WITHOUT_ORIGINAL = "how good a network that learned people's judgement finds the picture, without the original"
MEANINGS = {
    "psnr": "closeness to the original, pixel by pixel; smooth results do well",
    "psnr_y": "PSNR of the brightness alone",
    "ssim": "closeness of local structure to the original's, 1 is equal",
    "ssim_9": "SSIM with a larger window",
    "ssim_gauss": "SSIM whose window fades to its edges",
    "psnr_b": "PSNR that counts visible blocks as well",
    "psnr_b_luma": "PSNR that counts the blocks of the brightness as well",
    "bef": "how visible the 8x8 blocks are, 0 is none; needs no original",
    "lpips_squeeze": _NETWORKS_EYE,
    "lpips_alex": _NETWORKS_EYE,
    "dists": "difference from the original in structure and texture as a network sees it; texture may be displaced",
    "niqe": "naturalness without knowing the original: distance from what good photographs look like",
    "musiq": _WITHOUT_ORIGINAL,
    "maniqa": _WITHOUT_ORIGINAL,
    "clipiqa": "whether a network of pictures and words finds the picture good rather than bad, without the original",
    "fid": "distance of all results together from all originals: whether they look like such pictures",
    "kid": "as FID, but fair to small sets of pictures",
}
"""Metric -> what it tells, in a clause."""
ON_REQUEST = ("ssim_9", "ssim_gauss", "psnr_b_luma")
"""Measured only where they are named: SSIM with DriftRec's window, SSIM and PSNR-B as in FBCNN's tables."""
_Weights = Annotated[Path | None, unsaid(metavar="FILE")]


class NotMeasuredError(ValueError):
    """A picture that a metric says nothing about, for example because it is too small; the sentence says why."""


@dataclass(frozen=True)
class Metric:
    """A number for one picture.

    Args:
        name: Key in results.
        label: Heading in tables.
        variant: What exactly is computed, with its version.
        better: Which values are.
        digits: Behind the point in tables.
        reference: Whether it needs the clean picture.
        measure: From a picture (1, 3, H, W) in [0, 1], rounded to 8 bits, and the clean one (None where it is not
            needed), both on the device that the metric was found for, to a finite number. Raises `NotMeasuredError`
            where there is none, which leaves this picture out of the metric, and ValueError for wrong shapes.
    """

    name: str
    label: str
    variant: str
    better: Literal["higher", "lower"]
    digits: int
    reference: bool
    measure: Callable[[Tensor, Tensor | None], float]


@dataclass(frozen=True)
class SetMetric:
    """A number for a set of pictures beside a set of clean ones.

    Args:
        name: Key in results.
        label: Heading in tables.
        variant: What exactly is computed, with its version.
        better: Which values are.
        digits: Behind the point in tables.
        features: From a picture (1, 3, H, W) in [0, 1] to its features (D,), float64. Metrics of one network share the
            very same function, so that features may be kept.
        distance: From the features (N, D) of pictures and (M, D) of clean ones to a number. Raises `NotMeasuredError`
            where the sets are too small.
        network: A short name of what `features` runs, with its weights, for files' names.
    """

    name: str
    label: str
    variant: str
    better: Literal["higher", "lower"]
    digits: int
    features: Callable[[Tensor], np.ndarray]
    distance: Callable[[np.ndarray, np.ndarray], float]
    network: str


@dataclass(frozen=True)
class MissingMetric:
    """A metric that cannot be had: its heading, and what to give so that it is measured."""

    label: str
    reason: str


@dataclass(frozen=True)
class MetricFiles:
    """Where the weights of metrics are.

    Args:
        lpips: For LPIPS with SqueezeNet: the network and its heads (lpips_squeeze_f32.npz).
        lpips_alex: For LPIPS with AlexNet: its heads, version 0.1 (alex.pth).
        alexnet: For LPIPS with AlexNet: torchvision's network (alexnet-owt-7be5be79.pth).
        niqe: For NIQE: the model of pristine photographs (BasicSR's niqe_pris_params.npz).
        dists: For DISTS: its authors' weights.pt.
        vgg16: For DISTS: torchvision's VGG16 (vgg16-397923af.pth).
        inception: For FID and KID: Inception-v3 of TensorFlow's FID (pt_inception-2015-12-05-6726825d.pth).
    """

    lpips: _Weights = None
    lpips_alex: _Weights = None
    alexnet: _Weights = None
    niqe: _Weights = None
    dists: _Weights = None
    vgg16: _Weights = None
    inception: _Weights = None


@dataclass(frozen=True)
class Metrics:
    """What can be measured, of single pictures and of sets, and what cannot."""

    single: tuple[Metric, ...]
    sets: tuple[SetMetric, ...]
    missing: tuple[MissingMetric, ...]


def check_names(names: Sequence[str]) -> None:
    """Refuse names of metrics that there are not.

    Raises:
        ValueError: Names each wrong one, and the nearest right one.
    """
    for name in names:
        if name not in LABELS:
            near = difflib.get_close_matches(name, LABELS, n=1)
            hint = f" Perhaps you meant {near[0]}." if near else ""
            raise ValueError(f"--metrics: there is no metric {name}.{hint} There are {', '.join(LABELS)}.")


def find_metrics(
    files: MetricFiles, device: torch.device, *, wanted: Sequence[str] | None = None, also: Sequence[str] = ()
) -> Metrics:
    """Every metric that can be had without a download, ready on a device.

    Args:
        files: Where weights are. Those of pyiqa's metrics are looked for in its cache.
        device: Where networks run.
        wanted: Names of the metrics (see `LABELS`); None or none for all but `ON_REQUEST`. Others are not reported as
            missing.
        also: Names of those to measure beside all, for example what published figures are compared with; nothing where
            `wanted` says what to measure.

    Raises:
        ValueError: A name is unknown, or a given file is not what it should be.
    """
    from training.evaluate.finders import SETS, find_sets, find_single

    check_names((*(wanted or ()), *also))
    names = [name for name in LABELS if (name in wanted if wanted else name not in ON_REQUEST or name in also)]
    found = [find_single(name, files, device) for name in names if name not in SETS]
    found += find_sets([name for name in names if name in SETS], files, device)
    return Metrics(
        tuple(metric for metric in found if isinstance(metric, Metric)),
        tuple(metric for metric in found if isinstance(metric, SetMetric)),
        tuple(metric for metric in found if isinstance(metric, MissingMetric)),
    )
