"""The reduced base model is what tests take it for: an SD 2.1-base to diffusers and to ComfyUI, the same to both."""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from shared import shared_path

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.restorer_file import load_part, read_restorer
from tests.graphs import Graph
from tests.reduced_sd21 import (
    FULL_UNET,
    VAE,
    ReducedBase,
    lora_tensors,
    reduced_base,
    unet_lora_modules,
    unet_name,
    vae_lora_modules,
    write_codiff,
)  # fmt: skip


@pytest.fixture(scope="session")
def base() -> ReducedBase:
    return reduced_base()


@pytest.fixture(scope="session")
def unet(base) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base.folder / "unet").eval()


@pytest.fixture(scope="session")
def vae(base) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(base.folder / "vae").eval()


@pytest.fixture(scope="session")
def loaded(comfy, base):
    """ComfyUI's MODEL and VAE of the checkpoint, and its VAE of the VAE file."""
    comfy.folder_paths.add_model_folder_path("checkpoints", str(base.checkpoint.parent))
    comfy.folder_paths.add_model_folder_path("vae", str(base.vae.parent))
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=base.checkpoint.name)
    vae = graph.add("VAELoader", vae_name=base.vae.name)
    graph.sink([checkpoint, 0])
    graph.sink([checkpoint, 2])
    graph.sink([vae, 0])
    run = comfy.run(graph.prompt)
    assert run.success, run.error
    model, _, own_vae = run.outputs(checkpoint)
    return model, own_vae, run.outputs(vae)[0]


def inputs(seed=0, tokens=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, tokens, 1024, generator=generator)


@torch.no_grad()
def test_the_unet_answers_at_the_size_of_its_input_and_listens_to_context_and_timestep(unet):
    latents, context = inputs()
    eps = unet(latents, 499, context).sample
    assert 0.7 < float(eps.std()) < 1.5
    assert float((unet(latents, 499, context.flip(1).roll(1, 2)).sample - eps).std()) > 0.3
    assert float((unet(latents, 199, context).sample - eps).std()) > 0.1


@torch.no_grad()
def test_the_vae_gives_latents_of_sds_size_and_pictures_neither_flat_nor_clipped(vae):
    generator = torch.Generator().manual_seed(0)
    posterior = vae.encode(torch.rand((2, 3, 64, 48), generator=generator) * 2 - 1).latent_dist
    assert 0.3 < float(posterior.mode().std()) * vae.config.scaling_factor < 1.5
    assert float(posterior.std.mean()) < 0.05
    pictures = vae.decode(posterior.mode()).sample
    assert 0.2 < float(pictures.std()) < 0.8
    assert float((pictures.abs() > 1).float().mean()) < 0.1
    assert float((pictures[0] - pictures[1]).std()) > 0.2


def test_the_schedule_is_sds(base):
    scheduler = DDPMScheduler.from_pretrained(base.folder / "scheduler")
    assert float(scheduler.alphas_cumprod[499]) == pytest.approx(0.27766943, abs=1e-6)
    assert float(scheduler.alphas_cumprod[999]) == pytest.approx(0.0046601, abs=1e-6)
    index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_comfyui_takes_the_checkpoint_for_a_stable_diffusion_2_with_noise_prediction(loaded):
    import comfy.model_base
    import comfy.supported_models

    model = loaded[0].model
    assert type(model.model_config) is comfy.supported_models.SD20
    assert model.model_type == comfy.model_base.ModelType.EPS


def test_the_names_of_the_unet_are_those_that_comfyui_maps(loaded, unet):
    import comfy.utils

    mapping = comfy.utils.unet_to_diffusers(loaded[0].model.model_config.unet_config)
    assert {key: unet_name(key) for key in unet.state_dict()} == {key: mapping[key] for key in unet.state_dict()}
    with torch.device("meta"):
        names = list(UNet2DConditionModel(**FULL_UNET).state_dict())
    mapping = comfy.utils.unet_to_diffusers(
        {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
         "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1}
    )  # fmt: skip
    assert {key: unet_name(key, 4, 2) for key in names} == {key: mapping[key] for key in names}


@torch.no_grad()
def test_both_run_the_same_unet(loaded, unet):
    latents, context = inputs(1)
    timesteps = torch.tensor([499.0, 120.0])
    theirs = loaded[0].model.diffusion_model(latents, timesteps, context=context)
    torch.testing.assert_close(theirs, unet(latents, timesteps, context).sample, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("which", [1, 2])
def test_both_encode_a_picture_to_the_same_latent(loaded, vae, which):
    picture = torch.rand((1, 72, 56, 3), generator=torch.Generator().manual_seed(2))
    theirs = loaded[which].encode(picture)
    torch.testing.assert_close(theirs, vae.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_whole_vae_decodes_alike_and_the_narrow_one_to_some_picture(loaded, vae):
    latent = torch.randn((1, 4, 8, 6), generator=torch.Generator().manual_seed(3)) * 4
    expected = (vae.decode(latent).sample.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(loaded[2].decode(latent), expected, rtol=0, atol=1e-4)
    picture = loaded[1].decode(latent)
    assert picture.shape == (1, 64, 48, 3)
    assert float(picture.std()) > 0.1


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_loras_go_where_codiff_puts_them(part):
    published = json.loads(shared_path("facts", "keys", "lora.json").read_text(encoding="utf-8"))[part]
    with torch.device("meta"):
        modules = (unet_lora_modules(UNet2DConditionModel(**FULL_UNET)) if part == "unet"
                   else vae_lora_modules(AutoencoderKL(**VAE)))  # fmt: skip
    shapes = {key: list(value.shape) for key, value in lora_tensors(modules, 16, torch.Generator()).items()}
    adapters = (".default_encoder", ".default_decoder", ".default_others")
    expected = {}
    for key, shape in published:
        for adapter in adapters:
            key = key.replace(adapter, "")
        expected[key] = shape
    assert shapes == expected


@torch.no_grad()
def test_every_part_of_the_random_codiff_restorer_is_felt(base, tmp_path):
    file = read_restorer(write_codiff(tmp_path / "codiff.safetensors"))
    assert file.metadata.config["unet_lora"] == {"rank": 4, "alpha": 2.0}
    latents, context = inputs(4)
    unet = UNet2DConditionModel.from_pretrained(base.folder / "unet")
    outputs = [unet(latents, 499, context).sample]
    unet.conv_in.load_state_dict(file.part("unet.conv_in"))
    outputs.append(unet(latents, 499, context).sample)
    lora = file.part("unet_lora")
    assert {key.removesuffix(".lora_A.weight") for key in lora if "lora_A" in key} == unet_lora_modules(unet).keys()
    for name, module in unet_lora_modules(unet).items():
        down, up = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
        module.weight += 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
    outputs.append(unet(latents, 499, context).sample)
    assert min(float((b - a).std()) for a, b in pairwise(outputs)) > 0.05
    assert float(outputs[-1].std()) < 1.5

    cave = CaVE(CaVEConfig(**file.metadata.config["cave"]), decoder=False).eval()
    load_part(cave, file, "prompt")
    light = torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    features = cave.encode(torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(5)) * light)
    projection = file.part("projection")
    tokens = features.flatten(2).mT @ projection["weight"].T + projection["bias"]
    assert 0.3 < float(tokens.std()) < 3
    assert 0 < float(cave.quality(features).min()) < float(cave.quality(features).max()) < 100
