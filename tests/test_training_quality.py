"""The quality predictor's training: its loss, what of a crop it sees, its files, in half precision as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from restoration.networks.timestep_predictor import TimestepPredictor, TimestepPredictorConfig
from restoration.restorer_file import RestorerFileError, half, read_restorer
from tests.shared import shared_path
from training.configs.common import RunConfig, ValidationConfig
from training.configs.quality import PRESETS, QualityConfig, ViewConfig
from training.data.crops import draw_pair
from training.data.views import View, draw_view, pairs_of, see
from training.degradation import Degradation, compress
from training.loop.session import Session
from training.trainers.quality import QualityTask

SMALL = TimestepPredictorConfig(timesteps=0, stem=64, width=8, blocks=2, hidden=16)


def quick(folder: Path, **run) -> QualityConfig:
    """Two steps on three pictures of noise."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        picture = Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).resize((120, 100))
        picture.save(folder / "pictures" / f"{number}.png")
    starter = PRESETS["starter"]
    return replace(
        starter,
        data=replace(starter.data, train=folder / "pictures", workers=0, crop=64),
        view=replace(starter.view, side=40),
        network=SMALL,
        validation=ValidationConfig(every=10**9, images=1, crop=64, qualities=(15, 55)),
        run=RunConfig(folder / "run", images=8, batch=4, **run),
    )


def test_the_loss_is_the_mean_error_in_units_of_the_quality() -> None:
    task = QualityTask(replace(PRESETS["starter"], view=ViewConfig(side=64), network=SMALL))
    task.model.train()
    degraded = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = {"clean": degraded.flip(3), "degraded": degraded, "quality": torch.tensor([5.0, 30.0, 60.0, 95.0])}
    loss = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    estimated = task.model(degraded)[0].detach().numpy()
    assert loss.item() == pytest.approx(np.abs(estimated - [5, 30, 60, 95]).mean(), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.model.parameters())


# --- what of a crop is seen -------------------------------------------------------------------------------------------


def views(count: int, config: ViewConfig, crop: int = 100) -> list[View]:
    return [draw_view(config, crop, [0, 2, index]) for index in range(count)]


def places(side: int) -> np.ndarray:
    """A picture in which every pixel tells its place: red its row, green its column."""
    rows, columns = np.mgrid[:side, :side]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def test_plain_crops_are_cut_out_on_the_grid_of_16_everywhere_that_they_fit() -> None:
    seen = [see(places(100), view, 50) for view in views(300, ViewConfig(side=50))]
    assert {image.shape for image in seen} == {(50, 50, 3)}
    corners = {tuple(image[0, 0, :2].tolist()) for image in seen}
    assert corners == {(row, column) for row in (0, 16, 32, 48) for column in (0, 16, 32, 48)}
    for image in seen[:5]:
        row, column = image[0, 0, :2].tolist()
        assert np.array_equal(image, places(100)[row : row + 50, column : column + 50])


def test_misaligned_crops_are_cut_out_anywhere() -> None:
    seen = np.stack([see(places(100), view, 50) for view in views(400, ViewConfig(side=50, misaligned=0.5))])
    corners = seen[:, 0, 0, :2]
    assert 0.4 < (corners % 16 != 0).any(axis=1).mean() < 0.6
    assert corners.min() == 0 and corners.max() == 50


def test_resized_crops_lie_in_a_reduction_of_the_whole_crop() -> None:
    """Reduced to a size from the view's to the whole crop's, by an independent bicubic filter, to a level."""
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((96, 96)))
    for view in views(6, ViewConfig(side=64, resized=1.0), 96):
        seen = see(image, view, 64)
        assert view.kind == "resized" and seen.shape == (64, 64, 3)
        assert found_in(image, seen.astype(float))


def found_in(whole: np.ndarray, seen: np.ndarray) -> bool:
    """Whether a square is one of those of torch's antialiased reductions of a picture, to a level."""
    planes = torch.from_numpy(whole.copy()).movedim(-1, 0)[None].float()
    size = len(seen)
    for side in range(size, len(whole) + 1):
        reduced = F.interpolate(planes, (side, side), mode="bicubic", antialias=True)
        small = reduced[0].movedim(0, -1).round().clamp(0, 255).numpy()
        corners = np.abs(small[: side - size + 1, : side - size + 1] - seen[0, 0]).max(axis=-1) < 1.01
        for row, column in np.argwhere(corners):
            if np.abs(small[row : row + size, column : column + size] - seen).max() < 1.01:
                return True
    return False


def test_every_kind_of_view_has_its_share() -> None:
    drawn = views(4000, ViewConfig(side=64, resized=0.2, misaligned=0.25, uncompressed=0.1))
    shares = {kind: sum(view.kind == kind for view in drawn) / 4000 for kind in ("resized", "misaligned", "aligned")}
    assert shares == pytest.approx({"resized": 0.2, "misaligned": 0.2, "aligned": 0.6}, abs=0.02)
    assert sum(view.uncompressed for view in drawn) / 4000 == pytest.approx(0.1, abs=0.02)


def test_items_are_what_pillow_makes_of_the_crop_at_the_quality_they_tell(tmp_path: Path) -> None:
    """Of single JPEGs on the grid: the clean square, its surroundings unknown, compressed anew, differs only as its
    edges do. Clean ones have quality 100; an item depends on the seed and its index alone."""
    config = quick(tmp_path)
    plain = Degradation(quality_min=5, quality_max=60, subsampling={"4:4:4": 1.0})
    config = replace(config, data=replace(config.data, degradation=plain), view=ViewConfig(side=40, uncompressed=0.3))
    paths = sorted((tmp_path / "pictures").iterdir())
    pairs = pairs_of(config, paths)
    untouched = 0
    for index in range(40):
        item, pair = pairs[index], pairs.pair(index)[1]
        assert item["degraded"].shape == (3, 40, 40) and "clean" not in item
        if pair.description["view"]["uncompressed"]:
            untouched += 1
            assert np.array_equal(pair.image, pair.clean) and float(item["quality"]) == 100
        else:
            again = compress(np.ascontiguousarray(pair.clean), pair.quality, "4:4:4")
            assert np.array_equal(again, pair.image), "blocks of 8 in a square of 40 on the grid"
            assert float(item["quality"]) == pair.quality <= 60
        assert torch.equal(pairs_of(config, paths)[index]["degraded"], item["degraded"])
    assert 4 < untouched < 22


def test_only_shrunk_views_cost_a_whole_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick(tmp_path)
    config = replace(config, data=replace(config.data, crop=96), view=ViewConfig(side=40, resized=0.3, misaligned=0.5))
    sides, drawn = {"resized": set(), "misaligned": set(), "aligned": set()}, draw_pair
    latest: list[int] = []

    def spy(picture, settings, seed):
        latest.append(settings.crop)
        return drawn(picture, settings, seed)

    monkeypatch.setattr("training.data.pairs.draw_pair", spy)
    pairs = pairs_of(config, sorted((tmp_path / "pictures").iterdir()))
    for index in range(40):
        view = pairs.pair(index)[1].description["view"]
        sides[view["kind"]].add(latest[-1])
        assert latest[-1] * view["scale"] >= 40 and latest[-1] <= max(40 / view["scale"] + 32, 56)
    assert sides["misaligned"] == sides["aligned"] == {64} and sides["resized"] <= {64, 80, 96}
    assert len(sides["resized"]) > 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: replace(c, view=replace(c.view, side=300)), "at most data.crop, 256"),
        (lambda c: replace(c, network=replace(c.network, timesteps=1000)), "expected 0, got 1000"),
        (lambda c: replace(c, view=ViewConfig(side=4)), "at least 8"),
        (lambda c: replace(c, view=ViewConfig(resized=1.5)), "shares from 0 to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        change(PRESETS["starter"])


# --- runs and files ---------------------------------------------------------------------------------------------------


def test_a_run_writes_a_file_and_measures_the_quality(tmp_path: Path, capsys) -> None:
    config = quick(tmp_path, license="CC0-1.0", half=True)
    session = Session("quality", config)
    session.train()
    file = read_restorer(tmp_path / "run" / "quality.safetensors")
    metadata = file.metadata
    assert (metadata.family, metadata.base, metadata.license) == ("quality", None, "CC0-1.0")
    assert metadata.config == {"timestep_predictor": SMALL.to_dict()}
    assert metadata.training["images"] == 8 and metadata.training["metrics"]["quality_error/qf15"] > 0
    assert "quality error" in capsys.readouterr().out
    network = TimestepPredictor(TimestepPredictorConfig(**metadata.config["timestep_predictor"]))
    network.load_state_dict(file.part("timestep"))
    picture = torch.rand(1, 3, 70, 50, generator=torch.Generator().manual_seed(0))
    trained = session.task.model
    assert isinstance(trained, TimestepPredictor)
    assert int(network.stem[2].num_batches_tracked) == 2
    torch.testing.assert_close(network.eval()(picture)[0], trained.eval()(picture)[0], atol=0.2, rtol=0)


def test_a_run_starts_from_a_file_of_the_same_shape(tmp_path: Path) -> None:
    """A file of SODiff's serves as well: its timesteps are left behind."""
    task = QualityTask(replace(PRESETS["starter"], network=SMALL))
    whole = TimestepPredictor(replace(SMALL, timesteps=9))
    whole.initialize(torch.Generator().manual_seed(7))
    tensors = {f"timestep.{key}": value for key, value in whole.state_dict().items()}
    task.load({**tensors, "prompt.other": torch.zeros(3)})
    for key, value in task.model.state_dict().items():
        assert torch.equal(value, tensors[f"timestep.{key}"]), key
    assert task.tensors().keys() == {key for key in tensors if "timestep_head" not in key}
    del tensors["timestep.stem.0.bias"]
    with pytest.raises(RestorerFileError, match=r"stem\.0\.bias"):
        task.load(tensors)
    with pytest.raises(RestorerFileError, match="same network"):
        task.load({"prompt.other": torch.zeros(3)})


@torch.no_grad()
def test_a_file_in_half_precision_tells_the_same_quality() -> None:
    """Within 0.2, also where half of a picture is flat and bright: rounded filters must not see its brightness."""
    task = QualityTask(PRESETS["starter"])
    task.model.quality_head[-1].weight.mul_(100)  # undoes the small start, so that rounding shows
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(6)]
    pictures = [np.array(picture.resize((96, 96), Image.Resampling.BICUBIC)) for picture in small]
    for picture in pictures[::2]:
        picture[:48] = 250
    seen = torch.stack([
        torch.from_numpy(compress(picture, quality)).permute(2, 0, 1).float() / 255
        for picture, quality in zip(pictures, (5, 20, 40, 60, 80, 95), strict=True)
    ])  # fmt: skip
    for _ in range(30):
        task.model.train()(seen)  # statistics
    expected = task.model.eval()(seen)[0]
    rounded = {key.removeprefix("timestep."): value for key, value in half(task.tensors()).items()}
    assert rounded["stem.0.weight"].dtype == torch.float16
    stored = TimestepPredictor(task.config.network)
    stored.load_state_dict(rounded)
    assert expected.std() > 1
    torch.testing.assert_close(stored.eval()(seen)[0], expected, atol=0.2, rtol=0)


@pytest.mark.slow
def test_a_minute_of_training_tells_qualities_on_pictures_that_were_not_seen(tmp_path: Path) -> None:
    """4,800 crops, then LIVE1 in whole at qualities 10 to 90: better than 10, where the best constant has 24."""
    starter = PRESETS["starter"]
    config = replace(
        starter,
        data=replace(starter.data, train=shared_path("data", "train"), crop=128, workers=0),
        view=ViewConfig(side=128),
        validation=ValidationConfig(every=10**9, images=1, crop=128, qualities=(15,)),
        run=RunConfig(tmp_path / "run", images=4_800, batch=32, checkpoint_every=10**9, checkpoint_minutes=1e9),
    )
    session = Session("quality", config)
    session.train()
    network = session.task.model.eval()
    errors = []
    for path in sorted(shared_path("data", "eval", "LIVE1").glob("*.webp"))[:10]:
        clean = np.asarray(Image.open(path).convert("RGB"))
        for quality in (10, 30, 50, 70, 90):
            degraded = torch.from_numpy(compress(clean, quality)).movedim(-1, 0)[None].float() / 255
            with torch.no_grad():
                errors.append(abs(float(network(degraded)[0]) - quality))
    print("mean absolute error", np.mean(errors))
    assert np.mean(errors) < 10
