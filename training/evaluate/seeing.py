"""What restorers' own networks see in a compressed picture: its quality, and the prompt that they make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from restoration.compute import Compute
from restoration.embedding import embed_with_cave, embed_with_saipe, predict_timesteps
from restoration.networks.cave import CaVE, CaVEConfig
from restoration.prompts import CaVEPrompt, QualityEstimator, SAIPEPrompt
from restoration.restorer_file import RestorerFile, load_part, read_restorer
from restoration.restorers import build_restorer, load_weights
from training.evaluate.systems import RestorerOnDisk

_SEES = {
    "quality": ("cave", "codiff", "sodiff", "quality"),
    "embeddings": ("cave", "codiff", "saipe", "sodiff"),
}
"""Protocol -> the families that have what it asks for."""


@dataclass(frozen=True)
class Seen:
    """What a network sees in one picture.

    Args:
        quality: 0 to 100; None where it tells none.
        embedding: (D,), the mean of its prompt's tokens; None where it makes no prompt.
    """

    quality: float | None
    embedding: Tensor | None


See = Callable[[Tensor], Seen]
"""From a picture (1, 3, H, W) in [0, 1] to what is seen in it."""


def seeing(protocol: str, restorers: Sequence[RestorerOnDisk]) -> list[RestorerOnDisk]:
    """The restorers that a protocol can ask.

    Raises:
        ValueError: There are none.
    """
    found = [restorer for restorer in restorers if _can(protocol, restorer)]
    if not found:
        given = ", ".join(f"{restorer.label} ({restorer.metadata.family})" for restorer in restorers) or "none"
        raise ValueError(
            f"--protocol {protocol}: expected a --restorer of the families {', '.join(_SEES[protocol])}, got {given}."
        )
    return found


def _can(protocol: str, restorer: RestorerOnDisk) -> bool:
    family, config = restorer.metadata.family, restorer.metadata.config
    if family == "sodiff" and protocol == "quality":
        return config.get("timestep_predictor") is not None and config.get("tells_quality", True)
    return family in _SEES[protocol]


def load_seeing(restorer: RestorerOnDisk, device: torch.device) -> See:
    """The networks of a file that look at pictures, in single precision.

    Raises:
        RestorerFileError: The file is not whole.
    """
    file = read_restorer(restorer.path)
    compute = Compute(device)
    if file.metadata.family == "cave":
        return _cave(file, device)
    model = build_restorer(file.metadata, file.name)
    load_weights(model, file)
    model.to(device).eval().requires_grad_(False)
    if isinstance(model, QualityEstimator):
        return lambda image: Seen(_first(predict_timesteps(model.network, image, compute=compute)[1]), None)
    if isinstance(model, CaVEPrompt):
        return lambda image: _of_cave(*embed_with_cave(model, image, compute=compute))
    return lambda image: _of_saipe(cast(SAIPEPrompt, model), image, compute)


def _cave(file: RestorerFile, device: torch.device) -> See:
    """A first stage of CODiff, which has features but no tokens."""
    network = CaVE(CaVEConfig(**file.metadata.config["cave"]))
    load_part(network, file, "prompt")
    network.to(device).eval().requires_grad_(False)

    def see(image: Tensor) -> Seen:
        features = network.encode(image.to(device))
        return Seen(_first(network.quality(features)), features.mean(dim=(2, 3))[0].float().cpu())

    return see


def _of_cave(tokens: Tensor, quality: Tensor) -> Seen:
    return Seen(_first(quality), tokens.mean(dim=1)[0].float().cpu())


def _of_saipe(prompt: SAIPEPrompt, image: Tensor, compute: Compute) -> Seen:
    tokens, _ = embed_with_saipe(prompt, image, compute=compute)
    quality = None
    if prompt.predictor is not None and prompt.tells_quality:
        quality = _first(predict_timesteps(prompt.predictor, image, compute=compute)[1])
    return Seen(quality, tokens.mean(dim=1)[0].float().cpu())


def _first(values: Tensor) -> float:
    return float(values[0])
