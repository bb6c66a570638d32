"""From the trainer to the graph: an exported CODiff restores in ComfyUI as it did where it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from restoration.restorer_file import write_restorer
from tests.codiff_graphs import run
from tests.codiff_overfit import CROP, overfit, tiny_config
from tests.graphs import Graph, photo
from training.configs.common import RunConfig
from training.trainers.codiff import CoDiffTask

pytestmark = pytest.mark.comfyui


def restored_in_comfyui(codiff, file: Path, images: Tensor) -> Tensor:
    """The template's chain on images (B, 3, H, W), with the whole VAE, in float32 and without its colour node."""
    target = codiff.comfy.base / "models" / "jpeg_restorers" / "trained.safetensors"
    target.write_bytes(file.read_bytes())
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=codiff.base.checkpoint.name)
    vae = graph.add("VAELoader", vae_name=codiff.base.vae.name)
    loader = graph.add("LoadJPEGRestorer", restorer=target.name, dtype="fp32", model=[checkpoint, 0], vae=[vae, 0])
    source = graph.image(images.movedim(1, -1))
    latent = graph.add("VAEEncode", pixels=[source, 0], vae=[loader, 2])
    prompt = graph.add("CaVEEmbed", restorer=[loader, 0], image=[source, 0])
    step = graph.add("OneStepDenoise", model=[loader, 1], conditioning=[prompt, 0], latent=[latent, 0], timestep=-1.0)
    decoded = graph.add("VAEDecode", samples=[step, 0], vae=[loader, 2])
    graph.sink([decoded, 0])
    (image,) = run(codiff.comfy, graph).outputs(decoded)
    return image.movedim(-1, 1)


def test_an_exported_file_restores_as_the_task_does(codiff, tmp_path):
    """Adapters that change something, at a timestep of its own: the picture is the trainer's to 1e-3."""
    config = replace(tiny_config(codiff.base.folder, tmp_path), timestep=321.5, run=RunConfig(tmp_path / "run", seed=3))
    task, generator = CoDiffTask(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    file = tmp_path / "codiff.safetensors"
    write_restorer(file, task.metadata({}, "Apache-2.0"), task.tensors())
    images = photo(CROP, CROP).movedim(-1, 1)
    task.model.eval()
    with torch.no_grad():
        expected = task.restore(images, seed=0)
    assert (restored_in_comfyui(codiff, file, images) - expected).abs().max() < 1e-3
    assert expected.std() > 0.05


@pytest.mark.slow
def test_what_was_learned_by_heart_is_restored_in_comfyui(codiff, tmp_path):
    """Eight patches, trained until the loss has halved, come out of the graph as out of the trainer."""
    with torch.inference_mode(False), torch.enable_grad():
        trained = overfit(codiff.base.folder, tmp_path)
    first, last = sum(trained.losses[:3]) / 3, sum(trained.losses[-3:]) / 3
    assert last <= first / 2, (first, last)
    in_graph = restored_in_comfyui(codiff, trained.file, trained.degraded)
    assert (in_graph - trained.restored).abs().max() < 1e-3
