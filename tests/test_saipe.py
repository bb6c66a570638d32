"""SAIPE: counts of the build sheet, any size, both resolutions, weights and state, memory, refused configurations."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_cave import PeakMemory
from torch import nn

from restoration.networks.saipe import SAIPE, SAIPEConfig
from restoration.networks.swin import WindowAttention
from training.loop.checkpoint import load_trained_state, trained_state

TINY = SAIPEConfig(
    dim=12, down_depths=(2, 1), up_depths=(1,), heads=3, window=4, performer_depth=2, performer_heads=2,
    performer_dim_head=8, features=10, context_dim=16, tokens=5, pool_heads=2, image_side=64,
)  # fmt: skip
NATIVE = replace(TINY, resolution="native")
BOTH = pytest.mark.parametrize("config", [TINY, NATIVE], ids=["resize", "native"])
MEAN = torch.tensor([0.4488, 0.4371, 0.4040], dtype=torch.float64)[:, None, None]


def made(config=TINY, seed=0, **arguments):
    network = SAIPE(config, **{"dtype": torch.float64, **arguments}).eval()
    network.initialize(torch.Generator().manual_seed(seed))
    return network


def pictures(*size, batch=2, seed=1):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- the build sheet --------------------------------------------------------------------------------------------------


def test_the_default_network_has_the_parameters_of_the_build_sheet():
    network = SAIPE(SAIPEConfig(), device="meta")
    assert count(network.encoder.downsampler) == 880_380
    assert [count(block) for block in network.encoder.blocks] == [1_866_960] * 2
    assert count(network.decoder.upsampler) == 1_463_763
    assert tuple(network.embedder.features.shape) == (4, 621, 128)
    assert (network.encoder.positions.numel(), network.embedder.positions.numel()) == (128 * 128 * 180,) * 2
    assert count(network.embedder.fusion) == 180 * 64 * 1024 + 1024
    assert count(network.embedder.pool) == 4 * (1024 * 1024 + 1024)
    assert count(network) == 34_922_623


def test_the_default_network_gives_a_prompt_of_77_times_1024():
    network = SAIPE(SAIPEConfig(), device="meta").eval()
    reconstruction, tokens = network(torch.empty(2, 3, 321, 200, device="meta"))
    assert reconstruction.shape == (2, 3, 321, 200)
    assert tokens.shape == (2, 77, 1024)


@torch.no_grad()
def test_the_parts_are_joined_as_the_build_sheet_says():
    network, x = made(), pictures(64, 64)
    encoder, decoder, embedder = network.encoder, network.decoder, network.embedder
    h = x - MEAN
    for conv, stride in zip((0, 2, 3, 4), (1, 2, 2, 1), strict=True):
        layer = encoder.downsampler[conv]
        h = F.conv2d(h, layer.weight, layer.bias, stride=stride, padding=1)
        h = F.leaky_relu(h, 0.01) if conv == 0 else h
    embedded = encoder.norm(h.permute(0, 2, 3, 1))
    middle = encoder.blocks[1](encoder.blocks[0](embedded + encoder.positions)) + embedded
    upsampled = decoder.upsampler((decoder.norm(decoder.blocks[0](middle)) + middle).permute(0, 3, 1, 2)) + MEAN

    tokens = embedder.performer((embedder.project(middle) + embedder.positions).flatten(1, 2), embedder.features)
    performed = tokens.transpose(1, 2).unflatten(2, (16, 16))
    scales = [F.conv2d(performed, c.weight, c.bias, padding=p) for c, p in zip(embedder.convs, (1, 2, 3), strict=True)]
    mixed = performed + F.gelu(torch.cat(scales, dim=1))
    patches = F.unfold(mixed, 8, stride=8).transpose(1, 2)
    fused = F.linear(patches, embedder.fusion.weight.flatten(1), embedder.fusion.bias)
    prompt = embedder.norm(embedder.pool(embedder.queries.expand(2, -1, -1), fused))

    actual, actual_tokens = network(x)
    assert upsampled.std() > 0.01 and (prompt[0] - prompt[1]).abs().max() > 1e-6
    torch.testing.assert_close(actual, upsampled, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(actual_tokens, prompt, atol=1e-10, rtol=1e-10)


def test_gradients_reach_every_parameter():
    network = made().train()
    torch.manual_seed(0)
    reconstruction, tokens = network(pictures(64, 64))
    (reconstruction.square().mean() + tokens[..., 0].sum()).backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


# --- sizes ------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (33, 35), (64, 64), (7, 120), (200, 64), (96, 32)])
@torch.no_grad()
def test_every_size_gives_a_reconstruction_of_that_size_and_the_same_number_of_tokens(config, size):
    network = made(config)
    reconstruction, tokens = network(pictures(*size))
    assert reconstruction.shape == (2, 3, *size) and tokens.shape == (2, 5, 16)
    assert reconstruction.isfinite().all() and tokens.isfinite().all()
    torch.testing.assert_close(network.tokens(pictures(*size)), tokens, atol=0, rtol=0)


@torch.no_grad()
def test_a_picture_of_the_networks_own_size_goes_through_untouched():
    resizing, native = made(TINY), made(NATIVE)
    for actual, expected in zip(resizing(pictures(64, 64)), native(pictures(64, 64)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [(150, 90), (20, 35), (64, 200)])
@torch.no_grad()
def test_other_sizes_are_stretched_there_and_back_with_antialiasing(size):
    """The reference filters with a triangle, as wide as the shrinking demands, written as a matrix for each axis."""

    def matrix(given, wanted):
        scale = max(given / wanted, 1)
        centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5
        weights = (1 - (torch.arange(given)[None] - centres[:, None]).abs() / scale).clamp(min=0)
        return weights / weights.sum(dim=1, keepdim=True)

    def stretched(images, height, width):
        return matrix(images.shape[-2], height) @ images @ matrix(images.shape[-1], width).T

    network = made()
    reconstruction, tokens = network(stretched(pictures(*size), 64, 64))
    actual, actual_tokens = network(pictures(*size))
    torch.testing.assert_close(actual_tokens, tokens, atol=1e-9, rtol=0)
    torch.testing.assert_close(actual, stretched(reconstruction, *size), atol=1e-9, rtol=0)


@torch.no_grad()
def test_native_sizes_are_extended_by_repetition_and_cut_again():
    network, x = made(NATIVE), pictures(33, 70)
    rows, columns = torch.arange(64).clamp(max=32), torch.arange(96).clamp(max=69)
    reconstruction, tokens = network(x[..., rows[:, None], columns])
    actual, actual_tokens = network(x)
    torch.testing.assert_close(actual_tokens, tokens, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual, reconstruction[..., :33, :70], atol=1e-12, rtol=0)


# --- weights and state ------------------------------------------------------------------------------------------------


def test_starting_weights_follow_from_the_generator_alone():
    first, second, third = (made(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    norms = [f"{key}.{leaf}" for key, module in made().named_modules() if isinstance(module, nn.LayerNorm)
             for leaf in ("weight", "bias")]  # fmt: skip
    linear = [f"{key}.bias" for key, module in made().named_modules() if isinstance(module, nn.Linear)]
    for key, value in first.items():
        assert torch.equal(value, third[key]) == (key in norms or key in linear), key


def test_starting_weights_have_the_spread_of_the_build_sheet():
    network = made(replace(TINY, dim=48, context_dim=64))
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert 0.018 < module.weight.std() < 0.022
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound and module.bias.abs().max() <= bound
        elif isinstance(module, WindowAttention):
            assert 0.015 < module.bias_table.std() < 0.025
    assert 0.018 < network.encoder.positions.std() < 0.022
    assert 0.9 < network.embedder.positions.std() < 1.1 and 0.8 < network.embedder.queries.std() < 1.2


def test_random_features_are_redrawn_each_layer_of_its_own():
    network = made()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.redraw(torch.Generator().manual_seed(9))
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["embedder.features"]
    first, second = network.embedder.features
    assert not torch.equal(first, second)
    unit = first[:8] / first[:8].norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ unit.T, torch.eye(8), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_state_dict_brings_everything_and_so_does_the_checkpoint_of_a_training():
    network = made()
    network.redraw(torch.Generator().manual_seed(9))
    expected = network(pictures(50, 64))
    copies = [made(seed=1) for _ in range(2)]
    copies[0].load_state_dict(network.state_dict())
    load_trained_state(copies[1], trained_state(network))
    for copy in copies:
        for actual, wanted in zip(copy(pictures(50, 64)), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_every_layer_comes_from_the_given_operations():
    def marked(kind):
        return type(kind.__name__, (kind,), {"marked": True})

    names = ("Conv2d", "LayerNorm", "Linear")
    operations = type("Operations", (), {name: marked(getattr(nn, name)) for name in names})
    bare = {
        "Encoder": {"positions"},
        "ImageGuidanceEmbedder": {"positions", "queries"},
        "WindowAttention": {"bias_table"},
    }
    kinds = set()
    for module in SAIPE(TINY, operations=operations).modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if getattr(module, "marked", False):
            kinds.add(type(module).__name__)
        else:
            assert own == bare.get(type(module).__name__, set())
    assert kinds == set(names)


# --- evaluation, types, memory ----------------------------------------------------------------------------------------


@BOTH
@torch.no_grad()
def test_evaluation_is_deterministic_and_pictures_do_not_see_each_other(config):
    network, x = made(config), pictures(40, 50, batch=3)
    whole = network(x)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(network(x), whole, strict=True))
    alone = [torch.cat(parts) for parts in zip(*(network(image) for image in x.split(1)), strict=True)]
    torch.testing.assert_close(tuple(alone), whole, atol=1e-11, rtol=0)


@torch.no_grad()
def test_training_leaves_out_branches_by_torchs_own_random_state():
    network, x = made(replace(TINY, drop_path=0.5)).train(), pictures(64, 64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(network(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        network = made(recompute=recompute).train()
        torch.manual_seed(0)
        reconstruction, tokens = network(pictures(64, 64))
        (reconstruction.square().mean() + tokens[..., 0].sum()).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_finite_and_near_double(config, dtype):
    network, low = made(config), SAIPE(config, dtype=dtype).eval()
    low.load_state_dict(network.state_dict())
    assert low.embedder.features.dtype == torch.float32
    for size in ((64, 64), (33, 90)):
        expected, actual = network(pictures(*size)), low(pictures(*size).to(dtype))
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).abs().mean() < 0.05 * b.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(512, 512), (1000, 777)])
@pytest.mark.parametrize("resolution", ["resize", "native"])
def test_the_estimate_of_memory_is_what_it_holds_at_its_peak(resolution, size, dtype):
    network = SAIPE(SAIPEConfig(resolution=resolution), device="meta", dtype=dtype).eval()
    with torch.no_grad(), PeakMemory() as memory:
        network(torch.empty(1, 3, *size, device="meta", dtype=dtype))
    assert 0.99 < network.activation_bytes(*size, dtype) / memory.peak < 1.15


@pytest.mark.slow
@torch.no_grad()
def test_the_default_network_runs_on_a_processor():
    network = made(SAIPEConfig(), dtype=torch.float32)
    reconstruction, tokens = network(pictures(512, 512, batch=1).float())
    assert reconstruction.isfinite().all() and tokens.isfinite().all()


# --- refusals ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 0, 64)])
def test_other_shapes_are_refused_in_one_sentence(config, shape):
    network = made(config)
    for function in (network, network.tokens):
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
            function(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 10**9}, "dim from 3 to"), ({"dim": 180.0}, "dim from"), ({"dim": True}, "dim from"),
        ({"dim": 181}, "dim to be a multiple of 6"), ({"context_dim": 1023}, "context_dim to be a multiple of 8"),
        ({"image_side": 500}, "image_side to be a multiple of 32"), ({"image_side": 10**6}, "image_side from"),
        ({"down_depths": ()}, "down_depths of 1 to"), ({"down_depths": (6, 0)}, "down_depths"),
        ({"up_depths": [10**9]}, "up_depths"), ({"up_depths": [1] * 1000}, "up_depths"),
        ({"up_depths": 4}, "up_depths"),
        ({"window": 1}, "window from"), ({"window": 512}, "window from"), ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"drop_path": 1.0}, "drop_path"), ({"performer_depth": 10**6}, "performer_depth"),
        ({"performer_dim_head": 10**6}, "performer_dim_head"), ({"features": 10**9}, "features"),
        ({"tokens": 0}, "tokens from"), ({"heads": "6"}, "heads from"), ({"resolution": "half"}, "resize or native"),
        ({"resolution": ["native"]}, "resize or native"),
    ],
)  # fmt: skip
def test_a_configuration_that_describes_no_network_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SAIPEConfig(**wrong)


def test_many_large_parts_together_are_refused():
    parts = [{"dim": 512, "heads": 8}, {"mlp_ratio": 8}, {"down_depths": [24] * 8}]
    for part in parts:
        SAIPEConfig(**part)
    with pytest.raises(ValueError, match="at most 500,000,000 weights"):
        SAIPEConfig(**parts[0], **parts[1], **parts[2])


def test_the_configuration_survives_json():
    assert SAIPEConfig(**json.loads(json.dumps(NATIVE.to_dict()))) == NATIVE
