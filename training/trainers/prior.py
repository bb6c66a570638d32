"""The prior that DDRM steers: an unconditional network that predicts the noise in photographs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from restoration.compute import Compute
from restoration.diffusion.prior import DiffusionPrior
from restoration.jpeg import JPEGData
from restoration.networks.adm_unet import ADMUNet
from restoration.prior_pipeline import DDRMSettings, restore_ddrm
from restoration.restorer_file import RestorerMetadata
from restoration.tiling import Tiler
from training.configs.prior import PriorConfig
from training.trainers.task import TaskDefaults, load_whole


class PriorTask(TaskDefaults):
    """The mean squared error of the noise, at timesteps drawn evenly (Ho et al. 2020, Eq. 14)."""

    judged_by = ("lpips", "psnr")

    def __init__(self, config: PriorConfig) -> None:
        self.config, self.size_multiple = config, config.network.size_multiple
        network = ADMUNet(config.network)
        network.initialize(torch.Generator().manual_seed(config.run.seed))
        tile = 0 if config.any_size else config.data.crop
        self.model = DiffusionPrior(network, config.schedule, config.max_timestep, tile)

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        clean = 2 * batch["clean"] - 1
        on = generator.device
        t = torch.randint(self.model.max_timestep + 1, (len(clean),), generator=generator, device=on).cpu()
        noise = torch.randn(clean.shape, generator=generator, device=on).to(clean)
        abar = torch.from_numpy(self.model.alphas_cumprod)[t].float().to(clean.device)[:, None, None, None]
        predicted = model(abar.sqrt() * clean + (1 - abar).sqrt() * noise, t.to(clean.device))
        return ((predicted - noise) ** 2).mean()

    def restore_file(self, degraded: Tensor, jpeg: JPEGData, seed: int) -> Tensor:
        """One sample by DDRM, as far up in noise as the prior goes; the node averages several."""
        start = min(DDRMSettings.start, self.model.max_timestep + 1)
        settings = DDRMSettings(min(DDRMSettings.steps, start), start, seed=seed, samples=1)
        compute = Compute(degraded.device, Tiler(self.model.tile, align=math.lcm(16, self.size_multiple)))
        with torch.no_grad():
            return restore_ddrm(self.model, [jpeg], settings, compute=compute).to(degraded.device)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {
            "network": {"architecture": "adm", **self.config.network.to_dict()},
            "schedule": self.config.schedule.to_dict(),
            "max_timestep": self.model.max_timestep,
            "tile": self.model.tile,
        }
        return RestorerMetadata("prior", config, training=training, license=license)

    def tensors(self) -> dict[str, Tensor]:
        return {f"unet.{key}": value for key, value in self.model.network.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a prior of the same shape; where it predicts its variance as well, only the noise's."""
        given = {key.removeprefix("unet."): value for key, value in tensors.items() if key.startswith("unet.")}
        for key in ("out.2.weight", "out.2.bias"):
            if key in given and len(given[key]) == 6 and self.config.network.patch_size == 1:
                given[key] = given[key][:3]
        load_whole(self.model.network, given, "a prior of guided diffusion's shape", "prior")
