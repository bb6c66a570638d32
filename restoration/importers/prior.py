"""Published diffusion models of pixels as priors: guided diffusion's files, DDPM's, and folders of diffusers.

What a file is, its tensors tell: those of guided diffusion (`256x256_diffusion_uncond.pt`, `512x512_diffusion.pt`, its
LSUN files and others' of the same design) and those of DDPM's PyTorch port (`celeba_hq.ckpt`, the converted LSUN files,
a `ckpt.pth` of DDIM's training) are known. Both networks can come as a UNet2DModel of diffusers as well
(`google/ddpm-ema-celebahq-256`), whose config.json and scheduler_config.json are followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.prior import NoiseSchedule
from ..networks.adm_unet import ADMUNetConfig
from ..restorer_file import RestorerMetadata
from ._checkpoint import CheckpointError, kind, listed, tensor_differences, unpickled
from ._diffusers import DiffusersFolder, read_tensors
from ._published import PublishedShapes
from ._unet2d import DiffusersNames, PriorConfig, modernised, network_shapes

_ADM_SIGN, _DDPM_SIGN, _DIFFUSERS_SIGN = "time_embed.0.weight", "temb.dense.0.weight", "time_embedding.linear_1.weight"
_AVERAGES = ("ema", "ema_state_dict", "model_ema", "shadow")
_RAW = ("state_dict", "model", "model_state_dict", "net")
_WANTED = "a checkpoint of guided diffusion or of DDPM, or a folder of diffusers"
_LINEAR = "the linear schedule of 1000 steps from 0.0001 to 0.02"


class PriorCheckpointError(CheckpointError):
    """A file or folder is not a diffusion model that can be a prior; the message says what is wrong."""


def import_prior(
    path: str | os.PathLike[str], *, use_ema: bool = True, head_channels: int | None = None,
    image_size: int | None = None,
) -> tuple[RestorerMetadata, dict[str, Tensor]]:  # fmt: skip
    """Read a published diffusion model.

    Args:
        path: A `.pt`, `.pth`, `.ckpt` or `.safetensors` file, or a folder of diffusers. Only containers, numbers,
            strings and tensors are unpickled from it.
        use_ema: Take averaged weights where a file holds both; otherwise the raw ones.
        head_channels: Channels of each attention head of a network of guided diffusion, which its file does not tell;
            None for 64, as in all of the published files that can be read.
        image_size: Side of the images that the network was trained on; None for what config.json says, or the usual one
            for so many levels.

    Returns:
        The description of the restorer file (family `prior`), and its tensors, in the precision of the file, by their
        full names. What the file does not tell and was assumed is listed in the description, under `training`. The
        licence is `unknown`.

    Raises:
        PriorCheckpointError: The file cannot be read safely, or is no model of these designs; one sentence says why.
    """
    path, given = Path(path), {"head_channels": head_channels, "image_size": image_size}
    if not path.is_dir():
        content, folder = _read(path), path.parent
        if not _is_diffusers(content):
            return _imported(*_from_file(content, path.name, use_ema, given), path.name)
        if not (folder / "config.json").is_file():
            raise PriorCheckpointError(
                f"{path.name}: expected the config.json of diffusers beside these weights, got none. "
                "Give the whole folder."
            )
        path = folder
    return _imported(*_from_folder(path, given), path.resolve().name)


def _imported(
    network: PriorConfig, schedule: NoiseSchedule, tensors: Mapping[str, Tensor], notes: dict[str, Any], name: str
) -> tuple[RestorerMetadata, dict[str, Tensor]]:
    config = {
        "network": {"architecture": "adm" if isinstance(network, ADMUNetConfig) else "ddpm", **network.to_dict()},
        "schedule": schedule.to_dict(),
        "max_timestep": schedule.steps - 1,
        "tile": network.image_size or 0,
    }
    metadata = RestorerMetadata("prior", config, training={"imported_from": name, **notes})
    return metadata, {f"unet.{key}": value for key, value in tensors.items()}


def _from_file(
    content: Any, name: str, use_ema: bool, given: dict[str, int | None]
) -> tuple[PriorConfig, NoiseSchedule, Mapping[str, Tensor], dict[str, Any]]:
    state, weights = _state(content, name, use_ema=use_ema)
    shapes = PublishedShapes(state, name, PriorCheckpointError)
    network, assumed = shapes.ddpm(**given) if _DDPM_SIGN in state else shapes.adm(**given)
    if problem := tensor_differences(state, network_shapes(network)):
        raise PriorCheckpointError(
            f"{name}: expected the tensors of a network of {len(network.level_channels)} levels and "
            f"{network.res_blocks} blocks as its first ones show it, but {problem}. Download or copy it again."
        )
    tensors = {key: state[key] for key in network_shapes(network)}
    return network, NoiseSchedule(), tensors, {"weights": weights, "assumed": [*assumed, _LINEAR]}


def _from_folder(
    path: Path, given: dict[str, int | None]
) -> tuple[PriorConfig, NoiseSchedule, Mapping[str, Tensor], dict[str, Any]]:
    folder = DiffusersFolder(path, PriorCheckpointError)
    told = [key for key, value in given.items() if value is not None]
    if told:
        raise PriorCheckpointError(
            f"{folder.name}: expected no {told[0]}, because the folder's config.json says it, got {given[told[0]]}. "
            "Leave it out."
        )
    network, schedule = folder.network(), folder.schedule()
    state, names = modernised(_tensors_of(folder.weights(), folder.name)), DiffusersNames.of(network)
    if problem := tensor_differences(state, names.expected()):
        raise PriorCheckpointError(
            f"{folder.name}: expected the tensors of the network that its config.json describes, but {problem}. "
            "Download it again."
        )
    return network, schedule or NoiseSchedule(), names.converted(state), {"assumed": [] if schedule else [_LINEAR]}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors" and path.is_file():
        return read_tensors(path, PriorCheckpointError)
    return unpickled(path, wanted=_WANTED, error=PriorCheckpointError)


def _is_diffusers(content: Any) -> bool:
    return isinstance(content, dict) and _DIFFUSERS_SIGN in content


def _state(content: Any, name: str, *, use_ema: bool) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint, and which of its weights they are: `averaged`, `raw`, or, alone, `the file's`."""
    found = {kind: state for kind, state in _states(content) if _is_network(state)}
    if not found:
        raise PriorCheckpointError(f"{name}: expected {_WANTED}, got {_described(content)}")
    preferred = "averaged" if use_ema else "raw"
    weights = preferred if preferred in found else next(iter(found))
    if not use_ema and weights == "averaged":
        raise PriorCheckpointError(
            f"{name}: expected raw weights, got averaged ones only. Convert it without --raw-weights."
        )
    return _tensors_of(found[weights], name), weights


def _states(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """What may be a state dict: the file itself, what it wraps, or what DDIM's training lists, its average last."""
    if isinstance(content, list | tuple):
        states = [_bare(part) for part in content if isinstance(part, dict)]
        yield from zip(("raw", "averaged"), (state for state in states if _is_network(state)), strict=False)
    elif isinstance(content, dict):
        yield "the file's", _bare(content)
        for weights, keys in (("averaged", _AVERAGES), ("raw", _RAW)):
            parts = [content[key] for key in keys if isinstance(content.get(key), dict)]
            yield from ((weights, _bare(part)) for part in parts[:1])


def _bare(state: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict without what DataParallel puts before the names."""
    wrapped = bool(state) and all(str(key).startswith("module.") for key in state)
    return {str(key).removeprefix("module."): value for key, value in state.items()} if wrapped else state


def _is_network(state: dict[Any, Any]) -> bool:
    return _ADM_SIGN in state or _DDPM_SIGN in state


def _tensors_of(state: Mapping[Any, Any], name: str) -> dict[str, Tensor]:
    others = [f"{key} is {kind(value)}" for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise PriorCheckpointError(f"{name}: expected tensors only, got {listed('others', others)}.")
    return {str(key): value for key, value in state.items()}


def _described(content: Any) -> str:
    """What a file is instead, as far as its names tell."""
    if not isinstance(content, dict):
        return f"{kind(content)} without a network of these names."
    names = [str(key) for key in content]
    names += [str(key) for part in content.values() if isinstance(part, dict) for key in part]
    for start, what in _OTHERS.items():
        if any(name.startswith(start) for name in names):
            return f"{what}. A diffusion model of pixels is needed."
    return f"{kind(content)} of {len(content)} entries ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})."


_OTHERS = {
    "model.diffusion_model.": "a latent diffusion model",
    "encoder.down.": "an autoencoder",
    "all_modules.": "an NCSN++, whose own training is `python -m training convert driftrec`",
    "unet.": "a restorer file of this pack, or of its shape: it needs no conversion",
}
