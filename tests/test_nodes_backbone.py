"""A restorer's own UNet as ComfyUI's MODEL: what diffusers computes, refused where it is not whole, shared, freed."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from restoration.diffusion.one_step import alphas_cumprod_sd, interpolate_alphas_cumprod
from restoration.networks.small_unet import SmallUNetConfig
from restoration.restorer_file import RestorerFile, read_restorer, write_restorer
from tests.codiff_graphs import failure, run
from tests.graphs import Graph, photo
from tests.one_step_networks import TINY_SAIPE, TINY_UNET, TWO_LEVELS, write_tiny_sodiff
from tests.starter_graphs import encoded, loaded, numbers, outcome, random_prompt, step, write
from training.networks.backbone import make_unet

pytestmark = pytest.mark.comfyui
SHAPES = {
    "one level": TINY_UNET,
    "two levels": TWO_LEVELS,
    "prompt alone": SmallUNetConfig(widths=(32, 64), layers=2, attention=(True, False), head_dim=16, context_dim=24),
    "middle looks around": SmallUNetConfig(widths=(64,), layers=1, context_dim=32, middle_self_attention=True),
}


def by_diffusers(
    file: RestorerFile, config: SmallUNetConfig, latent: Tensor, tokens: Tensor, timesteps: Tensor
) -> Tensor:
    """z - sqrt(1 - abar) F, with diffusers' network and the schedule interpolated by hand."""
    unet = make_unet(config).eval()
    unet.load_state_dict(file.part("unet"))
    with torch.no_grad():
        residual = unet(latent, timesteps, tokens.expand(len(latent), -1, -1)).sample
    schedule = torch.logit(alphas_cumprod_sd())
    log_snr = torch.lerp(schedule[timesteps.long()], schedule[timesteps.long() + 1], timesteps.double() % 1)
    return latent - torch.sigmoid(-log_snr).sqrt().float().view(-1, 1, 1, 1) * residual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(64, 96), (72, 56), (101, 75)])
def test_equal_to_diffusers(fresh: Any, shape: str, size: tuple[int, int]) -> None:
    """To 1e-5 in single precision, also for latents whose sides the UNet cannot halve."""
    config, graph = SHAPES[shape], Graph()
    file, prompt = write(fresh, unet=config), random_prompt(config.context_dim)
    latent = encoded(graph, loaded(graph), photo(*size))
    restored = step(graph, "1", [latent, 0], prompt)
    graph.sink([restored, 0])
    outputs = run(fresh, graph).outputs
    before, after = (numbers(outputs(node)[0]) for node in (latent, restored))
    expected = by_diffusers(file, config, before, prompt[0][0], torch.tensor([300.5]))
    assert float((after - expected).abs().max()) < 1e-5
    assert float((after - before).abs().mean()) > 0.02  # it does something


def test_each_image_has_its_timestep_and_prompt(fresh: Any) -> None:
    file, prompt, graph = write(fresh), random_prompt(batch=2), Graph()
    timesteps = [0.25, 870.75]
    images = torch.cat([photo(48, 64), photo(48, 64).flip(2)])
    latent = encoded(graph, loaded(graph), images)
    restored = step(graph, "1", [latent, 0], prompt, timesteps)
    graph.sink([restored, 0])
    outputs = run(fresh, graph).outputs
    before, after = (numbers(outputs(node)[0]) for node in (latent, restored))
    expected = by_diffusers(file, TINY_UNET, before, prompt[0][0], torch.tensor(timesteps))
    assert float((after - expected).abs().max()) < 1e-5


def test_the_restorers_own_prompt_and_timestep(fresh: Any) -> None:
    """CaVE Prompt of the same file carries both; SAIPE Prompt and QF Timestep Predict of a SODiff restorer, too."""
    path = fresh.base / "models" / "jpeg_restorers" / "test-own-sodiff.safetensors"
    write_tiny_sodiff(path)
    write(fresh, timestep=123.5)
    for name, node in (("test-own-backbone.safetensors", "CaVEEmbed"), (path.name, "SAIPEPrompt")):
        graph = Graph()
        loader = loaded(graph, name)
        image = graph.image(photo(64, 64))
        latent = graph.add("VAEEncode", pixels=[image, 0], vae=[loader, 2])
        prompt = graph.add(node, restorer=[loader, 0], image=[image, 0])
        if node == "CaVEEmbed":
            timestep: Any = -1.0
        else:
            timestep = [graph.add("QFTimestepPredict", restorer=[loader, 0], image=[image, 0]), 0]
        restored = graph.add(
            "OneStepDenoise", model=[loader, 1], conditioning=[prompt, 0], latent=[latent, 0], timestep=timestep
        )
        for sink in (restored, prompt):
            graph.sink([sink, 0])
        outputs = run(fresh, graph).outputs
        tokens = outputs(prompt)[0][0][0]
        assert tokens.shape[1:] == ((4, 32) if node == "CaVEEmbed" else (TINY_SAIPE.tokens, 32))
        used = (
            torch.tensor([123.5]) if node == "CaVEEmbed" else torch.as_tensor(outputs(timestep[0])[0]).float().view(1)
        )
        expected = by_diffusers(read_restorer(path.parent / name), TINY_UNET, numbers(outputs(latent)[0]), tokens, used)
        assert float((numbers(outputs(restored)[0]) - expected).abs().max()) < 1e-5


def test_tiles_start_where_the_levels_do(fresh: Any) -> None:
    """With two levels at even positions of the latent; the blended result is close to that of the whole."""
    write(fresh, unet=TWO_LEVELS)
    results = []
    for tiling in ("never", "always"):
        graph = Graph()
        latent = encoded(graph, loaded(graph), photo(408, 312))
        settings = {"tiling": tiling, "tile": 256, "overlap": 72}
        results.append(numbers(outcome(fresh, graph, step(graph, "1", [latent, 0], random_prompt(), **settings))))
    whole, tiled = results
    assert 0 < float((tiled - whole).norm() / whole.norm()) < 0.1
    unet = sys.modules[f"{fresh.pack}.nodes.unet"]
    graph = Graph()
    loader = loaded(graph)
    graph.sink([loader, 1])
    evaluation = unet._Evaluation(run(fresh, graph).outputs(loader)[1], unet.Tiling("always", 33, 9), True)
    windows = [window for _, window in evaluation._parts(torch.zeros(1, 192, 51, 39), aligned=False)]
    assert len(windows) > 2 and all(window.top % 2 == window.left % 2 == 0 for window in windows)


def test_tiles_have_the_norms_of_the_whole(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is dark on one side and bright on the other: with norms of their own, tiles drift in tone."""
    graph = Graph()
    write(fresh, unet=TINY_UNET)
    image = 0.25 * photo(512, 512)
    image[:, :, 256:] += 0.7
    restorer, prompt = loaded(graph), random_prompt(TINY_UNET.context_dim)
    latent = [encoded(graph, restorer, image), 0]
    ends = [step(graph, "1", latent, prompt, tiling=tiling, tile=256, overlap=64) for tiling in ("never", "always")]
    for end in ends:
        graph.sink([end, 0])
    outputs = run(fresh, graph).outputs
    whole, shared = (numbers(outputs(end)[0]) for end in ends)
    unet = sys.modules[f"{fresh.pack}.nodes.unet"]
    monkeypatch.setattr(unet._Evaluation, "_evaluating", lambda self, call, *_: call)
    fresh.forget()
    own = numbers(run(fresh, graph).outputs(ends[1])[0])
    errors = [float((tiled - whole).abs().mean()) for tiled in (shared, own)]
    assert errors[0] < 0.5 * errors[1], errors


def test_half_precision_is_cast_where_the_device_cannot(fresh: Any) -> None:
    """As core's loaders do it: the weights are kept in what is asked for, and computed with in what the device can."""
    write(fresh, unet=TWO_LEVELS)
    results = {}
    for dtype in ("fp32", "fp16", "default"):
        graph = Graph()
        loader = loaded(graph, dtype=dtype)
        latent = encoded(graph, loader, photo(64, 64))
        restored = step(graph, loader, [latent, 0], random_prompt())
        graph.sink([restored, 0])
        outputs = run(fresh, graph).outputs
        results[dtype] = outputs(loader)[1].model.get_dtype(), numbers(outputs(restored)[0])
    assert results["fp32"][0] == torch.float32 and results["fp16"][0] == torch.float16
    difference = (results["fp16"][1] - results["fp32"][1]).abs().max()
    assert 0 < float(difference) < 0.02


def test_previews_are_the_picture_in_small(fresh: Any) -> None:
    """What core shows while it samples: each block's mean colour, in its true levels."""
    import latent_preview

    write(fresh)
    graph, image = Graph(), photo(160, 128)
    latent = encoded(graph, loaded(graph), image)
    graph.sink([latent, 0])
    outputs = run(fresh, graph).outputs
    form = outputs("1")[1].model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    preview = previewer.decode_latent_to_preview(numbers(outputs(latent)[0]))
    means = F.avg_pool2d(image.movedim(-1, 1), 8)[0].movedim(0, -1) * 255
    shown = torch.frombuffer(bytearray(preview.tobytes()), dtype=torch.uint8).view(20, 16, 3).float()
    assert float((shown - means).abs().max()) <= 1.01  # core cuts the fraction off


def test_core_samplers_run(fresh: Any) -> None:
    """KSampler reads it as a model that predicts noise; nothing good comes out, but nothing breaks either."""
    write(fresh, unet=TWO_LEVELS)
    graph = Graph()
    latent = encoded(graph, loaded(graph), photo(72, 64))
    prompt = [graph.image(random_prompt()), 0]
    settings = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5}
    sampler = graph.add(
        "KSampler", model=["1", 1], positive=prompt, negative=prompt, latent_image=[latent, 0], **settings
    )
    samples = numbers(outcome(fresh, graph, sampler))
    assert samples.shape == (1, 192, 9, 8) and bool(samples.isfinite().all())


def test_other_sampling_is_refused(fresh: Any) -> None:
    """Core's node would read the residual as noise, and divide by the size of the signal: too much contrast."""
    write(fresh)
    graph = Graph()
    latent = encoded(graph, loaded(graph), photo(64, 64))
    patched = graph.add("ModelSamplingDiscrete", model=["1", 1], sampling="eps", zsnr=False)
    restored = step(graph, "1", [latent, 0], random_prompt())
    graph.prompt[restored]["inputs"]["model"] = [patched, 0]
    graph.sink([restored, 0])
    message = failure(fresh, graph)
    assert message.startswith("OneStepDenoise: expected a restorer's own model as it is")


def test_memory_is_that_of_the_shape(fresh: Any) -> None:
    write(fresh, unet=TWO_LEVELS)
    graph = Graph()
    loader = loaded(graph)
    graph.sink([loader, 1])
    model = run(fresh, graph).outputs(loader)[1].model
    assert model.memory_required([2, 192, 16, 32]) == 2 * TWO_LEVELS.activation_bytes(128, 256, torch.float32)


def test_two_loads_share_weights_and_free_them(fresh: Any) -> None:
    """Two nodes give one MODEL and one VAE of a dtype; they go with their last user. What is connected is ignored."""
    write(fresh)
    graph = Graph()
    other = graph.image("neither a MODEL nor a VAE")
    loaders = [loaded(graph), loaded(graph, model=[other, 0], vae=[other, 0]), loaded(graph, dtype="fp16")]
    for loader in loaders:
        graph.sink([loader, 0])
    outputs = run(fresh, graph).outputs
    (_, model, vae), (_, same_model, same_vae), (_, half, _) = (outputs(loader) for loader in loaders)
    assert model is same_model and vae is same_vae and half is not model
    gone = [weakref.ref(part) for part in (model.model, vae.first_stage_model, half.model)]
    del outputs, model, vae, same_model, same_vae, half
    fresh.forget()
    gc.collect()
    assert not any(reference() for reference in gone)


def broken(fresh: Any, change: Any) -> str:
    """What Load JPEG Restorer says of a file whose tensors were changed."""
    file = write(fresh)
    tensors = dict(file.tensors)
    change(tensors)
    path = Path(fresh.base) / "models" / "jpeg_restorers" / "test-broken.safetensors"
    write_restorer(path, file.metadata, tensors)
    fresh.folder_paths.filename_list_cache.clear()
    graph = Graph()
    graph.sink([loaded(graph, path.name), 0])
    return failure(fresh, graph)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("unet.conv_in.weight"), "missing: conv_in.weight"),
        (lambda tensors: tensors.update({"unet.conv_inn.bias": torch.zeros(1)}), "unexpected: conv_inn.bias"),
        (
            lambda tensors: tensors.update({"unet.conv_in.bias": torch.zeros(7)}),
            "conv_in.bias is (7,) instead of (32,)",
        ),
        (lambda tensors: tensors.pop("codec.scale"), "missing: scale"),
        (lambda tensors: tensors["codec.scale"].zero_(), "codec.scale to be above 0"),
        (lambda tensors: tensors["codec.scale"].fill_(float("nan")), "codec.scale to be above 0"),
    ],
    ids=["missing", "left over", "shape", "no codec", "zero", "nan"],
)
def test_files_that_are_not_whole_are_refused(fresh: Any, change: Any, said: str) -> None:
    """In one sentence with the names that the file uses."""
    message = broken(fresh, change)
    assert message.startswith("LoadJPEGRestorer: test-broken.safetensors: ") and said in message


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {"kind": "pixels"}},
        {"backbone": None},
        {"backbone": {"kind": "dct-small", "context_dim": 64}},
        {"backbone": {"kind": "dct-small", "x": 1}},
    ],
    ids=["kind", "none", "width", "unknown"],
)
def test_descriptions_that_are_not_valid_are_refused(fresh: Any, changes: dict[str, Any]) -> None:
    write(fresh, **changes)
    graph = Graph()
    graph.sink([loaded(graph), 0])
    message = failure(fresh, graph)
    assert message.startswith("LoadJPEGRestorer: test-own-backbone.safetensors: ") and "not valid" in message


def test_prompts_of_another_width_are_refused(fresh: Any) -> None:
    """A prompt for Stable Diffusion, and a latent of its VAE: the sentence says what to connect."""
    write(fresh)
    graph = Graph()
    latent = encoded(graph, loaded(graph), photo(64, 64))
    graph.sink([step(graph, "1", [latent, 0], random_prompt(1024)), 0])
    assert "expected prompts (batch, tokens, 32)" in failure(fresh, graph)
    graph = Graph()
    loaded(graph)
    foreign = graph.image({"samples": torch.zeros(1, 4, 8, 8)})
    graph.sink([step(graph, "1", [foreign, 0], random_prompt()), 0])
    message = failure(fresh, graph)
    assert "(batch, 192, height, width)" in message and "VAE output of Load JPEG Restorer" in message


def test_schedule_is_the_one_that_training_uses(fresh: Any) -> None:
    """abar at any timestep, whole or not, as restoration.diffusion.one_step has it."""
    write(fresh)
    graph = Graph()
    loader = loaded(graph)
    graph.sink([loader, 1])
    model = run(fresh, graph).outputs(loader)[1]
    unet = sys.modules[f"{fresh.pack}.nodes.unet"]
    sampling = unet.unrounded(model.get_model_object("model_sampling"))
    timesteps = torch.tensor([0.0, 0.5, 299.5, 499.0, 999.0])
    sigma = sampling.sigma(timesteps)
    assert torch.allclose(1 / (1 + sigma.double() ** 2), interpolate_alphas_cumprod(timesteps), rtol=1e-5)
    assert torch.allclose(sampling.timestep(sigma), timesteps, atol=1e-3)
