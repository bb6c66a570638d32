"""One-step restorers from scratch: what their files mean, what is trained, the critic, resuming, their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT, shared_path
from stopping import stop_after
from torch import Tensor

from restoration.compute import Compute
from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.dct_codec import CHANNELS
from restoration.networks.saipe import SAIPEConfig
from restoration.networks.small_unet import SmallUNetConfig
from restoration.networks.timestep_predictor import TimestepPredictorConfig
from restoration.one_step_pipeline import OneStepSettings, restore_one_step, see_images
from restoration.restorer_file import RestorerFileError, half, read_restorer, write_restorer
from restoration.restorers import build_restorer, load_weights
from restoration.tiling import Tiler
from training.configs.codiff import PRESETS as CODIFF
from training.configs.codiff import AdversarialConfig, CoDiffConfig
from training.configs.common import OptimizerConfig, RunConfig, ValidationConfig
from training.configs.sodiff import PRESETS as SODIFF
from training.configs.sodiff import PromptedAdversarialConfig, SODiffConfig
from training.loop.session import Session
from training.losses import PerceptualConfig
from training.networks.backbone import DCTModel, load_latent_model, make_unet
from training.trainers.small import SmallTask
from training.trainers.small_codiff import SmallCoDiffTask
from training.trainers.small_sodiff import SmallSODiffTask

UNET = SmallUNetConfig((32,), 1, (False,), head_dim=16, context_dim=16)
SAIPE = SAIPEConfig(
    dim=12, down_depths=(1,), up_depths=(1,), heads=2, drop_path=0.0, performer_depth=1, performer_heads=1,
    performer_dim_head=8, performer_mult=1, features=8, context_dim=16, tokens=4, pool_heads=2, image_side=32,
)  # fmt: skip
PREDICTOR = TimestepPredictorConfig(timesteps=1000, stem=16, width=4, blocks=1, hidden=8)


def settings(folder: Path, crop: int = 32, **run: Any) -> dict[str, Any]:
    """What both trainings are told: some steps on three smooth pictures."""
    (folder / "pictures").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        small.resize((80, 72), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{number}.png")
    return {
        "data": replace(CODIFF["starter"].data, train=folder / "pictures", workers=0, crop=crop, downscale=(1.0, 1.0)),
        "unet": UNET,
        "optimizer": OptimizerConfig(learning_rate=1e-3, ema_decay=0.0),
        "validation": ValidationConfig(every=10**9, images=1, crop=64, qualities=(10,)),
        "run": RunConfig(**{"output": folder / "run", "images": 8, "batch": 4, **run}),
    }


def codiff(folder: Path, **run: Any) -> CoDiffConfig:
    embedder = CaVEConfig((4, 4, 8, 8), 1)
    return replace(CODIFF["starter"], **settings(folder, **run), embedder=embedder, most_tokens=4)


def sodiff(folder: Path, **run: Any) -> SODiffConfig:
    loss = replace(
        SODIFF["starter"].loss,
        perceptual=PerceptualConfig("none"),
        adversarial=PromptedAdversarialConfig("none"),
    )
    return replace(SODIFF["starter"], **settings(folder, **run), embedder=SAIPE, predictor=PREDICTOR, loss=loss)


def pictures(batch: int = 2, height: int = 48, width: int = 64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, degraded = torch.rand(2, batch, 3, height, width, generator=generator)
    return {"clean": clean, "degraded": degraded, "quality": torch.tensor([10.0, 20.0])[:batch]}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(task: SmallTask) -> SmallTask:
    """With weights as after a training: the last layer is no longer zero."""
    with torch.no_grad():
        task.look(pictures()["degraded"], pictures()["clean"])
        task.model.backbone.network.conv_out.weight.normal_(std=0.02, generator=generator(3))
    task.model.eval()
    return task


KINDS = {"codiff": (codiff, SmallCoDiffTask), "sodiff": (sodiff, SmallSODiffTask)}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(kind: str, folder: Path, **run: Any) -> tuple[Any, Any]:
    configure, task = KINDS[kind]
    config = configure(folder, **run)
    return config, task(config)


def test_a_new_restorer_gives_its_input_back(kind: str, tmp_path: Path) -> None:
    """So that training starts from the JPEG and not from noise."""
    _, task = make(kind, tmp_path)
    task.look(pictures()["degraded"], pictures()["clean"])
    task.model.eval()
    degraded = pictures(1, 50, 75)["degraded"]
    with torch.no_grad():
        torch.testing.assert_close(task.restore(degraded, 0), degraded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 75)])
def test_the_exported_file_restores_as_the_task_does(kind: str, height: int, width: int, tmp_path: Path) -> None:
    """Through the pipeline that the nodes and the command line call, to within its rounding to 8 bits."""
    _, task = make(kind, tmp_path)
    moved(task)
    path = tmp_path / "exported.safetensors"
    write_restorer(path, task.metadata({}, "CC0"), task.tensors())
    file = read_restorer(path)
    restorer = build_restorer(file.metadata, file.name)
    load_weights(restorer, file)
    degraded = pictures(1, height, width)["degraded"]
    with torch.no_grad():
        seen = see_images(restorer.eval(), degraded, OneStepSettings())
        compute = Compute(tiler=Tiler(align=8))  # by which the pictures are extended
        restored = restore_one_step(load_latent_model(file), degraded, seen, OneStepSettings(), compute=compute)
        expected = task.restore(degraded, 0)
    assert (expected - degraded).abs().max() > 0.02
    assert (restored - expected).abs().max() < 0.51 / 255


def test_the_timestep_says_how_much_of_the_prediction_is_taken_away() -> None:
    """x0 = z - sqrt(1 - abar) F, against diffusers' network and Stable Diffusion's schedule by hand."""
    unet = make_unet(UNET, generator())
    with torch.no_grad():
        unet.conv_out.weight.normal_(std=0.1, generator=generator(1))
    from restoration.networks.dct_codec import DCTCodec

    model = DCTModel(unet.eval(), DCTCodec(), 8)
    latents = torch.randn(2, CHANNELS, 4, 5, generator=generator(2))
    tokens = torch.randn(2, 3, 16, generator=generator(3))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[[100, 700]]
    with torch.no_grad():
        plain = make_unet(UNET)
        plain.load_state_dict(unet.state_dict())
        predicted = plain.eval()(latents, torch.tensor([100, 700]), encoder_hidden_states=tokens).sample
        expected = latents - torch.tensor(np.sqrt(1 - abar)).float().view(-1, 1, 1, 1) * predicted
        torch.testing.assert_close(
            model.denoise(latents, tokens, torch.tensor([100.0, 700.0])), expected, atol=1e-5, rtol=1e-5
        )


def test_everything_is_trained(kind: str, tmp_path: Path) -> None:
    """The picture's error reaches the UNet, the prompt and, of SODiff, the timestep."""
    _, task = make(kind, tmp_path)
    moved(task)
    task.model.train()
    task.loss(task.model, pictures(), generator()).backward()
    without = [name for name, p in task.model.named_parameters() if p.requires_grad and not _learns(p)]
    assert all(name.endswith("to_key.bias") for name in without)  # no softmax depends on those, but for its rounding


def _learns(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path) -> None:
    config = codiff(tmp_path)
    config = replace(config, loss=replace(config.loss, mse=2.0, l1=3.0, chroma=0.0, embedder=0.5))
    task = moved(SmallCoDiffTask(config))
    batch = pictures()
    with torch.no_grad():
        restored = task.model(batch["degraded"])
        error = restored.pictures - batch["clean"]
        quality = (restored.quality - batch["quality"]).abs().mean() / 100
        expected = 2 * (error**2).mean() + 3 * error.abs().mean() + 0.5 * quality
        assert task.loss(task.model, batch, generator()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_critic_learns_and_teaches(kind: str, tmp_path: Path) -> None:
    """It tells clean latents from restored ones after some steps, and its opinion reaches the UNet."""
    config, _ = make(kind, tmp_path)
    adversarial = {"codiff": AdversarialConfig, "sodiff": PromptedAdversarialConfig}[kind]("dct", weight=1.0, width=16)
    task = KINDS[kind][1](replace(config, loss=replace(config.loss, adversarial=adversarial, mse=0.0, l1=0.0)))
    moved(task)
    batch = pictures()
    batch["degraded"] = batch["degraded"] * 0.1 + 0.45
    task.loss(task.model, batch, generator()).backward()
    assert task.model.backbone.network.conv_out.weight.grad.abs().sum() > 0
    optimizer = torch.optim.Adam(task.critic.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        with torch.no_grad():
            task.loss(task.model, batch, generator())
        optimizer.zero_grad()
        loss = task.critic_loss(task.critic, batch, generator())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_whitened_start_belongs_to_a_new_cave_alone(tmp_path: Path) -> None:
    """One that was given keeps its filters."""
    cave = CaVE(CaVEConfig((4, 4, 8, 8), 1))
    cave.initialize(generator(7))
    from restoration.restorer_file import RestorerMetadata

    tensors = {f"prompt.{key}": value for key, value in cave.state_dict().items()}
    write_restorer(tmp_path / "cave.safetensors", RestorerMetadata("cave", {"cave": cave.config.to_dict()}), tensors)
    given = SmallCoDiffTask(replace(codiff(tmp_path), cave=tmp_path / "cave.safetensors"))
    new = SmallCoDiffTask(codiff(tmp_path))
    before = new.model.prompt.network.m_head.weight.clone()
    for task in (given, new):
        task.look(pictures()["degraded"], pictures()["clean"])
    assert torch.equal(given.model.prompt.network.m_head.weight, cave.m_head.weight)
    assert not torch.equal(new.model.prompt.network.m_head.weight, before)


def test_a_sodiff_run_can_start_from_the_unet_of_a_codiff_file(tmp_path: Path) -> None:
    source = moved(SmallCoDiffTask(codiff(tmp_path)))
    write_restorer(tmp_path / "faithful.safetensors", source.metadata({}, ""), source.tensors())
    task = SmallSODiffTask(replace(sodiff(tmp_path), unet_from=tmp_path / "faithful.safetensors"))
    scale = source.model.backbone.codec.scale.clone()
    task.look(pictures()["degraded"], pictures()["clean"] * 0.1)
    assert torch.equal(task.model.backbone.network.conv_out.weight, source.model.backbone.network.conv_out.weight)
    assert torch.equal(task.model.backbone.codec.scale, scale)
    other = replace(sodiff(tmp_path), unet=replace(UNET, layers=2), unet_from=tmp_path / "faithful.safetensors")
    with pytest.raises(RestorerFileError, match="do not fit the network"):
        SmallSODiffTask(other)


def test_a_stopped_run_goes_on_to_the_very_same_weights(kind: str, tmp_path: Path) -> None:
    """The codec's scale, which nothing trains and which was measured at the start, is part of the checkpoint."""
    whole, _ = make(kind, tmp_path, images=16)
    whole = replace(whole, optimizer=replace(whole.optimizer, ema_decay=0.9))
    Session(kind, whole).train()
    parts = replace(whole, run=replace(whole.run, output=tmp_path / "parts"))
    stop_after(Session(kind, parts), 8)
    Session(kind, parts).train()
    one, other = (read_restorer(tmp_path / folder / f"{kind}.safetensors").tensors for folder in ("run", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert one["codec.scale"].max() > 5 * one["codec.scale"].min()


def test_a_run_can_start_from_its_own_file_and_no_other(kind: str, tmp_path: Path) -> None:
    config, task = make(kind, tmp_path)
    moved(task)
    write_restorer(tmp_path / "start.safetensors", task.metadata({}, ""), task.tensors())
    started = replace(config, run=replace(config.run, init_from=tmp_path / "start.safetensors"))
    session = Session(kind, started)
    assert all(torch.equal(value, task.tensors()[key]) for key, value in session.task.tensors().items())
    narrow = replace(started, unet=replace(UNET, layers=2))
    with pytest.raises(ValueError, match=r"of another shape.*--unet"):
        Session(kind, narrow)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected dct or none with --backbone dct-small, got sd\."):
        replace(CODIFF["starter"], loss=replace(CODIFF["starter"].loss, adversarial=AdversarialConfig("sd")))
    with pytest.raises(ValueError, match=r"embedder.context_dim: expected unet.context_dim \(64\), got 128"):
        replace(SODIFF["starter"], unet=replace(SODIFF["starter"].unet, context_dim=64))
    with pytest.raises(ValueError, match=r"loss.l1: expected a weight of at least 0, got -1"):
        replace(CODIFF["starter"].loss, l1=-1.0)
    with pytest.raises(ValueError, match=r"loss.chroma: expected a weight of at least 0, got -1"):
        replace(SODIFF["starter"].loss, chroma=-1.0)
    with pytest.raises(ValueError, match=r"adversarial.width: expected a multiple of 8, got 12"):
        AdversarialConfig("dct", width=12)
    with pytest.raises(ValueError, match=r"with --backbone sd2.1-base, got dct\."):
        replace(SODIFF["paper"], loss=replace(SODIFF["paper"].loss, adversarial=PromptedAdversarialConfig("dct")))


def test_the_starters_fit_into_their_files() -> None:
    """At most 16 MB in half precision."""
    for preset, task in ((CODIFF["starter"], SmallCoDiffTask), (SODIFF["starter"], SmallSODiffTask)):
        loss = replace(preset.loss, perceptual=PerceptualConfig("none"))
        tensors = half(task(replace(preset, loss=loss)).tensors())
        assert sum(value.numel() * value.element_size() for value in tensors.values()) < 15.95e6


@pytest.mark.slow
def test_three_minutes_on_a_cpu_beat_the_jpeg(tmp_path: Path) -> None:
    """On pictures that were set aside, in PSNR, at low qualities; the command as people type it."""
    told = {
        "--backbone": "dct-small", "--data.train": shared_path("data", "train"), "--run.output": tmp_path / "run",
        "--run.images": 2_400, "--run.batch": 2, "--optimizer.warmup-images": 200, "--validation.every": 10**9,
    }  # fmt: skip
    line = [sys.executable, "-m", "training", "codiff", "--preset", "starter"]
    line += [str(part) for option in told.items() for part in option]
    subprocess.run(line, cwd=ROOT, check=True, timeout=1800)
    lines = (tmp_path / "run" / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    last = [row for row in map(json.loads, lines) if "validation/psnr/qf10" in row][-1]
    for quality in (5, 10, 20):
        gain = last[f"validation/psnr/qf{quality}"] - last[f"validation/jpeg_psnr/qf{quality}"]
        assert gain > 0.1, (quality, gain)


def test_a_saipe_that_has_learnt_keeps_its_encoder_and_decoder(tmp_path: Path) -> None:
    """With no weight on its reconstruction; what makes tokens learns."""
    config = sodiff(tmp_path)
    task = moved(SmallSODiffTask(replace(config, loss=replace(config.loss, embedder=0.0))))
    task.model.train()
    task.loss(task.model, pictures(), generator()).backward()
    network = task.model.prompt.network
    assert not any(p.requires_grad for part in (network.encoder, network.decoder) for p in part.parameters())
    assert _learns(network.embedder.queries) and _learns(network.embedder.project.weight)
