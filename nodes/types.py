"""The pack's own socket types, and what travels through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..restoration.jpeg import JPEGData
from ..restoration.restorer_file import RestorerMetadata
from ..restoration.restorers import Restorer as RestorerModule

JPEGDataSocket = io.Custom("JPEG_DATA")
"""A list of `JPEGData`, one for each image of the batch; `NoJPEG` where the file is no JPEG."""

RestorerSocket = io.Custom("JPEG_RESTORER")
"""A `Restorer`."""


_WITHOUT_JPEG = "Disconnect jpeg, or connect the JPEG_DATA of Compress to JPEG with its IMAGE."


@dataclass(frozen=True)
class NoJPEG:
    """In place of `JPEGData`: the picture of the file `name`, of which nothing is known beyond its pixels."""

    name: str


@dataclass(frozen=True, eq=False)
class Backbone:
    """What a one-step restorer brings along in place of a base model: core's MODEL and VAE."""

    model: Any
    vae: Any


@dataclass(frozen=True)
class Source:
    """One version of a file: its path, the time of its last change in nanoseconds, and its size in bytes."""

    path: str
    changed: int
    size: int


@dataclass(frozen=True, eq=False)
class Restorer:
    """A restorer file that is loaded, ready for ComfyUI's memory manager.

    Args:
        name: The file's name, for messages.
        metadata: What the file says of itself.
        module: The networks.
        patcher: ComfyUI's handle of `module`: it says on which device it runs and when it is moved there.
        dtype: In which type the networks compute.
        source: The file itself; what it has adapted carries it (`adapted_by`).
        backbone: Of a one-step restorer that adapts no base model.
    """

    name: str
    metadata: RestorerMetadata
    module: RestorerModule
    patcher: Any
    dtype: torch.dtype
    source: Source
    backbone: Backbone | None = None


@contextmanager
def errors_of(node: str) -> Iterator[None]:
    """Put the node's name in front of what the core says about values and files that it cannot use."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


def expect_jpegs(jpegs: Any, remedy: str = _WITHOUT_JPEG) -> list[JPEGData]:
    """What JPEG_DATA holds.

    Args:
        jpegs: From the input.
        remedy: What to do about a picture that is no JPEG.

    Raises:
        ValueError: It is no JPEG_DATA, or that of a picture that is no JPEG.
    """
    if not isinstance(jpegs, list) or not jpegs or not all(isinstance(jpeg, JPEGData | NoJPEG) for jpeg in jpegs):
        raise ValueError("expected JPEG_DATA of this pack at the input jpeg. Connect Load JPEG or Compress to JPEG.")
    for jpeg in jpegs:
        if isinstance(jpeg, NoJPEG):
            raise ValueError(
                f"{jpeg.name} is no JPEG, so nothing beyond its pixels is known for certain that the result could be "
                f"held to. {remedy}"
            )
    return jpegs


def expect_one_size(jpegs: list[JPEGData], remedy: str) -> tuple[int, int]:
    """Height and width, upright, that all JPEGs have.

    Args:
        jpegs: At least one.
        remedy: What to do about several sizes.

    Raises:
        ValueError: They are of several sizes.
    """
    sizes = sorted({(jpeg.upright_height, jpeg.upright_width) for jpeg in jpegs})
    if len(sizes) > 1:
        found = ", ".join(f"{width}x{height}" for height, width in sizes[:3])
        raise ValueError(f"expected JPEGs of one size, got {found}{' and more' if len(sizes) > 3 else ''}. {remedy}")
    return sizes[0]


def expect_restorer(restorer: Any, *families: str) -> Any:
    """The networks of a restorer that must be of certain families.

    Raises:
        ValueError: It is no restorer, or of another family.
    """
    if not isinstance(restorer, Restorer):
        raise ValueError(
            f"expected a restorer, got {type(restorer).__name__}. Connect the JPEG_RESTORER output of Load JPEG "
            "Restorer."
        )
    if restorer.metadata.family not in families:
        raise ValueError(
            f"expected a restorer of the family {' or '.join(families)}, got {restorer.metadata.family} "
            f"({restorer.name}). Choose another file in Load JPEG Restorer, or use the node for that family."
        )
    return restorer.module
