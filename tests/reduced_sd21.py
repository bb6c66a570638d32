"""A Stable Diffusion 2.1-base small enough for tests: its interfaces, key names and layer kinds, with random weights.

The UNet has two levels instead of four and one block a level (45 M parameters); the VAE is SD 2.1's own architecture,
because ComfyUI knows no other encoder width. Both exist as diffusers reads them, and as one ComfyUI checkpoint with the
same UNet and the same VAE encoder but a VAE decoder a quarter as wide, so that tests can decode large pictures.

The files are drawn from a seed once and kept outside the repository: in the folder that JPEG_RESTORER_TEST_CACHE names,
else below the system's temporary folder. Everything is float16 on the disk; both readers widen it to the same float32.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn

from restoration.jpeg import encode_with_pillow, read_jpeg_and_pixels
from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.saipe import SAIPE, SAIPEConfig
from restoration.networks.timestep_predictor import TimestepPredictor, TimestepPredictorConfig
from restoration.restorer_file import RestorerMetadata, write_restorer

UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 320), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 1024,
    "attention_head_dim": 5,  # diffusers' old misnomer: the number of heads, of 64 channels each
    "use_linear_projection": True,
}  # fmt: skip
FULL_UNET = {
    **UNET, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": (5, 10, 20, 20),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
VAE = {
    "sample_size": 768, "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32, "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SMALL_DECODER = {**VAE, "block_out_channels": (32, 64, 128, 128)}
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
# Standard deviation of each layer's weights, times the root of its fan-in; 1 where nothing is said. So the UNet answers
# at the size of its input and feels its context, latents are as large as SD's, and pictures neither flat nor clipped.
GAINS = {
    r"attn2\.to_out": 4.0, r"^conv_out": 1.7, r"^time_embedding\.linear_2": 3.0,
    r"^encoder\.conv_out": 2.0, r"^quant_conv": 3.0, r"^decoder\.conv_out": 0.8,
}  # fmt: skip
SEED = 21


@dataclass(frozen=True)
class ReducedBase:
    """Where the reduced base model lies.

    Args:
        folder: For diffusers: `unet`, `vae`, `scheduler` and `model_index.json`.
        checkpoint: For ComfyUI's CheckpointLoaderSimple; the only file of its folder.
        vae: For ComfyUI's VAELoader: the whole VAE, its decoder at full width, as diffusers wrote it.
    """

    folder: Path
    checkpoint: Path
    vae: Path


@cache
def reduced_base() -> ReducedBase:
    """The reduced base model, made on the first call on this machine (about 10 s, 430 MB)."""
    cache_folder = os.environ.get("JPEG_RESTORER_TEST_CACHE")
    root = Path(cache_folder) if cache_folder else Path(tempfile.gettempdir()) / "jpeg-restorer-tests"
    target = root / f"sd21-{_recipe_hash()}"
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="making-") as folder:
            made = Path(folder) / "sd21"
            _make(made, UNET)
            try:
                made.rename(target)
            except OSError:
                if not target.exists():  # otherwise another process was first
                    raise
    return _base_in(target)


def full_base(folder: Path) -> ReducedBase:
    """Random weights of SD 2.1-base's own size in `folder`, 3.8 GB, for benchmarks."""
    _make(folder / "sd21", FULL_UNET)
    return _base_in(folder / "sd21")


def _base_in(folder: Path) -> ReducedBase:
    return ReducedBase(
        folder / "diffusers",
        folder / "checkpoints" / "reduced-sd21.safetensors",
        folder / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors",
    )


def _recipe_hash() -> str:
    functions = (_make, _draw, unet_name, _resnet_name, vae_name)
    recipe = [json.dumps([UNET, VAE, SMALL_DECODER, SCHEDULER, GAINS, SEED]), *map(inspect.getsource, functions)]
    return hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:12]


def _make(folder: Path, unet_config: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    levels, layers = len(unet_config["block_out_channels"]), unet_config["layers_per_block"]
    with torch.device("meta"):
        unet, vae, small = UNet2DConditionModel(**unet_config), AutoencoderKL(**VAE), AutoencoderKL(**SMALL_DECODER)
    weights = {"unet": _draw(unet, generator), "vae": _draw(vae, generator)}
    for name, model in (("unet", unet), ("vae", vae)):
        model.save_config(folder / "diffusers" / name)
        save_file(weights[name], folder / "diffusers" / name / "diffusion_pytorch_model.safetensors")
    DDPMScheduler(**SCHEDULER).save_config(folder / "diffusers" / "scheduler")
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDPMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline"} | {name: ["diffusers", kind] for name, kind in classes.items()}
    (folder / "diffusers" / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    encoder = {key: value for key, value in weights["vae"].items() if key.startswith(("encoder.", "quant_conv."))}
    small_weights = _draw(small, generator)
    decoder = {key: value for key, value in small_weights.items() if key.startswith(("decoder.", "post_quant_conv."))}
    checkpoint = {
        f"model.diffusion_model.{unet_name(key, levels, layers)}": value for key, value in weights["unet"].items()
    }
    for key, value in {**encoder, **decoder}.items():
        is_attention = ".attentions." in key and value.dim() == 2
        checkpoint[f"first_stage_model.{vae_name(key)}"] = value[..., None, None] if is_attention else value
    (folder / "checkpoints").mkdir()
    save_file(checkpoint, folder / "checkpoints" / "reduced-sd21.safetensors")


def _draw(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Normally distributed weights for a network on the meta device: layers keep the size of what goes through them."""
    weights = {}
    for key, parameter in model.state_dict().items():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            gain = next((gain for pattern, gain in GAINS.items() if re.search(pattern, key)), 1.0)
            value *= gain / parameter[0].numel() ** 0.5
        else:
            value = 1 + 0.1 * value if key.endswith("weight") else 0.05 * value
        if key.startswith("quant_conv"):  # the latent's logarithmic variance: small, as in a trained VAE
            value[4:] = value[4:] * 0.05 - (10.0 if key.endswith("bias") else 0.0)
        weights[key] = value.half().contiguous()
    return weights


def unet_name(key: str, levels: int = 2, layers: int = 1) -> str:
    """The original (LDM) name of a diffusers UNet's parameter, for `levels` levels of `layers` residual blocks."""
    block, rest = re.match(r"((?:down_blocks|up_blocks)\.\d+|[^.]+)\.(.*)", key).groups()  # type: ignore[union-attr]
    top = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if block in top:
        return f"{top[block]}.{rest}"
    if block == "time_embedding":
        return rest.replace("linear_1", "time_embed.0").replace("linear_2", "time_embed.2")
    kind, index, leaf = re.match(r"([a-z]+)\.(\d+)\.(.*)", rest).groups()  # type: ignore[union-attr]
    if kind == "resnets":
        leaf = _resnet_name(leaf)
    if block == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{leaf}"
    level = int(block.split(".")[1])
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.{leaf.replace('conv', 'op')}"
    if kind == "upsamplers":  # after the level's last residual block and its attention; SD's lowest level has none
        slot = 1 if levels == 4 and level == 0 else 2
        return f"output_blocks.{(layers + 1) * level + layers}.{slot}.{leaf}"
    slot = 1 if kind == "attentions" else 0
    if block.startswith("down"):
        return f"input_blocks.{(layers + 1) * level + 1 + int(index)}.{slot}.{leaf}"
    return f"output_blocks.{(layers + 1) * level + int(index)}.{slot}.{leaf}"


def _resnet_name(leaf: str) -> str:
    names = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    layer, parameter = leaf.rsplit(".", 1)
    return f"{names[layer]}.{parameter}"


def vae_name(key: str) -> str:
    """The original (LDM) name of a diffusers AutoencoderKL's parameter; attention weights become 1x1 convolutions."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for theirs, original in attention.items():
        key = key.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{original}.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)


def unet_lora_modules(unet: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """What CODiff adapts in a diffusers UNet: all convolutions and linear layers but those of the time embedding."""
    return {name: module for name, module in unet.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and "time_emb" not in name}  # fmt: skip


def vae_lora_modules(vae: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """What CODiff adapts in a diffusers VAE: its encoder and `quant_conv`."""
    return {name: module for name, module in vae.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name.startswith(("encoder.", "quant_conv"))}  # fmt: skip


def lora_tensors(
    modules: dict[str, nn.Conv2d | nn.Linear], rank: int, generator: torch.Generator, strength: float = 0.4
) -> dict[str, Tensor]:
    """Random LoRA pairs `NAME.lora_A.weight`, `NAME.lora_B.weight` of visible effect, for modules on any device."""
    tensors = {}
    for name, module in modules.items():
        outputs, inputs, *kernel = module.weight.shape
        fan_in = module.weight[0].numel()
        down = torch.randn((rank, inputs, *kernel), generator=generator) / fan_in**0.5
        up = torch.randn((outputs, rank, *[1] * len(kernel)), generator=generator) * strength / rank**0.5
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    return tensors


def cave_tensors(cave: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights for a CaVE on the meta device that, unlike its initial ones, tell pictures apart."""
    tensors = {}
    for key, value in cave.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            tensors[key] = drawn * (0.5 if ".res." in key else 1.2) / value[0].numel() ** 0.5
        elif key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(1)
        elif key.endswith(("running_var", "res.1.weight")):
            tensors[key] = 0.5 + drawn.abs()
        else:
            tensors[key] = 0.1 * drawn
    return tensors


def write_codiff(
    path: Path, base: ReducedBase | None = None, *, cave_widths: tuple[int, ...] = (8, 16, 16, 32),
    cave_blocks: int = 4, rank: int = 4, alpha: float = 2.0, seed: int = 0, timestep: float = 499.0,
) -> Path:  # fmt: skip
    """A restorer of the family `codiff` for the reduced base model, its weights random and each of them felt."""
    base = base or reduced_base()
    generator = torch.Generator().manual_seed(seed)
    cave_config = CaVEConfig(widths=cave_widths, blocks=cave_blocks)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base.folder / "unet"))
        vae = AutoencoderKL(**VAE)
    with safe_open(base.folder / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        conv_in = {leaf: file.get_tensor(f"conv_in.{leaf}").float() for leaf in ("weight", "bias")}
    parts = {
        "prompt": cave_tensors(CaVE(cave_config, decoder=False, device="meta"), generator),
        "projection": {
            "weight": torch.randn((1024, cave_widths[-1]), generator=generator) / cave_widths[-1] ** 0.5,
            "bias": torch.randn(1024, generator=generator) * 0.1,
        },
        "unet_lora": lora_tensors(unet_lora_modules(unet), rank, generator),
        "unet.conv_in": {k: v + 0.1 * v.std() * torch.randn(v.shape, generator=generator) for k, v in conv_in.items()},
        "vae_lora": lora_tensors(vae_lora_modules(vae), rank, generator),
    }
    lora = {"rank": rank, "alpha": float(alpha)}
    config = {
        "cave": cave_config.to_dict(), "context_dim": 1024, "timestep": timestep, "unet_lora": lora, "vae_lora": lora
    }  # fmt: skip
    _write(path, RestorerMetadata("codiff", config, base="sd2.1-base", license="Apache-2.0"), parts)
    return path


TINY_PREDICTOR = TimestepPredictorConfig(stem=48, width=16, hidden=32)
TINY_SAIPE = SAIPEConfig(
    dim=24, down_depths=(1,), up_depths=(1,), heads=2, image_side=64, performer_depth=1, performer_heads=2,
    performer_dim_head=8, features=16,
)  # fmt: skip
CALIBRATION = {"qualities": [5.0, 25.0, 50.0, 75.0, 95.0], "timesteps": [800.0, 640.0, 440.0, 240.0, 80.0]}
"""840 - 8 quality, which is also what `predictor_tensors` aims at."""


def saipe_tensors(config: SAIPEConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights for a SAIPE whose tokens, unlike those of the initial ones, tell pictures apart."""
    saipe = SAIPE(config)
    saipe.initialize(generator)
    for name, parameter in saipe.named_parameters():
        if name.startswith("embedder.") and name.endswith("weight") and parameter.dim() == 2:
            parameter.data *= 6
    return saipe.state_dict()


def predictor_tensors(config: TimestepPredictorConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A random predictor whose last layers are fitted, in closed form, to tell a photo's qualities from 5 to 95 apart.

    Its timesteps are a bell of width 20 around 840 - 8 quality: the logits of -(i - t)^2 / 800 are linear in t.
    """
    predictor = TimestepPredictor(config)
    predictor.initialize(generator)
    photo = torch.from_numpy(data.astronaut().copy()).movedim(-1, 0).float() / 255
    qualities = torch.arange(5.0, 100.0, 10.0).repeat_interleave(16)
    crops = [photo[:, 128 * (i // 4) :, 128 * (i % 4) :][:, :128, :128] for i in range(16)] * 10
    seen = torch.stack([
        read_jpeg_and_pixels(encode_with_pillow(crop, int(quality)))[1]
        for crop, quality in zip(crops, qualities, strict=True)
    ])  # fmt: skip
    for module in predictor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics become those of these crops
    with torch.no_grad():
        predictor.train().encode(seen)
        pooled = predictor.eval().encode(seen)
        _fit(predictor.quality_head, pooled, torch.logit(qualities / 100))
        if predictor.timestep_head is not None:
            last = predictor.timestep_head[-1]
            weight, bias = _fitted(predictor.timestep_head[:-1](pooled), 840 - 8 * qualities)
            steps = torch.arange(float(config.timesteps))
            last.weight.copy_(steps[:, None] * weight / 400)
            last.bias.copy_((steps * bias - steps**2 / 2) / 400)
    return predictor.state_dict()


def _fit(branch: nn.Sequential, pooled: Tensor, wanted: Tensor) -> None:
    weight, bias = _fitted(branch[:-1](pooled), wanted)
    branch[-1].weight.copy_(weight[None])
    branch[-1].bias.fill_(bias)


def _fitted(hidden: Tensor, wanted: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weights and bias of a least-squares fit with a little ridge."""
    features = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1).double()
    normal = features.T @ features + ridge * torch.eye(features.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(normal, features.T @ wanted.double()).float()
    return solution[:-1], solution[-1]


def write_sodiff(
    path: Path, base: ReducedBase | None = None, *, saipe: SAIPEConfig = TINY_SAIPE,
    predictor: TimestepPredictorConfig | None = TINY_PREDICTOR, timestep: float | None = None,
    calibration: dict[str, list[float]] | None = CALIBRATION, rank: int = 4, alpha: float = 2.0, seed: int = 0,
) -> Path:  # fmt: skip
    """A restorer of the family `sodiff` for the reduced base model, its weights random and each of them felt."""
    base = base or reduced_base()
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base.folder / "unet"))
    parts = {
        "prompt": saipe_tensors(saipe, generator),
        "timestep": {} if predictor is None else predictor_tensors(predictor, generator),
        "unet_lora": lora_tensors(unet_lora_modules(unet), rank, generator),
    }
    config = {
        "saipe": saipe.to_dict(), "timestep_predictor": None if predictor is None else predictor.to_dict(),
        "timestep": timestep, "calibration": None if predictor is None else calibration,
        "context_dim": saipe.context_dim, "unet_lora": {"rank": rank, "alpha": float(alpha)},
    }  # fmt: skip
    _write(path, RestorerMetadata("sodiff", config, base="sd2.1-base", license="Apache-2.0"), parts)
    return path


def write_saipe(path: Path, *, saipe: SAIPEConfig = TINY_SAIPE, seed: int = 0) -> Path:
    """A restorer of the family `saipe`: SODiff's first stage."""
    metadata = RestorerMetadata("saipe", {"saipe": saipe.to_dict()}, license="Apache-2.0")
    _write(path, metadata, {"prompt": saipe_tensors(saipe, torch.Generator().manual_seed(seed))})
    return path


def write_quality(path: Path, *, predictor: TimestepPredictorConfig = TINY_PREDICTOR, seed: int = 0) -> Path:
    """A restorer of the family `quality` that tells qualities apart, roughly."""
    config = replace(predictor, timesteps=0)
    metadata = RestorerMetadata("quality", {"timestep_predictor": config.to_dict()}, license="Apache-2.0")
    _write(path, metadata, {"timestep": predictor_tensors(config, torch.Generator().manual_seed(seed))})
    return path


def _write(path: Path, metadata: RestorerMetadata, parts: dict[str, dict[str, Tensor]]) -> None:
    tensors = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    write_restorer(path, metadata, tensors)
