"""Restorer files: where they are, and how they become networks under ComfyUI's memory manager."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from weakref import WeakValueDictionary

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch

from ..restoration.restorer_file import RestorerFile, read_metadata, read_restorer
from ..restoration.restorers import backbone_of, build_restorer, load_weights
from .backbone import make_model
from .dct_vae import make_vae
from .types import Backbone, Restorer, Source

RESTORER_FOLDER = "jpeg_restorers"
SHIPPED_WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
DTYPES = {"default": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# By the type that is asked for: a backbone's own choice is another than that of the networks beside it.
# Weak: the outputs of LoadJPEGRestorer own the networks; this only finds one that is still alive.
_alive: WeakValueDictionary[tuple[Source, torch.dtype, torch.dtype | None], Restorer] = WeakValueDictionary()


def register_restorer_folders() -> None:
    """List `.safetensors` files of models/jpeg_restorers and of the pack's weights; the former win on equal names."""
    own = os.path.join(folder_paths.models_dir, RESTORER_FOLDER)
    try:
        os.makedirs(own, exist_ok=True)
    except OSError as error:
        logging.warning(
            "JPEG Restorer: %s could not be made (%s); only the weights of the pack are listed.", own, error
        )
    folder_paths.add_model_folder_path(RESTORER_FOLDER, own)
    folder_paths.add_model_folder_path(RESTORER_FOLDER, str(SHIPPED_WEIGHTS))
    paths, _ = folder_paths.folder_names_and_paths[RESTORER_FOLDER]
    folder_paths.folder_names_and_paths[RESTORER_FOLDER] = (paths, {".safetensors"})


def restorer_names() -> list[str]:
    """The files that LoadJPEGRestorer offers."""
    return folder_paths.get_filename_list(RESTORER_FOLDER)


def restorer_path(name: str) -> str:
    """Where a listed file is.

    Raises:
        ValueError: There is no such file.
    """
    path = folder_paths.get_full_path(RESTORER_FOLDER, name) if name.endswith(".safetensors") else None
    if path is None:
        raise ValueError(
            f"there is no restorer {name!r} in models/{RESTORER_FOLDER} or in the pack's weights folder. Choose one "
            "that is listed, or put the .safetensors file there and press R to refresh the list."
        )
    return path


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision where ComfyUI says that the device is good at it, else float32."""
    if mm.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float32


def source_of(path: str) -> Source:
    """The file that is at a path now."""
    state = os.stat(path)
    return Source(os.path.abspath(path), state.st_mtime_ns, state.st_size)


def load_restorer(path: str, dtype: torch.dtype | None = None) -> Restorer:
    """A restorer file as networks of ComfyUI's layers, under its memory manager; one that is in use already is shared.

    Args:
        path: The file.
        dtype: Of the networks; None for `default_dtype`, and for what core chooses for a backbone.

    Raises:
        RestorerFileError: The file is not a whole restorer, or not of a family that this version runs.
    """
    device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    wanted, dtype = dtype, dtype or default_dtype(device)
    own = backbone_of(read_metadata(path), os.path.basename(path)) is not None
    key = (source_of(path), dtype, wanted if own else None)  # core may choose another type for a backbone
    if (restorer := _alive.get(key)) is not None:
        return restorer
    file = read_restorer(path)
    operations = comfy.ops.manual_cast
    module = build_restorer(file.metadata, file.name, operations=operations, dtype=dtype, device=offload_device)
    # Looked up at each call: ComfyUI puts another class in its place when it starts.
    patcher = comfy.model_patcher.CoreModelPatcher(module, load_device=device, offload_device=offload_device)
    load_weights(module, file, assign=patcher.is_dynamic())
    module.eval().requires_grad_(False)
    module.compute_dtype = dtype
    backbone = _load_backbone(file, wanted)
    _alive[key] = restorer = Restorer(file.name, file.metadata, module, patcher, dtype, key[0], backbone)
    return restorer


def _load_backbone(file: RestorerFile, dtype: torch.dtype | None) -> Backbone | None:
    if backbone_of(file.metadata, file.name) is None:
        return None
    return Backbone(make_model(file, dtype), make_vae(file))
