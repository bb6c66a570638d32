"""Graphs of SODiff for tests: loading, predicting, denoising, the example's chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restoration.jpeg import encode_with_pillow, read_jpeg_and_pixels
from tests.codiff_graphs import run
from tests.graphs import Graph

RESTORER = "test-sodiff.safetensors"
FIXED = "test-sodiff-fixed.safetensors"
UNCALIBRATED = "test-sodiff-uncalibrated.safetensors"
FIRST_STAGE = "test-saipe.safetensors"
QUALITY = "test-quality.safetensors"


def loaded(graph: Graph, base: Any, restorer: str = RESTORER) -> tuple[str, str]:
    """Load Checkpoint and Load JPEG Restorer on it."""
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=base.checkpoint.name)
    loader = graph.add("LoadJPEGRestorer", restorer=restorer, dtype="fp32", model=[checkpoint, 0], vae=[checkpoint, 2])
    return checkpoint, loader


def alone(graph: Graph, restorer: str) -> str:
    """Load JPEG Restorer for a file that adapts no base model."""
    return graph.add("LoadJPEGRestorer", restorer=restorer, dtype="fp32")


def compressed(image: Tensor, quality: int) -> Tensor:
    """An IMAGE (1, H, W, 3) after JPEG compression, as libjpeg decodes it."""
    return read_jpeg_and_pixels(encode_with_pillow(image[0].movedim(-1, 0), quality))[1].movedim(0, -1)[None]


def workflow(graph: Graph, base: Any, image: list, restorer: str = RESTORER, **predict: Any) -> dict[str, str]:
    """The example's graph from the image on; `predict` are inputs of QFTimestepPredict."""
    _, loader = loaded(graph, base, restorer)
    encoded = graph.add("VAEEncode", pixels=image, vae=[loader, 2])
    prompt = graph.add("SAIPEPrompt", restorer=[loader, 0], image=image)
    predicted = graph.add("QFTimestepPredict", restorer=[loader, 0], image=image, **predict)
    step = graph.add(
        "OneStepDenoise",
        model=[loader, 1],
        conditioning=[prompt, 0],
        latent=[encoded, 0],
        timestep=[predicted, 0],
    )
    decoded = graph.add("VAEDecode", samples=[step, 0], vae=[loader, 2])
    colored = graph.add("JPEGMatchColor", image=[decoded, 0], jpeg_image=image, method="adain")
    return {"prompt": prompt, "predicted": predicted, "step": step, "decoded": decoded, "colored": colored}


def restored(sodiff: Any, image: Tensor, **predict: Any) -> tuple[Tensor, Any]:
    """The restored latent of an IMAGE by the example's chain, and the timesteps that were predicted."""
    graph = Graph()
    nodes = workflow(graph, sodiff.base, [graph.image(image), 0], **predict)
    graph.sink([nodes["step"], 0])
    outputs = run(sodiff.comfy, graph).outputs
    return outputs(nodes["step"])[0]["samples"], outputs(nodes["predicted"])[0]


def predicted(sodiff: Any, image: Tensor, restorer: str = QUALITY, **inputs: Any) -> tuple[Any, float, str]:
    """What QFTimestepPredict says of an IMAGE: timestep, quality, and the text on the node."""
    graph = Graph()
    needs_base = restorer not in (QUALITY, FIRST_STAGE)
    loader = loaded(graph, sodiff.base, restorer)[1] if needs_base else alone(graph, restorer)
    links = {key: [graph.image(value), 0] if isinstance(value, list) else value for key, value in inputs.items()}
    node = graph.add("QFTimestepPredict", restorer=[loader, 0], image=[graph.image(image), 0], **links)
    graph.sink([node, 0])
    timestep, quality = run(sodiff.comfy, graph).outputs(node)
    (text,) = sodiff.comfy.executor.history_result["outputs"][node]["text"]
    return timestep, quality, text


def text_prompt(seed: int = 2) -> list:
    """What CLIP Text Encode gives for Stable Diffusion 2.x: 77 tokens of 1024 numbers, and pooled ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens, pooled = torch.randn(1, 77, 1024, generator=generator), torch.randn(1, 1024, generator=generator)
    return [[tokens, {"pooled_output": pooled}]]
