"""CODiff's published files: `codiff.pkl`, adapters for Stable Diffusion 2.1-base, and `cave.pth`, their prompt encoder.

`codiff.pkl` is a pickled dictionary: the LoRA tensors of the UNet as three peft adapters (way down, way up, middle) and
those of the VAE's encoder as one, with lists of the layers that they belong to; the UNet's `conv_in`, which was trained
as a whole beside its adapter; and the projection from CaVE's features to the prompt. `cave.pth` is CaVE's state dict.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..networks.cave import CaVE, CaVEConfig
from ..networks.sd21_layers import SD21_UNET, Layers, codiff_unet_targets, codiff_vae_targets, lora_shapes
from ..restorer_file import RestorerMetadata
from ._checkpoint import CheckpointError, differences, kind, read_pickled, tensor_differences

TIMESTEP = 499.0
"""The timestep at which CODiff evaluates the UNet, and of the noise schedule that it solves for the image."""
LORA_ALPHA = 8.0
"""peft's default, which the published training left in place; the file does not tell it."""

_UNET_ADAPTERS = {
    "default_encoder": ("unet_lora_encoder_modules", ("conv_in", "down_blocks.")),
    "default_decoder": ("unet_lora_decoder_modules", ("up_blocks.", "conv_out")),
    "default_others": ("unet_lora_others_modules", ("mid_block.",)),
}
_VAE_ADAPTERS = {"default_encoder": ("vae_lora_encoder_modules", ("",))}
_SECTIONS = {
    "state_dict_unet": dict, "state_dict_vae": dict, "proj": dict, "rank_unet": int, "rank_vae": int,
    **{key: list for key, _ in (*_UNET_ADAPTERS.values(), *_VAE_ADAPTERS.values())},
}  # fmt: skip
_DECODER = ("m_body_decoder.", "m_up", "m_tail.")


class CODiffCheckpointError(CheckpointError):
    """A file is not one of CODiff's that can be used; the message says what is wrong."""


def import_codiff(
    codiff_path: str | os.PathLike[str], cave_path: str | os.PathLike[str]
) -> tuple[RestorerMetadata, dict[str, Tensor]]:
    """Read the two files of a CODiff restorer.

    Args:
        codiff_path: `codiff.pkl`. Only containers, numbers, strings and tensors are unpickled from either file.
        cave_path: `cave.pth`; its decoder, which nothing but its training needs, is left out.

    Returns:
        The description of the restorer file (family `codiff`, base `sd2.1-base`), and its tensors by their full names.
        The licence is `unknown`: the files do not tell.

    Raises:
        CODiffCheckpointError: A file cannot be read safely, or anything in it is missing, too much or of another shape.
    """
    name = Path(codiff_path).name
    checkpoint = _read(codiff_path, "CODiff's codiff.pkl")
    _check_sections(checkpoint, name)
    cave, state = _read_cave(cave_path)
    unet = _Lora(checkpoint, "unet", _UNET_ADAPTERS, codiff_unet_targets(), name)
    vae = _Lora(checkpoint, "vae", _VAE_ADAPTERS, codiff_vae_targets(), name)
    conv_in = {f"conv_in.base_layer.{key}": shape for key, shape in _conv_in_shapes().items()}
    tensors = {f"prompt.{key}": value for key, value in state.items() if not key.startswith(_DECODER)}
    tensors |= {f"projection.{key}": value for key, value in _projection(checkpoint["proj"], cave, name).items()}
    tensors |= {f"unet_lora.{key}": value for key, value in unet.tensors(conv_in).items()}
    tensors |= {f"unet.conv_in.{key}": unet.state[f"conv_in.base_layer.{key}"] for key in _conv_in_shapes()}
    tensors |= {f"vae_lora.{key}": value for key, value in vae.tensors().items()}
    training = {"imported_from": name, "prompt_imported_from": Path(cave_path).name}
    return RestorerMetadata("codiff", _config(cave, unet, vae), base="sd2.1-base", training=training), tensors


def import_cave(path: str | os.PathLike[str]) -> tuple[RestorerMetadata, dict[str, Tensor]]:
    """Read CaVE alone, with its decoder, e.g. to train on.

    Args:
        path: `cave.pth`, or another state dict of the authors' training; widths and blocks follow its tensors.

    Returns:
        The description of the restorer file (family `cave`), and its tensors by their full names.

    Raises:
        CODiffCheckpointError: As `import_codiff`.
    """
    config, state = _read_cave(path)
    metadata = RestorerMetadata("cave", {"cave": config.to_dict()}, training={"imported_from": Path(path).name})
    return metadata, {f"prompt.{key}": value for key, value in state.items()}


class _Lora:
    """The adapters of one network of the checkpoint.

    Args:
        checkpoint: The whole dictionary.
        part: `unet` or `vae`.
        adapters: For each adapter the list of its layers, and how their names begin.
        targets: The layers that must be adapted.
        name: The file's name, for messages.
    """

    def __init__(
        self, checkpoint: dict[str, Any], part: str, adapters: dict[str, tuple[str, tuple[str, ...]]], targets: Layers,
        name: str,
    ) -> None:  # fmt: skip
        self.part, self.targets, self.name = part, targets, name
        self.rank: int = checkpoint[f"rank_{part}"]
        self.state: dict[str, Tensor] = checkpoint[f"state_dict_{part}"]
        self.modules = {
            adapter: {module: targets[module] for module in targets if module.startswith(starts)}
            for adapter, (_, starts) in adapters.items()
        }
        for adapter, (section, _) in adapters.items():
            self._check_list(section, checkpoint[section], self.modules[adapter])

    def _check_list(self, section: str, found: list[Any], expected: Layers) -> None:
        if problem := differences(found, expected):
            raise CODiffCheckpointError(
                f"{self.name}: expected {section} to list the {len(expected)} layers of Stable Diffusion 2.1-base "
                f"that CODiff adapts there, but {problem}. Give the authors' codiff.pkl."
            )

    def tensors(self, besides: Layers | None = None) -> dict[str, Tensor]:
        """The adapters' tensors without the names of the adapters; `besides` are shapes of what else must be there."""
        shapes, names = dict(besides or {}), {}
        for adapter, modules in self.modules.items():
            for module, weight in modules.items():
                for matrix, shape in zip(("lora_A", "lora_B"), lora_shapes(weight, self.rank), strict=True):
                    key = f"{module}.{matrix}.{adapter}.weight"
                    shapes[key], names[key] = shape, f"{module}.{matrix}.weight"
        if problem := tensor_differences(self.state, shapes):
            raise CODiffCheckpointError(
                f"{self.name}: expected state_dict_{self.part} to hold adapters of rank {self.rank} for Stable "
                f"Diffusion 2.1-base, but {problem}. Give the authors' codiff.pkl."
            )
        return {new: self.state[key] for key, new in names.items()}


def _config(cave: CaVEConfig, unet: _Lora, vae: _Lora) -> dict[str, Any]:
    return {
        "cave": cave.to_dict(),
        "context_dim": SD21_UNET.cross_attention_dim,
        "timestep": TIMESTEP,
        "unet_lora": {"rank": unet.rank, "alpha": LORA_ALPHA},
        "vae_lora": {"rank": vae.rank, "alpha": LORA_ALPHA},
    }


def _read(path: str | os.PathLike[str], wanted: str) -> dict[str, Any]:
    return read_pickled(path, wanted=wanted, content=wanted, error=CODiffCheckpointError)


def _check_sections(checkpoint: dict[str, Any], name: str) -> None:
    problem = differences(checkpoint, _SECTIONS)
    if not problem:
        wrong = [key for key, wanted in _SECTIONS.items() if not isinstance(checkpoint[key], wanted)]
        wrong += [key for key in ("rank_unet", "rank_vae") if key not in wrong and checkpoint[key] < 1]
        problem = ", ".join(f"{key} is {_shown(checkpoint[key])}" for key in wrong)
    if problem:
        raise CODiffCheckpointError(
            f"{name}: expected the sections of CODiff's codiff.pkl, but {problem}. "
            "Give the authors' codiff.pkl first and their cave.pth second."
        )


def _shown(value: object) -> str:
    return str(value) if isinstance(value, int) else kind(value)


def _conv_in_shapes() -> Layers:
    weight = codiff_unet_targets()["conv_in"]
    return {"weight": weight, "bias": weight[:1]}


def _projection(found: dict[str, Any], cave: CaVEConfig, name: str) -> dict[str, Tensor]:
    context = SD21_UNET.cross_attention_dim
    if problem := tensor_differences(found, {"weight": (context, cave.widths[-1]), "bias": (context,)}):
        raise CODiffCheckpointError(
            f"{name}: expected proj to map CaVE's {cave.widths[-1]} channels to {context}, but {problem}. "
            "Give the cave.pth that this codiff.pkl was trained with."
        )
    return {key: found[key] for key in ("weight", "bias")}


def _read_cave(path: str | os.PathLike[str]) -> tuple[CaVEConfig, dict[str, Tensor]]:
    name = Path(path).name
    state = _read(path, "CaVE's cave.pth")
    config = _cave_config(state, name)
    expected = {key: tuple(value.shape) for key, value in CaVE(config, device="meta").state_dict().items()}
    if problem := tensor_differences(state, expected):
        raise CODiffCheckpointError(
            f"{name}: expected the state dict of CaVE with widths {config.widths} and {config.blocks} blocks, but "
            f"{problem}. Give the authors' cave.pth."
        )
    return config, {key: state[key] for key in expected}


def _cave_config(state: dict[str, Any], name: str) -> CaVEConfig:
    """Widths and blocks as the tensors have them."""
    blocks = len({str(key).split(".")[1] for key in state if str(key).startswith("m_body_encoder.")})
    layers = ["m_head.weight", *(f"m_down{level}.{blocks}.weight" for level in (1, 2, 3))]
    found = [state.get(key) for key in layers]
    absent = [
        key for key, value in zip(layers, found, strict=True) if not (torch.is_tensor(value) and value.dim() == 4)
    ]
    if absent or not blocks:
        raise CODiffCheckpointError(
            f"{name}: expected the state dict of CaVE, with m_body_encoder.* and the convolutions {', '.join(layers)}, "
            f"got {kind(state)} of {len(state)} entries without {', '.join(absent) or 'the former'}. "
            "Give the authors' cave.pth."
        )
    return CaVEConfig(tuple(value.shape[0] for value in found if value is not None), blocks)
