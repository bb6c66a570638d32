"""Priors as other code has them: diffusers' networks with random weights, and what guided diffusion and DDPM save."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from restoration.networks.adm_unet import ADMUNet, ADMUNetConfig
from restoration.networks.ddpm_unet import DDPMUNet, DDPMUNetConfig
from restoration.restorer_file import RestorerMetadata

NARROW_ADM = ADMUNetConfig(
    width=32, channel_multipliers=(1, 2, 3, 4), res_blocks=1, attention_levels=(1, 3), image_size=64
)  # fmt: skip
NARROW_ADM_HEADS = 32
NARROW_DDPM = DDPMUNetConfig(width=32, channel_multipliers=(1, 1, 2, 2, 3), attention_levels=(1, 4), image_size=256)


def diffusers_adm(config: ADMUNetConfig) -> UNet2DModel:
    """diffusers' equivalent of a network of guided diffusion."""
    levels = range(len(config.channel_multipliers))
    attends = [level in config.attention_levels for level in levels]
    model = UNet2DModel(
        sample_size=config.image_size, out_channels=config.out_channels, block_out_channels=config.level_channels,
        layers_per_block=config.res_blocks, resnet_time_scale_shift="scale_shift", norm_eps=1e-5, freq_shift=0,
        attention_head_dim=config.head_channels, norm_num_groups=config.norm_groups,
        attn_norm_num_groups=config.norm_groups, flip_sin_to_cos=True, downsample_type="resnet",
        upsample_type="resnet", add_attention=config.middle_attention, num_class_embeds=config.classes or None,
        down_block_types=tuple("AttnDownBlock2D" if attends[level] else "ResnetDownsampleBlock2D" for level in levels),
        up_block_types=tuple(
            "AttnUpBlock2D" if attends[level] else "ResnetUpsampleBlock2D" for level in reversed(levels)
        ),
    )  # fmt: skip
    if config.channel_multipliers[0] != 1:  # as published for 512 pixels; a config.json cannot say it
        model.time_proj = Timesteps(config.width, True, 0)
        model.time_embedding = TimestepEmbedding(config.width, 4 * config.width)
        for block in model.modules():
            if hasattr(block, "time_emb_proj"):
                block.time_emb_proj = nn.Linear(4 * config.width, block.time_emb_proj.out_features)
        if config.classes:
            model.class_embedding = nn.Embedding(config.classes, 4 * config.width)
    return model


def diffusers_ddpm(config: DDPMUNetConfig, **changes: object) -> UNet2DModel:
    """diffusers' equivalent of a network of DDPM, as google/ddpm-ema-celebahq-256 has it."""
    levels = range(len(config.channel_multipliers))
    attends = [level in config.attention_levels for level in levels]
    fields = {
        "sample_size": config.image_size, "block_out_channels": config.level_channels, "norm_eps": 1e-6,
        "layers_per_block": config.res_blocks, "downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False,
        "attention_head_dim": None,
        "down_block_types": tuple("AttnDownBlock2D" if attends[level] else "DownBlock2D" for level in levels),
        "up_block_types": tuple("AttnUpBlock2D" if attends[level] else "UpBlock2D" for level in reversed(levels)),
    }  # fmt: skip
    return UNet2DModel(**{**fields, **changes})


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every layer count: nothing at zero, norms not at one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.3, 0.1, generator=generator)
        if parameter.dim() > 1:
            parameter.data.mul_(10 / parameter[0].numel() ** 0.5)
    return module.eval()


def as_folder(path: Path, model: UNet2DModel, *, pipeline: bool = False, scheduler: dict[str, object] | None = None):
    """A folder that `save_pretrained` writes: flat as Google's, or as a pipeline is saved today."""
    model.save_pretrained(path / "unet" if pipeline else path)
    if scheduler is not None:
        DDPMScheduler(**scheduler).save_pretrained(path / "scheduler" if pipeline else path)
    if pipeline:
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        (path / "model_index.json").write_text(json.dumps(index))
    return path


def with_earlier_names(folder: Path) -> None:
    """Rewrite a folder's weights as diffusers wrote them in 2022: pickled, and its attention under other names."""
    from safetensors.torch import load_file

    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")


def rebuilt(metadata: RestorerMetadata, tensors: dict[str, Tensor]) -> ADMUNet | DDPMUNet:
    """The network that a converted file describes, with its weights."""
    fields = dict(metadata.config["network"])
    adm = fields.pop("architecture") == "adm"
    network = ADMUNet(ADMUNetConfig(**fields)) if adm else DDPMUNet(DDPMUNetConfig(**fields))
    network.load_state_dict({key.removeprefix("unet."): value.float() for key, value in tensors.items()})
    return network.eval()
