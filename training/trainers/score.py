"""DriftRec's score network, and its regression baseline: the same network with another loss."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from restoration.diffusion.prediction import RegressionRestorer, ScoreDenoiser
from restoration.diffusion.samplers import NoiseSource, sample
from restoration.diffusion.sde import make_sde
from restoration.networks.ncsnpp import NCSNpp
from restoration.restorer_file import RestorerFileError, RestorerMetadata
from training.configs.driftrec import DriftRecConfig, RegressionConfig
from training.trainers.task import TaskDefaults


class DriftRecTask(TaskDefaults):
    """Denoising score matching along the drift (paper Eq. 9; here as a weighted error of the predicted image).

    For the paper's `noise` prediction the loss is half the squared error of the noise. The authors sum over a picture
    where this takes the mean; AdamW does not tell the two apart.
    """

    stores_frozen = True  # the frequencies of the noise level
    judged_by = ("lpips", "psnr")

    def __init__(self, config: DriftRecConfig) -> None:
        self.config, self.size_multiple = config, config.network.size_multiple
        sde = make_sde(
            config.sde.name, sigma_min=config.sde.sigma_min, sigma_max=config.sde.sigma_max, gamma=config.sde.drift
        )
        self.model = ScoreDenoiser(_new_network(NCSNpp(config.network), config.run.seed), sde, config.prediction)

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        clean, degraded = batch["clean"], batch["degraded"]
        t_eps = self.config.sde.t_eps
        uniform = torch.rand(clean.shape[0], generator=generator, device=generator.device)
        t = (t_eps + (1 - t_eps) * uniform.cpu().double()).numpy()
        a, sigma = self.model.coefficients(t, clean)
        noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean)
        denoised = model(degraded + a * (clean - degraded) + sigma * noise, degraded, t)
        return 0.5 * (self.model.prediction.loss_weight(a, sigma) * (denoised - clean) ** 2).mean()

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        noise = NoiseSource(torch.Generator().manual_seed(seed))
        return sample("ode_2m", self.model, self.model.sde, degraded, noise, steps=10).clamp(0, 1)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {
            "network": self.config.network.to_dict(),
            "sde": {**asdict(self.config.sde), "gamma": self.config.sde.drift},
            "prediction": asdict(self.config.prediction),
        }
        return RestorerMetadata("driftrec", config, training=training, license=license)

    def tensors(self) -> dict[str, Tensor]:
        return {f"score.{key}": value for key, value in self.model.network.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a DriftRec file, or of a regression file of the same shape (see `place_weights`)."""
        place_weights(self.model.network, _network_tensors(tensors))


class RegressionTask(TaskDefaults):
    """The mean squared (or absolute) error of the restored picture."""

    stores_frozen = True

    def __init__(self, config: RegressionConfig) -> None:
        self.config, self.size_multiple = config, config.network.size_multiple
        network = _new_network(NCSNpp(config.network), config.run.seed)
        self.model = RegressionRestorer(network, config.residual_scale, 1.0 if config.network.conditional else None)

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        error = (model(batch["degraded"]) - batch["clean"]) / (self.config.residual_scale or 1.0)
        return 0.5 * (error**2).mean() if self.config.loss == "l2" else error.abs().mean()

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        return self.model(degraded).clamp(0, 1)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {
            "network": self.config.network.to_dict(),
            "residual_scale": self.config.residual_scale,
            "noise_level": self.model.noise_level,
        }
        return RestorerMetadata("regression", config, training=training, license=license)

    def tensors(self) -> dict[str, Tensor]:
        return {f"regression.{key}": value for key, value in self.model.network.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a regression file of the same shape."""
        place_weights(self.model.network, _network_tensors(tensors))


def place_weights(network: NCSNpp, tensors: dict[str, Tensor]) -> None:
    """Load weights, also those of a regression network into a score network of the same shape.

    The regression sees y, the score network [x_t, y]: where a side of a tensor has the score network's image channels,
    the given values take its last places, which belong to y, and zeros the others. The score network keeps its own
    frequencies of the noise level: at sigma = 1 they do not matter, and there it starts as the regression.

    Raises:
        RestorerFileError: The networks differ in more than that.
    """
    state = network.state_dict()
    if state.keys() != tensors.keys():
        differing = sorted(state.keys() ^ tensors.keys())
        raise RestorerFileError(
            f"the file to start from has another network: {differing[0]} is in one of the two only. "
            "Give a file of `python -m training regression` or `driftrec` with this --network, or leave the option out."
        )
    patch = network.config.patch_size**2
    grows = tensors["output_layer.weight"].shape[1] == 3 * patch and network.config.in_channels == 6
    may_grow = {(3 * patch, 6 * patch)} if grows else set()
    for key, target in state.items():
        given = tensors[key].to(target.dtype)
        if grows and key == "all_modules.0.W":
            continue
        sides = list(zip(given.shape, target.shape, strict=False))
        if given.dim() != target.dim() or any(g != t and (g, t) not in may_grow for g, t in sides):
            raise RestorerFileError(
                f"the file to start from has {key} of {tuple(given.shape)}, not {tuple(target.shape)}. Train with "
                "its --network, or leave the option out."
            )
        if not key.startswith("output_layer"):  # its inputs are zero by then; zeros on both sides would never learn
            target.zero_()
        target[tuple(slice(t - g, t) for g, t in sides)] = given


def _network_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(("score.", "regression."))}


def _new_network(network: NCSNpp, seed: int) -> NCSNpp:
    network.initialize(torch.Generator().manual_seed(seed))
    return network
