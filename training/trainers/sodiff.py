"""SODiff's second stage: one step of Stable Diffusion 2.1-base, guided by SAIPE, at a timestep that is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from restoration.calibration import Calibration
from restoration.networks.saipe import SAIPE, SAIPEConfig
from restoration.networks.timestep_predictor import (
    TimestepPredictor,
    TimestepPredictorConfig,
    expected_timestep,
    gumbel_noise,
)
from restoration.prompts import SAIPEPrompt
from restoration.restorer_file import RestorerFile, RestorerFileError, RestorerMetadata, load_part
from training.configs.one_step import LoRAConfig
from training.configs.sodiff import SODiffConfig
from training.degradation import compress
from training.given_files import read_given
from training.losses import make_perceptual
from training.networks import base_models
from training.networks.base_models import BaseModel, lora_tensors
from training.networks.discriminators import PromptedDiscriminator
from training.trainers.one_step import OneStepModel, OneStepTask, Restored, Seen, check_crop

CALIBRATED_QUALITIES = tuple(range(5, 100, 5))
"""Where the mean timestep is measured for the file's table of it against quality."""
_LOOKED_AT_ONCE = 8


class SODiffModel(OneStepModel):
    """Trained are the adapters of the UNet and the timestep predictor; the VAE is frozen as a whole, and so is SAIPE.

    Args:
        base: The frozen base model; its UNet is changed in place.
        prompt: SAIPE, trained, with a predictor or a fixed timestep.
        config: Adapters, types, what the losses see.
        generator: Draws the adapters.
    """

    def __init__(self, base: BaseModel, prompt: SAIPEPrompt, config: SODiffConfig, generator: torch.Generator) -> None:
        super().__init__(base, prompt, config.base.dtype, clamp_gradient=config.loss.clamp_gradient)
        self.gumbel = config.gumbel
        lora, targets = config.unet_lora, base_models.unet_targets(self.unet)
        base_models.add_lora(self.unet, targets, lora.rank, lora.alpha, generator)
        if prompt.predictor is not None and config.loss.quality == 0:
            prompt.predictor.quality_head.requires_grad_(False)  # what no loss reaches must not wait for gradients
        self.freeze(gradient_checkpointing=config.gradient_checkpointing)

    def train(self, mode: bool = True) -> SODiffModel:
        """As of any module, but SAIPE stays in evaluation mode, and so do the predictor's norms.

        With a picture or two at a time, their own statistics would hide what tells pictures apart, and use would differ
        from training. The stored ones are those of the predictor's own training, or of pictures seen at the start.
        """
        super().train(mode)
        for norm in predictor_norms(self.prompt):
            norm.eval()
        return self

    def see(self, degraded: Tensor, noise: torch.Generator | None) -> Seen:
        """SAIPE's tokens, and the predictor's expectation of the timestep (Eq. 11), with Gumbel noise in training."""
        prompt: SAIPEPrompt = self.prompt  # type: ignore[assignment]
        with torch.no_grad():
            tokens = prompt.network.tokens(degraded)
        if prompt.predictor is None:
            assert prompt.timestep is not None
            return Seen(tokens, torch.full((len(degraded),), prompt.timestep, device=degraded.device))
        quality, logits = prompt.predictor(degraded)
        drawn = gumbel_noise(logits.shape, noise, logits.device) if noise is not None and self.gumbel else None
        return Seen(tokens, expected_timestep(logits, drawn), quality)


class SODiffTask(OneStepTask[SODiffModel]):
    """Error, edge-aware perceptual distance, a discriminator on noised latents, and the error of the quality.

    Raises:
        ValueError: SAIPE, the base model, the discriminator's or the perceptual weights are missing or unfit, or the
            crops are too small.
    """

    first_stage = "--saipe"
    size_multiple = 8

    def __init__(self, config: SODiffConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.run.seed)
        prompt = load_prompt(config, generator)
        self.perceptual = make_perceptual(config.loss.perceptual)
        base = base_models.load_base(config.base.path)
        self.critic = _make_critic(base, prompt.network.config.tokens, config, generator)
        self.critic_optimizer = config.critic_optimizer
        self.model = SODiffModel(base, prompt, config, generator)
        self._pictures: list[np.ndarray] = []

    def auxiliary(self, restored: Restored, batch: dict[str, Any]) -> Tensor | float:
        """The absolute error of the predicted quality (L_QF)."""
        if restored.quality is None or self.config.loss.quality == 0:
            return 0.0
        return self.config.loss.quality * (restored.quality - batch["quality"]).abs().mean()

    @torch.no_grad()
    def look(self, degraded: Tensor, clean: Tensor) -> None:
        """Give a new predictor's norms the statistics of pictures."""
        if self.config.predictor_from is None:
            fit_norms(self._prompt, degraded)

    def take_validation(self, pictures: list[np.ndarray]) -> None:
        self._pictures = pictures

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """`timestep`: as the nodes predict it; `quality_error`: the mean absolute error of the predicted quality."""
        return seen_figures(self.model.see(degraded, None), quality, tells_quality=self._tells_quality)

    def calibration(self) -> Calibration | None:
        """The mean timestep of the validation pictures at each of `CALIBRATED_QUALITIES`."""
        predictor = self._prompt.predictor
        if predictor is None or not self._tells_quality:
            return None
        return measured_calibration(predictor, self._pictures)

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        prompt, calibration = self._prompt, self.calibration()
        config = {
            "saipe": prompt.network.config.to_dict(),
            "timestep_predictor": None if prompt.predictor is None else prompt.predictor.config.to_dict(),
            "timestep": prompt.timestep,
            "calibration": None if calibration is None else calibration.to_dict(),
            "tells_quality": self._tells_quality,
            "context_dim": prompt.network.config.context_dim,
            **self.described_lora(),
        }
        return RestorerMetadata("sodiff", config, base="sd2.1-base", training=training, license=license)

    @property
    def _tells_quality(self) -> bool:
        return self._prompt.predictor is not None and self.config.loss.quality > 0

    @property
    def _prompt(self) -> SAIPEPrompt:
        return self.model.prompt  # type: ignore[return-value]

    def lora(self) -> dict[str, LoRAConfig]:
        return {"unet_lora": self.config.unet_lora}

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        parts = {"prompt": self._prompt.network.state_dict(), "unet_lora": lora_tensors(self.model.unet)}
        if self._prompt.predictor is not None:
            parts["timestep"] = self._prompt.predictor.state_dict()
        return parts


@torch.no_grad()
def measured_calibration(predictor: TimestepPredictor, pictures: Sequence[np.ndarray]) -> Calibration | None:
    """The mean timestep of pictures (H, W, 3), uint8, at each of `CALIBRATED_QUALITIES`; None without pictures."""
    device = next(predictor.parameters()).device
    qualities, timesteps = [], []
    for quality in CALIBRATED_QUALITIES:
        for picture in pictures:
            degraded = torch.from_numpy(compress(picture, quality)).to(device).movedim(-1, 0)[None] / 255
            qualities.append(float(quality))
            timesteps.append(float(expected_timestep(predictor(degraded)[1])))
    return Calibration.fit(qualities, timesteps) if qualities else None


def seen_figures(seen: Seen, quality: Tensor, *, tells_quality: bool) -> dict[str, float]:
    """`timestep`, the mean, and `quality_error`, the mean absolute one against qualities (B,), where it is told."""
    measured = {"timestep": float(seen.timestep.mean())}
    if seen.quality is not None and tells_quality:
        measured["quality_error"] = float((seen.quality - quality).abs().mean())
    return measured


def predictor_norms(prompt: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norms of the timestep predictor; none where the timestep is fixed."""
    predictor = prompt.predictor
    return [] if predictor is None else [part for part in predictor.modules() if isinstance(part, nn.BatchNorm2d)]  # type: ignore[union-attr]


@torch.no_grad()
def fit_norms(prompt: SAIPEPrompt, degraded: Tensor) -> None:
    """Give the predictor's batch norms the statistics of pictures (N, 3, H, W) in [0, 1]."""
    norms = predictor_norms(prompt)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for pictures in degraded.split(_LOOKED_AT_ONCE) if norms else ():
        prompt.predictor(pictures)  # type: ignore[misc]
    for norm in norms:
        norm.eval()


def _make_critic(
    base: BaseModel, tokens: int, config: SODiffConfig, generator: torch.Generator
) -> PromptedDiscriminator | None:
    adversarial = config.loss.adversarial
    if adversarial.discriminator == "none":
        return None
    own = adversarial.discriminator == "sdxl"
    unet = base_models.load_sdxl_unet(adversarial.sdxl) if own else base.unet
    critic = PromptedDiscriminator(
        unet, rank=adversarial.rank, alpha=adversarial.alpha, context_dim=base_models.CONTEXT_DIM,
        tokens=tokens, generator=generator, dtype=base_models.DTYPES[config.base.dtype], take=own,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    check_crop(critic, config.data.crop)
    return critic


def load_prompt(config: SODiffConfig, generator: torch.Generator) -> SAIPEPrompt:
    """SAIPE from the file of a first stage, with a predictor of the timestep, new or from a file, or a fixed timestep.

    Raises:
        ValueError: No first stage is given, or a file without what is asked of it.
    """
    small = config.backbone == "dct-small"
    if config.saipe is not None:
        network = _load_saipe(config.saipe, config.unet.context_dim if small else base_models.CONTEXT_DIM)
    elif small:
        network = SAIPE(config.embedder)
        network.initialize(generator)
    else:
        raise ValueError(
            "saipe: SODiff's second stage needs the first. Give --saipe a restorer file that `python -m training "
            "saipe` wrote, or a SODiff file."
        )
    predictor = None if config.timestep is not None else _load_predictor(config, generator)
    return SAIPEPrompt(network, predictor, config.timestep)


def _load_saipe(path: Path, context_dim: int) -> SAIPE:
    file = _read(path, ("saipe", "sodiff"), "saipe")
    network = SAIPE(_described(file, "saipe", SAIPEConfig))
    load_part(network, file, "prompt")
    if network.config.context_dim != context_dim:
        raise RestorerFileError(
            f"{file.name}: its prompt is {network.config.context_dim} wide, the base model's {context_dim}. Train a "
            "first stage with that width."
        )
    return network


def _load_predictor(config: SODiffConfig, generator: torch.Generator) -> TimestepPredictor:
    predictor = TimestepPredictor(config.predictor)
    predictor.initialize(generator)
    if config.predictor_from is not None:
        file = _read(config.predictor_from, ("quality", "sodiff"), "predictor-from")
        described = _described(file, "timestep_predictor", TimestepPredictorConfig)
        if replace(described, timesteps=config.predictor.timesteps) != config.predictor:
            raise RestorerFileError(
                f"{file.name} holds a predictor {described}, not {config.predictor}. Give --predictor the same shape."
            )
        _take_shared(predictor, file)
    return predictor


def _take_shared(predictor: TimestepPredictor, file: RestorerFile) -> None:
    """Everything that both have; a predictor of the quality alone lacks the branch of the timesteps."""
    own, given = predictor.state_dict(), file.part("timestep")
    own.update({key: value for key, value in given.items() if key in own and own[key].shape == value.shape})
    load_part(predictor, replace(file, tensors={f"timestep.{key}": value for key, value in own.items()}), "timestep")


def _read(path: Path, families: tuple[str, ...], option: str) -> RestorerFile:
    file = read_given(path, f"--{option}")
    if file.metadata.family not in families:
        raise RestorerFileError(
            f"{file.name} is of the family {file.metadata.family!r}. Give --{option} a file of the family "
            f"{' or '.join(families)}."
        )
    return file


def _described(file: RestorerFile, part: str, kind: Any) -> Any:
    try:
        return kind(**file.metadata.config[part])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"its description of {part} is not valid ({error})"
        raise RestorerFileError(f"{file.name}: {reason}. Export it again.") from error
