"""Stable Diffusion 2.1-base, and SDXL's UNet, as diffusers stores them, frozen; low-rank adapters (LoRA, by peft)."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from training.configs.one_step import SD21_BASE_COPIES, SDXL_BASE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONTEXT_DIM = 1024
"""Width of SD 2.1's prompts."""
_SD21_BASE: dict[str, tuple[Any, dict[str, Any]]] = {
    "scheduler": (DDPMScheduler, {
        "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000,
    }),
    "unet": (UNet2DConditionModel, {"in_channels": 4, "out_channels": 4, "cross_attention_dim": CONTEXT_DIM}),
    "vae": (AutoencoderKL, {"latent_channels": 4, "scaling_factor": 0.18215}),
}  # fmt: skip
"""Part -> how diffusers reads it, and what its description must say."""
_SDXL_UNET = {"in_channels": 4, "mid_block_type": "UNetMidBlock2DCrossAttn", "addition_embed_type": "text_time",
              "encoder_hid_dim_type": None, "class_embed_type": None}  # fmt: skip
_ADAPTER = "default"


class BaseModelError(ValueError):
    """A base model cannot be loaded or is another one than expected; the message says what to do."""


class _Advice(NamedTuple):
    """How messages speak of a base model, and what they say where a folder is incomplete, where the hub has not got
    it, and where it is another model."""

    name: str
    folder: str
    hub: str
    other: str


_SD21 = _Advice(
    "SD 2.1-base",
    "Give --base.path a folder in diffusers' layout: unet, vae and scheduler, each with its config and .safetensors.",
    "SD 2.1-base left its place (stabilityai/stable-diffusion-2-1-base): give --base.path a folder with a copy of it, "
    f"or one of {', '.join(SD21_BASE_COPIES)}.",
    "Give --base.path SD 2.1-base.",
)
_SDXL = _Advice(
    "SDXL",
    "Give --loss.adversarial.sdxl a folder in diffusers' layout with unet, its config and .safetensors, or choose "
    "--loss.adversarial.discriminator sd21.",
    f"Give --loss.adversarial.sdxl {SDXL_BASE} or a folder with a copy of its unet, or "
    "choose --loss.adversarial.discriminator sd21.",
    f"Give --loss.adversarial.sdxl {SDXL_BASE}, or choose --loss.adversarial.discriminator sd21.",
)


class BaseModel(NamedTuple):
    """What is needed of SD 2.1-base: prompts come from a picture, so there is no text encoder."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL


def load_base(path: str) -> BaseModel:
    """The UNet and the VAE of SD 2.1-base, float32, frozen.

    Args:
        path: A folder in diffusers' layout (`unet`, `vae`, `scheduler`), or a name on the Hugging Face hub.

    Raises:
        BaseModelError: It is missing or incomplete, or another model: its latents must have 4 channels, its prompt
            1024, and it must predict noise (`epsilon`) on Stable Diffusion's schedule.
    """
    for part, (kind, expected) in _SD21_BASE.items():
        _check(_read(path, part, kind.load_config, _SD21), kind, expected, path, part, _SD21)
    unet = _read(path, "unet", partial(_network, UNet2DConditionModel), _SD21)
    vae = _read(path, "vae", partial(_network, AutoencoderKL), _SD21)
    return BaseModel(unet.requires_grad_(False), vae.requires_grad_(False))


def load_sdxl_unet(path: str) -> UNet2DConditionModel:
    """The UNet of SDXL (Podell et al. 2024), float32, frozen: 2.57 billion parameters, 10.3 GB.

    Args:
        path: A folder in diffusers' layout, of which `unet` is read, or a name on the Hugging Face hub.

    Raises:
        BaseModelError: It is missing or incomplete, or another model: its latents must have 4 channels, its first
            level no attention and all others some (the refiner's last has none), and it must take a pooled prompt and
            sizes (`text_time`).
    """
    config = _read(path, "unet", UNet2DConditionModel.load_config, _SDXL)
    levels = len(config.get("down_block_types", ())) - 1
    described = {**_SDXL_UNET, "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * levels}
    _check(config, UNet2DConditionModel, described, path, "unet", _SDXL)
    return _read(path, "unet", partial(_network, UNet2DConditionModel), _SDXL).requires_grad_(False)


def _network(kind: Any, path: str, **where: Any) -> Any:
    network, report = kind.from_pretrained(
        path, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True, **where
    )
    if report["missing_keys"]:
        raise ValueError(f"its weights lack {min(report['missing_keys'])}")
    return network


def _read(path: str, part: str, load: Callable[..., Any], advice: _Advice) -> Any:
    local = Path(path).is_dir()
    try:
        return load(path, subfolder=part, local_files_only=local)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = _first_line(error)
        if local:
            raise BaseModelError(
                f"{path} holds no {part} of {advice.name} that can be read ({reason}). {advice.folder}"
            ) from error
        raise BaseModelError(
            f"{path}: neither a folder nor a model that can be had from the hub ({reason}). {advice.hub}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _check(
    config: dict[str, Any], kind: Any, expected: dict[str, Any], path: str, part: str, advice: _Advice
) -> None:  # fmt: skip
    """Refuse another model by its description, before its weights are read."""
    defaults = inspect.signature(kind.__init__).parameters
    found = {key: config.get(key, defaults[key].default) for key in expected}
    if found.get("prediction_type") == "v_prediction":
        raise BaseModelError(
            f"{path}: expected a model that predicts noise (epsilon), as SD 2.1-base for 512 px, got v_prediction: "
            f"this looks like SD 2.1 for 768 px. {advice.other}"
        )
    differing = [f"{key} {found[key]!r}, not {value!r}" for key, value in expected.items() if found[key] != value]
    if differing:
        raise BaseModelError(
            f"{path}: its {part} is not that of {advice.name} ({'; '.join(differing)}). {advice.other}"
        )


def blocks(network: nn.Module) -> list[nn.Module]:
    """The residual and the attention blocks of a UNet or a VAE: nearly all of its weights."""
    return [module for module in network.modules() if isinstance(module, (ResnetBlock2D, Transformer2DModel))]


def unet_targets(unet: nn.Module) -> list[str]:
    """What CODiff adapts in the UNet: every convolution and linear layer but those of the time embedding."""
    return [
        name for name in _layers(unet) if not name.startswith("time_embedding.") and not name.endswith(".time_emb_proj")
    ]


def vae_targets(vae: nn.Module) -> list[str]:
    """What CODiff adapts in the VAE: the encoder with `quant_conv`; the decoder stays as it is."""
    return [name for name in _layers(vae) if name.startswith("encoder.") or name == "quant_conv"]


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def add_lora(network: nn.Module, targets: list[str], rank: int, alpha: float, generator: torch.Generator) -> None:
    """Wrap layers so that W becomes W + alpha/rank * B A (Hu et al. 2022): A from N(0, 1/rank²), B zero.

    The other parameters are frozen. On the meta device nothing is drawn.
    """
    pattern = "|".join(re.escape(name) for name in targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network, _ADAPTER, low_cpu_mem_usage=_is_meta(network))
    for _, down, up in lora_layers(network):
        if not down.is_meta:
            nn.init.normal_(down, std=1 / rank, generator=generator)
            nn.init.zeros_(up)


def _is_meta(network: nn.Module) -> bool:
    return next(network.parameters()).is_meta


def lora_layers(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Each adapted layer's name in diffusers, its A (rank, in, ...) and its B (out, rank, ...)."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight  # type: ignore[misc]


def lora_tensors(network: nn.Module) -> dict[str, Tensor]:
    """`NAME.lora_A.weight` and `NAME.lora_B.weight` of every adapted layer."""
    return {
        f"{name}.lora_{side}.weight": weight.detach()
        for name, down, up in lora_layers(network)
        for side, weight in (("A", down), ("B", up))
    }


@contextlib.contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """The network as it was before it was adapted, for the duration of a `with`, without gradients."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def store_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is not trained in `dtype`; trained parameters stay float32."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def compute_in_float32(layer: nn.Module, dtype: torch.dtype) -> None:
    """Let a layer whose weights are float32 take and return `dtype`, as its neighbours do."""
    layer.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
    layer.register_forward_hook(lambda _, __, output: output.to(dtype))
