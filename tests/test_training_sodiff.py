"""SODiff's second stage: what is trained, its losses, the timestep that learns through the UNet, its files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from reduced_sd21 import reduced_base, unet_lora_modules
from safetensors.torch import load_file
from sodiff_overfit import CROP, PREDICTOR, SAIPE_CONFIG, overfit, tiny_config, write_patches, write_saipe
from stopping import stop_after
from torch import Tensor, nn

from restoration.calibration import Calibration
from restoration.networks.saipe import SAIPE, SAIPEConfig
from restoration.networks.timestep_predictor import TimestepPredictor, TimestepPredictorConfig, gumbel_noise
from restoration.restorer_file import RestorerFileError, RestorerMetadata, read_restorer, write_restorer
from tests.shared import ROOT
from training.configs.one_step import LoRAConfig
from training.configs.sodiff import PRESETS, PromptedAdversarialConfig, SODiffConfig
from training.degradation import Degradation
from training.loop.checkpoint import read_checkpoint
from training.loop.session import Session
from training.networks.base_models import lora_layers
from training.networks.discriminators import PromptedDiscriminator
from training.trainers.sodiff import CALIBRATED_QUALITIES, SODiffTask


@pytest.fixture(scope="module")
def base() -> Path:
    return reduced_base().folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> SODiffConfig:
    return tiny_config(base, tmp_path)


def with_discriminator(config: SODiffConfig) -> SODiffConfig:
    adversarial = replace(config.loss.adversarial, discriminator="sd21")
    return replace(config, loss=replace(config.loss, adversarial=adversarial))


def pictures(batch: int = 1, height: int = CROP, width: int = CROP, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, degraded = torch.rand(2, batch, 3, height, width, generator=generator)
    return {"clean": clean, "degraded": degraded, "quality": torch.full((batch,), 30.0)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(task: SODiffTask, seed: int = 5) -> None:
    """Adapters and a predictor as after a training: no part is zero, and pictures differ in their timesteps."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, down, up in lora_layers(task.model.unet):
            nn.init.normal_(down, std=down[0].numel() ** -0.5, generator=drawn)
            nn.init.normal_(up, std=0.3, generator=drawn)
        predictor = task.model.prompt.predictor
        if predictor is not None:
            for head in (predictor.quality_head, predictor.timestep_head):
                nn.init.normal_(head[-1].weight, std=0.3, generator=drawn)


@torch.no_grad()
def restored_by_hand(path: Path, base: Path, degraded: Tensor) -> Tensor:
    """A SODiff file applied to fresh diffusers models, step by step as the paper says; sides are multiples of 8."""
    tensors, metadata = load_file(path), read_restorer(path).metadata
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32)
    lora = metadata.config["unet_lora"]
    for name in {key.split(".", 1)[1].rsplit(".lora_", 1)[0] for key in tensors if key.startswith("unet_lora.")}:
        down, up = (tensors[f"unet_lora.{name}.lora_{side}.weight"] for side in "AB")
        weight, rank = unet.get_submodule(name).weight.data, down.shape[0]
        weight += lora["alpha"] / lora["rank"] * (up.view(-1, rank) @ down.view(rank, -1)).view_as(weight)
    saipe = SAIPE(SAIPEConfig(**metadata.config["saipe"])).eval()
    saipe.load_state_dict({k.removeprefix("prompt."): v for k, v in tensors.items() if k.startswith("prompt.")})
    predictor = TimestepPredictor(TimestepPredictorConfig(**metadata.config["timestep_predictor"])).eval()
    predictor.load_state_dict({k.removeprefix("timestep."): v for k, v in tensors.items() if k.startswith("timestep.")})
    logits = predictor(degraded)[1].double().numpy()
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    tau = (chances / chances.sum(axis=1, keepdims=True) * np.arange(logits.shape[1])).sum(axis=1)
    latent = vae.encode(2 * degraded - 1).latent_dist.mode() * 0.18215
    eps = unet(latent, torch.tensor(tau, dtype=torch.float32), encoder_hidden_states=saipe.tokens(degraded)).sample
    alphas = DDPMScheduler.from_pretrained(base / "scheduler").alphas_cumprod.double().numpy()
    snr = np.log(alphas / (1 - alphas))
    abar = torch.tensor(1 / (1 + np.exp(-np.interp(tau, np.arange(1000), snr)))).view(-1, 1, 1, 1)
    x0 = ((latent - (1 - abar).sqrt() * eps) / abar.sqrt()).float()
    return (vae.decode(x0 / 0.18215).sample / 2 + 0.5).clamp(0, 1)


def test_the_exported_file_applied_by_hand_restores_as_the_task_does(
    config: SODiffConfig, base: Path, tmp_path: Path
) -> None:
    task = SODiffTask(config)
    draw(task)
    task.model.eval()
    path = tmp_path / "sodiff.safetensors"
    write_restorer(path, task.metadata({}, "Apache-2.0"), task.tensors())
    degraded = pictures(2)["degraded"]
    degraded[1] = degraded[1].round()
    with torch.no_grad():
        expected = task.restore(degraded, seed=0)
        timesteps = task.model.see(degraded, None).timestep
    assert abs(float(timesteps[0] - timesteps[1])) > 1
    torch.testing.assert_close(restored_by_hand(path, base, degraded), expected, atol=1e-4, rtol=0)


def test_the_file_says_what_it_is(config: SODiffConfig) -> None:
    metadata = SODiffTask(replace(config, unet_lora=LoRAConfig(2, 3.0))).metadata({"images": 1}, "MIT")
    assert (metadata.family, metadata.base, metadata.license) == ("sodiff", "sd2.1-base", "MIT")
    assert metadata.config == {
        "saipe": SAIPE_CONFIG.to_dict(),
        "timestep_predictor": PREDICTOR.to_dict(),
        "timestep": None,
        "calibration": None,
        "tells_quality": True,
        "context_dim": 1024,
        "unet_lora": {"rank": 2, "alpha": 3.0},
    }
    assert json.loads(json.dumps(metadata.config)) == metadata.config
    fixed = SODiffTask(replace(config, timestep=199.0))
    assert fixed.metadata({}, "MIT").config["timestep"] == 199.0
    assert fixed.metadata({}, "MIT").config["timestep_predictor"] is None
    assert not any(key.startswith("timestep.") for key in fixed.tensors())


def test_only_the_unet_s_adapters_and_the_predictor_are_trained(config: SODiffConfig) -> None:
    """The VAE and SAIPE are frozen as wholes; the first convolution has an adapter and nothing else (facts of the
    paper: "LoRA on UNet")."""
    task = SODiffTask(config)
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    with torch.device("meta"):
        bare = UNet2DConditionModel.from_config(task.model.unet.config)
    expected = {f"unet.{name}.lora_{side}.default.weight" for name in unet_lora_modules(bare) for side in "AB"}
    expected |= {f"prompt.predictor.{name}" for name, _ in task.model.prompt.predictor.named_parameters()}
    assert trained == expected
    without = SODiffTask(replace(config, loss=replace(config.loss, quality=0.0)))
    left_out = {name for name, p in without.model.prompt.predictor.named_parameters() if not p.requires_grad}
    assert left_out == {name for name, _ in without.model.prompt.predictor.named_parameters() if "quality" in name}


def test_a_step_changes_nothing_else(config: SODiffConfig) -> None:
    """Neither SAIPE, the VAE and the base, nor the statistics of the predictor's norms."""
    task = SODiffTask(config)
    task.model.train()
    assert not any(module.training for module in task.model.prompt.network.modules())
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    task.loss(task.model, pictures(2), generator()).backward()
    optimizer.step()
    changed = {key for key, value in task.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= trained
    assert {key.split(".")[0] for key in changed} == {"unet", "prompt"}


def test_the_predictor_answers_in_training_as_in_use(config: SODiffConfig) -> None:
    """Its norms have the statistics of the pictures that a run begins with, in batches of one as well; a start from a
    file keeps the file's."""
    task = SODiffTask(config)
    draw(task)
    seen = torch.rand(24, 3, CROP, CROP, generator=generator())
    predictor = task.model.prompt.predictor
    norm, given = next(part for part in predictor.modules() if isinstance(part, nn.BatchNorm2d)), []
    hook = norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    task.look(seen, seen)
    hook.remove()
    responses = torch.cat(given)
    torch.testing.assert_close(norm.running_mean, responses.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, responses.var(dim=(0, 2, 3)), atol=0, rtol=0.05)
    with torch.no_grad():
        task.model.train()
        alone = torch.cat([task.model.see(picture, None).timestep for picture in seen[:3].split(1)])
        task.model.eval()
        torch.testing.assert_close(task.model.see(seen[:3], None).timestep, alone, atol=1e-3, rtol=1e-5)
    assert len(set(alone.tolist())) == 3
    kept = SODiffTask(config)
    kept.config = replace(config, predictor_from=Path("given"))
    before = {key: value.clone() for key, value in kept.model.state_dict().items()}
    kept.look(seen, seen)
    assert all(torch.equal(value, before[key]) for key, value in kept.model.state_dict().items())


def test_the_picture_s_error_reaches_the_timestep_through_the_unet_and_through_abar(config: SODiffConfig) -> None:
    """The gradient of the timestep is that of finite differences, and it goes on to the logits."""
    task = SODiffTask(replace(config, loss=replace(config.loss, quality=0.0), latents="mode"))
    draw(task)
    task.model.eval()
    batch = pictures(1)
    tokens = task.model.see(batch["degraded"], None).tokens.detach()

    def error(timestep: Tensor) -> Tensor:
        task.model.see = lambda *_: type("Seen", (), {"tokens": tokens, "timestep": timestep, "quality": None})()
        restored = task.model(batch["degraded"])
        return (restored.latents**2).mean()

    timestep = torch.tensor([320.4], requires_grad=True)
    error(timestep).backward()
    with torch.no_grad():
        difference = (error(torch.tensor([320.45])) - error(torch.tensor([320.35]))) / 0.1
    assert float(timestep.grad) == pytest.approx(float(difference), rel=0.05)
    del task.model.see
    task.loss(task.model, batch, generator()).backward()
    gradient = task.model.prompt.predictor.timestep_head[-1].weight.grad
    assert gradient.abs().max() > 0
    assert task.model.prompt.predictor.quality_head[-1].weight.grad is None


def test_noise_moves_the_timestep_in_training_alone(config: SODiffConfig) -> None:
    task = SODiffTask(replace(config, latents="mode"))
    draw(task)
    task.model.eval()
    degraded = pictures(1)["degraded"]
    with torch.no_grad():
        calm = [float(task.model.see(degraded, None).timestep) for _ in range(2)]
        noisy = [float(task.model.see(degraded, generator(seed)).timestep) for seed in (1, 1, 2)]
        task.model.gumbel = False
        without = float(task.model.see(degraded, generator(1)).timestep)
        logits = task.model.prompt.predictor(degraded)[1]
    assert calm[0] == calm[1] == without
    assert noisy[0] == noisy[1] != noisy[2] != calm[0]
    scores = logits.double() + gumbel_noise(logits.shape, generator(1)).double()
    expected = (scores.softmax(dim=1) * torch.arange(logits.shape[1])).sum()
    assert noisy[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_parts(config: SODiffConfig) -> None:
    config = with_discriminator(replace(config, latents="mode", gumbel=False))
    task = SODiffTask(replace(config, loss=replace(config.loss, mse=3.0, quality=0.5)))
    task.model.eval()
    batch = pictures(2)
    with torch.no_grad():
        restored = task.model(batch["degraded"])
        loss = float(task.loss(task.model, batch, generator(3)))
        expected = 3 * ((restored.pictures - batch["clean"]) ** 2).mean()
        expected += 0.5 * (restored.quality - 30).abs().mean()
        logits = task.critic(restored.latents, restored.tokens, generator(3))
        expected += 1e-2 * torch.log1p(torch.exp(-logits)).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_the_discriminator_sees_the_prompt_and_teaches_the_generator(config: SODiffConfig) -> None:
    task = SODiffTask(with_discriminator(config))
    task.config = replace(task.config, loss=replace(task.config.loss, mse=0.0, quality=0.0))
    assert isinstance(task.critic, PromptedDiscriminator)
    seen = []
    task.critic.register_forward_pre_hook(lambda _, inputs: seen.append([value.detach() for value in inputs[:2]]))
    batch = pictures(2)
    task.critic.requires_grad_(False)  # as the loop does
    task.loss(task.model, batch, generator()).backward()
    lessons = [p.grad.abs().max() for _, _, p in lora_layers(task.model.unet) if p.grad is not None]
    assert max(lessons) > 0
    task.critic_loss(task.critic, batch, generator())
    (restored, tokens), (both, twice) = seen
    torch.testing.assert_close(tokens, task.model.prompt.network.tokens(batch["degraded"]))
    torch.testing.assert_close(twice, torch.cat([tokens, tokens]))
    torch.testing.assert_close(both[:2], restored)
    assert not torch.equal(both[2:], restored)


def test_the_run_s_seed_alone_decides_the_first_weights(config: SODiffConfig) -> None:
    torch.manual_seed(1)
    first = SODiffTask(config)
    torch.manual_seed(2)
    second = SODiffTask(config)
    other = SODiffTask(replace(config, run=replace(config.run, seed=7)))
    assert all(torch.equal(value, second.tensors()[key]) for key, value in first.tensors().items())
    differing = {
        key.split(".")[0] for key, value in first.tensors().items() if not torch.equal(value, other.tensors()[key])
    }
    assert differing == {"timestep", "unet_lora"}


def test_the_exported_table_is_that_of_the_predictor_on_the_validation_pictures(config: SODiffConfig) -> None:
    task = SODiffTask(config)
    draw(task)
    task.model.eval()
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 255, (CROP, CROP, 3), dtype=np.uint8) for _ in range(2)]
    task.take_validation(given)
    table = task.metadata({}, "MIT").config["calibration"]
    assert table["qualities"] == list(CALIBRATED_QUALITIES)
    calibration = Calibration(**table)
    steps = np.diff(calibration.timesteps)
    assert (steps >= 0).all() or (steps <= 0).all()
    assert json.loads(json.dumps(table)) == table


def test_a_predictor_of_the_quality_is_a_start(config: SODiffConfig, tmp_path: Path) -> None:
    """All but the branch of the timesteps, which it lacks, is taken; another shape is refused."""
    alone = replace(PREDICTOR, timesteps=0)
    predictor = TimestepPredictor(alone)
    predictor.initialize(generator(9))
    path = tmp_path / "quality.safetensors"
    tensors = {f"timestep.{key}": value for key, value in predictor.state_dict().items()}
    write_restorer(path, RestorerMetadata("quality", {"timestep_predictor": alone.to_dict()}), tensors)
    task = SODiffTask(replace(config, predictor_from=path))
    own = task.model.prompt.predictor.state_dict()
    assert all(torch.equal(own[key], value) for key, value in predictor.state_dict().items())
    assert any("timestep_head" in key for key in own)
    with pytest.raises(RestorerFileError, match="--predictor the same shape"):
        SODiffTask(replace(config, predictor_from=path, predictor=replace(PREDICTOR, width=8)))


def test_the_shipped_predictor_of_the_quality_is_a_start_for_the_default_one(config: SODiffConfig) -> None:
    shipped = ROOT / "weights" / "starter-quality.safetensors"
    task = SODiffTask(replace(config, predictor=PRESETS["paper"].predictor, predictor_from=shipped))
    own = task.model.prompt.predictor.state_dict()
    given = read_restorer(shipped).part("timestep")
    assert given.keys() == {key for key in own if not key.startswith("timestep_head.")}
    assert all(torch.equal(own[key].float(), value.float()) for key, value in given.items())


def test_a_run_can_start_from_a_sodiff_file(config: SODiffConfig, tmp_path: Path) -> None:
    task = SODiffTask(config)
    draw(task)
    path = tmp_path / "start.safetensors"
    write_restorer(path, task.metadata({}, ""), task.tensors())
    other = SODiffTask(replace(config, run=replace(config.run, seed=3, init_from=path)))
    other.load(read_restorer(path).tensors)
    assert all(torch.equal(value, task.tensors()[key]) for key, value in other.tensors().items())
    elsewhere = write_saipe(tmp_path / "other-saipe.safetensors", seed=4)
    with pytest.raises(RestorerFileError, match=r"another first stage\. Give it as --saipe"):
        SODiffTask(replace(config, saipe=elsewhere)).load(read_restorer(path).tensors)
    with pytest.raises(RestorerFileError, match="rank and alpha"):
        SODiffTask(replace(config, unet_lora=LoRAConfig(4, 8.0), run=replace(config.run, init_from=path))).load(
            read_restorer(path).tensors
        )
    # A SODiff file also serves as first stage and as start of the predictor.
    third = SODiffTask(replace(config, saipe=path, predictor_from=path))
    for part in ("prompt.", "timestep."):
        assert all(torch.equal(v, task.tensors()[k]) for k, v in third.tensors().items() if k.startswith(part))


def test_presets_say_what_the_publication_says() -> None:
    paper = PRESETS["paper"]
    assert (paper.run.images, paper.run.batch, paper.data.crop) == (300_000, 2, 512)
    assert paper.data.degradation == Degradation(5, 95)
    assert paper.optimizer.learning_rate == paper.critic_optimizer.learning_rate == 1e-5
    assert (paper.optimizer.ema_decay, paper.unet_lora) == (0.0, LoRAConfig(16, 16.0))
    loss = paper.loss
    assert (loss.mse, loss.perceptual.kind, loss.perceptual.weight, loss.perceptual.edges) == (1.0, "dists", 1.0, True)
    assert loss.adversarial == PromptedAdversarialConfig("sdxl", weight=1e-2, rank=16, alpha=16.0)
    assert (loss.quality, paper.gumbel, paper.timestep, paper.predictor.timesteps) == (1e-3, True, None, 1000)
    for name in ("24gb", "12gb"):
        one = PRESETS[name]
        assert (one.loss.adversarial.discriminator, one.base.dtype, one.run.accumulate) == ("sd21", "bf16", 2)
        assert one.gradient_checkpointing == (name == "12gb")


def test_what_is_missing_or_contradicts_itself_is_refused(config: SODiffConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m training saipe"):
        SODiffTask(replace(config, saipe=None))
    with pytest.raises(ValueError, match=r"base\.dtype fp16 needs"):
        replace(config, base=replace(config.base, dtype="fp16"), run=replace(config.run, precision="bf16"))
    with pytest.raises(ValueError, match="from 0 to 999"):
        replace(config, timestep=1000.0)
    with pytest.raises(ValueError, match="fixed --timestep"):
        replace(config, predictor=replace(PREDICTOR, timesteps=0))
    narrow = write_saipe(tmp_path / "narrow.safetensors", config=replace(SAIPE_CONFIG, context_dim=64))
    with pytest.raises(RestorerFileError, match="64 wide"):
        SODiffTask(replace(config, saipe=narrow))
    quality = tmp_path / "quality.safetensors"
    write_restorer(quality, RestorerMetadata("quality", {}), {"timestep.x": torch.zeros(1)})
    with pytest.raises(RestorerFileError, match="family saipe or sodiff"):
        SODiffTask(replace(config, saipe=quality))
    crops = replace(with_discriminator(config), data=replace(config.data, crop=16))
    with pytest.raises(ValueError, match=r"data\.crop"):
        SODiffTask(crops)


def test_a_resumed_run_ends_as_an_uninterrupted_one(config: SODiffConfig, tmp_path: Path) -> None:
    """Weights, norms' statistics, both optimisers and the discriminator, bit by bit (on the CPU)."""
    write_patches(tmp_path / "patches")
    config = with_discriminator(config)
    config = replace(config, run=replace(config.run, images=6, batch=2, precision="no"))
    states = []
    for interrupted in (False, True):
        this = replace(config, run=replace(config.run, output=tmp_path / f"run-{interrupted}"))
        if interrupted:
            stop_after(Session("sodiff", this), 4)
            assert read_checkpoint(this.run.output / "checkpoint.pt")["images"] == 4
        assert Session("sodiff", this).train()
        states.append(read_checkpoint(this.run.output / "checkpoint.pt"))
        exported = load_file(this.run.output / "sodiff.safetensors")
        states[-1]["exported"] = exported
        shutil.rmtree(this.run.output)
    assert _equal(*states)
    assert any("running_mean" in key for key in states[0]["model"])


def _equal(first: object, second: object) -> bool:
    if isinstance(first, dict):
        assert isinstance(second, dict)
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))  # type: ignore[arg-type]
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


@pytest.mark.slow
def test_four_patches_are_learned_by_heart(base: Path, tmp_path: Path) -> None:
    """With the predicted timestep and the loss of the quality; the file has a table of the timesteps.

    Without the discriminator, whose base has random weights as well and knows no pictures."""
    result = overfit(base, tmp_path, discriminator="none")
    errors = [float(F.mse_loss(pictures, result.clean)) for pictures in (result.begun, result.restored)]
    print(errors, np.array(result.losses).reshape(-1, 8).mean(axis=1))
    assert errors[1] < 0.7 * errors[0]
    assert read_restorer(result.file).metadata.config["calibration"]["qualities"] == list(CALIBRATED_QUALITIES)
