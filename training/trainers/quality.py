"""SODiff's predictor, trained to tell the JPEG quality alone: the L_QF of its second stage, without the rest.

The file serves as an estimate of the quality, and as the start of the predictor in that stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from restoration.networks.timestep_predictor import TimestepPredictor
from restoration.restorer_file import RestorerMetadata
from training.configs.quality import QualityConfig
from training.trainers.task import COPY_IT, TaskDefaults, load_whole

_PART = "timestep."


class QualityTask(TaskDefaults):
    """The absolute error of the quality, 0 to 100."""

    what_next = f"{COPY_IT}, or give it to SODiff's second stage"
    judged_by = ("quality_error",)
    restores = False

    def __init__(self, config: QualityConfig) -> None:
        self.config = config
        self.size_multiple = config.network.patch
        self.model = TimestepPredictor(config.network)
        self.model.initialize(torch.Generator().manual_seed(config.run.seed))

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        estimated, _ = model(batch["degraded"])
        error = (estimated - batch["quality"]).abs().mean()
        self.note({"quality_error": error})
        return error

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """The picture as it is: this network restores nothing."""
        return degraded

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """`quality_error`: the mean absolute error of the estimated quality."""
        return {"quality_error": float((self.model(degraded)[0] - quality).abs().mean())}

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {"timestep_predictor": self.config.network.to_dict()}
        return RestorerMetadata("quality", config, training=training, license=license)

    def tensors(self) -> dict[str, Tensor]:
        return {_PART + key: value for key, value in self.model.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Start from a predictor of the same shape: a file of this training, or one of SODiff, without its timesteps.

        Raises:
            RestorerFileError: It is another network, or no predictor.
        """
        given = {key.removeprefix(_PART): value for key, value in tensors.items() if key.startswith(_PART)}
        given = {key: value for key, value in given.items() if not key.startswith("timestep_head.")}
        load_whole(self.model, given, f"a quality predictor of {self.config.network}", "quality")
