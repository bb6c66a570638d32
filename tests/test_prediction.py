"""What a DriftRec network's output means, and that a score network can start as a regression network."""

import math

import pytest
import torch
from torch import nn

from restoration.diffusion.prediction import PREDICTIONS, Prediction, RegressionRestorer, ScoreDenoiser
from restoration.diffusion.sde import OUVE, TSDVE, CosVE
from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig
from restoration.restorer_file import RestorerFileError
from training.trainers.score import place_weights

SIGMA_DATA = 0.05
each_kind = pytest.mark.parametrize("kind", PREDICTIONS)
each_time = pytest.mark.parametrize("t", [0.01, 0.2, 0.6, 1.0])


class Stub(nn.Module):
    """Stands in for a network: keeps what it was given, returns what it was told to."""

    def __init__(self, output=None):
        super().__init__()
        self.output = output

    def forward(self, x, noise_level=None):
        self.input, self.noise_level = x, noise_level
        return torch.zeros_like(x[:, -3:]) if self.output is None else self.output.to(x.dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(sde, t, size=(2, 3, 16, 16), dtype=torch.float32):
    """Clean, compressed and noisy images of a residual with deviation SIGMA_DATA, and the noise."""
    draw = generator()
    degraded = torch.rand(size, generator=draw, dtype=dtype)
    clean = degraded + SIGMA_DATA * torch.randn(size, generator=draw, dtype=dtype)
    noise = torch.randn(size, generator=draw, dtype=dtype)
    a, sigma = float(sde.mean_coefficient(t)), float(sde.std(t))
    return clean, degraded, degraded + a * (clean - degraded) + sigma * noise, noise


def perfect_output(kind, clean, degraded, x, noise, a, sigma):
    """The output that a faultless network would have, by the definition of each kind.

    `noise`: the noise with its sign turned. `residual`: EDM's F = (target - c_skip input) / c_out for data of deviation
    SIGMA_DATA that are scaled by a before the noise is added, all of the residuals clean - y and x - y.
    """
    if kind == "noise":
        return -noise
    ratio = sigma / a  # (x - y) / a is a residual under EDM's plain noise of this deviation
    c_skip = SIGMA_DATA**2 / (ratio**2 + SIGMA_DATA**2)
    c_out = ratio * SIGMA_DATA / math.sqrt(ratio**2 + SIGMA_DATA**2)
    return ((clean - degraded) - c_skip * (x - degraded) / a) / c_out


@each_kind
@each_time
@pytest.mark.parametrize("sde", [OUVE(), TSDVE(), CosVE()], ids=lambda sde: sde.name)
def test_a_faultless_network_gives_back_the_clean_image(kind, t, sde):
    clean, degraded, x, noise = problem(sde, t)
    a, sigma = float(sde.mean_coefficient(t)), float(sde.std(t))
    network = Stub(perfect_output(kind, clean, degraded, x, noise, a, sigma))
    denoise = ScoreDenoiser(network, sde, Prediction(kind, SIGMA_DATA))
    torch.testing.assert_close(denoise(x, degraded, t), clean, atol=3e-6, rtol=0)


@each_kind
@each_time
def test_the_loss_weight_turns_image_errors_into_output_errors(kind, t):
    sde = CosVE()
    clean, degraded, x, noise = problem(sde, t, dtype=torch.float64)
    a, sigma = (torch.full((2, 1, 1, 1), float(f(t)), dtype=torch.float64) for f in (sde.mean_coefficient, sde.std))
    prediction = Prediction(kind, SIGMA_DATA)
    perfect = perfect_output(kind, clean, degraded, x, noise, float(a[0]), float(sigma[0]))
    raw = perfect + torch.randn(perfect.shape, generator=generator(1), dtype=torch.float64)
    denoised = prediction.denoised(raw, x, degraded, a, sigma)
    weighted = prediction.loss_weight(a, sigma) * (denoised - clean) ** 2
    torch.testing.assert_close(weighted, (raw - perfect) ** 2, atol=1e-6, rtol=1e-6)


@each_time
def test_residual_input_and_target_have_unit_variance_and_share_nothing(t):
    """Karras et al. 2022, appendix B.6, carried over to the residual."""
    sde = CosVE()
    clean, degraded, x, noise = problem(sde, t, (1, 3, 200, 200))
    a, sigma = float(sde.mean_coefficient(t)), float(sde.std(t))
    network = Stub()
    ScoreDenoiser(network, sde, Prediction("residual", SIGMA_DATA))(x, degraded, t)
    seen = network.input[:, :3].flatten()
    target = perfect_output("residual", clean, degraded, x, noise, a, sigma).flatten()
    assert seen.std().item() == pytest.approx(1, abs=0.01)
    assert target.std().item() == pytest.approx(1, abs=0.01)
    assert abs(float((seen * target).mean())) < 0.015
    torch.testing.assert_close(network.input[:, 3:], 2 * degraded - 1)


def test_the_paper_feeds_the_noisy_and_the_compressed_image_as_they_are():
    sde, network = OUVE(), Stub()
    _, degraded, x, _ = problem(sde, 0.4)
    ScoreDenoiser(network, sde, Prediction("noise"))(x, degraded, 0.4)
    assert torch.equal(network.input, torch.cat([x, degraded], dim=1))


def test_every_image_of_a_batch_may_have_its_own_time():
    sde, network, times = OUVE(), Stub(), [0.1, 0.9]
    _, degraded, x, _ = problem(sde, 0.4)
    denoise = ScoreDenoiser(network, sde, Prediction("residual", SIGMA_DATA))
    together = denoise(x, degraded, times)
    torch.testing.assert_close(network.noise_level, torch.tensor(sde.std(times), dtype=torch.float32))
    for index, t in enumerate(times):
        torch.testing.assert_close(
            together[index : index + 1], denoise(x[index : index + 1], degraded[index : index + 1], t)
        )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="expected a prediction of noise or residual, got 'velocity'"):
        Prediction("velocity")


# --- the regression baseline ------------------------------------------------------------------------------------------


def test_the_baseline_of_the_paper_returns_the_output_itself():
    image, output = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    network = Stub(output)
    assert torch.equal(RegressionRestorer(network)(image), output)
    assert torch.equal(network.input, image)
    assert network.noise_level is None


def test_a_residual_baseline_adds_its_scaled_output_to_the_image():
    image, output = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    network = Stub(output)
    torch.testing.assert_close(RegressionRestorer(network, 0.1, 1.0)(image), image + 0.1 * output)
    torch.testing.assert_close(network.input, 2 * image - 1)
    assert torch.equal(network.noise_level, torch.ones(2))


@torch.no_grad()
def test_the_network_may_run_in_half_precision_while_the_sums_stay_single():
    image, network = torch.rand(1, 3, 8, 8), Stub()
    regression, score = RegressionRestorer(network, 0.1), ScoreDenoiser(network, CosVE(), Prediction("residual"))
    regression.compute_dtype = score.compute_dtype = torch.bfloat16
    assert regression(image).dtype == torch.float32
    assert network.input.dtype == torch.bfloat16
    network.input = None
    assert score(image + 0.1, image, 0.3).dtype == torch.float32
    assert network.input.dtype == torch.bfloat16


# --- a score network that starts as a regression network --------------------------------------------------------------


def small(in_channels, patch_size, **changes):
    shape = {"width": 16, "channel_multipliers": (1, 2, 2), "attention_levels": (1,), **changes}
    return NCSNpp(NCSNppConfig(in_channels=in_channels, patch_size=patch_size, **shape)).eval()


@torch.no_grad()
def trained_regression(patch_size, **changes):
    """Weights as after a training: the layers that start near zero are not near zero any more."""
    network = small(3, patch_size, **changes)
    network.initialize(generator(2))
    for key, parameter in network.named_parameters():
        if key != "all_modules.0.W":
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(len(key))))
    return network


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("kind", PREDICTIONS)
@torch.no_grad()
def test_a_score_network_starts_as_the_regression_whatever_the_noise(patch_size, kind):
    regression, network = trained_regression(patch_size), small(6, patch_size)
    network.initialize(generator(3))
    place_weights(network, regression.state_dict())
    degraded = torch.rand(2, 3, 24, 16, generator=generator(4))
    prediction = Prediction(kind, SIGMA_DATA)
    seen = degraded if kind == "noise" else 2 * degraded - 1
    expected = regression(seen, torch.ones(2))
    assert expected.std() > 0.1
    for scale in (0.0, 1.0, 50.0):
        x = degraded + scale * torch.randn(degraded.shape, generator=generator(5))
        one = torch.ones(2, 1, 1, 1)
        a = math.exp(-1) * one
        raw = network(prediction.network_input(x, degraded, a, one), torch.ones(2))
        torch.testing.assert_close(raw, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_the_first_data_prediction_is_the_regressions_restoration(patch_size):
    """At t = 1, but for the share of x_t that the preconditioning passes on: a sd^2 / (a^2 sd^2 + 1) of x_t - y."""
    regression, network, sde = trained_regression(patch_size), small(6, patch_size), CosVE()
    place_weights(network, regression.state_dict())
    degraded = torch.rand(1, 3, 24, 16, generator=generator(4))
    x = degraded + torch.randn(degraded.shape, generator=generator(5))
    denoised = ScoreDenoiser(network, sde, Prediction("residual", SIGMA_DATA))(x, degraded, 1.0)
    restored = RegressionRestorer(regression, SIGMA_DATA, 1.0)(degraded)
    total = math.exp(-2) * SIGMA_DATA**2 + 1
    skipped = math.exp(-1) * SIGMA_DATA**2 / total * (x - degraded)
    expected = degraded + (restored - degraded) / math.sqrt(total) + skipped
    torch.testing.assert_close(denoised, expected, atol=1e-5, rtol=0)
    assert (restored - degraded).abs().mean() > 1e-3


def test_the_new_channels_of_a_started_network_still_learn():
    """Zeros that are multiplied by zeros on both sides would have no gradient for ever."""
    network = small(6, 1)
    network.initialize(generator(3))
    place_weights(network, trained_regression(1).state_dict())
    network(torch.rand(1, 6, 16, 16, generator=generator(4)), torch.full((1,), 0.3)).square().sum().backward()
    first, last = network.all_modules[3].weight.grad, network.all_modules[-1].weight.grad
    assert first[:, :3].abs().max() > 0
    assert last[:3].abs().max() > 0


@torch.no_grad()
def test_a_network_of_the_same_shape_is_taken_as_it_is():
    given, network = trained_regression(1), small(3, 1)
    place_weights(network, given.state_dict())
    assert all(torch.equal(value, given.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"channel_multipliers": (1, 2)}, "has another network"), ({"width": 32}, r"has all_modules\S* of .*, not ")],
)
def test_another_network_is_refused(changes, message):
    with pytest.raises(RestorerFileError, match=message):
        place_weights(small(6, 1), trained_regression(1, **changes).state_dict())
