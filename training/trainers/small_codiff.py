"""CODiff's recipe without Stable Diffusion: CaVE guides a small UNet on DCT latents, both trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from restoration.prompts import CaVEPrompt
from restoration.restorer_file import RestorerMetadata
from training.configs.codiff import CoDiffConfig
from training.trainers.cave import whiten
from training.trainers.codiff import load_prompt
from training.trainers.one_step import Restored, Seen
from training.trainers.small import SmallModel, SmallTask


class SmallCoDiffModel(SmallModel):
    """One timestep for all pictures; CaVE sees the prompt."""

    def see(self, degraded: Tensor, noise: torch.Generator | None) -> Seen:
        """CaVE's cells, projected, and the quality that it tells; nothing is random."""
        prompt = cast(CaVEPrompt, self.prompt)
        features = prompt.network.encode(degraded)
        timestep = torch.full((len(degraded),), prompt.timestep, device=degraded.device)
        return Seen(prompt(features), timestep, prompt.network.quality(features))


class SmallCoDiffTask(SmallTask[SmallCoDiffModel]):
    """The restorer's losses, and the absolute error of the quality that CaVE tells.

    Raises:
        ValueError: The file for CaVE or the perceptual weights are missing or unfit, or the crops are too small.
    """

    def __init__(self, config: CoDiffConfig) -> None:
        generator = torch.Generator().manual_seed(config.run.seed)
        super().__init__(config, generator)
        self.model = SmallCoDiffModel(load_prompt(config, generator), config.unet, generator)

    @torch.no_grad()
    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """Measure the codec's scale, and turn a new CaVE's first filters into ones of decorrelated pixels."""
        super().look(degraded, clean)
        if self.config.cave is None:
            whiten(cast(Tensor, self._prompt.network.m_head.weight), degraded)

    def auxiliary(self, restored: Restored, batch: dict[str, Any]) -> Tensor:
        assert restored.quality is not None
        return self.config.loss.embedder * (restored.quality - batch["quality"]).abs().mean() / 100

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """`quality_error`: the mean absolute error of the quality that CaVE tells."""
        seen = self.model.see(degraded, None)
        assert seen.quality is not None
        return {"quality_error": float((seen.quality - quality).abs().mean())}

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {
            "cave": self._prompt.network.config.to_dict(),
            "context_dim": self.config.unet.context_dim,
            "timestep": float(self.config.timestep),
            "most_tokens": self.config.most_tokens,
            "backbone": self.described_backbone(),
        }
        return RestorerMetadata("codiff", config, training=training, license=license)

    @property
    def _prompt(self) -> CaVEPrompt:
        return cast(CaVEPrompt, self.model.prompt)

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            **super().parts(),
            "prompt": self._prompt.network.state_dict(),
            "projection": self._prompt.projection.state_dict(),
        }
