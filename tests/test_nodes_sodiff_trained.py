"""From the trainer to the graph: an exported SODiff restores in ComfyUI as it did where it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from restoration.restorer_file import write_restorer
from tests.codiff_graphs import run
from tests.graphs import Graph, photo
from tests.sodiff_graphs import compressed
from tests.sodiff_overfit import CROP, overfit, tiny_config
from training.configs.common import RunConfig
from training.trainers.sodiff import SODiffTask

pytestmark = pytest.mark.comfyui


def restored_in_comfyui(sodiff, file: Path, images: Tensor) -> tuple[Tensor, list[float] | float]:
    """The template's chain on images (B, 3, H, W), with the whole VAE, in float32 and without its colour node; and
    the timesteps that it took."""
    target = sodiff.comfy.base / "models" / "jpeg_restorers" / "trained-sodiff.safetensors"
    target.write_bytes(file.read_bytes())
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=sodiff.base.checkpoint.name)
    vae = graph.add("VAELoader", vae_name=sodiff.base.vae.name)
    loader = graph.add("LoadJPEGRestorer", restorer=target.name, dtype="fp32", model=[checkpoint, 0], vae=[vae, 0])
    source = graph.image(images.movedim(1, -1))
    latent = graph.add("VAEEncode", pixels=[source, 0], vae=[loader, 2])
    prompt = graph.add("SAIPEPrompt", restorer=[loader, 0], image=[source, 0])
    predicted = graph.add("QFTimestepPredict", restorer=[loader, 0], image=[source, 0])
    step = graph.add(
        "OneStepDenoise", model=[loader, 1], conditioning=[prompt, 0], latent=[latent, 0], timestep=[predicted, 0]
    )
    decoded = graph.add("VAEDecode", samples=[step, 0], vae=[loader, 2])
    graph.sink([decoded, 0])
    outputs = run(sodiff.comfy, graph).outputs
    return outputs(decoded)[0].movedim(-1, 1), outputs(predicted)[0]


@pytest.mark.parametrize("timestep", [None, 321.5])
def test_an_exported_file_restores_as_the_task_does(sodiff, tmp_path, timestep):
    """Adapters that change something, timesteps predicted or fixed: the pictures are the trainer's to 1e-3."""
    config = tiny_config(sodiff.base.folder, tmp_path)
    config = replace(config, timestep=timestep, run=RunConfig(tmp_path / "run", seed=3))
    task, generator = SODiffTask(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
            if "timestep_head.2.weight" in name:  # away from almost equal logits, so that images differ
                parameter.mul_(300)
    file = tmp_path / "sodiff.safetensors"
    write_restorer(file, task.metadata({}, "Apache-2.0"), task.tensors())
    images = torch.cat([compressed(photo(CROP, CROP), quality) for quality in (5, 50)]).movedim(-1, 1)
    task.model.eval()
    with torch.no_grad():
        expected = task.restore(images, seed=0)
        timesteps = task.model.see(images, None).timestep
    restored, taken = restored_in_comfyui(sodiff, file, images)
    assert taken == pytest.approx(timesteps.tolist(), abs=0.05)
    assert timestep is not None or abs(taken[0] - taken[1]) > 0.5
    assert (restored - expected).abs().max() < 1e-3
    assert expected.std() > 0.05


@pytest.mark.slow
def test_what_was_learned_by_heart_is_restored_in_comfyui(sodiff, tmp_path):
    """Four patches, trained until the loss has fallen, come out of the graph as out of the trainer."""
    with torch.inference_mode(False), torch.enable_grad():
        trained = overfit(sodiff.base.folder, tmp_path, steps=16)
    first, last = sum(trained.losses[:3]) / 3, sum(trained.losses[-3:]) / 3
    assert last < 0.9 * first, (first, last)
    in_graph, _ = restored_in_comfyui(sodiff, trained.file, trained.degraded)
    assert (in_graph - trained.restored).abs().max() < 1e-3
