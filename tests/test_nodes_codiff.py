"""CODiff in graphs, through ComfyUI's own executor: equal to diffusers with peft, on a reduced SD 2.1."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from restoration.networks.cave import cells
from restoration.restorers import build_restorer, load_weights
from tests.codiff_graphs import convolutional, denoised, failure, loaded, noise, relative, run, step_of, workflow
from tests.diffusers_reference import adapted, one_step, schedule_at
from tests.graphs import Graph, photo, save_jpeg
from tests.reduced_sd21 import unet_lora_modules, vae_lora_modules

pytestmark = pytest.mark.comfyui


def reference_unet(codiff) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(codiff.base.folder / "unet")
    unet.conv_in.load_state_dict(
        {key.removeprefix("conv_in."): value for key, value in codiff.file.part("unet").items()}
    )
    return adapted(unet, list(unet_lora_modules(unet)), codiff.file, "unet_lora")


def reference(codiff, latent, prompt, timesteps: list[float]) -> torch.Tensor:
    return one_step(reference_unet(codiff), latent, prompt, timesteps)


@pytest.mark.parametrize("timestep", [499.0, 499.5])
def test_one_step_equals_diffusers_with_peft(codiff, timestep):
    """The same LoRA, the same latent: ComfyUI's result is that of diffusers + peft; half timesteps are not rounded."""
    latent, prompt = noise(1, 4, 12, 16) * 5, noise(1, 24, 1024, seed=1)
    expected = reference(codiff, latent, prompt, [timestep])
    assert relative(denoised(codiff, latent, prompt, timestep), expected) < 1e-4
    rounded = reference(codiff, latent, prompt, [round(timestep + 0.01)])
    assert timestep == 499.0 or relative(rounded, expected) > 1e-3, "rounding would not show, so this shows nothing"


def test_a_batch_takes_one_timestep_for_each_image(codiff):
    latent, prompt = noise(2, 4, 8, 8) * 5, noise(2, 9, 1024, seed=1)
    both = denoised(codiff, latent, prompt, [499.0, 120.25])
    assert relative(both, reference(codiff, latent, prompt, [499.0, 120.25])) < 1e-4


def test_the_adapted_vae_equals_peft_and_the_input_stays_untouched(codiff):
    """VAE Encode with the restorer's VAE is diffusers' posterior mode with the LoRA; the checkpoint's is as before."""
    image = photo(64, 48)
    graph = Graph()
    checkpoint, restorer = loaded(graph, codiff.base)
    picture = graph.image(image)
    encoded = [
        graph.add("VAEEncode", pixels=[picture, 0], vae=[source, slot])
        for source, slot in ((restorer, 2), (checkpoint, 2))
    ]
    for node in encoded:
        graph.sink([node, 0])
    result = run(codiff.comfy, graph)
    vae = AutoencoderKL.from_pretrained(codiff.base.folder / "vae").eval()
    pixels = image.movedim(-1, 1) * 2 - 1
    with torch.no_grad():
        plain = vae.encode(pixels).latent_dist.mode()
        with_lora = adapted(vae, list(vae_lora_modules(vae)), codiff.file, "vae_lora").encode(pixels).latent_dist.mode()
    assert relative(result.outputs(encoded[0])[0]["samples"], with_lora) < 1e-4
    assert relative(result.outputs(encoded[1])[0]["samples"], plain) < 1e-4
    assert relative(with_lora, plain) > 0.05


def test_the_input_model_stays_untouched(codiff):
    """After a run with the adapted MODEL, the checkpoint's own MODEL predicts what the plain network predicts."""
    latent, prompt = noise(1, 4, 8, 8) * 5, noise(1, 9, 1024, seed=1)
    graph = Graph()
    checkpoint, restorer = loaded(graph, codiff.base)
    conditioning, source = graph.image([[prompt, {}]]), graph.image({"samples": latent})
    steps = [
        graph.add("OneStepDenoise", model=model, conditioning=[conditioning, 0], latent=[source, 0], timestep=499.0)
        for model in ([restorer, 1], [checkpoint, 0])
    ]
    for step in steps:
        graph.sink([step, 0])
    result = run(codiff.comfy, graph)
    unet = UNet2DConditionModel.from_pretrained(codiff.base.folder / "unet").eval()
    with torch.no_grad():
        eps = unet(latent * 0.18215, 499, encoder_hidden_states=prompt).sample
    abar = schedule_at([499.0])
    plain = ((latent * 0.18215 - (1 - abar).sqrt() * eps) / abar.sqrt() / 0.18215).float()
    assert relative(result.outputs(steps[1])[0]["samples"], plain) < 1e-4
    assert relative(result.outputs(steps[0])[0]["samples"], plain) > 0.05


def test_cave_embed_gives_a_token_for_each_cell_and_the_restorers_timestep(codiff):
    """The tokens are those of the core network and its projection, the whole batch at once, in tiles too."""
    image = torch.cat([photo(100, 170), photo(100, 170).flip(2)])
    graph = Graph()
    _, restorer = loaded(graph, codiff.base)
    picture = graph.image(image)
    whole, tiled = (graph.add("CaVEEmbed", restorer=[restorer, 0], image=[picture, 0], tile=tile) for tile in (0, 64))
    for node in (whole, tiled):
        graph.sink([node, 0])
    result = run(codiff.comfy, graph)
    [[tokens, extra]], quality = result.outputs(whole)
    module = build_restorer(codiff.file.metadata, codiff.file.name)
    load_weights(module, codiff.file)
    with torch.no_grad():
        features = module.eval().network.encode(image.movedim(-1, 1))
        expected, level = module.projection(features.flatten(2).mT), module.network.quality(features)
    rows, columns = cells(100, 170)
    assert tuple(tokens.shape) == (2, rows * columns, 1024) and tokens.is_contiguous()
    assert relative(tokens, expected) < 1e-5
    assert quality == pytest.approx(float(level.mean()), abs=1e-3)
    assert extra["jpeg_restorer_timestep"] == 499.0
    assert relative(result.outputs(tiled)[0][0][0], tokens) < 1e-4


@pytest.mark.parametrize(
    ("height", "width", "batch"),
    [(33, 35, 1), (64, 72, 2), pytest.param(700, 1000, 1, marks=pytest.mark.slow)],
)
def test_the_whole_graph_runs_at_any_size(codiff, height, width, batch):
    """A file (or a batch) through the example's graph to a picture of multiples of 8, with the JPEG's mean colours."""
    graph = Graph()
    if batch == 1:
        save_jpeg(codiff.comfy, "codiff.jpg", photo(height, width), quality=10)
        link = [graph.add("LoadJPEG", image="codiff.jpg"), 0]
    else:
        link = [graph.image(torch.cat([photo(height, width)] * batch)), 0]
    nodes = workflow(graph, codiff.base, link)
    graph.add("SaveImage", images=[nodes["colored"], 0], filename_prefix="codiff")
    result = run(codiff.comfy, graph)
    (image,) = result.outputs(nodes["colored"])
    assert tuple(image.shape) == (batch, height // 8 * 8, width // 8 * 8, 3)
    assert image.isfinite().all() and float(image.min()) >= 0 and float(image.max()) <= 1 and float(image.std()) > 0.02
    (source,) = result.outputs(link[0])[:1] if batch == 1 else [torch.cat([photo(height, width)] * batch)]
    assert (image.mean(dim=(1, 2)) - source.mean(dim=(1, 2))).abs().max() < 0.05


def test_tiles_equal_the_whole_away_from_their_edges(codiff):
    """With a network that sees 7 pixels around, tiles that overlap by 32 give the whole's result: the Gaussian blend
    leaves almost no weight to their edges, and outside of overlaps they are equal to rounding."""
    model, latent = convolutional(codiff), noise(2, 4, 75, 110) * 5
    whole, _ = step_of(codiff, model, latent, tiling="never")
    tiled, result = step_of(codiff, model, latent, tiling="always", tile=384, overlap=192)
    assert relative(tiled, whole) < 5e-3
    alone = tiled[..., :16, :16], whole[..., :16, :16]  # covered by the first tile only
    assert relative(*alone) < 1e-5
    assert len(result.progress) >= 2, "tiles are reported"


def test_large_batches_run_image_by_image_and_small_ones_whole_when_memory_is_short(codiff, monkeypatch):
    """auto: what fits whole runs whole; a batch that does not is split; an image that does not is tiled."""
    model, calls = convolutional(codiff), []
    network = model.object_patches["diffusion_model"]
    original = network.forward
    network.forward = lambda x, *args, **kwargs: (calls.append(tuple(x.shape)), original(x, *args, **kwargs))[1]
    latent = noise(2, 4, 112, 120) * 5
    whole, _ = step_of(codiff, model, latent)
    assert calls == [(2, 4, 112, 120)]
    calls.clear()
    unet = f"{codiff.comfy.pack}.nodes.unet"
    import sys

    memory = sys.modules[unet].mm
    need = model.model.memory_required([1, 4, 112, 120])
    monkeypatch.setattr(memory, "get_free_memory", lambda *_: need * 1.5)
    one_by_one, _ = step_of(codiff, model, latent)
    assert calls == [(1, 4, 112, 120)] * 2 and relative(one_by_one, whole) < 1e-6
    calls.clear()
    monkeypatch.setattr(memory, "get_free_memory", lambda *_: need * 0.9)
    tiled, _ = step_of(codiff, model, latent)
    assert set(calls) == {(1, 4, 96, 96)} and relative(tiled, whole) < 5e-3


def test_out_of_memory_halves_the_tiles_until_they_fit(codiff):
    """Running out of memory loses nothing: images one by one, then tiles, then smaller ones; never means never."""
    model, calls = convolutional(codiff), []
    network = model.object_patches["diffusion_model"]
    original = network.forward

    def short_of_memory(x, *args, **kwargs):
        calls.append(tuple(x.shape))
        if x.shape[0] * x.shape[-1] * x.shape[-2] > 50 * 50:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. (simulated)")
        return original(x, *args, **kwargs)

    latent = noise(2, 4, 112, 120) * 5
    whole, _ = step_of(codiff, model, latent)
    network.forward = short_of_memory
    tiled, _ = step_of(codiff, model, latent)
    assert calls[:3] == [(2, 4, 112, 120), (1, 4, 112, 120), (1, 4, 96, 96)] and calls[-1] == (1, 4, 48, 48)
    assert relative(tiled, whole) < 5e-2
    graph = Graph()
    sources = [graph.image(v) for v in (model, [[noise(1, 4, 1024), {}]], {"samples": latent})]
    links = dict(zip(("model", "conditioning", "latent"), ([s, 0] for s in sources), strict=True))
    graph.sink([graph.add("OneStepDenoise", **links, timestep=1.0, tiling="never"), 0])
    assert "out of memory" in failure(codiff.comfy, graph).lower()


def test_the_same_prompt_gives_the_same_bytes(codiff):
    latent, prompt = noise(1, 4, 8, 8), noise(1, 9, 1024, seed=1)
    first, second = (denoised(codiff, latent, prompt, 499.0) for _ in range(2) if codiff.comfy.forget() is None)
    assert torch.equal(first, second) and first.is_contiguous() and first.dtype == torch.float32


def test_a_mask_keeps_the_latent_outside(codiff):
    """A LATENT with a noise mask is restored inside of it only, as core's samplers do."""
    latent, mask = noise(1, 4, 8, 8), torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    prompt = [[noise(1, 4, 1024), {}]]
    graph = Graph()
    _, restorer = loaded(graph, codiff.base)
    sources = [graph.image(value) for value in (prompt, {"samples": latent, "noise_mask": mask})]
    step = graph.add(
        "OneStepDenoise",
        model=[restorer, 1],
        conditioning=[sources[0], 0],
        latent=[sources[1], 0],
        timestep=499.0,
    )
    graph.sink([step, 0])
    restored = run(codiff.comfy, graph).outputs(step)[0]["samples"]
    assert torch.equal(restored[..., :4], latent[..., :4])
    assert relative(restored[..., 4:], latent[..., 4:]) > 0.1
