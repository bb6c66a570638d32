"""The timestep predictor: a plain restatement of the network, Eq. 11 against scipy's Gumbel law, exact windows."""

import json
import math

import numpy as np
import pytest
import scipy.fft
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from test_cave import peak_bytes
from torch import nn

from restoration.networks.timestep_predictor import (
    TimestepPredictor,
    TimestepPredictorConfig,
    cut_cosines,
    expected_timestep,
    gumbel_noise,
)

SMALL = TimestepPredictorConfig(timesteps=7, stem=20, width=6, blocks=3, hidden=5)
SIZES = [(64, 96), (45, 70), (33, 20), (8, 8), (5, 1), (1, 1), (7, 40)]


def random_network(config=SMALL, seed=0, **arguments):
    """Weights under which every layer shows, statistics and biases included."""
    network, generator = TimestepPredictor(config, **arguments).eval(), torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if value.dim() > 1:
            gain = {"stem.0.weight": 20, "quality_head.2.weight": 0.1}.get(key, 1.5)
            value.normal_(0, gain / value[0].numel() ** 0.5, generator=generator)
        elif key.endswith("running_var"):
            value.uniform_(0.3, 1.5, generator=generator)
        elif value.dim() == 1:
            value.normal_(0, 0.4, generator=generator)
    return network


def picture(*size, seed=1, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


# --- the same network in numpy ----------------------------------------------------------------------------------------


class Plain:
    """The network written down layer by layer in double precision, from a state dict."""

    def __init__(self, network):
        self.state = {key: value.double().numpy() for key, value in network.state_dict().items()}
        self.config = network.config

    def norm(self, name, x):
        leaves = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (self.state[f"{name}.{leaf}"][:, None, None] for leaf in leaves)
        return (x - mean) / np.sqrt(var + 1e-5) * scale + shift

    def conv1(self, name, x):
        weight = self.state[f"{name}.weight"][..., 0, 0]
        return np.einsum("oi,birs->bors", weight, x) + self.state[f"{name}.bias"][:, None, None]

    def conv3(self, name, x):
        """3 by 3 over a map whose border is repeated."""
        rows, columns = x.shape[-2:]
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        weight, out = self.state[f"{name}.weight"], 0
        for dy in range(3):
            for dx in range(3):
                out += np.einsum("oi,biyx->boyx", weight[:, :, dy, dx], x[:, :, dy : dy + rows, dx : dx + columns])
        return out + self.state[f"{name}.bias"][:, None, None]

    def pooled(self, images):
        side = self.config.patch
        x = images.double().numpy()
        rows, columns = (max(length // side, 1) for length in x.shape[-2:])
        missing = [(0, max(side - length, 0)) for length in x.shape[-2:]]
        x = np.pad(x, ((0, 0), (0, 0), *missing), mode="edge")[..., : rows * side, : columns * side]
        cells = x.reshape(len(x), 3, rows, side, columns, side)
        cells = cells - cells.mean(axis=(3, 5), keepdims=True)
        x = np.einsum("ocyx,bcrysx->bors", self.state["stem.0.weight"], cells)
        x = self.norm("stem.2", np.clip(x + self.state["stem.0.bias"][:, None, None], 0, 6))
        for block in range(self.config.blocks):
            name = f"blocks.{block}.res"
            h = np.maximum(self.norm(f"{name}.1", self.conv3(f"{name}.0", x)), 0)
            x = x + np.maximum(self.norm(f"{name}.4", self.conv1(f"{name}.3", h)), 0)
        return x.mean(axis=(2, 3))

    def branch(self, name, pooled):
        hidden = np.maximum(pooled @ self.state[f"{name}.0.weight"].T + self.state[f"{name}.0.bias"], 0)
        return hidden @ self.state[f"{name}.2.weight"].T + self.state[f"{name}.2.bias"]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_quality_and_logits_are_those_of_the_plain_restatement_at_every_size(size):
    network, images = random_network(), picture(*size)
    plain = Plain(network)
    pooled = plain.pooled(images)
    quality, logits = network(images)
    assert quality.shape == (2,) and logits.shape == (2, 7)
    assert quality.dtype == logits.dtype == torch.float32
    np.testing.assert_allclose(network.encode(images).numpy(), pooled, rtol=1e-4, atol=1e-4)
    expected = 100 * scipy.special.expit(plain.branch("quality_head", pooled)[:, 0])
    np.testing.assert_allclose(quality.numpy(), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(logits.numpy(), plain.branch("timestep_head", pooled), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_different_pictures_get_different_answers():
    """A restatement that agrees because both are constant would prove nothing."""
    network = random_network()
    images = torch.cat([picture(40, 40, batch=1), 0.1 * picture(40, 40, batch=1)])
    quality, logits = network(images)
    assert abs(float(quality[0] - quality[1])) > 1
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_without_the_timestep_branch_the_rest_is_the_same():
    whole = random_network()
    part = TimestepPredictor(TimestepPredictorConfig(0, stem=20, width=6, blocks=3, hidden=5)).eval()
    left_out = part.load_state_dict(whole.state_dict(), strict=False)
    assert not left_out.missing_keys
    assert left_out.unexpected_keys and all(key.startswith("timestep_head.") for key in left_out.unexpected_keys)
    quality, logits = part(picture(40, 50))
    assert logits is None
    assert torch.equal(quality, whole(picture(40, 50))[0])


# --- Eq. 11 -----------------------------------------------------------------------------------------------------------


def test_the_expected_timestep_is_numpys():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 3
    noise = gumbel_noise((3, 1000), torch.Generator().manual_seed(1))
    for given, scores in (((logits,), logits), ((logits, noise), logits + noise)):
        expected = scipy.special.softmax(scores.double().numpy(), axis=-1) @ np.arange(1000.0)
        actual = expected_timestep(*given)
        assert actual.dtype == torch.float32 and actual.shape == (3,)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5)
    low = expected_timestep(logits.half())
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low.numpy(), expected_timestep(logits.half().double()).numpy(), rtol=1e-5)


def test_certain_logits_give_their_timestep_and_flat_ones_the_middle():
    certain = torch.full((2, 1000), -50.0)
    certain[0, 0] = certain[1, 999] = 50.0
    torch.testing.assert_close(expected_timestep(certain), torch.tensor([0.0, 999.0]))
    torch.testing.assert_close(expected_timestep(torch.zeros(1, 1000)), torch.tensor([499.5]))


def test_gumbel_noise_follows_scipys_law_and_its_generator():
    noise = gumbel_noise((200, 1000), torch.Generator().manual_seed(3))
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert scipy.stats.kstest(noise.flatten().numpy()[::4], scipy.stats.gumbel_r.cdf).pvalue > 0.001
    assert float(noise.mean()) == pytest.approx(scipy.stats.gumbel_r.mean(), abs=0.01)
    assert float(noise.max()) > 10  # the tail has not been cut
    assert torch.equal(noise, gumbel_noise((200, 1000), torch.Generator().manual_seed(3)))
    assert not torch.equal(noise, gumbel_noise((200, 1000), torch.Generator().manual_seed(4)))


def test_its_mean_over_draws_is_scipys_monte_carlo_mean():
    """Four standard errors of both means apart at most; the noise-free expectation is another number."""
    logits = torch.linspace(3, -3, 40)
    draws = 20_000
    noise = gumbel_noise((draws, 40), torch.Generator().manual_seed(5))
    ours = expected_timestep(logits.expand(draws, 40), noise).double().numpy()
    theirs = scipy.special.softmax(
        logits.double().numpy() + scipy.stats.gumbel_r.rvs(size=(draws, 40), random_state=6), axis=-1
    ) @ np.arange(40.0)
    error = math.hypot(ours.std(), theirs.std()) / math.sqrt(draws)
    assert abs(ours.mean() - theirs.mean()) < 4 * error < 0.3
    assert ours.std() == pytest.approx(theirs.std(), rel=0.05)
    assert abs(float(expected_timestep(logits[None])) - ours.mean()) > 8 * error


def test_gradients_reach_the_logits_and_every_parameter():
    """d tau / d l_i = p_i (i - tau)."""
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    noise = gumbel_noise((1, 9), torch.Generator().manual_seed(1))
    tau = expected_timestep(logits, noise)
    tau.sum().backward()
    shares = (logits + noise).detach().softmax(-1)
    torch.testing.assert_close(logits.grad, shares * (torch.arange(9) - tau.detach()), rtol=1e-4, atol=1e-5)
    network = random_network().train()
    quality, logits = network(picture(40, 48))
    (quality.sum() + expected_timestep(logits, gumbel_noise(logits.shape, torch.Generator())).sum()).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0 or key.endswith("bias"), key


# --- windows and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tile"), [((520, 299), 64), ((203, 170), 40), ((350, 97), 8), ((40, 700), 96)])
@torch.no_grad()
def test_windows_give_the_very_features_of_the_whole_picture(size, tile):
    network, images, counted = random_network(), picture(*size), []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.abs_()  # keeps activity alive at every position
    expected = network.encode(images)
    actual = network.encode_tiled(images, tile, on_tile=lambda done, total: counted.append((done, total)))
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    assert len(counted) > 4
    assert counted == [(index + 1, len(counted)) for index in range(len(counted))]


@torch.no_grad()
def test_a_window_needs_all_of_its_halo():
    """One block of pixels less of it, and the windows would show: the test above is no accident of a short reach."""
    network = random_network(TimestepPredictorConfig(0, stem=6, width=4, blocks=1, hidden=4)).double()
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.abs_().add_(0.1)
    images = picture(64, 128, batch=1).double()
    whole = network._features(images)[..., 8:]
    halo = network.config.halo
    assert halo == 8
    enough, short = (network._features(images[..., 64 - read :])[..., read // 8 :] for read in (halo, halo - 8))
    torch.testing.assert_close(enough, whole)
    assert (short - whole).abs().max() > 1e-3


@torch.no_grad()
def test_tile_0_is_one_window_and_small_pictures_are_extended():
    network, counted = random_network(), []
    actual = network.encode_tiled(picture(100, 70), 0, on_tile=lambda *count: counted.append(count))
    assert counted == [(1, 1)]
    torch.testing.assert_close(actual, network.encode(picture(100, 70)))
    torch.testing.assert_close(network.encode_tiled(picture(1, 3), 64), network.encode(picture(1, 3)))


def test_windows_are_refused_in_training_mode():
    with pytest.raises(ValueError, match=r"Call eval\(\) first"):
        random_network().train().encode_tiled(picture(64, 64), 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(480, 720), (1000, 777), (5, 300)])
@pytest.mark.parametrize("config", [{"timesteps": 0}, {"stem": 16, "width": 64}, {"patch": 2}])
def test_the_estimate_of_memory_is_what_encoding_holds_at_its_peak(config, size, dtype):
    network = TimestepPredictor(TimestepPredictorConfig(**config), device="meta", dtype=dtype).eval()
    ratio = network.activation_bytes(*size, dtype) / peak_bytes(network.encode, *size, dtype=dtype)
    assert 0.95 < ratio < 1.25


# --- types, start, refusals -------------------------------------------------------------------------------------------


def test_every_layer_comes_from_the_given_operations():
    def marked(kind):
        return type(kind.__name__, (kind,), {"marked": True})

    names = ("Conv2d", "BatchNorm2d", "Linear")
    operations = type("Operations", (), {name: marked(getattr(nn, name)) for name in names})
    network = TimestepPredictor(SMALL, operations=operations)
    layers = [module for module in network.modules() if list(module.parameters(recurse=False))]
    assert {type(layer).__name__ for layer in layers} == set(names)
    assert all(getattr(layer, "marked", False) for layer in layers)


@torch.no_grad()
def test_half_precision_stays_near_single_and_the_mean_does_not_overflow():
    """A plain mean in half precision of 262,144 positions of 100 would have to pass through infinity."""
    network = random_network()
    low = TimestepPredictor(SMALL, dtype=torch.float16).eval()
    low.load_state_dict(network.state_dict())
    images = picture(64, 80)
    quality, logits = low(images.half())
    expected_quality, expected_logits = network(images)
    assert quality.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(quality, expected_quality, atol=0.2, rtol=0)
    torch.testing.assert_close(logits, expected_logits, atol=0.02, rtol=0.02)
    low._features = lambda x: torch.full((1, 20, 512, 512), 100.0, dtype=torch.float16)
    pooled = low.encode(images.half())
    assert pooled.dtype == torch.float32 and torch.equal(pooled, torch.full((1, 20), 100.0))


def test_the_first_filters_are_scipys_cosine_transform_of_luma_over_their_limits():
    """Pillow's luma, scipy's orthonormal DCT row by row, over limits of 1 to 16 levels, times 6 (where ReLU6 ends)."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    luma = scipy.fft.dctn(np.asarray(picture.convert("L")).astype(float), norm="ortho").flatten()
    pixels = torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0)[None].float() / 255
    filters = cut_cosines(189, 8, torch.Generator().manual_seed(0))
    actual = F.conv2d(pixels, filters, stride=8).flatten().numpy()
    assert filters.shape == (189, 3, 8, 8)
    for number, limit in enumerate((1, 4, 16)):
        one = actual[63 * number : 63 * number + 63] * limit / 6
        np.testing.assert_allclose(np.abs(one), np.abs(luma[1:]), atol=4)  # Pillow rounds luma to whole levels
        assert 10 < (np.sign(one) == np.sign(luma[1:])).sum() < 53  # either sign
    assert np.abs(luma[1:]).max() > 100
    assert cut_cosines(20, 8, torch.Generator()).shape == (20, 3, 8, 8)


@torch.no_grad()
def test_rounded_filters_do_not_see_the_brightness_of_flat_blocks():
    """In half precision their weights sum to something; a norm blows that up where most blocks are flat."""
    network = TimestepPredictor(TimestepPredictorConfig()).eval()
    network.initialize(torch.Generator().manual_seed(0))
    filters = network.stem[0].weight
    filters += 0.5 * torch.randn(filters.shape, generator=torch.Generator().manual_seed(1))  # as training moves them
    filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
    filters.copy_(filters.half())
    assert filters.sum(dim=(1, 2, 3)).abs().max() > 0.1
    dark, bright = (network.encode(torch.full((1, 3, 64, 64), level / 255)) for level in (9, 250))
    torch.testing.assert_close(dark, bright, atol=1e-3, rtol=0)


def test_starting_weights_follow_from_the_generator_alone_and_favour_nothing():
    networks = [TimestepPredictor(TimestepPredictorConfig()) for _ in range(3)]
    for network, seed in zip(networks, (3, 3, 4), strict=True):
        network.initialize(torch.Generator().manual_seed(seed))
    first, second, third = (network.state_dict() for network in networks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["blocks.0.res.0.weight"], third["blocks.0.res.0.weight"])
    assert not torch.equal(first["stem.0.weight"], third["stem.0.weight"])
    quality, logits = networks[0].eval()(picture(64, 64))
    assert (quality - 50).abs().max() < 10
    assert (expected_timestep(logits) - 499.5).abs().max() < 50


def test_answers_are_the_same_every_time():
    network = random_network()
    first, second = network(picture(72, 50)), network(picture(72, 50))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 0, 64)])
def test_other_shapes_are_refused_in_one_sentence(shape):
    network = random_network()
    for function in (network, network.encode, lambda x: network.encode_tiled(x, 32)):
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
            function(torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong",
    [{"width": 10**9}, {"stem": 5000}, {"hidden": 10**6}, {"blocks": 17}, {"patch": 33}, {"patch": 1},
     {"timesteps": 10**7}, {"width": 0}, {"timesteps": -1}, {"width": 64.0}, {"width": "64"}, {"blocks": True},
     {"patch": None}],
)  # fmt: skip
def test_absurd_configurations_are_refused_before_anything_is_allocated(wrong):
    with pytest.raises(ValueError, match=f"expected {next(iter(wrong))} from"):
        TimestepPredictorConfig(**wrong)


def test_the_configuration_survives_json():
    assert TimestepPredictorConfig(**json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    assert TimestepPredictorConfig().timesteps == 1000


def test_a_network_that_is_large_as_a_whole_is_refused_before_it_is_made():
    """Each number lies within its own bounds; a file of anybody's could ask for 2.8 GB with them."""
    with pytest.raises(ValueError, match="at most 50,000,000 weights"):
        TimestepPredictorConfig(stem=4096, patch=32, width=1024, blocks=16)


def test_the_expectation_stays_within_the_timesteps():
    """Where the last one is all but certain, the sum in single precision would come out above it."""
    logits = torch.zeros(200, 1000)
    logits[:, -1] = torch.linspace(5, 60, 200)
    assert expected_timestep(logits).max() <= 999
