"""CODiff's first stage: CaVE learns to restore JPEGs (implicitly) and to tell their quality (explicitly).

The paper's loss is L_QF + 1000 L_rec (Guo et al. 2025, Eq. 5); its code's L_rec + 0.001 L_QF is the same to Adam.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.networks.cave import STRIDE, CaVE
from restoration.restorer_file import RestorerMetadata
from training.configs.cave import CaVETrainingConfig
from training.trainers.task import TaskDefaults, load_whole

_PART = "prompt."
_WHITENING_EPS = 1e-5
"""Variance below which a direction of the patches counts as noise; pixels in [0, 1]."""
_WHITENED_DEVIATION = 0.3


class CaVETask(TaskDefaults):
    """The absolute errors of the reconstruction and of the level (100 - quality) / 100."""

    stores_frozen = True  # the half that is not learnt, where one of the two is turned off
    size_multiple = STRIDE
    what_next = "give it to the second stage: python -m training codiff --cave FILE"

    def __init__(self, config: CaVETrainingConfig) -> None:
        self.config = config
        self.model = CaVE(config.network)
        self.model.initialize(torch.Generator().manual_seed(config.run.seed))
        if not config.explicit:
            self.model.qf_pred.requires_grad_(False)
        if not config.implicit:
            for part in self._decoder():
                part.requires_grad_(False)

    @property
    def judged_by(self) -> tuple[str, ...]:  # type: ignore[override]
        """Its quality is what the second stage needs."""
        return ("quality_error", "psnr")

    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """With `whitened`: turn the orthogonal filters of the first convolution into ones of decorrelated pixels."""
        if self.config.initialization == "whitened":
            with torch.no_grad():
                whiten(cast(Tensor, self.model.m_head.weight), degraded)

    def _decoder(self) -> list[nn.Module]:
        model = self.model
        return [model.m_body_decoder, model.m_up3, model.m_up2, model.m_up1, model.m_tail]

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        degraded, clean = self._cut(batch["degraded"], generator), batch["clean"]
        reconstruction, level = model(degraded)
        total, parts = torch.zeros((), device=level.device), {}
        if self.config.implicit:
            clean = clean[..., : degraded.shape[-2], : degraded.shape[-1]]
            parts["loss/pixels"] = (reconstruction - clean).abs().mean()
            total = total + parts["loss/pixels"]
        if self.config.explicit:
            expected = (100 - batch["quality"]) / 100
            error = (level.float() - expected).abs().mean()
            parts["quality_error"] = 100 * error
            total = total + self.config.quality_weight * error
        self.note(parts)
        return total

    def _cut(self, degraded: Tensor, generator: torch.Generator) -> Tensor:
        """The upper left square of one of the sides to be trained on, where the block grid begins."""
        if not self.config.sides:
            return degraded
        drawn = int(torch.randint(len(self.config.sides), (), generator=generator, device=generator.device))
        side = self.config.sides[drawn]
        return degraded[..., :side, :side]

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """The reconstruction; meaningless without the implicit learning."""
        return self.model(degraded)[0].clamp(0, 1)

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """`quality_error`: the mean absolute error of the estimated quality, as the nodes estimate it."""
        if not self.config.explicit:
            return {}
        estimated = self.model.quality(self.model.encode(degraded))
        return {"quality_error": float((estimated - quality).abs().mean())}

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        return RestorerMetadata("cave", {"cave": self.config.network.to_dict()}, training=training, license=license)

    def tensors(self) -> dict[str, Tensor]:
        return {_PART + key: value for key, value in self.model.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Start from a whole CaVE of the same shape: a restorer file of this stage.

        Raises:
            RestorerFileError: It is another network, or a CaVE without its decoder, as CODiff's files hold.
        """
        given = {key.removeprefix(_PART): value for key, value in tensors.items() if key.startswith(_PART)}
        network = self.config.network
        expected = f"a whole CaVE of widths {network.widths}, {network.blocks} blocks each"
        load_whole(self.model, given, expected, "cave")


def whiten(filters: Tensor, pictures: Tensor) -> None:
    """Give filters (out, 3, k, k) responses to pictures (N, 3, H, W) that are uncorrelated, with equal deviations.

    Each row o becomes s o C^(-1/2) with C the covariance of the pictures' k x k patches, as in ZCA whitening.
    """
    size = filters.shape[-1]
    patches = F.unfold(pictures.double(), size, stride=2).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    inverse_root = vectors * (values + _WHITENING_EPS).rsqrt() @ vectors.T
    rows = F.normalize(filters.double().flatten(1), dim=1)
    filters.copy_((_WHITENED_DEVIATION * rows @ inverse_root).view_as(filters))
