"""Graphs of CODiff for tests: loading, denoising, the example's chain, and a network in the UNet's place."""

from __future__ import annotations

import numpy as np
import torch

from tests.graphs import Graph

RESTORER = "test-codiff.safetensors"


def loaded(graph: Graph, base) -> tuple[str, str]:
    """Load Checkpoint and Load JPEG Restorer on it."""
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=base.checkpoint.name)
    restorer = graph.add(
        "LoadJPEGRestorer", restorer=RESTORER, dtype="fp32", model=[checkpoint, 0], vae=[checkpoint, 2]
    )
    return checkpoint, restorer


def run(comfy, graph: Graph):
    result = comfy.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    return result


def failure(comfy, graph: Graph) -> str:
    """The message of a graph that must fail in its last node but the sink."""
    result = comfy.run(graph.prompt)
    assert not result.success
    return result.error or str(result.validation)


def denoised(codiff, latent, prompt, timestep=-1.0, **settings) -> torch.Tensor:
    """OneStepDenoise of a latent (B, 4, h, w) with a prompt (B, K, 1024) that carries no timestep of its own."""
    graph = Graph()
    _, restorer = loaded(graph, codiff.base)
    sources = [graph.image(value) for value in ([[prompt, {}]], {"samples": latent}, timestep)]
    step = graph.add(
        "OneStepDenoise",
        model=[restorer, 1],
        conditioning=[sources[0], 0],
        latent=[sources[1], 0],
        timestep=[sources[2], 0],
        **settings,
    )
    graph.sink([step, 0])
    return run(codiff.comfy, graph).outputs(step)[0]["samples"]


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def workflow(graph: Graph, base, image_link: list, **settings) -> dict[str, str]:
    """The example's graph from the image on: encode, embed, denoise, decode, with the colours of the JPEG."""
    _, restorer = loaded(graph, base)
    encoded = graph.add("VAEEncode", pixels=image_link, vae=[restorer, 2])
    prompt = graph.add("CaVEEmbed", restorer=[restorer, 0], image=image_link)
    step = graph.add(
        "OneStepDenoise",
        model=[restorer, 1],
        conditioning=[prompt, 0],
        latent=[encoded, 0],
        timestep=-1.0,
        **settings,
    )
    decoded = graph.add("VAEDecode", samples=[step, 0], vae=[restorer, 2])
    colored = graph.add("JPEGMatchColor", image=[decoded, 0], jpeg_image=image_link, method="adain")
    return {"encoded": encoded, "prompt": prompt, "step": step, "decoded": decoded, "colored": colored}


class ConvolutionsOnly(torch.nn.Module):
    """A network in the UNet's place that only looks at its neighbourhood: 7 latent pixels around, and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(8, 4, 5, 5), (8, 8, 5, 5), (4, 8, 7, 7)]
        self.kernels = torch.nn.ParameterList(
            torch.randn(shape, generator=generator) / np.prod(shape[1:]) ** 0.5 for shape in shapes
        )
        self.dtype = torch.float32

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs):
        for kernel in self.kernels:
            x = torch.nn.functional.conv2d(torch.tanh(x), kernel.to(x), padding=kernel.shape[-1] // 2)
        return x * (1 + timesteps.view(-1, 1, 1, 1) / 1000)


def convolutional(codiff):
    """The checkpoint's MODEL with that network in it."""
    graph = Graph()
    checkpoint, _ = loaded(graph, codiff.base)
    graph.sink([checkpoint, 0])
    model = run(codiff.comfy, graph).outputs(checkpoint)[0].clone()
    model.add_object_patch("diffusion_model", ConvolutionsOnly())
    return model


def step_of(codiff, model, latent, **settings):
    graph = Graph()
    prompt = [[noise(1, 4, 1024), {"jpeg_restorer_timestep": 300.5}]]
    sources = [graph.image(value) for value in (model, prompt, {"samples": latent})]
    links = dict(zip(("model", "conditioning", "latent"), ([source, 0] for source in sources), strict=True))
    step = graph.add("OneStepDenoise", **links, timestep=-1.0, **settings)
    graph.sink([step, 0])
    result = run(codiff.comfy, graph)
    return result.outputs(step)[0]["samples"], result
