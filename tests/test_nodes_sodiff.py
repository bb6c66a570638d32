"""SODiff in graphs, through ComfyUI's own executor: equal to diffusers with peft, on a reduced SD 2.1."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel

from restoration.networks.timestep_predictor import expected_timestep
from restoration.restorers import build_restorer, load_weights
from tests.codiff_graphs import noise, relative, run
from tests.diffusers_reference import adapted, one_step
from tests.graphs import Graph, photo, save_jpeg
from tests.reduced_sd21 import unet_lora_modules
from tests.sodiff_graphs import (
    FIRST_STAGE,
    FIXED,
    QUALITY,
    RESTORER,
    alone,
    compressed,
    loaded,
    predicted,
    restored,
    workflow,
)

pytestmark = pytest.mark.comfyui


def networks(sodiff):
    """The file's networks in plain PyTorch."""
    module = build_restorer(sodiff.file.metadata, sodiff.file.name)
    load_weights(module, sodiff.file)
    return module.eval().requires_grad_(False)


def batch(height: int = 96, width: int = 128) -> torch.Tensor:
    """Two photos, an IMAGE (2, H, W, 3), one compressed at quality 5 and one at 50."""
    return torch.cat([compressed(photo(height, width), 5), compressed(photo(height, width).flip(2), 50)])


def test_one_step_equals_diffusers_with_peft(sodiff):
    """The file's LoRA, conv_in's among it, a prompt of SAIPE's shape and a timestep for each image, not rounded."""
    latent, prompt, timesteps = noise(2, 4, 12, 16) * 5, noise(2, 77, 1024, seed=1), [611.25, 87.75]
    graph = Graph()
    _, loader = loaded(graph, sodiff.base)
    sources = [graph.image(value) for value in ([[prompt, {}]], {"samples": latent}, timesteps)]
    links = dict(zip(("conditioning", "latent", "timestep"), ([source, 0] for source in sources), strict=True))
    step = graph.add("OneStepDenoise", model=[loader, 1], **links)
    graph.sink([step, 0])
    result = run(sodiff.comfy, graph).outputs(step)[0]["samples"]
    unet = UNet2DConditionModel.from_pretrained(sodiff.base.folder / "unet")
    names = list(unet_lora_modules(unet))
    assert "conv_in" in names
    expected = one_step(adapted(unet, names, sodiff.file, "unet_lora"), latent, prompt, timesteps)
    assert relative(result, expected) < 1e-4
    without = {name: part for name, part in sodiff.file.tensors.items() if "conv_in" not in name}
    unet = UNet2DConditionModel.from_pretrained(sodiff.base.folder / "unet")
    file = type(sodiff.file)(sodiff.file.metadata, without, "without")
    names.remove("conv_in")
    assert relative(one_step(adapted(unet, names, file, "unet_lora"), latent, prompt, timesteps), expected) > 1e-3


def test_the_vae_is_handed_on_and_may_be_missing(sodiff):
    """SODiff freezes the VAE: the output is the input itself; without one there is none, and the MODEL comes anyway."""
    graph = Graph()
    checkpoint, loader = loaded(graph, sodiff.base)
    without = graph.add("LoadJPEGRestorer", restorer=RESTORER, dtype="fp32", model=[checkpoint, 0])
    for node in (loader, without):
        graph.sink([node, 1])
    outputs = run(sodiff.comfy, graph).outputs
    assert outputs(loader)[2] is outputs(checkpoint)[2]
    assert outputs(without)[2] is None and outputs(without)[1].patches and not outputs(checkpoint)[0].patches


def test_saipe_prompt_is_the_networks_whatever_the_batch(sodiff):
    """Tokens and reconstruction of each image are the core network's; alpha comes back; no timestep is carried."""
    colors, alpha = batch(70, 100), torch.rand(2, 70, 100, 1)
    graph = Graph()
    _, loader = loaded(graph, sodiff.base)
    node = graph.add("SAIPEPrompt", restorer=[loader, 0], image=[graph.image(torch.cat([colors, alpha], -1)), 0])
    graph.sink([node, 0])
    [[tokens, extra]], image = run(sodiff.comfy, graph).outputs(node)
    reconstruction, expected = networks(sodiff).network(colors.movedim(-1, 1))
    assert tuple(tokens.shape) == (2, 77, 1024) and tokens.is_contiguous() and extra == {}
    assert relative(tokens, expected) < 1e-5 and relative(expected[0], expected[1]) > 1e-3
    assert tuple(image.shape) == (2, 70, 100, 4) and torch.equal(image[..., 3:], alpha)
    assert torch.allclose(image[..., :3], reconstruction.clamp(0, 1).movedim(1, -1), atol=1e-5)


def test_the_first_stage_alone_gives_prompts_and_needs_no_base(sodiff):
    """A file of the family saipe runs in the same node; MODEL and VAE pass through."""
    graph = Graph()
    model = graph.image(marker := object())
    loader = graph.add("LoadJPEGRestorer", restorer=FIRST_STAGE, dtype="fp32", model=[model, 0])
    node = graph.add("SAIPEPrompt", restorer=[loader, 0], image=[graph.image(photo(64, 64)), 0])
    graph.sink([node, 0])
    outputs = run(sodiff.comfy, graph).outputs
    assert tuple(outputs(node)[0][0][0].shape) == (1, 77, 1024)
    assert outputs(loader)[1] is marker and outputs(loader)[2] is None


def test_timesteps_and_qualities_are_the_networks(sodiff):
    """One number for one image, a list for a batch: Eq. 11 in plain PyTorch; in tiles too; shown on the node."""
    image = batch(150, 220)
    predictor = networks(sodiff).predictor
    quality, logits = predictor(image.movedim(-1, 1))
    expected = expected_timestep(logits)
    timesteps, mean, text = predicted(sodiff, image, RESTORER, tile=0)
    assert timesteps == pytest.approx(expected.tolist(), abs=0.05) and mean == pytest.approx(
        float(quality.mean()), abs=0.01
    )
    assert text.splitlines() == [f"{i + 1}: quality {quality[i]:.1f}, timestep {expected[i]:.1f}" for i in range(2)]
    in_tiles, *_ = predicted(sodiff, image, RESTORER, tile=64)
    assert in_tiles == pytest.approx(timesteps, abs=0.05)
    one, _, text = predicted(sodiff, image[:1], RESTORER)
    assert isinstance(one, float) and one == pytest.approx(timesteps[0], abs=0.05) and "1:" not in text


def test_a_batch_of_two_qualities_is_restored_as_its_images_alone(sodiff):
    """Quality 5 and 50 in one batch: two timesteps, and each picture comes out as it does alone."""
    image = batch()
    both, timesteps = restored(sodiff, image)
    assert len(timesteps) == 2 and abs(timesteps[0] - timesteps[1]) > 20
    for index in range(2):
        single, timestep = restored(sodiff, image[index : index + 1])
        assert timestep == pytest.approx(timesteps[index], abs=0.05)
        assert relative(both[index : index + 1], single) < 1e-4
    swapped, _ = restored(sodiff, image.flip(0))
    assert relative(swapped.flip(0), both) < 1e-4


def test_the_quality_is_a_dial(sodiff):
    """A given quality moves the timestep along the file's table, one way only, from where the picture is; and so it
    moves the result away from that of the quality that is seen."""
    image = compressed(photo(96, 128), 30)
    timestep, seen, _ = predicted(sodiff, image, RESTORER)
    moved = [predicted(sodiff, image, RESTORER, quality=float(quality))[0] for quality in range(5, 100, 10)]
    assert all(before > after for before, after in pairwise(moved))
    assert predicted(sodiff, image, RESTORER, quality=round(seen, 2))[0] == pytest.approx(timestep, abs=0.2)
    slope = -8.0  # of the file's table, everywhere
    inner = predicted(sodiff, image, RESTORER, quality=round(seen, 2) + 5)[0]
    assert inner - timestep == pytest.approx(5 * slope, abs=0.5)
    usual, _ = restored(sodiff, image)
    near, far = (restored(sodiff, image, quality=min(max(seen + change, 0.0), 100.0))[0] for change in (-4.0, -12.0))
    assert 0 < relative(near, usual) < relative(far, usual)


def test_qualities_can_be_given_for_each_image(sodiff):
    """A list has one for each image; -1 among them leaves that image as it is seen."""
    image = batch()
    (first, second), *_ = predicted(sodiff, image, RESTORER)
    (moved, kept), mean, text = predicted(sodiff, image, RESTORER, quality=[60.0, -1.0])
    assert moved != pytest.approx(first, abs=1) and kept == pytest.approx(second, abs=0.01)
    lines = text.splitlines()
    assert lines[0].startswith("1: quality 60.0 (given)") and "given" not in lines[1]
    assert mean == pytest.approx((60 + float(lines[1].split()[2].rstrip(","))) / 2, abs=0.1)


def test_frames_of_a_film_share_the_mean_of_their_timesteps(sodiff):
    """Quality 5 and 50 as two frames: one timestep between those that they get alone; the quality stays the mean."""
    image = batch()
    each, quality, _ = predicted(sodiff, image, RESTORER)
    shared, same_quality, said = predicted(sodiff, image, RESTORER, same_for_batch=True)
    assert each[0] != each[1] and shared == [pytest.approx(sum(each) / 2)] * 2 and same_quality == quality
    assert said.count(f"timestep {shared[0]:.1f}") == 2
    alone, _, _ = predicted(sodiff, image[:1], RESTORER, same_for_batch=True)
    assert alone == pytest.approx(each[0], abs=0.01)


def test_the_quality_alone_knows_no_timestep(sodiff):
    """Family quality: the estimate orders the qualities; -1 lets One-Step Denoise take the prompt's timestep."""
    image = torch.cat([compressed(photo(128, 128), quality) for quality in (8, 30, 80)])
    timestep, _, text = predicted(sodiff, image)
    qualities = [float(line.split()[2]) for line in text.splitlines()]
    assert timestep == -1.0 and qualities == sorted(qualities) and "timestep" not in text
    assert predicted(sodiff, image[:1], quality=33.0)[:2] == (-1.0, 33.0)
    graph = Graph()
    _, loader = loaded(graph, sodiff.base)
    estimator = alone(graph, QUALITY)
    prompt = graph.image([[noise(1, 77, 1024), {"jpeg_restorer_timestep": 250.0}]])
    latent = graph.image({"samples": noise(1, 4, 8, 8)})
    node = graph.add("QFTimestepPredict", restorer=[estimator, 0], image=[graph.image(image[:1]), 0])
    steps = [
        graph.add("OneStepDenoise", model=[loader, 1], conditioning=[prompt, 0], latent=[latent, 0], timestep=timestep)
        for timestep in ([node, 0], 250.0)
    ]
    for step in steps:
        graph.sink([step, 0])
    first, second = (run(sodiff.comfy, graph).outputs(step)[0]["samples"] for step in steps)
    assert torch.equal(first, second)


def test_a_fixed_timestep_comes_with_the_prompt(sodiff):
    """A file without a predictor: its timestep is on the prompt and from the node, for each image, the same result."""
    image = batch(64, 64)
    timestep, quality, text = predicted(sodiff, image, FIXED)
    assert (timestep, quality) == ([199.5, 199.5], -1.0) and text.splitlines()[0] == "1: timestep 199.5"
    results = []
    for connected in (True, False):
        graph = Graph()
        nodes = workflow(graph, sodiff.base, [graph.image(image), 0], FIXED)
        if not connected:
            graph.prompt[nodes["step"]]["inputs"]["timestep"] = -1.0
        graph.sink([nodes["step"], 0])
        results.append(run(sodiff.comfy, graph).outputs(nodes["step"])[0]["samples"])
    assert torch.equal(*results)


@pytest.mark.parametrize(("height", "width"), [(33, 35), (200, 120)])
def test_the_whole_graph_runs_at_any_size(sodiff, height, width):
    """A file through the example's graph to a picture of multiples of 8, and the same bytes the second time."""
    save_jpeg(sodiff.comfy, "sodiff.jpg", photo(height, width), quality=10)
    images = []
    for _ in range(2):
        graph = Graph()
        nodes = workflow(graph, sodiff.base, [graph.add("LoadJPEG", image="sodiff.jpg"), 0])
        graph.add("SaveImage", images=[nodes["colored"], 0], filename_prefix="sodiff")
        images.append(run(sodiff.comfy, graph).outputs(nodes["colored"])[0])
        sodiff.comfy.forget()
    assert tuple(images[0].shape) == (1, height // 8 * 8, width // 8 * 8, 3) and torch.equal(*images)
    assert images[0].isfinite().all() and float(images[0].std()) > 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 0.02), ("bf16", 0.15)])
def test_half_precision_is_close_to_full(sodiff, dtype, tolerance):
    """The prompt in half precision stays near the one in full; the predictor keeps single precision and its numbers."""
    image, results = batch(64, 64), {}
    for kind in ("fp32", dtype):
        graph = Graph()
        _, loader = loaded(graph, sodiff.base)
        graph.prompt[loader]["inputs"]["dtype"] = kind
        source = graph.image(image)
        prompt = graph.add("SAIPEPrompt", restorer=[loader, 0], image=[source, 0])
        predicted = graph.add("QFTimestepPredict", restorer=[loader, 0], image=[source, 0])
        for node in (prompt, predicted):
            graph.sink([node, 0])
        outputs = run(sodiff.comfy, graph).outputs
        results[kind] = outputs(prompt)[0][0][0], outputs(prompt)[1], outputs(predicted)[0]
    (full, seen, timesteps), (half, seen_half, same) = results["fp32"], results[dtype]
    assert half.dtype == torch.float32 and 0 < relative(half, full) < tolerance
    assert 0 < relative(seen_half, seen) < tolerance
    assert same == pytest.approx(timesteps, abs=1e-3)
