"""CODiff's second stage: what it trains, what its file means, its discriminator, resuming, its errors."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from codiff_overfit import CROP, make_patches, overfit, tiny_config, write_cave
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from reduced_sd21 import reduced_base, unet_lora_modules, vae_lora_modules
from safetensors.torch import load_file, save_file
from stopping import stop_after
from torch import Tensor, nn

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.sd21_layers import codiff_unet_targets, codiff_vae_targets
from restoration.prompts import CaVEPrompt
from restoration.restorer_file import RestorerFileError, read_restorer, write_restorer
from training.command_line.configure import parse
from training.configs.codiff import PRESETS, AdversarialConfig, CoDiffConfig, CoDiffLossConfig
from training.configs.one_step import BaseConfig, LoRAConfig
from training.loop.checkpoint import read_checkpoint
from training.loop.session import Session
from training.losses import PerceptualConfig
from training.networks.base_models import BaseModel, BaseModelError, load_base, lora_layers
from training.trainers.codiff import CoDiffModel, CoDiffTask

SD21_UNET = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
}  # fmt: skip
SD21_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Path:
    return reduced_base().folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> CoDiffConfig:
    return tiny_config(base, tmp_path)


def with_discriminator(config: CoDiffConfig, **changes: object) -> CoDiffConfig:
    adversarial = AdversarialConfig(**{"rank": 2, "alpha": 1.0, **changes})
    return replace(config, loss=replace(config.loss, adversarial=adversarial))


def pictures(batch: int = 1, height: int = CROP, width: int = CROP, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, degraded = torch.rand(2, batch, 3, height, width, generator=generator)
    return {"clean": clean, "degraded": degraded}


def draw_adapters(task: CoDiffTask, seed: int = 5) -> None:
    """Adapters as after a training: none of their parts is zero, and conv_in and the projection have moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in (task.model.unet, task.model.vae):
            for _, down, up in lora_layers(network):
                nn.init.normal_(down, std=down[0].numel() ** -0.5, generator=generator)
                nn.init.normal_(up, std=0.3, generator=generator)
        task.model.conv_in.weight.mul_(1.1)
        task.model.conv_in.bias.add_(0.05)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def merged(module: nn.Module, tensors: dict[str, Tensor], part: str, scale: float) -> None:
    """W + scale B A on every layer that the file names, by hand."""
    names = {key.removeprefix(part + ".").rsplit(".lora_", 1)[0] for key in tensors if key.startswith(part + ".")}
    for name in names:
        down, up = (tensors[f"{part}.{name}.lora_{side}.weight"] for side in "AB")
        weight = module.get_submodule(name).weight.data
        rank = down.shape[0]
        weight += scale * (up.view(-1, rank) @ down.view(rank, -1)).view_as(weight)


@torch.no_grad()
def restored_by_hand(path: Path, base: Path, degraded: Tensor) -> Tensor:
    """A CODiff file applied to fresh diffusers models, step by step as the paper says."""
    tensors, metadata = load_file(path), read_restorer(path).metadata
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32)
    unet.conv_in.load_state_dict({key: tensors[f"unet.conv_in.{key}"] for key in ("weight", "bias")})
    for module, part in ((unet, "unet_lora"), (vae, "vae_lora")):
        lora = metadata.config[part]
        merged(module, tensors, part, lora["alpha"] / lora["rank"])
    cave = CaVE(CaVEConfig(**metadata.config["cave"]), decoder=False).eval()
    cave.load_state_dict({key.removeprefix("prompt."): v for key, v in tensors.items() if key.startswith("prompt.")})
    cells = cave.encode(degraded)
    prompt = cells.flatten(2).transpose(1, 2) @ tensors["projection.weight"].T + tensors["projection.bias"]
    height, width = degraded.shape[-2:]
    padded = F.pad(2 * degraded - 1, (0, -width % 8, 0, -height % 8), mode="replicate")
    latent = vae.encode(padded).latent_dist.mode() * 0.18215
    t = int(metadata.config["timestep"])
    eps = unet(latent, t, encoder_hidden_states=prompt).sample
    abar = DDPMScheduler.from_pretrained(base / "scheduler").alphas_cumprod[t]
    x0 = (latent - (1 - abar).sqrt() * eps) / abar.sqrt()
    return (vae.decode(x0 / 0.18215).sample / 2 + 0.5).clamp(0, 1)[..., :height, :width]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 75)])
def test_the_exported_file_applied_by_hand_restores_as_the_task_does(
    height: int, width: int, config: CoDiffConfig, base: Path, tmp_path: Path
) -> None:
    task = CoDiffTask(config)
    untrained = task.tensors() | {}
    draw_adapters(task)
    task.model.eval()
    path = tmp_path / "codiff.safetensors"
    write_restorer(path, task.metadata({}, "Apache-2.0"), task.tensors())
    degraded = pictures(1, height, width)["degraded"]
    with torch.no_grad():
        expected = task.restore(degraded, seed=0)
    assert expected.shape == degraded.shape
    assert expected.std() > 0.05
    assert untrained.keys() == load_file(path).keys()
    torch.testing.assert_close(restored_by_hand(path, base, degraded), expected, atol=1e-4, rtol=0)


def test_the_file_says_what_it_is(config: CoDiffConfig) -> None:
    task = CoDiffTask(replace(config, unet_lora=LoRAConfig(2, 3.0), timestep=399.0))
    metadata = task.metadata({"images": 1}, "MIT")
    assert (metadata.family, metadata.base, metadata.license) == ("codiff", "sd2.1-base", "MIT")
    assert metadata.config == {
        "cave": {"widths": [8, 16, 16, 32], "blocks": 1},
        "context_dim": 1024,
        "timestep": 399.0,
        "unet_lora": {"rank": 2, "alpha": 3.0},
        "vae_lora": {"rank": 4, "alpha": 2.0},
    }
    assert json.loads(json.dumps(metadata.config)) == metadata.config


def test_only_adapters_first_convolution_and_projection_are_trained(config: CoDiffConfig) -> None:
    task = CoDiffTask(config)
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    unet, vae = unet_lora_modules(_bare(task.model.unet)), vae_lora_modules(_bare(task.model.vae))
    expected = {f"{part}.{name}.lora_{side}.default.weight"
                for part, modules in (("unet", unet), ("vae", vae)) for name in modules for side in "AB"}  # fmt: skip
    expected |= {f"unet.conv_in.base_layer.{leaf}" for leaf in ("weight", "bias")}
    expected |= {f"prompt.projection.{leaf}" for leaf in ("weight", "bias")}
    assert trained == expected
    assert all(p.dtype == torch.float32 for p in task.model.parameters() if p.requires_grad)


def _bare(network: nn.Module) -> nn.Module:
    """The same architecture without adapters."""
    with torch.device("meta"):
        return type(network).from_config(network.config)


def test_at_full_size_the_counts_are_those_of_the_published_training(tmp_path: Path) -> None:
    with torch.device("meta"):
        base = BaseModel(UNet2DConditionModel(**SD21_UNET), AutoencoderKL(**SD21_VAE))
        prompt = CaVEPrompt(CaVEConfig(), 1024, 499.0)
    assert sum(p.numel() for p in base.unet.parameters()) == 865_910_724
    assert sum(p.numel() for p in base.vae.parameters()) == 83_653_863
    model = CoDiffModel(base, prompt, PRESETS["paper"], generator())
    counts = {"unet lora": 0, "conv_in": 0, "vae lora": 0, "projection": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            network = name.split(".")[0]
            part = f"{network} lora" if ".lora_" in name else "conv_in" if network == "unet" else "projection"
            counts[part] += parameter.numel()
    assert counts == {"unet lora": 16_222_848, "conv_in": 11_840, "vae lora": 1_477_424, "projection": 525_312}
    assert {name for name, _, _ in lora_layers(model.unet)} == set(codiff_unet_targets())
    assert {name for name, _, _ in lora_layers(model.vae)} == set(codiff_vae_targets())
    assert {layer.scaling["default"] for layer in model.unet.modules() if hasattr(layer, "scaling")} == {0.5}


def test_adapters_start_as_peft_draws_them_and_change_nothing(config: CoDiffConfig, base: Path) -> None:
    task = CoDiffTask(replace(config, unet_lora=LoRAConfig(16, 8.0)))
    downs, ups = zip(*[(down, up) for _, down, up in lora_layers(task.model.unet)], strict=True)
    drawn = torch.cat([down.detach().flatten() for down in downs])
    assert float(drawn.mean()) == pytest.approx(0, abs=1e-3)
    assert float(drawn.std()) == pytest.approx(1 / 16, rel=0.01)
    assert all(not up.any() for up in ups)
    latent, prompt = torch.rand(1, 4, 8, 8, generator=generator()), torch.rand(1, 3, 1024, generator=generator(1))
    plain = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    with torch.no_grad():
        expected = plain(latent, 499, prompt).sample
        torch.testing.assert_close(task.model.unet(latent, 499, prompt).sample, expected, atol=1e-5, rtol=1e-5)


def test_the_run_s_seed_alone_decides_the_first_weights(config: CoDiffConfig) -> None:
    config = with_discriminator(config)
    torch.manual_seed(1)
    first = CoDiffTask(config)
    torch.manual_seed(2)
    second = CoDiffTask(config)
    other = CoDiffTask(replace(config, run=replace(config.run, seed=7)))
    same = [torch.equal(a, b) for a, b in zip(first.critic.parameters(), second.critic.parameters(), strict=True)]
    assert all(same)
    assert all(torch.equal(value, second.tensors()[key]) for key, value in first.tensors().items())
    differing = {key for key, value in first.tensors().items() if not torch.equal(value, other.tensors()[key])}
    assert {key.split(".")[0] for key in differing} == {"unet_lora", "vae_lora", "projection"}


def test_a_step_leaves_cave_the_decoder_and_the_base_untouched(config: CoDiffConfig) -> None:
    task = CoDiffTask(config)
    task.model.train()
    assert not any(module.training for module in task.model.prompt.network.modules())
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    task.loss(task.model, pictures(), generator()).backward()
    optimizer.step()
    changed = {key for key, value in task.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= trained
    assert {key.split(".")[0] for key in changed} == {"unet", "vae", "prompt"}
    assert not any(key.startswith("vae.decoder") for key in changed)


def test_the_discriminator_teaches_the_generator_only_where_gradients_pass_through_it(config: CoDiffConfig) -> None:
    lessons = {}
    for frozen in (False, True):
        task = CoDiffTask(with_discriminator(config, frozen_backbone=frozen))
        task.config = replace(task.config, loss=replace(task.config.loss, mse=0.0))
        task.critic.requires_grad_(False)  # as the loop does
        task.loss(task.model, pictures(), generator()).backward()
        lessons[frozen] = [gradient.abs().max() for gradient in gradients(task.model).values()]
    assert max(lessons[False]) > 0
    assert max(lessons[True], default=0) == 0


def test_the_discriminator_learns_from_clean_latents_of_the_vae_as_it_was(config: CoDiffConfig, base: Path) -> None:
    task = CoDiffTask(replace(with_discriminator(config), latents="mode"))
    draw_adapters(task)
    seen = []
    task.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    batch = pictures()
    task.loss(task.model, batch, generator()).backward()
    trained = gradients(task.model)
    task.critic.zero_grad()
    task.critic_loss(task.critic, batch, generator()).backward()
    assert all(torch.equal(gradient, trained[name]) for name, gradient in gradients(task.model).items())
    assert all(parameter.grad is not None for parameter in task.critic.parameters() if parameter.requires_grad)
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        clean = vae.encode(2 * batch["clean"] - 1).latent_dist.mode() * 0.18215
        adapted = task.model.encode(batch["clean"])
    restored, both = seen
    torch.testing.assert_close(both, torch.cat([restored, clean]), atol=1e-4, rtol=1e-4)
    assert (adapted - clean).abs().max() > 0.1
    assert all(p.requires_grad for _, *pair in lora_layers(task.model.vae) for p in pair)


def counted_checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every activation that is going to be computed twice."""
    calls: list[str] = []
    original = torch.utils.checkpoint.checkpoint

    def checkpoint(*arguments, **options):
        calls.append("")
        return original(*arguments, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    return calls


def test_gradient_checkpointing_gives_the_same_gradients(config: CoDiffConfig, monkeypatch) -> None:
    config, found = with_discriminator(config), []
    for checkpointing in (False, True):
        task = CoDiffTask(replace(config, gradient_checkpointing=checkpointing))
        task.model.train()
        draw_adapters(task)
        calls = counted_checkpoints(monkeypatch)
        task.loss(task.model, pictures(), generator()).backward()
        assert bool(calls) == checkpointing
        found.append(gradients(task.model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_latents_are_drawn_from_the_step_s_generator_or_are_the_mode(config: CoDiffConfig) -> None:
    task = CoDiffTask(config)
    with torch.no_grad():
        losses = [float(task.loss(task.model, pictures(), generator(seed))) for seed in (1, 1, 2)]
        task.config = replace(config, latents="mode")
        modes = [float(task.loss(task.model, pictures(), generator(seed))) for seed in (1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert modes[0] == modes[1] not in losses


def test_the_loss_is_the_weighted_sum_of_its_parts(config: CoDiffConfig) -> None:
    config = with_discriminator(config, weight=0.25)
    task = CoDiffTask(replace(config, latents="mode", loss=replace(config.loss, mse=3.0, l1=0.5)))
    task.config = replace(task.config, loss=replace(task.config.loss, perceptual=PerceptualConfig("lpips", weight=2.0)))
    task.perceptual = _MeanDistance()
    batch = pictures(2)
    with torch.no_grad():
        restored, x0, *_ = task.model(batch["degraded"])
        loss = float(task.loss(task.model, batch, generator()))
        expected = 3 * ((restored - batch["clean"]) ** 2).mean() + 2.5 * (restored - batch["clean"]).abs().mean()
        expected += 0.25 * torch.log1p(torch.exp(-task.critic(x0))).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)


class _MeanDistance(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("clamp_gradient", [False, True])
def test_pictures_are_clamped_as_published_and_may_keep_their_gradient(
    clamp_gradient: bool, config: CoDiffConfig
) -> None:
    task = CoDiffTask(replace(config, loss=replace(config.loss, clamp_gradient=clamp_gradient)))
    latent = (4 * torch.randn(1, 4, 8, 8, generator=generator())).requires_grad_()
    unclamped = task.model.vae.decode(latent / 0.18215).sample / 2 + 0.5
    outside = (unclamped < 0) | (unclamped > 1)
    assert 0.05 < outside.float().mean() < 0.95
    decoded = task.model.decode(latent)
    torch.testing.assert_close(decoded, unclamped.clamp(0, 1))
    (decoded * outside).sum().backward()
    assert bool(latent.grad.abs().max() > 0) == clamp_gradient


@pytest.fixture
def exact_and_rounded(config: CoDiffConfig) -> tuple[CoDiffTask, CoDiffTask]:
    """The same restorer on a base in float32, and on one in bfloat16."""
    return CoDiffTask(config), CoDiffTask(replace(config, base=replace(config.base, dtype="bf16")))


def test_a_base_in_bfloat16_keeps_what_is_trained_in_float32(exact_and_rounded: tuple[CoDiffTask, CoDiffTask]) -> None:
    exact, rounded = exact_and_rounded
    for name, parameter in rounded.model.named_parameters():
        trained = parameter.requires_grad or name.startswith("prompt.")
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    assert torch.equal(rounded.model.conv_in.weight, exact.model.conv_in.weight)
    latent, prompt = torch.rand(2, 4, 8, 8, generator=generator()), torch.rand(2, 3, 1024, generator=generator(1))
    expected = exact.model.unet(latent, 499, prompt).sample
    found = rounded.model.unet(latent.bfloat16(), 499, prompt.bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).abs().mean() < 0.02 * expected.std()
    found.float().square().mean().backward()
    gradient = gradients(rounded.model.unet)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradient.values())
    assert gradient["conv_in.base_layer.weight"].any()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rounded.model.unet(latent.bfloat16(), 499, prompt.bfloat16()).sample
    assert (mixed - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.slow
def test_training_on_a_base_in_bfloat16_is_as_on_one_in_float32(
    exact_and_rounded: tuple[CoDiffTask, CoDiffTask],
) -> None:
    losses, found = [], []
    for task in exact_and_rounded:  # 32 pixels: CPUs are slow at this type
        task.config = replace(task.config, latents="mode")
        loss = task.loss(task.model, pictures(1, 32, 32), generator())
        loss.backward()
        losses.append(float(loss.detach()))
        found.append(torch.cat([value.flatten() for value in gradients(task.model).values()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.9


def test_a_run_can_start_from_a_codiff_file(config: CoDiffConfig, tmp_path: Path) -> None:
    first = CoDiffTask(config)
    draw_adapters(first)
    path = tmp_path / "first.safetensors"
    write_restorer(path, first.metadata({}, "Apache-2.0"), first.tensors())
    started = replace(config, run=replace(config.run, seed=3, init_from=path), cave=path)
    second = CoDiffTask(started)
    second.load(read_restorer(path).tensors)
    assert all(torch.equal(value, second.tensors()[key]) for key, value in first.tensors().items())
    louder = CoDiffTask(replace(started, unet_lora=LoRAConfig(4, 8.0)))
    with pytest.raises(RestorerFileError, match=r"unet_lora .*'alpha': 2.0.*'alpha': 8.0.* Give --unet-lora"):
        louder.load(read_restorer(path).tensors)
    other_cave = CoDiffTask(replace(started, cave=write_cave(tmp_path / "other.safetensors", seed=9)))
    with pytest.raises(RestorerFileError, match=r"another first stage. Give it as --cave"):
        other_cave.load(read_restorer(path).tensors)
    wider = CoDiffTask(replace(started, vae_lora=LoRAConfig(8, 4.0)))
    with pytest.raises(RestorerFileError, match=r"vae_lora\..*of another shape"):
        wider.load(read_restorer(path).tensors)


def test_presets_say_what_the_publication_and_the_code_say() -> None:
    for name in PRESETS.keys() - {"starter"}:
        _, config = parse("codiff", ["--preset", name, "--cave", "cave.safetensors", "--base.path", "base"])
        assert config == replace(
            PRESETS[name], cave=Path("cave.safetensors"), base=replace(PRESETS[name].base, path="base")
        )
        steps = config.run.images // config.run.batch
        assert (steps, config.data.crop, config.optimizer.learning_rate) == (100_000, 256, 5e-5)
        assert config.run.batch % config.run.accumulate == 0
        assert (config.unet_lora, config.vae_lora) == (LoRAConfig(16, 8.0), LoRAConfig(16, 8.0))
        assert (config.optimizer.gradient_clip, config.optimizer.ema_decay) == (1.0, 0.0)
    paper, code = PRESETS["paper"], PRESETS["code"]
    assert (paper.run.batch, paper.optimizer.weight_decay, paper.data.degradation.quality_max) == (32, 1e-5, 95)
    assert (code.run.batch, code.optimizer.weight_decay, code.data.degradation.quality_max) == (64, 1e-2, 96)
    assert code.run.precision == "fp16"
    assert code.loss.adversarial.frozen_backbone
    assert not paper.loss.adversarial.frozen_backbone
    for name in ("24gb", "12gb"):
        small = PRESETS[name]
        assert (small.base.dtype, small.run.precision) == ("bf16", "bf16")
        assert (small.run.batch, small.run.accumulate) == (32, 4)
        assert small.gradient_checkpointing == (name == "12gb")
        assert small.loss == paper.loss
        assert small.optimizer == paper.optimizer


def test_configurations_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timestep: expected a timestep from 0 to 999, got 1000"):
        replace(PRESETS["paper"], timestep=1000.0)
    with pytest.raises(ValueError, match=r"base.dtype fp16 needs --run.precision fp16"):
        replace(PRESETS["paper"], base=BaseConfig(dtype="fp16"))
    with pytest.raises(ValueError, match=r"rank of at least 1"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match=r"adversarial.timestep: expected a timestep from 0 to 999, got -1"):
        AdversarialConfig(timestep=-1.0)


def test_without_cave_it_says_where_to_get_one(config: CoDiffConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Give --cave a restorer file that `python -m training cave` wrote"):
        CoDiffTask(replace(config, cave=None))
    with pytest.raises(RestorerFileError, match=r"nothing.safetensors: there is no such file"):
        CoDiffTask(replace(config, cave=tmp_path / "nothing.safetensors"))
    file = read_restorer(config.cave)
    prior = tmp_path / "prior.safetensors"
    write_restorer(prior, replace(file.metadata, family="prior"), file.tensors)
    with pytest.raises(RestorerFileError, match=r"holds no CaVE: it is of the family 'prior'"):
        CoDiffTask(replace(config, cave=prior))
    wrong = tmp_path / "wrong.safetensors"
    write_restorer(
        wrong, replace(file.metadata, config={"cave": {"widths": [8, 16, 16, 16], "blocks": 1}}), file.tensors
    )
    with pytest.raises(RestorerFileError, match=r"of another shape"):
        CoDiffTask(replace(config, cave=wrong))
    write_restorer(wrong, replace(file.metadata, config={}), file.tensors)
    with pytest.raises(RestorerFileError, match=r"its description of CaVE is not valid"):
        CoDiffTask(replace(config, cave=wrong))


def test_missing_perceptual_weights_are_reported_before_the_base_is_read(config: CoDiffConfig) -> None:
    config = replace(config, loss=CoDiffLossConfig(), base=BaseConfig("no/such"))
    with pytest.raises(ValueError, match=r"--loss.perceptual.dists must name"):
        CoDiffTask(config)


def test_crops_too_small_for_the_discriminator_are_refused(config: CoDiffConfig) -> None:
    config = with_discriminator(config)
    with pytest.raises(ValueError, match=r"data.crop: the discriminator needs crops of at least 40 pixels, got 32"):
        CoDiffTask(replace(config, data=replace(config.data, crop=32)))


def changed_base(base: Path, folder: Path, part: str, **changes: object) -> str:
    """The base model with other values in one of its descriptions; the weights are linked."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    shutil.copytree(base, folder, copy_function=os.link)
    description = json.loads((folder / part / name).read_text())
    (folder / part / name).unlink()
    (folder / part / name).write_text(json.dumps({**description, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("scheduler", {"prediction_type": "v_prediction"}, "predicts noise .* got v_prediction: this looks like"),
        ("scheduler", {"beta_schedule": "linear"}, "its scheduler is not .*'linear', not 'scaled_linear'"),
        ("unet", {"in_channels": 9}, "its unet is not that of SD 2.1-base .in_channels 9, not 4"),
        ("vae", {"scaling_factor": 0.13025}, "its vae is not that of SD 2.1-base .scaling_factor 0.13025, not 0.18215"),
    ],
)  # fmt: skip
def test_another_model_is_refused_in_words(
    part: str, changes: dict[str, object], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=message):
        load_base(changed_base(base, tmp_path / "base", part, **changes))


def test_a_base_that_is_missing_or_incomplete_says_what_to_give(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"SD 2.1-base left its place .* one of sd2-community/"):
        load_base("nobody/no-such-model")
    with pytest.raises(BaseModelError, match=r"holds no scheduler of SD 2.1-base .* folder in diffusers' layout"):
        load_base(str(tmp_path))
    folder = tmp_path / "base"
    shutil.copytree(base, folder, copy_function=os.link)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    save_file({key: value for key, value in tensors.items() if key != "encoder.conv_in.bias"}, weights)
    with pytest.raises(BaseModelError, match=r"holds no vae .*its weights lack encoder.conv_in.bias"):
        load_base(str(folder))
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(BaseModelError, match=r"holds no vae of SD 2.1-base that can be read"):
        load_base(str(folder))


def test_the_vae_s_old_attention_names_are_understood(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder, copy_function=os.link)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for key, value in tensors.items():
        for new_name, old_name in old.items():
            key = key.replace(f"attentions.0.{new_name}", f"attentions.0.{old_name}")
        renamed[key] = value
    assert renamed.keys() != tensors.keys()
    weights.unlink()
    save_file(renamed, weights)
    vae = load_base(str(folder)).vae
    assert all(torch.equal(value, tensors[key].float()) for key, value in vae.state_dict().items())


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(config: CoDiffConfig, tmp_path: Path) -> None:
    make_patches(tmp_path / "patches", np.random.default_rng(0))
    config = with_discriminator(config)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-3))
    states = []
    for name, stops in (("whole", ()), ("parts", (1,))):
        run = replace(config, run=replace(config.run, output=tmp_path / name))
        for images in stops:
            stop_after(Session("codiff", run), images)
            assert read_checkpoint(tmp_path / name / "checkpoint.pt")["images"] == images
        Session("codiff", run).train()
        states.append(read_checkpoint(tmp_path / name / "checkpoint.pt"))
    whole, parts = ({**state["model"], **state["critic"]["model"]} for state in states)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not any(".base_layer." in key for key in whole if "conv_in" not in key)
    files = [load_file(tmp_path / name / "codiff.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())


@pytest.mark.slow
def test_eight_patches_are_learned_by_heart(base: Path, tmp_path: Path) -> None:
    result = overfit(base, tmp_path)
    first, last = result.losses[:3], result.losses[-3:]
    assert np.mean(last) < np.mean(first) / 2
    torch.testing.assert_close(
        restored_by_hand(result.file, base, result.degraded[:1]), result.restored[:1], atol=1e-4, rtol=0
    )
