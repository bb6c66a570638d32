"""Graphs with RestoreJPEG, the graphs of single nodes that it has to equal, and restorers of all families for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.codiff_graphs import run
from tests.ddrm_graphs import PRIOR, add_ddrm, write_prior
from tests.graphs import RESTORER as DRIFTREC
from tests.graphs import Graph, photo, save_jpeg
from tests.one_step_networks import write_tiny_codiff, write_tiny_sodiff

CODIFF = "test-small-codiff.safetensors"
SODIFF = "test-small-sodiff.safetensors"
FIXED = "test-small-sodiff-fixed.safetensors"
REGRESSION = "test-regression.safetensors"
BY_FAMILY = {"codiff": CODIFF, "sodiff": SODIFF, "driftrec": DRIFTREC, "regression": REGRESSION, "prior": PRIOR}
SETTINGS = {"strength": 1.0, "seed": 0, "samples": 1, "consistency": 1.0}


def write_restorers(folder: Path) -> None:
    """A restorer of each family but driftrec and regression, which the executor has already."""
    write_tiny_codiff(folder / CODIFF)
    write_tiny_sodiff(folder / SODIFF)
    write_tiny_sodiff(folder / FIXED, predictor=None, timestep=199.5)
    write_prior(folder / PRIOR)


def loader(graph: Graph, restorer: str, dtype: str = "fp32", **base: Any) -> str:
    return graph.add("LoadJPEGRestorer", restorer=restorer, dtype=dtype, **base)


def add_restore(graph: Graph, restorer: str, **inputs: Any) -> str:
    """RestoreJPEG with the restorer of a file; one sample."""
    return graph.add("RestoreJPEG", restorer=[loader(graph, restorer), 0], **{**SETTINGS, **inputs})


def restored(comfy: Any, restorer: str, image: Tensor | None = None, jpegs: Any = None, **inputs: Any) -> Tensor:
    """What RestoreJPEG makes of an IMAGE and of JPEG_DATA, at least one of them."""
    graph = Graph()
    given = {name: [graph.image(value), 0] for name, value in (("image", image), ("jpeg", jpegs)) if value is not None}
    node = add_restore(graph, restorer, **given, **inputs)
    graph.sink([node, 0])
    return run(comfy, graph).outputs(node)[0]


def add_single_nodes(
    graph: Graph, family: str, image: list, jpeg: list | None, restorer: str | None = None, **base: Any
) -> str:  # fmt: skip
    """What an artist wires of the nodes of one family; the last node gives the result."""
    name = restorer or BY_FAMILY[family]
    held = {} if jpeg is None else {"jpeg": jpeg}
    if family in ("driftrec", "regression"):
        sampling = {"sampler": "ode_2m", "steps": 10, "seed": 0, "samples": 1, "color": "mean"}
        return graph.add("DriftRecSample", restorer=[loader(graph, name), 0], image=image, **held, **sampling)
    if family == "prior":
        assert jpeg is not None
        return add_ddrm(graph, jpeg, name, "fp32", steps=20, samples=1)
    return _add_one_step(graph, family, image, jpeg, loader(graph, name, **base))


def _add_one_step(graph: Graph, family: str, image: list, jpeg: list | None, restorer: str) -> str:
    encoded = graph.add("VAEEncode", pixels=image, vae=[restorer, 2])
    node = "CaVEEmbed" if family == "codiff" else "SAIPEPrompt"
    prompt = graph.add(node, restorer=[restorer, 0], image=image)
    timestep: Any = -1.0
    if family == "sodiff":
        predicted = graph.add("QFTimestepPredict", restorer=[restorer, 0], image=image, same_for_batch=True)
        timestep = [predicted, 0]
    step = graph.add(
        "OneStepDenoise", model=[restorer, 1], conditioning=[prompt, 0], latent=[encoded, 0], timestep=timestep
    )
    decoded = graph.add("VAEDecode", samples=[step, 0], vae=[restorer, 2])
    if jpeg is None:
        return decoded
    return graph.add("JPEGConsistency", image=[decoded, 0], jpeg=jpeg, strength=1.0, closed_loop=True)


def jpeg_of(comfy: Any, height: int, width: int, quality: int = 20, **options: Any) -> tuple[list[Any], Tensor]:
    """JPEG_DATA of a part of a photograph as the pack in ComfyUI knows it, and its IMAGE as Pillow decodes it."""
    path = save_jpeg(comfy, f"{height}x{width}.jpg", photo(height, width), quality, **options)
    jpeg, pixels = sys.modules[f"{comfy.pack}.restoration.jpeg"].read_jpeg_and_pixels(path)
    return [jpeg], pixels.movedim(0, -1)[None]
