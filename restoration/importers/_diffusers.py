"""Folders that diffusers wrote: a UNet2DModel alone, or a pipeline with `unet` and `scheduler`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..diffusion.prior import NoiseSchedule
from ..networks.adm_unet import ADMUNetConfig
from ..networks.ddpm_unet import NORM_GROUPS, DDPMUNetConfig
from ._checkpoint import CheckpointError, kind, read_pickled
from ._unet2d import PriorConfig

_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}{ending}" for ending in (".safetensors", ".bin") for variant in ("", ".fp16")
)
_DEFAULTS: dict[str, Any] = {
    "_class_name": None, "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
}  # fmt: skip
"""What UNet2DModel takes for what a config.json does not say."""

_BOTH: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",), "in_channels": (3,), "center_input_sample": (False,),
    "time_embedding_type": ("positional",), "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"), "class_embed_type": (None,),
}  # fmt: skip
_DDPM: dict[str, tuple[Any, ...]] = {
    "out_channels": (3,), "freq_shift": (1,), "flip_sin_to_cos": (False,), "downsample_type": ("conv",),
    "upsample_type": ("conv",), "downsample_padding": (0,), "norm_eps": (1e-6,), "norm_num_groups": (NORM_GROUPS,),
    "attn_norm_num_groups": (None, NORM_GROUPS), "add_attention": (True,), "num_class_embeds": (None,),
}  # fmt: skip
_ADM: dict[str, tuple[Any, ...]] = {
    "out_channels": (3, 6), "freq_shift": (0,), "flip_sin_to_cos": (True,), "downsample_type": ("resnet",),
    "upsample_type": ("resnet",), "norm_eps": (1e-5,), "add_attention": (True, False),
}  # fmt: skip
_WIDEST, _MOST_LEVELS, _MOST_BLOCKS = 4096, 10, 100
_BLOCKS = {
    "ddpm": (("DownBlock2D",), ("UpBlock2D",)),
    "adm": (("ResnetDownsampleBlock2D", "DownBlock2D"), ("ResnetUpsampleBlock2D", "UpBlock2D")),
}
"""The blocks of levels without attention. Where nothing is resampled, both of a pair are the same."""


class DiffusersFolder:
    """A folder of diffusers.

    Args:
        path: The folder of a UNet2DModel, or of a pipeline around one.
        error: What is raised.

    Raises:
        CheckpointError: There is no UNet2DModel in it, or one that works on latents.
    """

    def __init__(self, path: Path, error: type[CheckpointError]) -> None:
        self.error, self.name = error, path.resolve().name
        self.path = path / "unet" if (path / "unet" / "config.json").is_file() else path
        self.pipeline = path.resolve().parent if path.resolve().name == "unet" else path
        if not (self.path / "config.json").is_file():
            raise error(
                f"{self.name}: expected a folder of diffusers with a config.json, or with a folder unet that has one, "
                "got none. Give the whole folder, as it was saved or downloaded."
            )
        coders = [part for part in ("vqvae", "vae", "vqvae_decoder") if self._has(part)]
        if coders:
            raise error(
                f"{self.name}: expected a network that works on pixels, got one on the latents of a {coders[0]}. "
                "Choose a pixel diffusion model, e.g. google/ddpm-ema-celebahq-256."
            )

    def _has(self, part: str) -> bool:
        index = self.pipeline / "model_index.json"
        return (self.pipeline / part).is_dir() or (index.is_file() and part in self._json(index))

    def network(self) -> PriorConfig:
        """The network that config.json describes.

        Raises:
            CheckpointError: It is of another design than those two that are known here; the fields are named.
        """
        given = self._json(self.path / "config.json")
        config = _DEFAULTS | {key: value for key, value in given.items() if key in _DEFAULTS}
        adm = config["resnet_time_scale_shift"] == "scale_shift"
        rules = _BOTH | (_ADM if adm else {"resnet_time_scale_shift": ("default",), **_DDPM})
        wrong = [
            f"{key} {config[key]!r} instead of {' or '.join(map(repr, allowed))}"
            for key, allowed in rules.items()
            if config[key] not in allowed
        ]
        if wrong:
            design = "guided diffusion" if adm else "DDPM"
            raise self._unlike(f"{design}'s", ", ".join(wrong[:3]) + (" and more" if len(wrong) > 3 else ""))
        try:
            return self._adm(config) if adm else self._ddpm(config)
        except (TypeError, ValueError, IndexError, ArithmeticError) as reason:
            if isinstance(reason, CheckpointError):
                raise
            raise self._unlike("a usable", f"fields that describe no network ({reason})") from reason

    def _ddpm(self, config: dict[str, Any]) -> DDPMUNetConfig:
        network = DDPMUNetConfig(**self._shape(config, "ddpm"))
        attentive = {network.level_channels[level] for level in (*network.attention_levels, -1)}
        if config["attention_head_dim"] is not None and attentive != {config["attention_head_dim"]}:
            raise self._unlike("DDPM's", f"attention_head_dim {config['attention_head_dim']} instead of None, one head")
        return network

    def _adm(self, config: dict[str, Any]) -> ADMUNetConfig:
        groups = config["norm_num_groups"]
        if config["add_attention"] and config["attn_norm_num_groups"] != groups:
            raise self._unlike(
                "guided diffusion's", f"attn_norm_num_groups {config['attn_norm_num_groups']} instead of {groups}"
            )
        head = config["attention_head_dim"]
        if not isinstance(head, int):
            raise self._unlike("guided diffusion's", f"attention_head_dim {head!r} instead of a number, e.g. 64")
        return ADMUNetConfig(
            **self._shape(config, "adm"), out_channels=config["out_channels"], head_channels=head, norm_groups=groups,
            middle_attention=config["add_attention"], classes=config["num_class_embeds"] or 0,
        )  # fmt: skip

    def _shape(self, config: dict[str, Any], architecture: str) -> dict[str, Any]:
        """What both networks have: widths, blocks, attention, size."""
        channels, size = config["block_out_channels"], config["sample_size"]
        size = min(size) if isinstance(size, list | tuple) else size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise self._unlike("a usable", f"sample_size {size!r} instead of pixels")
        width = channels[0]
        if config["time_embedding_dim"] not in (None, 4 * width):
            raise self._unlike("a usable", f"time_embedding_dim {config['time_embedding_dim']} instead of {4 * width}")
        if max(channels) > _WIDEST or len(channels) > _MOST_LEVELS or config["layers_per_block"] > _MOST_BLOCKS:
            raise self._unlike("a usable", f"{len(channels)} levels of up to {max(channels)} channels")
        multipliers = tuple(int(own / width) if own % width == 0 else own / width for own in channels)
        return {
            "width": width, "channel_multipliers": multipliers, "res_blocks": config["layers_per_block"],
            "attention_levels": self._attention_levels(config, architecture),
            "image_size": size, "dropout": config["dropout"],
        }  # fmt: skip

    def _attention_levels(self, config: dict[str, Any], architecture: str) -> tuple[int, ...]:
        plain_down, plain_up = _BLOCKS[architecture]
        down, up = list(config["down_block_types"]), list(reversed(config["up_block_types"]))
        levels = [level for level, block in enumerate(down) if block == "AttnDownBlock2D"]
        same = levels == [level for level, block in enumerate(up) if block == "AttnUpBlock2D"]
        known_down = all(
            block == "AttnDownBlock2D" or block == plain_down[0] or (block in plain_down and level == len(down) - 1)
            for level, block in enumerate(down)
        )
        known_up = all(
            block == "AttnUpBlock2D" or block == plain_up[0] or (block in plain_up and level == 0)
            for level, block in enumerate(up)
        )
        if not same or not known_down or not known_up or not len(down) == len(up) == len(config["block_out_channels"]):
            raise self._unlike(
                "a usable",
                f"the blocks {', '.join(map(str, down))} and {', '.join(map(str, reversed(up)))} instead of "
                f"{plain_down[0]} and {plain_up[0]}, or AttnDownBlock2D and AttnUpBlock2D at the same levels",
            )
        return tuple(levels)

    def schedule(self) -> NoiseSchedule | None:
        """The schedule that scheduler_config.json describes; None where there is no such file.

        Raises:
            CheckpointError: It is not linear, or the network does not predict the noise.
        """
        folders = (self.path, self.pipeline, self.pipeline / "scheduler")
        files = [folder / "scheduler_config.json" for folder in folders]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            return None
        given = self._json(found)
        wanted = {
            "beta_schedule": "linear", "prediction_type": "epsilon", "trained_betas": None,
            "rescale_betas_zero_snr": False,
        }  # fmt: skip
        for key, value in wanted.items():
            if given.get(key, value) != value:
                raise self.error(
                    f"{self.name}: expected a scheduler with {key} {value!r}, the only one known here, got "
                    f"{str(given[key])[:40]!r}. Choose a model that was trained so."
                )
        try:
            return NoiseSchedule(
                "linear", float(given.get("beta_start", 1e-4)), float(given.get("beta_end", 2e-2)),
                int(given.get("num_train_timesteps", 1000)),
            )  # fmt: skip
        except (TypeError, ValueError) as reason:
            raise self.error(f"{self.name}: its scheduler_config.json describes no schedule ({reason})") from reason

    def weights(self) -> dict[str, Any]:
        """The tensors by diffusers' names.

        Raises:
            CheckpointError: There are none, in more than one file, or they cannot be read safely.
        """
        found = next((self.path / name for name in _WEIGHTS if (self.path / name).is_file()), None)
        if found is None:
            raise self.error(
                f"{self.name}: expected {_WEIGHTS[0]} or {_WEIGHTS[2]} beside its config.json, in one piece, got none. "
                "Download the folder's weights, too."
            )
        return read_tensors(found, self.error)

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as reason:
            raise self.error(f"{self.name}: its {path.name} is not valid JSON. Download it again.") from reason
        if not isinstance(content, dict):
            raise self.error(f"{self.name}: expected an object in its {path.name}, got {kind(content)}.")
        return content

    def _unlike(self, design: str, found: str) -> CheckpointError:
        return self.error(
            f"{self.name}: expected a config.json of {design} network, got {found}. "
            "Networks of the design of google/ddpm-ema-celebahq-256 or of guided diffusion can be converted."
        )


def read_tensors(path: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """What a `.safetensors` file holds, or a dictionary that was pickled by `torch.save`.

    Raises:
        CheckpointError: The file is cut, or unpickling it could run code.
    """
    if path.suffix != ".safetensors":
        return read_pickled(path, wanted="a checkpoint", content="a state dict", error=error)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as reason:
        raise error(f"{path.name}: not a whole safetensors file ({reason}). Download or copy it again.") from reason
    return dict(tensors)
