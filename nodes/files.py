"""Nodes that load files: a JPEG, a restorer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..restoration.jpeg import JPEGError, apply_orientation, read_jpeg_and_pixels
from ..restoration.restorer_file import read_restorer
from .adapters import adapt_model, adapt_vae
from .images import join_image
from .runtime import DTYPES, image_device, load_restorer, restorer_names, restorer_path
from .types import JPEGDataSocket, RestorerSocket, errors_of

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")


class LoadJPEG(io.ComfyNode):
    """A JPEG file with all that it says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadJPEG",
            display_name="Load JPEG",
            category="image/restoration",
            description="Loads a JPEG file as a picture, together with what only the file knows: its quantised "
            "coefficients, tables and orientation. The pixels are libjpeg's, as training saw them; Load Image "
            "decodes JPEGs differently.",
            search_aliases=["load jpg", "open jpeg", "jpeg quality", "quantization tables", "jpeg loader"],
            inputs=[
                io.Combo.Input(
                    "image",
                    options=jpeg_files(),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A JPEG in ComfyUI's input folder. Drop a file on the node to upload it.",
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", tooltip="The picture, turned upright as its EXIF orientation says."),
                JPEGDataSocket.Output(
                    "JPEG_DATA",
                    tooltip="What the file holds without loss; restorers keep their result consistent with it.",
                ),
                io.Float.Output(
                    "quality",
                    display_name="quality",
                    tooltip="Quality from 1 to 100, read off the quantisation tables; the nearest one where they "
                    "are not standard.",
                ),
                io.String.Output("name", display_name="name", tooltip="The file's name without folder and ending."),
            ],
        )

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        with errors_of("LoadJPEG"):
            jpeg, pixels = read_jpeg_and_pixels(_input_path(image))
        upright = apply_orientation(pixels, jpeg.orientation)[None]
        return io.NodeOutput(
            join_image(upright, None, image_device()), [jpeg], jpeg.quality.quality, Path(jpeg.name).stem
        )

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
            "this pack. Restorers of the family codiff adapt Stable Diffusion 2.1-base: connect its MODEL and VAE.",
            search_aliases=[
                *("jpeg model", "artifact removal model", "driftrec", "codiff", "load restorer", "deblocking"),
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
                    tooltip="Stable Diffusion 2.1-base (the 512-pixel one), for restorers that are adapters of it. "
                    "Others leave it as it is.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of Stable Diffusion 2.1-base, for restorers that are adapters of it. Others "
                    "leave it as it is.",
                ),
            ],
            outputs=[
                RestorerSocket.Output("JPEG_RESTORER", tooltip="The restorer, for the node of its family."),
                io.Model.Output(
                    "MODEL",
                    tooltip="For adapters of Stable Diffusion 2.1: the adapted model. Otherwise the input, or nothing.",
                ),
                io.Vae.Output(
                    "VAE",
                    tooltip="For adapters of Stable Diffusion 2.1: the adapted VAE. Otherwise the input, or nothing.",
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer: str, dtype: str, model: Any = None, vae: Any = None) -> io.NodeOutput:
        with errors_of("LoadJPEGRestorer"):
            path = restorer_path(restorer)
            loaded = load_restorer(path, DTYPES[dtype])
            if loaded.metadata.base is not None:
                file = read_restorer(path)
                model, vae = adapt_model(model, file), adapt_vae(vae, file)
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


def jpeg_files() -> list[str]:
    """The files in ComfyUI's input folder whose names are those of JPEGs."""
    folder = Path(folder_paths.get_input_directory())
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in JPEG_SUFFIXES and path.is_file())


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
