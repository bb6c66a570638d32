"""From a restorer file to a network that restores: one row for each family that this version runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .calibration import Calibration
from .diffusion.one_step import TIMESTEPS
from .diffusion.prediction import Prediction, RegressionRestorer, ScoreDenoiser
from .diffusion.prior import DiffusionPrior, NoiseSchedule
from .diffusion.sde import make_sde
from .networks.adm_unet import ADMUNet, ADMUNetConfig
from .networks.cave import CaVEConfig
from .networks.dct_codec import DCTCodec
from .networks.ddpm_unet import DDPMUNet, DDPMUNetConfig
from .networks.ncsnpp import NCSNpp, NCSNppConfig
from .networks.saipe import SAIPE, SAIPEConfig
from .networks.small_unet import SmallUNetConfig
from .networks.timestep_predictor import TimestepPredictor, TimestepPredictorConfig
from .prompts import CaVEPrompt, QualityEstimator, SAIPEPrompt
from .restorer_file import RestorerFile, RestorerFileError, RestorerMetadata, load_part

_WIDEST = 4096
_MOST_LEVELS = 10
_MOST_BLOCKS = 100
_MOST_CLASSES = 100_000
DCT_SMALL = "dct-small"
"""The kind of backbone that is a `SmallUNetConfig` on DCT latents: parts `unet` (by diffusers' names) and `codec`."""
_PREDICTOR = "timestep"
"""The part of a file that holds the predictor of quality and timestep."""

Restorer = ScoreDenoiser | RegressionRestorer | DiffusionPrior | CaVEPrompt | SAIPEPrompt | QualityEstimator
"""Modules with a `network` and a `compute_dtype`."""


def build_restorer(
    metadata: RestorerMetadata, name: str, *, operations: ModuleType | type = nn, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Restorer:  # fmt: skip
    """The modules that a file describes, without its weights.

    Args:
        metadata: The file's description.
        name: The file's name, for messages.
        operations: Namespace of the layers: `torch.nn`, or one of ComfyUI's.
        dtype: Type of the weights.
        device: Where they are made.

    Raises:
        RestorerFileError: The family restores nothing, or its configuration is not valid.
    """
    if metadata.family == "cave":
        raise RestorerFileError(
            f"{name}: the first stage of CODiff's training alone, which restores nothing. Train the second on it: "
            f"python -m training codiff --cave {name}."
        )
    try:
        return _FAMILIES[metadata.family].build(
            metadata.config, {"operations": operations, "dtype": dtype, "device": device}
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RestorerFileError(
            f"{name}: its configuration is not valid ({error}). Download or export it again."
        ) from error


def load_weights(restorer: Restorer, file: RestorerFile, *, assign: bool = False) -> None:
    """Put a file's weights into the modules made by `build_restorer`.

    Raises:
        RestorerFileError: They do not fit.
    """
    for name, part in _FAMILIES[file.metadata.family].parts.items():
        module = getattr(restorer, name)
        if module is not None:
            load_part(module, _single(file) if part == _PREDICTOR else file, part, assign=assign)


def backbone_of(metadata: RestorerMetadata, name: str) -> SmallUNetConfig | None:
    """The UNet that a one-step restorer brings along with its codec; None of other families, and of adapters of a base.

    Raises:
        RestorerFileError: It is not described, or not validly.
    """
    if metadata.family not in ("codiff", "sodiff") or metadata.base is not None:
        return None
    try:
        described = dict(metadata.config["backbone"])
        if described.pop("kind") != DCT_SMALL:
            raise ValueError(f"a backbone of the kind {metadata.config['backbone']['kind']!r}, not {DCT_SMALL!r}")
        config = SmallUNetConfig(**described)
        if config.context_dim != metadata.config["context_dim"]:
            raise ValueError(f"context_dim {metadata.config['context_dim']!r}, but a backbone of {config.context_dim}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RestorerFileError(f"{name}: its backbone is not valid ({error}). Download or export it again.") from error
    return config


def codec_of(file: RestorerFile) -> DCTCodec:
    """The codec that a file's backbone was trained on.

    Raises:
        RestorerFileError: It is missing, or not valid.
    """
    codec = DCTCodec()
    load_part(codec, file, "codec")
    if not bool(torch.isfinite(codec.scale).all() and (codec.scale > 0).all()):
        raise RestorerFileError(
            f"{file.name}: expected codec.scale to be above 0, got {float(codec.scale.min()):g} as its least. Export "
            "or download the file again."
        )
    return codec.eval().requires_grad_(False)


def _single(file: RestorerFile) -> RestorerFile:
    """A file with the predictor's weights in single precision, in which they stay where tensors are assigned."""
    single = {
        key: value.float() if key.startswith(f"{_PREDICTOR}.") and value.is_floating_point() else value
        for key, value in file.tensors.items()
    }
    return replace(file, tensors=single)


def _build_driftrec(config: dict[str, Any], factory: dict[str, Any]) -> ScoreDenoiser:
    parameters = {key: float(config["sde"][key]) for key in ("sigma_min", "sigma_max", "gamma")}
    network = _build_ncsnpp(config["network"], 6, factory)
    sde = make_sde(config["sde"]["name"], **parameters)
    return ScoreDenoiser(network, sde, Prediction(**config["prediction"]), float(config["sde"].get("t_eps", 0.0)))


def _build_regression(config: dict[str, Any], factory: dict[str, Any]) -> RegressionRestorer:
    network = _build_ncsnpp(config["network"], 3, factory)
    level = config["noise_level"]
    return RegressionRestorer(network, float(config["residual_scale"]), None if level is None else float(level))


def _build_ncsnpp(config: dict[str, Any], in_channels: int, factory: dict[str, Any]) -> NCSNpp:
    parsed = NCSNppConfig(**config)
    if (parsed.in_channels, parsed.out_channels) != (in_channels, 3):
        raise ValueError(f"{parsed.in_channels} channels in and {parsed.out_channels} out, not {in_channels} and 3")
    if parsed.width * max(parsed.channel_multipliers) > _WIDEST or len(parsed.channel_multipliers) > _MOST_LEVELS:
        raise ValueError(f"a network of width {parsed.width} and levels {parsed.channel_multipliers} is no restorer")
    if parsed.res_blocks > _MOST_BLOCKS:
        raise ValueError(f"a network of {parsed.res_blocks} blocks at each level is no restorer")
    return NCSNpp(parsed, **factory)


def _build_prior(config: dict[str, Any], factory: dict[str, Any]) -> DiffusionPrior:
    shape = dict(config["network"])
    architecture = shape.pop("architecture")
    if architecture not in _PRIOR_NETWORKS:
        raise ValueError(f"a network {architecture!r}, not one of {', '.join(_PRIOR_NETWORKS)}")
    network_config, network = _PRIOR_NETWORKS[architecture]
    parsed = network_config(**shape)
    widest = parsed.width * max(parsed.channel_multipliers)
    if widest > _WIDEST or len(parsed.channel_multipliers) > _MOST_LEVELS or parsed.res_blocks > _MOST_BLOCKS:
        raise ValueError(f"a network of width {widest:g} and {parsed.res_blocks} blocks at each level is no prior")
    if parsed.in_channels != 3 or parsed.out_channels not in (3, 6) or parsed.classes > _MOST_CLASSES:
        raise ValueError(f"{parsed.in_channels} channels in and {parsed.out_channels} out, not 3 and 3 or 6")
    schedule = NoiseSchedule(**config["schedule"])
    return DiffusionPrior(network(parsed, **factory), schedule, int(config["max_timestep"]), int(config["tile"]))


def _build_codiff(config: dict[str, Any], factory: dict[str, Any]) -> CaVEPrompt:
    cave = CaVEConfig(**config["cave"])
    timestep, context_dim = _timestep(config["timestep"]), config["context_dim"]
    if max(cave.widths) > _WIDEST or cave.blocks > _MOST_BLOCKS:
        raise ValueError(f"a CaVE of widths {cave.widths} and {cave.blocks} blocks is no restorer's")
    if not isinstance(context_dim, int) or not 0 < context_dim <= _WIDEST:
        raise ValueError(f"tokens of width {context_dim!r} are no restorer's")
    most_tokens = config.get("most_tokens")
    if most_tokens is not None and (not isinstance(most_tokens, int) or most_tokens < 1):
        raise ValueError(f"most_tokens {most_tokens!r}, neither null nor a number of tokens")
    return CaVEPrompt(cave, context_dim, timestep, most_tokens, **factory)


def _build_sodiff(config: dict[str, Any], factory: dict[str, Any]) -> SAIPEPrompt:
    network = _build_saipe(config, factory).network
    if config["context_dim"] != network.config.context_dim:
        raise ValueError(f"context_dim {config['context_dim']!r}, but a SAIPE of {network.config.context_dim}")
    if config["timestep_predictor"] is None:
        return SAIPEPrompt(network, None, _timestep(config["timestep"]))
    predictor = _build_predictor(config["timestep_predictor"], factory)
    if not 2 <= predictor.config.timesteps <= TIMESTEPS:
        raise ValueError(f"a predictor of {predictor.config.timesteps} timesteps, not of 2 to {TIMESTEPS}")
    calibration, tells_quality = config.get("calibration"), config.get("tells_quality", True)
    if not isinstance(tells_quality, bool):
        raise ValueError(f"tells_quality {tells_quality!r}, neither true nor false")
    table = None if calibration is None or not tells_quality else _calibration(calibration)
    return SAIPEPrompt(network, predictor, None, table, tells_quality=tells_quality)


def _build_saipe(config: dict[str, Any], factory: dict[str, Any]) -> SAIPEPrompt:
    return SAIPEPrompt(SAIPE(SAIPEConfig(**config["saipe"]), **factory))


def _build_quality(config: dict[str, Any], factory: dict[str, Any]) -> QualityEstimator:
    network = _build_predictor(config["timestep_predictor"], factory)
    if network.config.timesteps:
        raise ValueError(f"a predictor of {network.config.timesteps} timesteps, not of the quality alone")
    return QualityEstimator(network)


def _build_predictor(config: dict[str, Any], factory: dict[str, Any]) -> TimestepPredictor:
    """In single precision whatever is asked for: what tells high qualities is lost in half, and it is small."""
    return TimestepPredictor(TimestepPredictorConfig(**config), **{**factory, "dtype": torch.float32})


def _timestep(value: Any) -> float:
    timestep = float(value)
    if not 0 <= timestep <= TIMESTEPS - 1:
        raise ValueError(f"timestep {timestep:g}, not one from 0 to {TIMESTEPS - 1}")
    return timestep


def _calibration(config: dict[str, Any]) -> Calibration:
    return Calibration(tuple(config["qualities"]), tuple(config["timesteps"]))


@dataclass(frozen=True)
class _Family:
    """How a family is built, and which part of the file belongs to which of its modules."""

    parts: dict[str, str]
    build: Callable[[dict[str, Any], dict[str, Any]], Restorer]


_PRIOR_NETWORKS: dict[str, tuple[Any, Any]] = {
    "adm": (ADMUNetConfig, ADMUNet),
    "ddpm": (DDPMUNetConfig, DDPMUNet),
}

_FAMILIES = {
    "driftrec": _Family({"network": "score"}, _build_driftrec),
    "regression": _Family({"network": "regression"}, _build_regression),
    "prior": _Family({"network": "unet"}, _build_prior),
    "codiff": _Family({"network": "prompt", "projection": "projection"}, _build_codiff),
    "sodiff": _Family({"network": "prompt", "predictor": _PREDICTOR}, _build_sodiff),
    "saipe": _Family({"network": "prompt"}, _build_saipe),
    "quality": _Family({"network": _PREDICTOR}, _build_quality),
}
