"""The pack's own socket types, and what travels through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..restoration.restorer_file import RestorerMetadata
from ..restoration.restorers import Restorer as RestorerModule

JPEGDataSocket = io.Custom("JPEG_DATA")
"""A list of `JPEGData`, one for each image of the batch."""

RestorerSocket = io.Custom("JPEG_RESTORER")
"""A `Restorer`."""


@dataclass(frozen=True, eq=False)
class Restorer:
    """A restorer file that is loaded, ready for ComfyUI's memory manager.

    Args:
        name: The file's name, for messages.
        metadata: What the file says of itself.
        module: The networks.
        patcher: ComfyUI's handle of `module`: it says on which device it runs and when it is moved there.
        dtype: In which type the networks compute.
    """

    name: str
    metadata: RestorerMetadata
    module: RestorerModule
    patcher: Any
    dtype: torch.dtype


@contextmanager
def errors_of(node: str) -> Iterator[None]:
    """Put the node's name in front of what the core says about values and files that it cannot use."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from error


def expect_restorer(restorer: Any, kinds: type | tuple[type, ...], families: str) -> Any:
    """The networks of a restorer that must be of certain families.

    Raises:
        ValueError: It is no restorer, or of another family.
    """
    if not isinstance(restorer, Restorer):
        raise ValueError(
            f"expected a restorer, got {type(restorer).__name__}. Connect the JPEG_RESTORER output of Load JPEG "
            "Restorer."
        )
    if not isinstance(restorer.module, kinds):
        raise ValueError(
            f"expected a restorer of the family {families}, got {restorer.metadata.family} ({restorer.name}). Choose "
            "another file in Load JPEG Restorer, or use the node for that family."
        )
    return restorer.module
