"""CODiff's second stage: one step of Stable Diffusion 2.1-base, guided by CaVE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from restoration.networks.cave import CaVEConfig
from restoration.prompts import CaVEPrompt
from restoration.restorer_file import RestorerFileError, RestorerMetadata, load_part
from training.configs.codiff import CoDiffConfig
from training.configs.one_step import LoRAConfig
from training.given_files import read_given
from training.losses import make_perceptual
from training.networks import base_models
from training.networks.base_models import BaseModel, lora_tensors
from training.networks.discriminators import LatentDiscriminator
from training.trainers.one_step import OneStepModel, OneStepTask, Seen, check_crop


class CoDiffModel(OneStepModel):
    """Trained are the adapters of the UNet and of the VAE's encoder, the UNet's first convolution and the projection of
    the prompt.

    Args:
        base: The frozen base model; it is changed in place.
        prompt: CaVE, trained, and the projection of its features.
        config: Adapters, types, what the losses see.
        generator: Draws the adapters.
    """

    def __init__(self, base: BaseModel, prompt: CaVEPrompt, config: CoDiffConfig, generator: torch.Generator) -> None:
        super().__init__(base, prompt, config.base.dtype, clamp_gradient=config.loss.clamp_gradient)
        self.timestep = config.timestep
        for network, targets, lora in (
            (self.unet, base_models.unet_targets(self.unet), config.unet_lora),
            (self.vae, base_models.vae_targets(self.vae), config.vae_lora),
        ):
            base_models.add_lora(network, targets, lora.rank, lora.alpha, generator)
        self.conv_in.requires_grad_(True)
        self.freeze(gradient_checkpointing=config.gradient_checkpointing)
        if self.dtype != torch.float32:
            base_models.compute_in_float32(self.unet.conv_in, self.dtype)

    @property
    def conv_in(self) -> nn.Conv2d:
        """The UNet's first convolution, without its adapter."""
        return self.unet.conv_in.base_layer  # type: ignore[return-value]

    def see(self, degraded: Tensor, noise: torch.Generator | None) -> Seen:
        """CaVE's cells, projected, and the one timestep of all pictures; nothing is random."""
        with torch.no_grad():
            features = self.prompt.network.encode(degraded)  # type: ignore[operator, union-attr]
        timestep = torch.full((len(degraded),), self.timestep, device=degraded.device)
        return Seen(self.prompt(features), timestep)


class CoDiffTask(OneStepTask[CoDiffModel]):
    """Error, perceptual distance and a discriminator on the latents (Guo et al. 2025, section 3.3).

    Raises:
        ValueError: CaVE, the base model or the perceptual weights are missing or unfit, or the crops are too small.
    """

    first_stage = "--cave"
    size_multiple = 32  # of CaVE's cells; the UNet and the VAE make do with 8

    def __init__(self, config: CoDiffConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.run.seed)
        prompt = load_prompt(config, generator)
        self.perceptual = make_perceptual(config.loss.perceptual)
        base = base_models.load_base(config.base.path)
        self.critic = _make_critic(base.unet, config, generator)
        self.critic_optimizer = config.critic_optimizer
        self.model = CoDiffModel(base, prompt, config, generator)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        config = {
            "cave": self._prompt.network.config.to_dict(),
            "context_dim": self._prompt.projection.out_features,
            "timestep": float(self.config.timestep),
            **self.described_lora(),
        }
        return RestorerMetadata("codiff", config, base="sd2.1-base", training=training, license=license)

    @property
    def _prompt(self) -> CaVEPrompt:
        return self.model.prompt  # type: ignore[return-value]

    def lora(self) -> dict[str, LoRAConfig]:
        return {"unet_lora": self.config.unet_lora, "vae_lora": self.config.vae_lora}

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "prompt": self._prompt.network.state_dict(),
            "projection": self._prompt.projection.state_dict(),
            "unet_lora": lora_tensors(self.model.unet),
            "unet.conv_in": self.model.conv_in.state_dict(),
            "vae_lora": lora_tensors(self.model.vae),
        }


def _make_critic(
    unet: UNet2DConditionModel, config: CoDiffConfig, generator: torch.Generator
) -> LatentDiscriminator | None:
    adversarial = config.loss.adversarial
    if adversarial.discriminator == "none":
        return None
    critic = LatentDiscriminator(
        unet, rank=adversarial.rank, alpha=adversarial.alpha, timestep=adversarial.timestep, generator=generator,
        frozen_backbone=adversarial.frozen_backbone, dtype=base_models.DTYPES[config.base.dtype],
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    check_crop(critic, config.data.crop)
    return critic


def load_prompt(config: CoDiffConfig, generator: torch.Generator) -> CaVEPrompt:
    """CaVE from a file of the family `cave` or `codiff`, and a new projection of its features to a prompt.

    Raises:
        ValueError: No file is given, or one without CaVE.
    """
    small = config.backbone == "dct-small"
    context_dim, most = (config.unet.context_dim, config.most_tokens) if small else (base_models.CONTEXT_DIM, None)
    if config.cave is not None:
        prompt = _load_cave(config.cave, context_dim, config.timestep, most)
    elif small:
        prompt = CaVEPrompt(config.embedder, context_dim, config.timestep, most)
        prompt.network.initialize(generator)
    else:
        raise ValueError(
            "cave: CODiff's second stage needs the first. Give --cave a restorer file that `python -m training cave` "
            "wrote, or a CODiff file."
        )
    bound = 1 / math.sqrt(prompt.projection.in_features)  # as torch draws linear layers
    for parameter in prompt.projection.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return prompt


def _load_cave(path: Path, context_dim: int, timestep: float, most_tokens: int | None) -> CaVEPrompt:
    file = read_given(path, "--cave")
    if file.metadata.family not in ("cave", "codiff"):
        raise RestorerFileError(
            f"{file.name} holds no CaVE: it is of the family {file.metadata.family!r}. Give --cave a file of the "
            "family cave or codiff."
        )
    try:
        config = CaVEConfig(**file.metadata.config["cave"])
    except (KeyError, TypeError, ValueError) as error:
        raise RestorerFileError(
            f"{file.name}: its description of CaVE is not valid ({error}). Export it again."
        ) from error
    prompt = CaVEPrompt(config, context_dim, timestep, most_tokens)
    needed = {f"prompt.{key}" for key in prompt.network.state_dict()}  # a first stage has the decoder as well
    encoder = {key: value for key, value in file.tensors.items() if key in needed}
    load_part(prompt.network, replace(file, tensors=encoder), "prompt")
    return prompt
