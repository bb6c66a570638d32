"""CODiff's first stage: its loss, its start, its files; and that it learns to tell qualities that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.restorer_file import RestorerFileError, read_restorer
from tests.shared import shared_path
from training.configs.cave import PRESETS, CaVETrainingConfig
from training.configs.common import RunConfig, ValidationConfig
from training.degradation import Degradation, compress
from training.loop.session import Session
from training.trainers.cave import CaVETask, whiten

CODE_QUALITIES = (10, 20, 30, 40, 50, 60)
UNSEEN = (15, 25, 35, 45, 55)


def small(**changes) -> CaVETrainingConfig:
    return replace(PRESETS["small"], **changes)


def batch(seed: int = 0, images: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, degraded = torch.rand(2, images, 3, 64, 64, generator=generator)
    return {"clean": clean, "degraded": degraded, "quality": torch.tensor([10.0, 30.0, 60.0, 95.0])[:images]}


@pytest.mark.parametrize(("implicit", "explicit"), [(True, True), (True, False), (False, True)])
def test_the_loss_is_the_sum_of_both_errors_and_each_can_be_turned_off(implicit: bool, explicit: bool) -> None:
    """|reconstruction - clean| + weight |level - (100 - QF) / 100|; what is off gets no gradient."""
    task, given = CaVETask(small(implicit=implicit, explicit=explicit, quality_weight=0.25)), batch()
    task.model.train()
    loss = task.loss(task.model, given, torch.Generator())
    reconstruction, level = task.model(given["degraded"])
    expected = np.abs((reconstruction - given["clean"]).detach().numpy()).mean() * implicit
    expected += 0.25 * np.abs(level.detach().numpy() - np.array([0.9, 0.7, 0.4, 0.05])).mean() * explicit
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    for name, parameter in task.model.named_parameters():
        decoder = name.startswith(("m_body_decoder", "m_up", "m_tail"))
        off = (decoder and not implicit) or (name.startswith("qf_pred") and not explicit)
        assert (parameter.grad is None) == off, name


def test_batches_are_cut_to_one_of_the_sides_at_random() -> None:
    """The loss is that of the upper left squares; the step's generator alone decides which."""
    config = small(implicit=True, sides=(32, 64))
    task, whole, given = CaVETask(config), CaVETask(small(implicit=True, sides=())), batch()
    whole.model.load_state_dict(task.model.state_dict())
    expected = set()
    for side in config.sides:
        cut = {key: value[..., :side, :side] if value.dim() == 4 else value for key, value in given.items()}
        expected.add(float(whole.loss(whole.model, cut, torch.Generator()).detach()))
    drawn = [float(task.loss(task.model, given, torch.Generator().manual_seed(seed)).detach()) for seed in range(12)]
    assert set(drawn) == expected and len(expected) == 2
    assert drawn[0] == float(task.loss(task.model, given, torch.Generator().manual_seed(0)).detach())
    with pytest.raises(ValueError, match=r"multiples of 32 up to data\.crop"):
        small(sides=(48,))


def test_presets_are_the_papers_and_the_codes() -> None:
    paper, code = PRESETS["paper"], PRESETS["code"]
    for config in (paper, code):
        assert sum(parameter.numel() for parameter in CaVE(config.network, device="meta").parameters()) == 74_887_428
        assert (config.quality_weight, config.run.batch, config.data.crop) == (1e-3, 128, 256)
        assert config.run.images == 200_000 * 128 and config.optimizer.learning_rate == 2e-5
        assert (config.optimizer.weight_decay, config.optimizer.ema_decay) == (0.0, 0.0)
        assert config.initialization == "published" and config.sides == ()
    assert paper.data.degradation == Degradation(8, 95)
    assert code.data.degradation == Degradation(
        8, 96, quality_choices=CODE_QUALITIES, choice_probability=0.75, misaligned_probability=0.5, misaligned_max=8
    )
    with pytest.raises(ValueError, match="at least one"):
        replace(paper, implicit=False, explicit=False)


def test_whitened_filters_respond_uncorrelated_with_equal_deviations() -> None:
    """On the pictures that they were made from, numpy finds no correlation between responses, and equal deviations."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(16, 3, 40, 40, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(rough, 5, stride=1, padding=2) + 0.02 * rough.flip(1)
    filters = torch.empty(27, 3, 3, 3)
    torch.nn.init.orthogonal_(filters.view(27, 27), generator=generator)
    plain = torch.conv2d(smooth, filters, stride=2).movedim(1, -1).reshape(-1, 27).double().numpy()
    whiten(filters, smooth)
    responses = torch.conv2d(smooth, filters, stride=2).movedim(1, -1).reshape(-1, 27).double().numpy()
    correlation = np.corrcoef(responses.T) - np.eye(27)
    assert np.abs(correlation).max() < 0.1 < np.abs(np.corrcoef(plain.T) - np.eye(27)).max()
    assert responses.std(axis=0).max() / responses.std(axis=0).min() < 1.2


def test_only_a_whitened_start_looks_at_pictures() -> None:
    for initialization in ("published", "whitened"):
        task = CaVETask(small(initialization=initialization))
        before = task.model.m_head.weight.clone()
        task.look(batch()["degraded"], batch()["clean"])
        assert torch.equal(task.model.m_head.weight, before) == (initialization == "published")


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def quick(folder: Path, **run) -> CaVETrainingConfig:
    config = small()
    return replace(
        config,
        data=replace(config.data, train=pictures(folder / "pictures"), workers=0),
        validation=ValidationConfig(every=10**9, images=1, crop=64, qualities=(15, 55)),
        run=RunConfig(folder / "run", images=8, batch=4, **run),
    )


def test_a_run_writes_a_whole_first_stage_and_measures_the_quality(tmp_path: Path, capsys) -> None:
    """The file has all weights of CaVE, norms' statistics included; the table tells the error of the quality."""
    config = quick(tmp_path)
    Session("cave", config).train()
    file = read_restorer(tmp_path / "run" / "cave.safetensors")
    assert file.metadata.family == "cave" and file.metadata.base is None
    cave = CaVE(CaVEConfig(**file.metadata.config["cave"]))
    cave.load_state_dict(file.part("prompt"))
    assert int(cave.m_down1[0].res[1].num_batches_tracked) == 2
    assert "quality error" in capsys.readouterr().out
    assert file.metadata.training["metrics"]["quality_error/qf15"] > 0


def test_a_run_starts_from_a_first_stage_of_the_same_shape(tmp_path: Path) -> None:
    task = CaVETask(small())
    tensors = {key: value + 1 for key, value in task.tensors().items()}
    task.load(tensors)
    assert torch.equal(task.model.m_tail.bias, tensors["prompt.m_tail.bias"])
    del tensors["prompt.m_tail.bias"]
    with pytest.raises(RestorerFileError, match=r"m_tail\.bias"):
        task.load(tensors)


@pytest.mark.slow
def test_minutes_of_training_tell_qualities_that_were_not_seen(tmp_path: Path) -> None:
    """Trained on photographs at every quality from 5 to 95 but those that it is asked for on LIVE1: far better than
    the best constant, with the preset `small` as it is."""
    config = small()
    seen = tuple(quality for quality in range(5, 96) if quality not in UNSEEN)
    law = Degradation(5, 95, quality_choices=seen, choice_probability=1.0)
    config = replace(
        config,
        data=replace(config.data, train=shared_path("data", "train"), degradation=law, workers=0),
        validation=ValidationConfig(every=10**9, images=1, crop=64, qualities=(15,)),
        run=replace(config.run, output=tmp_path / "run", checkpoint_every=10**9, checkpoint_minutes=1e9),
    )
    session = Session("cave", config)
    session.train()
    errors = quality_errors(session.task.model.eval())
    constant = float(np.mean(np.abs(np.array(UNSEEN) - np.median(UNSEEN))))
    print({quality: round(error, 2) for quality, error in errors.items()}, "constant", constant)
    assert np.mean(list(errors.values())) < 0.75 * constant


@torch.no_grad()
def quality_errors(cave: CaVE) -> dict[int, float]:
    """Mean absolute error of the estimated quality on LIVE1, at each unseen one."""
    errors: dict[int, list[float]] = {quality: [] for quality in UNSEEN}
    for path in sorted(shared_path("data", "eval", "LIVE1").glob("*.webp")):
        clean = np.asarray(Image.open(path).convert("RGB"))
        for quality in UNSEEN:
            degraded = torch.from_numpy(compress(clean, quality)).movedim(-1, 0)[None].float() / 255
            errors[quality].append(abs(float(cave.quality(cave.encode(degraded))) - quality))
    return {quality: float(np.mean(values)) for quality, values in errors.items()}
