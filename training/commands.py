"""What `python -m training` can train: one row a command. Nothing of a row is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.trainers.task import Task


@dataclass(frozen=True)
class Command:
    """One kind of training.

    Args:
        summary: What people read in the list.
        presets: Gives the presets by name; `paper` is the default. Each is a dataclass with the fields `data`,
            `optimizer`, `validation` and `run` of `training.configs.common`.
        make_task: From such a configuration to what is trained.
    """

    summary: str
    presets: Callable[[], dict[str, Any]]
    make_task: Callable[[Any], Task]


def _driftrec_presets() -> dict[str, Any]:
    from training.configs.driftrec import PRESETS

    return PRESETS


def _driftrec(config: Any) -> Task:
    from training.trainers.score import DriftRecTask

    return DriftRecTask(config)


def _regression_presets() -> dict[str, Any]:
    from training.configs.driftrec import REGRESSION_PRESETS

    return REGRESSION_PRESETS


def _regression(config: Any) -> Task:
    from training.trainers.score import RegressionTask

    return RegressionTask(config)


def _cave_presets() -> dict[str, Any]:
    from training.configs.cave import PRESETS

    return PRESETS


def _cave(config: Any) -> Task:
    from training.trainers.cave import CaVETask

    return CaVETask(config)


def _codiff_presets() -> dict[str, Any]:
    from training.configs.codiff import PRESETS

    return PRESETS


def _codiff(config: Any) -> Task:
    if config.backbone == "dct-small":
        from training.trainers.small_codiff import SmallCoDiffTask

        return SmallCoDiffTask(config)
    from training.trainers.codiff import CoDiffTask

    return CoDiffTask(config)


def _saipe_presets() -> dict[str, Any]:
    from training.configs.saipe import PRESETS

    return PRESETS


def _saipe(config: Any) -> Task:
    from training.trainers.saipe import SAIPETask

    return SAIPETask(config)


def _sodiff_presets() -> dict[str, Any]:
    from training.configs.sodiff import PRESETS

    return PRESETS


def _sodiff(config: Any) -> Task:
    if config.backbone == "dct-small":
        from training.trainers.small_sodiff import SmallSODiffTask

        return SmallSODiffTask(config)
    from training.trainers.sodiff import SODiffTask

    return SODiffTask(config)


def _quality_presets() -> dict[str, Any]:
    from training.configs.quality import PRESETS

    return PRESETS


def _quality(config: Any) -> Task:
    from training.trainers.quality import QualityTask

    return QualityTask(config)


def _prior_presets() -> dict[str, Any]:
    from training.configs.prior import PRESETS

    return PRESETS


def _prior(config: Any) -> Task:
    from training.trainers.prior import PriorTask

    return PriorTask(config)


COMMANDS = {
    "cave": Command("train CaVE, CODiff's first stage: the embedder of JPEG artefacts", _cave_presets, _cave),
    "saipe": Command("train SAIPE, SODiff's first stage: prompts seen in the picture", _saipe_presets, _saipe),
    "codiff": Command("train CODiff's second stage: SD 2.1 or a small UNet, guided by CaVE", _codiff_presets, _codiff),
    "sodiff": Command(
        "train SODiff's second stage: SD 2.1 or a small UNet, guided by SAIPE",
        _sodiff_presets,
        _sodiff,
    ),
    "driftrec": Command("train a DriftRec score network", _driftrec_presets, _driftrec),
    "regression": Command("train its baseline: the same network, one evaluation", _regression_presets, _regression),
    "prior": Command("train a prior for DDRM: a network that knows pictures in general", _prior_presets, _prior),
    "quality": Command("train SODiff's predictor to tell the JPEG quality alone", _quality_presets, _quality),
}
