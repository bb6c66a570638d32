"""What cannot work with SODiff ends in one sentence that names the node, what came and what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from restoration.restorer_file import write_restorer
from tests.codiff_graphs import RESTORER as CODIFF
from tests.codiff_graphs import noise, run
from tests.graphs import RESTORER as DRIFTREC
from tests.graphs import Graph, photo
from tests.sodiff_graphs import FIRST_STAGE, FIXED, QUALITY, RESTORER, UNCALIBRATED, alone, loaded, predicted

pytestmark = pytest.mark.comfyui


def refusal(sodiff, graph: Graph, node: str) -> str:
    """The message of a graph that must fail in `node`, in one line."""
    result = sodiff.comfy.run(graph.prompt)
    assert not result.success and result.error is not None, result.validation
    assert result.error_node == node and result.error.count(f"{node}: ") == 1 and "\n" not in result.error
    assert len(result.error) < 500
    return result.error


def refused_prediction(sodiff, restorer: str, image=None, **inputs) -> str:
    graph = Graph()
    based = restorer in (RESTORER, FIXED, UNCALIBRATED, CODIFF)
    loader = loaded(graph, sodiff.base, restorer)[1] if based else alone(graph, restorer)
    links = {key: [graph.image(value), 0] if isinstance(value, list) else value for key, value in inputs.items()}
    source = graph.image(photo(64, 64) if image is None else image)
    graph.sink([graph.add("QFTimestepPredict", restorer=[loader, 0], image=[source, 0], **links), 0])
    return refusal(sodiff, graph, "QFTimestepPredict")


def refused_load(sodiff, restorer: str) -> str:
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=sodiff.base.checkpoint.name)
    graph.sink([graph.add("LoadJPEGRestorer", restorer=restorer, dtype="fp32", model=[checkpoint, 0]), 1])
    return refusal(sodiff, graph, "LoadJPEGRestorer")


def changed(sodiff, name: str, tensors=None, **config) -> str:
    """A copy of the test restorer with another description, or other tensors, in ComfyUI's folder."""
    metadata = replace(sodiff.file.metadata, config={**sodiff.file.metadata.config, **config})
    path = sodiff.comfy.base / "models" / "jpeg_restorers" / name
    write_restorer(path, metadata, sodiff.file.tensors if tensors is None else tensors)
    return name


def test_without_a_model_the_message_says_where_it_comes_from(sodiff):
    graph = Graph()
    graph.sink([alone(graph, RESTORER), 1])
    message = refusal(sodiff, graph, "LoadJPEGRestorer")
    assert "needs its MODEL" in message and "v2-1_512-ema-pruned.safetensors" in message


@pytest.mark.parametrize("restorer", [DRIFTREC, CODIFF, FIRST_STAGE])
def test_the_predictor_refuses_other_families(sodiff, restorer):
    assert "family sodiff or quality, got" in refused_prediction(sodiff, restorer)


@pytest.mark.parametrize("restorer", [DRIFTREC, QUALITY])
def test_the_prompt_refuses_other_families(sodiff, restorer):
    graph = Graph()
    source = graph.image(photo(64, 64))
    graph.sink([graph.add("SAIPEPrompt", restorer=[alone(graph, restorer), 0], image=[source, 0]), 0])
    assert "family sodiff or saipe, got" in refusal(sodiff, graph, "SAIPEPrompt")


@pytest.mark.parametrize(
    ("restorer", "quality", "expected"),
    [
        (FIXED, 50.0, "one timestep, 199.5. Set quality to -1"),
        (FIXED, [-1.0, -1.0], "one timestep, 199.5. Set quality to -1"),
        (UNCALIBRATED, 50.0, "without a calibration"),
        (RESTORER, [50.0, 20.0], "each of the 1 images, or one for all, got 2"),
        (RESTORER, -0.5, "got [-0.5]"),
        (QUALITY, [101.0], "got [101.0]"),
        (RESTORER, [float("nan")], "got [nan]"),
    ],
)
def test_qualities_that_cannot_be_taken(sodiff, restorer, quality, expected):
    """Of a file with one timestep, of one without a calibration, too many, and out of range."""
    assert expected in refused_prediction(sodiff, restorer, quality=quality)


def test_a_predictor_that_was_not_taught_the_quality_does_not_tell_one(sodiff):
    """Its timestep is that of the same weights elsewhere; its quality is -1, and none can be given."""
    name = changed(sodiff, "untaught.safetensors", tells_quality=False)
    timestep, quality, text = predicted(sodiff, photo(64, 64), name)
    assert (timestep, quality) == (predicted(sodiff, photo(64, 64), RESTORER)[0], -1.0)
    assert "quality" not in text
    graph = Graph()
    source, loader = graph.image(photo(64, 64)), loaded(graph, sodiff.base, name)[1]
    graph.sink([graph.add("QFTimestepPredict", restorer=[loader, 0], image=[source, 0], quality=50.0), 0])
    assert "trained without telling it. Set quality to -1" in refusal(sodiff, graph, "QFTimestepPredict")


def test_images_that_are_none(sodiff):
    assert "(1, 8, 8, 5)" in refused_prediction(sodiff, QUALITY, torch.zeros(1, 8, 8, 5))
    graph = Graph()
    source = graph.image(torch.zeros(0, 8, 8, 3))
    graph.sink([graph.add("SAIPEPrompt", restorer=[alone(graph, FIRST_STAGE), 0], image=[source, 0]), 0])
    assert "(0, 8, 8, 3)" in refusal(sodiff, graph, "SAIPEPrompt")


def test_a_missing_timestep_names_the_node_that_predicts_it(sodiff):
    """SAIPE's prompt in One-Step Denoise with timestep -1."""
    graph = Graph()
    _, loader = loaded(graph, sodiff.base)
    prompt = graph.add("SAIPEPrompt", restorer=[loader, 0], image=[graph.image(photo(64, 64)), 0])
    latent = graph.image({"samples": noise(1, 4, 8, 8)})
    graph.sink([
        graph.add("OneStepDenoise", model=[loader, 1], conditioning=[prompt, 0], latent=[latent, 0], timestep=-1.0), 0,
    ])  # fmt: skip
    assert "connect QF Timestep Predict" in refusal(sodiff, graph, "OneStepDenoise")


@pytest.mark.parametrize(
    "config",
    [
        {"saipe": {"dim": 10**9}},
        {"timestep_predictor": {"width": "wide"}},
        {"timestep_predictor": {"timesteps": 0}},
        {"timestep_predictor": None, "timestep": None},
        {"timestep_predictor": None, "timestep": 1000.0},
        {"calibration": {"qualities": [5.0, 5.0], "timesteps": [1.0, 2.0]}},
        {"calibration": {"qualities": [5.0]}},
        {"context_dim": 768},
    ],
)
def test_descriptions_of_no_restorer_are_refused(sodiff, config):
    assert "its configuration is not valid" in refused_load(sodiff, changed(sodiff, "nonsense.safetensors", **config))


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("unet_lora.conv_in.lora_B.weight", "unet_lora.conv_in"),
        ("unet_lora.", "unet_lora is empty"),
        ("prompt.", "missing"),
        ("timestep.quality_head.2.weight", "missing: quality_head.2.weight"),
    ],
)
def test_incomplete_files_are_refused(sodiff, without, expected):
    tensors = {key: value for key, value in sodiff.file.tensors.items() if not key.startswith(without)}
    assert expected in refused_load(sodiff, changed(sodiff, "cut.safetensors", tensors))


def test_no_number_is_an_error(sodiff):
    """Weights that are broken: the prompt and the prediction say so instead of giving black pictures."""
    broken = {
        key: value * torch.nan if key.startswith(("prompt.", "timestep.")) and value.is_floating_point() else value
        for key, value in sodiff.file.tensors.items()
    }
    name = changed(sodiff, "nan.safetensors", broken)
    graph = Graph()
    _, loader = loaded(graph, sodiff.base, name)
    graph.sink([graph.add("SAIPEPrompt", restorer=[loader, 0], image=[graph.image(photo(64, 64)), 0]), 0])
    assert "no number" in refusal(sodiff, graph, "SAIPEPrompt")
    graph = Graph()
    _, loader = loaded(graph, sodiff.base, name)
    graph.sink([graph.add("QFTimestepPredict", restorer=[loader, 0], image=[graph.image(photo(64, 64)), 0]), 0])
    assert "no number" in refusal(sodiff, graph, "QFTimestepPredict")
    good = Graph()
    _, loader = loaded(good, sodiff.base)
    good.sink([loader, 1])
    run(sodiff.comfy, good)
