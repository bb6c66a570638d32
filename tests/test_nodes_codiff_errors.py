"""What cannot work with CODiff ends in one sentence that names the node, what came and what to load."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from restoration.restorer_file import write_restorer
from tests.codiff_graphs import RESTORER, loaded, noise, run
from tests.graphs import RESTORER as DRIFTREC
from tests.graphs import Graph, photo

pytestmark = pytest.mark.comfyui


def refusal(codiff, graph: Graph, node: str) -> str:
    """The message of a graph that must fail in `node`, in one line."""
    result = codiff.comfy.run(graph.prompt)
    assert not result.success and result.error is not None, result.validation
    assert result.error_node == node and result.error.count(f"{node}: ") == 1 and "\n" not in result.error
    assert len(result.error) < 700
    return result.error


def loader(graph: Graph, **inputs) -> str:
    return graph.add("LoadJPEGRestorer", restorer=RESTORER, dtype="fp32", **inputs)


def refused_load(codiff, model=None, vae=None, restorer: str = RESTORER) -> str:
    """Load JPEG Restorer with values in place of the checkpoint's; None leaves an input unconnected."""
    graph = Graph()
    inputs = {name: [graph.image(value), 0] for name, value in (("model", model), ("vae", vae)) if value is not None}
    node = loader(graph, **inputs)
    graph.prompt[node]["inputs"]["restorer"] = restorer
    graph.sink([node, 1])
    return refusal(codiff, graph, "LoadJPEGRestorer")


@pytest.fixture
def parts(codiff) -> SimpleNamespace:
    """The checkpoint's MODEL and VAE, and the adapted ones."""
    graph = Graph()
    checkpoint, restorer = loaded(graph, codiff.base)
    graph.sink([checkpoint, 0])
    graph.sink([restorer, 1])
    result = run(codiff.comfy, graph)
    model, _, vae = result.outputs(checkpoint)
    _, adapted, _ = result.outputs(restorer)
    return SimpleNamespace(model=model, vae=vae, adapted=adapted, restorer=result.outputs(restorer)[0])


def test_without_a_base_the_message_says_where_it_comes_from(codiff, parts):
    for message in (refused_load(codiff), refused_load(codiff, vae=parts.vae), refused_load(codiff, model=parts.model)):
        assert "v2-1_512-ema-pruned.safetensors" in message and "Load Checkpoint" in message
    assert "needs its MODEL" in refused_load(codiff, vae=parts.vae)
    assert "needs its VAE" in refused_load(codiff, model=parts.model)


def test_v_prediction_is_refused(codiff, parts):
    """Both a checkpoint that core takes for one, and core's node that turns a model into one."""
    graph = Graph()
    source = graph.image(parts.model)
    changed = graph.add("ModelSamplingDiscrete", model=[source, 0], sampling="v_prediction", zsnr=False)
    node = loader(graph, model=[changed, 0], vae=[graph.image(parts.vae), 0])
    graph.sink([node, 1])
    message = refusal(codiff, graph, "LoadJPEGRestorer")
    assert "v-prediction" in message and "SD 2.1-base" in message


def other_model(model, **config):
    """A MODEL of another kind: the same, but for what its configuration says."""
    other = model.clone()
    other.model = copy.copy(model.model)
    kind = type(model.model.model_config)
    other.model.model_config = kind({**model.model.model_config.unet_config, **config})
    return other


def test_other_models_are_refused(codiff, parts):
    sd15 = refused_load(codiff, model=other_model(parts.model, context_dim=768), vae=parts.vae)
    assert "Stable Diffusion 2.x" in sd15 and "768" in sd15
    inpainting = refused_load(codiff, model=other_model(parts.model, in_channels=9), vae=parts.vae)
    assert "9" in inpainting


def test_layers_that_do_not_fit_are_named(codiff, parts):
    """A restorer of the full SD 2.1 on the reduced one: it has layers that this one has not."""
    file = codiff.file
    name = "mid_block.resnets.0.conv1"
    tensors = {
        **file.tensors,
        **_lora("unet_lora.down_blocks.3.resnets.0.conv1", (8, 8)),
        **_lora(f"unet_lora.{name}", (9, 9)),
    }
    write_restorer(codiff.comfy.base / "models" / "jpeg_restorers" / "larger.safetensors", file.metadata, tensors)
    message = refused_load(codiff, parts.model, parts.vae, "larger.safetensors")
    assert "down_blocks.3.resnets.0.conv1 is missing" in message and name in message


def _lora(name: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.zeros(4, shape[1]), f"{name}.lora_B.weight": torch.zeros(shape[0], 4)}


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("unet.conv_in.bias", "unet.conv_in.bias"),
        ("unet_lora.conv_out.lora_B.weight", "unet_lora.conv_out"),
        ("vae_lora.", "vae_lora is empty"),
        ("projection.weight", "missing: weight"),
    ],
)
def test_incomplete_files_are_refused(codiff, parts, without, expected):
    tensors = {key: value for key, value in codiff.file.tensors.items() if not key.startswith(without)}
    write_restorer(codiff.comfy.base / "models" / "jpeg_restorers" / "cut.safetensors", codiff.file.metadata, tensors)
    assert expected in refused_load(codiff, parts.model, parts.vae, "cut.safetensors")


def test_another_vae_is_refused(codiff, parts):
    """A small preview decoder in the VAE's place, and something of more channels."""
    tiny = SimpleNamespace(latent_channels=4, first_stage_model=torch.nn.Identity())
    assert "Identity" in refused_load(codiff, parts.model, tiny)
    flux = SimpleNamespace(latent_channels=16, first_stage_model=parts.vae.first_stage_model)
    assert "16 latent channels" in refused_load(codiff, parts.model, flux)


def test_first_stage_files_are_told_from_restorers(codiff):
    """A file of the first training stage alone: the message says that the second is missing."""
    from restoration.restorer_file import RestorerMetadata

    folder = codiff.comfy.base / "models" / "jpeg_restorers"
    write_restorer(folder / "stage1.safetensors", RestorerMetadata("cave", {"cave": {}}), {"prompt.x": torch.zeros(1)})
    assert "python -m training codiff" in refused_load(codiff, restorer="stage1.safetensors")


def test_cave_embed_refuses_small_images_and_other_families(codiff, parts):
    graph = Graph()
    source, small = graph.image(parts.restorer), graph.image(photo(20, 400))
    graph.sink([graph.add("CaVEEmbed", restorer=[source, 0], image=[small, 0]), 0])
    assert "CaVEEmbed: expected an image of at least 32x32 pixels, got 400x20. Resize or pad it first." in refusal(
        codiff, graph, "CaVEEmbed"
    )
    graph = Graph()
    other = graph.add("LoadJPEGRestorer", restorer=DRIFTREC, dtype="fp32")
    graph.sink([graph.add("CaVEEmbed", restorer=[other, 0], image=[graph.image(photo(40, 40)), 0]), 0])
    assert "family codiff, got driftrec" in refusal(codiff, graph, "CaVEEmbed")


def test_driftrec_sample_refuses_codiff(codiff, parts):
    graph = Graph()
    graph.sink([graph.sample([graph.image(photo(40, 40)), 0]), 0])
    graph.prompt["3"]["inputs"]["restorer"] = [graph.image(parts.restorer), 0]
    assert "got codiff" in refusal(codiff, graph, "DriftRecSample")


GOOD = {"samples": torch.zeros(2, 4, 8, 8)}
PROMPT = [[torch.zeros(1, 4, 1024), {"jpeg_restorer_timestep": 499.0}]]


@pytest.mark.parametrize(
    ("latent", "prompt", "timestep", "expected"),
    [
        (GOOD, [[torch.zeros(1, 4, 1024), {}]], -1.0, "got none. Set timestep"),
        (GOOD, [*PROMPT, [torch.zeros(1, 4, 1024), {"jpeg_restorer_timestep": 200.0}]], -1.0, "got 200 and 499"),
        (GOOD, [[torch.zeros(1, 4, 768), {}]], 499.0, "got (1, 4, 768)"),
        (GOOD, [[torch.zeros(3, 4, 1024), {}]], 499.0, "2 images, or one for all, got 3"),
        (GOOD, [], 499.0, "got none. Connect CaVE Prompt"),
        (GOOD, PROMPT, [1.0, 2.0, 3.0], "2 images, or one for all, got 3"),
        (GOOD, PROMPT, [1.0, 1000.0], "got [1.0, 1000.0]"),
        (GOOD, PROMPT, -0.5, "got [-0.5, -0.5]"),
        ({"samples": torch.zeros(1, 16, 8, 8)}, PROMPT, -1.0, "got (1, 16, 8, 8)"),
        ({"samples": torch.zeros(1, 4, 3, 8, 8)}, PROMPT, -1.0, "got (1, 4, 3, 8, 8)"),
    ],
)
def test_one_step_denoise_says_what_does_not_fit(codiff, parts, latent, prompt, timestep, expected):
    graph = Graph()
    sources = [graph.image(value) for value in (parts.adapted, prompt, latent, timestep)]
    links = dict(zip(("model", "conditioning", "latent", "timestep"), ([s, 0] for s in sources), strict=True))
    graph.sink([graph.add("OneStepDenoise", **links), 0])
    assert expected in refusal(codiff, graph, "OneStepDenoise")


def test_tiles_with_too_much_overlap_and_models_without_timesteps_are_refused(codiff, parts):
    graph = Graph()
    sources = [graph.image(value) for value in (parts.adapted, PROMPT, GOOD)]
    links = dict(zip(("model", "conditioning", "latent"), ([s, 0] for s in sources), strict=True))
    graph.sink([graph.add("OneStepDenoise", **links, timestep=-1.0, tile=256, overlap=192), 0])
    assert "half the tile" in refusal(codiff, graph, "OneStepDenoise")
    graph = Graph()
    sources = [graph.image(value) for value in (parts.adapted, PROMPT, GOOD)]
    changed = graph.add("ModelSamplingDiscrete", model=[sources[0], 0], sampling="lcm", zsnr=False)
    links = {"model": [changed, 0], "conditioning": [sources[1], 0], "latent": [sources[2], 0]}
    graph.sink([graph.add("OneStepDenoise", **links, timestep=-1.0), 0])
    assert "discrete timesteps" in refusal(codiff, graph, "OneStepDenoise")


def test_match_color_needs_images_that_belong_together(codiff):
    graph = Graph()
    node = graph.add(
        "JPEGMatchColor",
        image=[graph.image(noise(2, 16, 16, 3).clamp(0, 1)), 0],
        jpeg_image=[graph.image(photo(32, 16)), 0],
        method="wavelet",
    )
    graph.sink([node, 0])
    assert "got 1 of 16x32" in refusal(codiff, graph, "JPEGMatchColor")
