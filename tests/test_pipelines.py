"""From images to restored images: sizes, batches, tiles, averaging, progress."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from restoration.diffusion.prediction import Prediction, RegressionRestorer, ScoreDenoiser
from restoration.diffusion.samplers import SAMPLERS
from restoration.diffusion.sde import make_sde
from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig
from restoration.pipelines import Compute, DriftRecSettings, restore_driftrec, restore_regression, to_8bit
from restoration.tiling import Tiler


def network(in_channels: int) -> NCSNpp:
    """A small network whose output is not zero."""
    config = NCSNppConfig(
        in_channels, width=8, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(), patch_size=2
    )
    network = NCSNpp(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    network.initialize(generator)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def driftrec() -> ScoreDenoiser:
    return ScoreDenoiser(network(6), make_sde("ouve"), Prediction("residual")).eval()


@pytest.fixture(scope="module")
def regression() -> RegressionRestorer:
    return RegressionRestorer(network(3), residual_scale=0.05, noise_level=1.0).eval()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 33), (16, 16), (50, 21)])
def test_any_size_comes_back_in_range_and_in_whole_levels(driftrec, regression, height: int, width: int) -> None:
    given = images(2, 3, height, width)
    for restored in (
        restore_driftrec(driftrec, given, DriftRecSettings(steps=3)),
        restore_regression(regression, given),
    ):
        assert restored.shape == given.shape and restored.dtype == torch.float32
        levels = restored * 255
        assert (levels - levels.round()).abs().max() < 1e-4 and levels.min() >= 0 and levels.max() <= 255


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_does_not_depend_on_its_batch(driftrec, sampler: str) -> None:
    given = images(3, 3, 20, 24)
    settings = DriftRecSettings(sampler, steps=4, tolerance=0.1, seed=5)
    together = restore_driftrec(driftrec, given, settings)
    assert torch.equal(together[2:], restore_driftrec(driftrec, given[2:], settings))


def test_the_seed_alone_decides(driftrec) -> None:
    given = images(1, 3, 16, 16)
    first = restore_driftrec(driftrec, given, DriftRecSettings(steps=3, seed=1))
    assert torch.equal(first, restore_driftrec(driftrec, given, DriftRecSettings(steps=3, seed=1)))
    assert not torch.equal(first, restore_driftrec(driftrec, given, DriftRecSettings(steps=3, seed=2)))
    assert restore_driftrec(driftrec, given, DriftRecSettings(steps=3, seed=2**64 - 1)).isfinite().all()


def test_averages_are_means_of_single_samples_and_rounded(driftrec) -> None:
    """The average of two lies halfway to a second picture: truncation would pull it half a level down on average."""
    given = images(1, 3, 64, 64)
    means = {
        count: restore_driftrec(driftrec, given, DriftRecSettings(steps=3, samples=count, color="mean")).mean()
        for count in (1, 2, 4)
    }
    assert not torch.equal(means[1], means[4])
    for count in (
        1,
        2,
        4,
    ):  # the colour correction gives every result the mean of the input, up to rounding and clipping
        assert abs(means[count] - given.mean()) < 0.2 / 255


def test_rounding_is_to_the_nearest_level_and_survives_truncation() -> None:
    levels = to_8bit(torch.tensor([0.0, 0.4, 0.6, 254.4, 254.6, 300.0]) / 255)
    assert (levels * 255).round().tolist() == [0, 0, 1, 254, 255, 255]
    every = torch.arange(256) / 255
    saved = np.clip(255.0 * to_8bit(every).numpy(), 0, 255).astype(np.uint8)  # what ComfyUI's SaveImage does
    assert saved.tolist() == list(range(256))


class LocalNetwork(torch.nn.Module):
    """Looks one pixel far: what remains between tiles and the whole image is then the noise and the blending."""

    config = NCSNppConfig(channel_multipliers=(1,))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn((3, 6, 3, 3), generator=torch.Generator().manual_seed(3)) / 5

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight, padding=1)


@pytest.mark.parametrize("sampler", ["ode_2m", "sde_2m", "ode_1", "sde_1"])
def test_tiles_share_the_noise_of_the_whole_image(sampler: str) -> None:
    model = ScoreDenoiser(LocalNetwork(), make_sde("ouve"), Prediction("residual"))  # type: ignore[arg-type]
    given = images(1, 3, 200, 300)
    settings = DriftRecSettings(sampler, steps=4, color="none")
    whole = restore_driftrec(model, given, settings)
    tiled = restore_driftrec(model, given, settings, compute=Compute(tiler=Tiler(128, 32)))
    other_seed = restore_driftrec(model, given, DriftRecSettings(sampler, steps=4, color="none", seed=9))
    assert (whole - tiled).abs().max() <= 1.01 / 255
    assert (whole - other_seed).abs().max() > 20 / 255


class Between:
    """A constraint of whose calls the test knows: predictions are clamped, and so is the result, to whole levels."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high, self.projected, self.finished = low, high, 0, 0

    def project(self, images: Tensor) -> Tensor:
        self.projected += 1
        return images.clamp(self.low, self.high)

    def finish(self, images: Tensor) -> Tensor:
        self.finished += 1
        return to_8bit(images.clamp(self.low, self.high))


def test_constraints_hold_every_prediction_and_the_result_of_their_own_image(driftrec, regression) -> None:
    given = images(2, 3, 16, 16)
    for restore, predictions in (
        (partial(restore_driftrec, driftrec, given, DriftRecSettings(steps=3, samples=2)), 6),
        (partial(restore_regression, regression, given), 0),
    ):
        dark, light = Between(0, 0.2), Between(0.9, 1)
        restored = restore(constraints=[dark, light])
        assert restored[0].max() <= 0.2 + 1e-6 and restored[1].min() >= 0.9 - 1 / 255
        assert (dark.projected, dark.finished, light.projected, light.finished) == (predictions, 1, predictions, 1)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_progress_never_falls_ends_at_one_and_shows_the_picture(driftrec, sampler: str) -> None:
    seen: list[float] = []
    previews: list[tuple[int, ...]] = []

    def note(progress) -> None:
        seen.append(progress.fraction)
        if progress.preview is not None:
            previews.append(tuple(progress.preview.shape))

    settings = DriftRecSettings(sampler, steps=3, tolerance=0.1, samples=2)
    compute = Compute(tiler=Tiler(128, 32))
    restore_driftrec(driftrec, images(2, 3, 18, 222), settings, compute=compute, on_progress=note)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert len(set(seen)) > 2 * len(set(previews)) + 10  # between the tiles, too
    assert set(previews) == {(1, 3, 18, 222)}


def test_times_that_were_not_trained_are_refused() -> None:
    model = ScoreDenoiser(network(6), make_sde("ouve"), Prediction("residual"), smallest_time=0.01)
    with pytest.raises(ValueError, match=r"t_eps of at least 0\.01, .* got 0\.005"):
        restore_driftrec(model, images(1, 3, 16, 16), DriftRecSettings(t_eps=0.005))


def test_results_that_are_no_numbers_are_an_error_not_a_black_picture(regression) -> None:
    broken = RegressionRestorer(network(3), residual_scale=float("nan"), noise_level=1.0)
    with pytest.raises(ValueError, match=r"no number\. Load the restorer as bf16 or fp32"):
        restore_regression(broken, images(1, 3, 16, 16))


def test_an_interruption_between_tiles_comes_through(driftrec) -> None:
    class StopError(Exception):
        pass

    def check() -> None:
        raise StopError

    with pytest.raises(StopError):
        restore_driftrec(driftrec, images(1, 3, 16, 16), DriftRecSettings(steps=2), compute=Compute(check=check))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a sampler of ode_2m"):
        DriftRecSettings("heun")
    with pytest.raises(ValueError, match="at least 1 sample and 1 step"):
        DriftRecSettings(samples=0)


def test_half_precision_stays_close_to_single(driftrec) -> None:
    """Only the network runs in half precision: the sampler's state and the sums around it stay float32."""
    given = torch.from_numpy(np.asarray(Image.new("RGB", (32, 32), (90, 120, 40))).copy()).permute(2, 0, 1)[None] / 255
    full = restore_driftrec(driftrec, given, DriftRecSettings(steps=4))
    half = ScoreDenoiser(network(6).to(torch.float16), make_sde("ouve"), Prediction("residual"))
    half.compute_dtype = torch.float16
    assert (restore_driftrec(half, given, DriftRecSettings(steps=4)) - full).abs().mean() < 2 / 255
