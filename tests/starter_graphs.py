"""Graphs of one-step restorers with a backbone of their own, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restoration.restorer_file import RestorerFile, read_restorer
from tests.codiff_graphs import run
from tests.graphs import Graph
from tests.one_step_networks import write_tiny_codiff

RESTORER = "test-own-backbone.safetensors"


def write(comfy: Any, name: str = RESTORER, **changes: Any) -> RestorerFile:
    """A tiny restorer of the family codiff in ComfyUI's models folder."""
    path = write_tiny_codiff(comfy.base / "models" / "jpeg_restorers" / name, **changes)
    comfy.folder_paths.filename_list_cache.clear()
    return read_restorer(path)


def loaded(graph: Graph, name: str = RESTORER, dtype: str = "fp32", **inputs: Any) -> str:
    return graph.add("LoadJPEGRestorer", restorer=name, dtype=dtype, **inputs)


def encoded(graph: Graph, loader: str, image: Tensor, node: str = "VAEEncode", **settings: int) -> str:
    return graph.add(node, pixels=[graph.image(image), 0], vae=[loader, 2], **settings)


def outcome(comfy: Any, graph: Graph, node: str) -> Any:
    """The first output of a node of a graph that must succeed."""
    graph.sink([node, 0])
    return run(comfy, graph).outputs(node)[0]


def numbers(latent: dict[str, Any]) -> Tensor:
    """A latent's samples as an ordinary tensor."""
    return latent["samples"].as_subclass(Tensor)


def random_prompt(width: int = 32, batch: int = 1, seed: int = 3) -> list:
    return [[torch.randn(batch, 9, width, generator=torch.Generator().manual_seed(seed)), {}]]


def step(graph: Graph, loader: str, latent: list, prompt: list, timestep: Any = 300.5, **settings: Any) -> str:
    """OneStepDenoise with a prompt and a timestep, or a list of them."""
    return graph.add(
        "OneStepDenoise",
        model=[loader, 1],
        latent=latent,
        conditioning=[graph.image(prompt), 0],
        timestep=[graph.image(timestep), 0],
        **settings,
    )
