"""The prior's training: its loss in closed form, its files in ComfyUI's terms, starting from others, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stopping import stop_after
from torch import nn

from restoration.diffusion.prior import DiffusionPrior, NoiseSchedule
from restoration.jpeg import encode_with_pillow, read_jpeg_and_pixels
from restoration.networks.adm_unet import ADMUNetConfig
from restoration.restorer_file import read_restorer, write_restorer
from restoration.restorers import build_restorer, load_weights
from training.configs.common import OptimizerConfig, RunConfig, ValidationConfig
from training.configs.prior import PRESETS, PriorConfig
from training.loop.session import Session
from training.trainers.prior import PriorTask

SMALL = ADMUNetConfig(
    out_channels=3, width=8, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(1,), head_channels=8,
    image_size=None, norm_groups=4,
)  # fmt: skip


def quick(folder: Path, **run) -> PriorConfig:
    """Some steps on three pictures of noise."""
    (folder / "pictures").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        picture = Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).resize((60, 50))
        picture.save(folder / "pictures" / f"{number}.png")
    starter = PRESETS["starter"]
    return replace(
        starter,
        data=replace(starter.data, train=folder / "pictures", workers=0, crop=16),
        network=SMALL,
        any_size=False,
        validation=ValidationConfig(every=10**9, images=1, crop=32, qualities=(10,)),
        run=RunConfig(**{"output": folder / "run", "images": 8, "batch": 4, **run}),
    )


class Constant(nn.Module):
    """Stands for a network: the same noise everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, self.value)


def test_the_loss_is_that_of_unit_noise() -> None:
    """Of a constant c the mean square error against standard normal noise is 1 + c^2."""
    task = PriorTask(replace(PRESETS["starter"], network=SMALL))
    batch = {"clean": torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    loss = task.loss(Constant(0.5), batch, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1.25, abs=0.01)


def test_the_network_sees_what_the_schedule_says_at_the_timesteps_that_are_trained() -> None:
    """A network that knows the clean picture can undo the noise exactly: its loss is zero."""
    task = PriorTask(replace(PRESETS["starter"], network=SMALL, max_timestep=399))
    clean = torch.full((256, 3, 8, 8), 0.7)
    seen: list[torch.Tensor] = []

    def knows(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps)
        betas = np.linspace(1e-4, 2e-2, 1000)
        abar = torch.tensor([np.prod(1 - betas[: int(t) + 1]) for t in timesteps], dtype=torch.float32)
        abar = abar[:, None, None, None]
        return (x - abar.sqrt() * (2 * clean - 1)) / (1 - abar).sqrt()

    loss = task.loss(knows, {"clean": clean}, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert loss.item() < 1e-6
    assert 0 <= seen[0].min() < 10 and 390 < seen[0].max() <= 399


def test_the_exported_file_is_the_prior_that_was_trained(tmp_path: Path) -> None:
    config = quick(tmp_path, images=40, license="CC0")
    session = Session("prior", replace(config, optimizer=replace(config.optimizer, ema_decay=0.0)))
    session.train()
    file = read_restorer(tmp_path / "run" / "prior.safetensors")
    assert file.metadata.family == "prior" and file.metadata.license == "CC0"
    assert file.metadata.config["max_timestep"] == 399 and file.metadata.config["tile"] == 16
    prior = build_restorer(file.metadata, file.name)
    load_weights(prior, file)
    assert isinstance(prior, DiffusionPrior)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert prior(x, 100).abs().max() > 1e-4  # its last layer started at zero
        torch.testing.assert_close(prior(x, 100), task_of(session).model(x, 100))


def task_of(session: Session) -> PriorTask:
    assert isinstance(session.task, PriorTask)
    session.task.model.eval()
    return session.task


def test_validation_restores_by_ddrm_within_what_the_file_allows(tmp_path: Path) -> None:
    task = PriorTask(quick(tmp_path))
    picture = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    jpeg, pixels = read_jpeg_and_pixels(encode_with_pillow(picture, 10), name="a.jpg")
    restored = task.restore_file(pixels[None], jpeg, seed=0)
    assert restored.shape == (1, 3, 32, 48) and not torch.equal(restored, pixels[None])
    again, _ = read_jpeg_and_pixels(encode_with_pillow(restored[0], 10), name="b.jpg")
    kept = [
        (a == b).float().mean().item() for a, b in zip(again.coefficients.planes, jpeg.coefficients.planes, strict=True)
    ]
    assert min(kept) == 1.0


def test_priors_of_few_timesteps_are_validated_with_as_many_steps(tmp_path: Path) -> None:
    task = PriorTask(replace(quick(tmp_path), max_timestep=7))
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    jpeg, pixels = read_jpeg_and_pixels(encode_with_pillow(picture, 50), name="a.jpg")
    assert task.restore_file(pixels[None], jpeg, seed=0).shape == (1, 3, 16, 16)


def test_a_stopped_run_goes_on_to_the_very_same_weights(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3, ema_decay=0.9)
    whole = replace(quick(tmp_path, images=16), optimizer=optimizer)
    Session("prior", whole).train()
    parts = replace(whole, run=replace(whole.run, output=tmp_path / "parts"))
    stop_after(Session("prior", parts), 8)
    Session("prior", parts).train()
    one, other = (read_restorer(tmp_path / folder / "prior.safetensors").tensors for folder in ("run", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_prior_that_predicts_its_variance_can_be_started_from(tmp_path: Path) -> None:
    """Imported ones of guided diffusion have six output channels; three of them are the noise."""
    source = PriorTask(replace(PRESETS["starter"], network=SMALL))
    tensors = source.tensors()
    for key in ("unet.out.2.weight", "unet.out.2.bias"):
        value = torch.randn_like(tensors[key])
        tensors[key] = torch.cat([value, torch.full_like(value, 9.0)])
    config = {**source.metadata({}, "").config}
    config["network"] = {**config["network"], "out_channels": 6}
    write_restorer(tmp_path / "six.safetensors", replace(source.metadata({}, ""), config=config), tensors)
    session = Session("prior", quick(tmp_path, init_from=tmp_path / "six.safetensors"))
    started = task_of(session).tensors()
    assert torch.equal(started["unet.out.2.bias"], tensors["unet.out.2.bias"][:3])
    assert torch.equal(started["unet.input_blocks.0.0.weight"], tensors["unet.input_blocks.0.0.weight"])


def test_a_file_of_another_shape_is_refused_in_words(tmp_path: Path) -> None:
    source = PriorTask(replace(PRESETS["starter"], network=replace(SMALL, width=16)))
    write_restorer(tmp_path / "wide.safetensors", source.metadata({}, ""), source.tensors())
    with pytest.raises(ValueError, match=r"another shape.*training prior"):
        Session("prior", quick(tmp_path, init_from=tmp_path / "wide.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": replace(SMALL, out_channels=6)}, "3 channels in and out"),
        ({"network": replace(SMALL, classes=5)}, "no classes"),
        ({"max_timestep": 1000}, "expected 1 to 999, got 1000"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["starter"], **change)


def test_presets_describe_networks_of_the_size_that_they_claim() -> None:
    """Guided diffusion's network for 256 pixels without its variance outputs; a starter of at most 16 MB in half."""
    from restoration.networks.adm_unet import ADMUNet

    def parameters(name: str) -> int:
        return sum(p.numel() for p in ADMUNet(PRESETS[name].network, device="meta").parameters())

    assert parameters("paper") == 552_814_086 - 3 * (256 * 9 + 1)
    assert parameters("starter") * 2 < 16e6


def test_the_schedule_is_ddpms() -> None:
    """abar falls from 1 - 1e-4 to 4.04e-5 (Ho et al. 2020: betas from 1e-4 to 0.02 over 1000 steps)."""
    abar = NoiseSchedule().alphas_cumprod()
    assert abar[0] == pytest.approx(1 - 1e-4)
    assert abar[-1] == pytest.approx(4.0358e-5, rel=1e-3)
    assert np.sqrt([abar[285], 1 - abar[285]]) == pytest.approx([0.6564, 0.7544], abs=1e-4)
