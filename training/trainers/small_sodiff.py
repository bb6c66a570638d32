"""SODiff's recipe without Stable Diffusion: SAIPE and a predicted timestep guide a small UNet on DCT latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from restoration.networks.timestep_predictor import expected_timestep, gumbel_noise
from restoration.prompts import SAIPEPrompt
from restoration.restorer_file import RestorerMetadata
from training.configs.sodiff import SODiffConfig
from training.trainers.one_step import Restored, Seen
from training.trainers.small import SmallModel, SmallTask, take_backbone
from training.trainers.sodiff import fit_norms, load_prompt, measured_calibration, predictor_norms, seen_figures


class SmallSODiffModel(SmallModel):
    """SAIPE sees the prompt and, beside it, reconstructs the picture; the timestep is predicted."""

    gumbel: bool = True
    """Whether training adds noise to the logits of the timestep."""
    reconstructs: bool = True
    """Whether SAIPE's encoder and decoder are trained, too; without, only what makes tokens of the encoder's map."""

    def train(self, mode: bool = True) -> SmallSODiffModel:
        """As of any module, but the predictor's norms keep the statistics that they were given."""
        super().train(mode)
        for norm in predictor_norms(self.prompt):
            norm.eval()
        return self

    def see(self, degraded: Tensor, noise: torch.Generator | None) -> Seen:
        """SAIPE's tokens, and the expectation of the timestep, with Gumbel noise where `noise` is given."""
        prompt = cast(SAIPEPrompt, self.prompt)
        picture, tokens = prompt.network(degraded) if self.reconstructs else (None, prompt.network.tokens(degraded))
        if prompt.predictor is None:
            assert prompt.timestep is not None
            return Seen(tokens, torch.full((len(degraded),), prompt.timestep, device=degraded.device), None, picture)
        quality, logits = prompt.predictor(degraded)
        drawn = gumbel_noise(logits.shape, noise, logits.device) if noise is not None and self.gumbel else None
        return Seen(tokens, expected_timestep(logits, drawn), quality, picture)


class SmallSODiffTask(SmallTask[SmallSODiffModel]):
    """The restorer's losses, the error of SAIPE's reconstruction, and that of the predicted quality.

    Raises:
        ValueError: A file to start from or the perceptual weights are missing or unfit, or the crops are too small.
    """

    def __init__(self, config: SODiffConfig) -> None:
        generator = torch.Generator().manual_seed(config.run.seed)
        super().__init__(config, generator)
        self.model = SmallSODiffModel(load_prompt(config, generator), config.unet, generator)
        self.model.gumbel, self.model.reconstructs = config.gumbel, config.loss.embedder > 0
        if not self.model.reconstructs:
            self._prompt.network.encoder.requires_grad_(False)
            self._prompt.network.decoder.requires_grad_(False)
        if self._prompt.predictor is not None and config.loss.quality == 0:
            self._prompt.predictor.quality_head.requires_grad_(False)
        if config.unet_from is not None:
            take_backbone(self.model.backbone, config.unet_from)
        self._pictures: list[np.ndarray] = []

    @torch.no_grad()
    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """Measure the codec's scale, and give a new predictor's norms the statistics of pictures."""
        if self.config.unet_from is None:
            super().look(degraded, clean)
        if self.config.predictor_from is None:
            fit_norms(self._prompt, degraded)

    def auxiliary(self, restored: Restored, batch: dict[str, Any]) -> Tensor:
        weights, total = self.config.loss, torch.zeros((), device=restored.pictures.device)
        if restored.reconstruction is not None:
            total = weights.embedder * (restored.reconstruction - batch["clean"]).abs().mean()
        if restored.quality is not None and weights.quality > 0:
            total = total + weights.quality * (restored.quality - batch["quality"]).abs().mean()
        return total

    def take_validation(self, pictures: list[np.ndarray]) -> None:
        self._pictures = pictures

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """`timestep`: as the nodes predict it; `quality_error`: the mean absolute error of the predicted quality."""
        return seen_figures(self.model.see(degraded, None), quality, tells_quality=self._tells_quality)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        prompt = self._prompt
        table = None
        if prompt.predictor is not None and self._tells_quality:
            table = measured_calibration(prompt.predictor, self._pictures)
        config = {
            "saipe": prompt.network.config.to_dict(),
            "timestep_predictor": None if prompt.predictor is None else prompt.predictor.config.to_dict(),
            "timestep": prompt.timestep,
            "calibration": None if table is None else table.to_dict(),
            "tells_quality": self._tells_quality,
            "context_dim": self.config.unet.context_dim,
            "backbone": self.described_backbone(),
        }
        return RestorerMetadata("sodiff", config, training=training, license=license)

    @property
    def _tells_quality(self) -> bool:
        return self._prompt.predictor is not None and self.config.loss.quality > 0

    @property
    def _prompt(self) -> SAIPEPrompt:
        return cast(SAIPEPrompt, self.model.prompt)

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        parts = {**super().parts(), "prompt": self._prompt.network.state_dict()}
        if self._prompt.predictor is not None:
            parts["timestep"] = self._prompt.predictor.state_dict()
        return parts
