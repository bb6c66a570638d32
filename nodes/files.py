"""Nodes that load files: a JPEG or another picture, a restorer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..restoration.jpeg import JPEGData, JPEGError, apply_orientation, read_jpeg_and_pixels
from ..restoration.pictures import picture_format, read_picture
from ..restoration.pipelines import predict_timesteps
from ..restoration.restorer_file import read_restorer
from .adapters import adapt_model, adapt_vae
from .images import join_image
from .loading import DTYPES, load_restorer, restorer_names, restorer_path
from .runtime import image_device, prepare_exact
from .types import JPEGDataSocket, NoJPEG, RestorerSocket, errors_of, expect_restorer

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff")
QUALITY_ESTIMATOR = "starter-quality.safetensors"
_TILE = 1024


class LoadJPEG(io.ComfyNode):
    """A JPEG file with all that it says; of another picture, its pixels and an estimate of its quality."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadJPEG",
            display_name="Load JPEG",
            category="image/restoration",
            description="Loads a JPEG file as a picture, together with what only the file knows: its quantised "
            "coefficients, tables and orientation. The pixels are libjpeg's, as training saw them; Load Image "
            "decodes JPEGs differently. Of PNG, WebP, BMP and TIFF files, which may have been JPEGs before, the "
            "quality is estimated from the pixels.",
            search_aliases=["load jpg", "open jpeg", "jpeg quality", "quantization tables", "jpeg loader"],
            inputs=[
                io.Combo.Input(
                    "image",
                    options=picture_files(),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A JPEG, or a PNG, WebP, BMP or TIFF, in ComfyUI's input folder. Drop a file on the node "
                    "to upload it.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The picture, turned upright as its EXIF orientation says."),
                JPEGDataSocket.Output(
                    "JPEG_DATA",
                    tooltip="What the file holds without loss; restorers keep their result consistent with it. Only "
                    "of JPEGs.",
                ),
                io.Float.Output(
                    "quality",
                    display_name="quality",
                    tooltip="Quality from 1 to 100, read off the quantisation tables; the nearest one where they "
                    "are not standard. Of other files the one that their pixels look like, estimated by a network.",
                ),
                io.String.Output("name", display_name="name", tooltip="The file's name without folder and ending."),
            ],
        )

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        with errors_of("LoadJPEG"):
            path = _input_path(image)
            upright, jpeg, quality = load_picture(path)
        return io.NodeOutput(join_image(upright, None, image_device()), [jpeg], quality, Path(jpeg.name).stem)

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool | str:
        try:
            if image is not None:
                _input_path(image)
        except JPEGError as error:
            return f"LoadJPEG: {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, image: str | None = None) -> str:
        if image is None or cls.validate_inputs(image) is not True:
            return ""
        return hashlib.sha256(Path(_input_path(image)).read_bytes()).hexdigest()


class LoadJPEGRestorer(io.ComfyNode):
    """A restorer file, ready to run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadJPEGRestorer",
            display_name="Load JPEG Restorer",
            category="model/loaders",
            description="Loads a network that restores JPEGs, from models/jpeg_restorers or from the weights of "
            "this pack. One-step restorers bring their own MODEL and VAE (the starters), or adapt Stable Diffusion "
            "2.1-base: then connect its MODEL and VAE.",
            search_aliases=[
                *("jpeg model", "artifact removal model", "driftrec", "codiff", "sodiff", "load restorer"),
                "deblocking",
            ],
            inputs=[
                io.Combo.Input("restorer", options=restorer_names(), tooltip="A restorer file (.safetensors)."),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="Precision of the network. default: half precision where the device is good at it, else "
                    "fp32.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Stable Diffusion 2.1-base (the 512-pixel one), for restorers that are adapters of it: "
                    "codiff, sodiff. Those with a backbone of their own ignore it, others hand it on.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of Stable Diffusion 2.1-base, for restorers that adapt it: codiff. Those with a "
                    "backbone of their own ignore it, others hand it on, sodiff too.",
                ),
            ],
            outputs=[
                RestorerSocket.Output("JPEG_RESTORER", tooltip="The restorer, for the node of its family."),
                io.Model.Output(
                    "MODEL",
                    tooltip="Of a one-step restorer: its own model, or the adapted Stable Diffusion 2.1. Otherwise the "
                    "input, or nothing.",
                ),
                io.Vae.Output(
                    "VAE",
                    tooltip="Of a one-step restorer with a backbone of its own: its own VAE, which loses nothing. Of "
                    "another codiff restorer: the adapted VAE. Otherwise the input, or nothing.",
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer: str, dtype: str, model: Any = None, vae: Any = None) -> io.NodeOutput:
        with errors_of("LoadJPEGRestorer"):
            path = restorer_path(restorer)
            loaded = load_restorer(path, DTYPES[dtype])
            if loaded.backbone is not None:
                model, vae = loaded.backbone.model, loaded.backbone.vae
            elif loaded.metadata.base is not None:
                file = read_restorer(path)
                model, vae = adapt_model(model, file, loaded.source), adapt_vae(vae, file, loaded.source)
        return io.NodeOutput(loaded, model, vae)

    @classmethod
    def validate_inputs(cls, restorer: str | None = None) -> bool | str:
        try:
            if restorer is not None:
                restorer_path(restorer)
        except ValueError as error:
            return f"LoadJPEGRestorer: {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, restorer: str | None = None, **_: Any) -> str:
        if restorer is None or cls.validate_inputs(restorer) is not True:
            return ""
        state = os.stat(restorer_path(restorer))
        return f"{state.st_mtime_ns}-{state.st_size}"


def picture_files() -> list[str]:
    """The files in ComfyUI's input folder whose names are those of JPEGs and other pictures."""
    folder = Path(folder_paths.get_input_directory())
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def load_picture(path: str) -> tuple[Tensor, JPEGData | NoJPEG, float]:
    """Pixels (1, 3, H, W) in [0, 1], turned upright, what the file says, and its quality, read off or estimated.

    Raises:
        JPEGError: It can be used neither as a JPEG nor as another picture.
        PictureError: It is another picture, and damaged.
        ValueError: Its quality has to be estimated, and the network that does that is missing.
    """
    return _load_jpeg(path) if picture_format(path) is None else _load_other(path)


def _load_jpeg(path: str) -> tuple[Tensor, JPEGData, float]:
    """Pixels (1, 3, H, W), turned upright, and what the file says."""
    jpeg, pixels = read_jpeg_and_pixels(path)
    return apply_orientation(pixels, jpeg.orientation)[None], jpeg, jpeg.quality.quality


def _load_other(path: str) -> tuple[Tensor, NoJPEG, float]:
    """Pixels (1, 3, H, W), turned upright, and the quality that they look like."""
    pixels = read_picture(path)[None]
    return pixels, NoJPEG(Path(path).name), _estimated_quality(pixels, Path(path).name)


def _estimated_quality(pixels: Tensor, name: str) -> float:
    """What the shipped network says of one image (1, 3, H, W).

    Raises:
        ValueError: The network is not there.
    """
    try:
        path = restorer_path(QUALITY_ESTIMATOR)
    except ValueError as error:
        raise ValueError(
            f"{name} is no JPEG, so its quality has to be estimated, and {QUALITY_ESTIMATOR}, which does that, is "
            "missing from the pack's weights folder. Install the pack again, or load the picture with Load Image."
        ) from error
    estimator = load_restorer(path, torch.float32)
    network = expect_restorer(estimator, "quality").network
    compute = prepare_exact(estimator, network, pixels.shape, _TILE, torch.float32)
    _, quality = predict_timesteps(network, pixels, compute=compute)
    return float(quality)


def _input_path(name: str) -> str:
    """The path of an input file, inside of ComfyUI's folders.

    Raises:
        JPEGError: There is no such file there.
    """
    if not folder_paths.exists_annotated_filepath(name):
        raise JPEGError(
            f"there is no file {name!r} in ComfyUI's input folder. Choose one from the list, or drop your JPEG on "
            "the node."
        )
    path = folder_paths.get_annotated_filepath(name)
    if not os.path.isfile(path):
        raise JPEGError(f"{name!r} is a folder. Choose a JPEG from the list, or drop one on the node.")
    return path
