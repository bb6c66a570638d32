"""CaVE: the published keys and shapes, the outputs of a plain restatement, every size, and exact windows."""

import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared import shared_path
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from restoration.networks.cave import CaVE, CaVEConfig, cave_tokens, cells

SMALL = CaVEConfig((4, 6, 8, 10), 2)
SIZES = [(64, 96), (45, 70), (33, 20), (5, 1), (104, 96), (72, 40)]


def norm_shapes(channels):
    return {"weight": (channels,), "bias": (channels,), "running_mean": (channels,), "running_var": (channels,),
            "num_batches_tracked": ()}  # fmt: skip


def block_shapes(name, channels):
    conv = {"weight": (channels, channels, 3, 3), "bias": (channels,)}
    layers = {"0": conv, "1": norm_shapes(channels), "3": conv}
    return {f"{name}.res.{index}.{leaf}": shape for index, leaves in layers.items() for leaf, shape in leaves.items()}


def published_shapes():
    """The module list of the authors' CaVE: which layers stand at which index of which Sequential."""
    shapes = {"m_head.weight": (64, 3, 3, 3), "m_head.bias": (64,), "m_tail.weight": (3, 64, 3, 3), "m_tail.bias": (3,)}
    for part, channels, first in (
        ("m_down1", 64, 0), ("m_down2", 128, 0), ("m_down3", 256, 0), ("m_body_encoder", 512, 0),
        ("m_body_decoder", 512, 0), ("m_up3", 256, 1), ("m_up2", 128, 1), ("m_up1", 64, 1), ("qf_pred", 512, 0),
    ):  # fmt: skip
        for index in range(first, first + 4):
            shapes |= block_shapes(f"{part}.{index}", channels)
    for level, wide, narrow, kernel in ((1, 128, 64, 2), (2, 256, 128, 4), (3, 512, 256, 4)):
        for name, bias in ((f"m_down{level}.4", wide), (f"m_up{level}.0", narrow)):
            shapes |= {f"{name}.weight": (wide, narrow, kernel, kernel), f"{name}.bias": (bias,)}
    for index, outputs in ((6, 512), (8, 512), (10, 1)):
        shapes |= {f"qf_pred.{index}.weight": (outputs, 512), f"qf_pred.{index}.bias": (outputs,)}
    return shapes


def test_the_paper_configuration_has_exactly_the_authors_keys_and_shapes():
    state = CaVE(CaVEConfig(), device="meta").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes()
    assert len(state) == 346


def test_the_authors_module_code_has_the_same_state_dict():
    lines = shared_path("facts", "keys", "cave.txt").read_text().splitlines()
    published = [line.split(" ", 2)[1:] for line in lines if line.startswith("CAVE ") and "." in line]
    state = CaVE(CaVEConfig(), device="meta").state_dict()
    assert [[key, f"{tuple(value.shape)} {value.dtype}"] for key, value in state.items()] == published


def test_without_its_decoder_it_has_the_rest_of_the_keys():
    whole, part = (CaVE(CaVEConfig(), decoder=decoder, device="meta").state_dict() for decoder in (True, False))
    left_out = whole.keys() - part.keys()
    assert part.keys() < whole.keys()
    assert {key.split(".")[0] for key in left_out} == {"m_body_decoder", "m_up1", "m_up2", "m_up3", "m_tail"}
    with pytest.raises(ValueError, match="without its decoder"):
        CaVE(SMALL, decoder=False)(torch.rand(1, 3, 32, 32))


def test_norms_have_the_published_constants():
    norms = [module for module in CaVE(SMALL).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 9 * SMALL.blocks
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-4, 0.9)}


# --- the same network in plain functions ------------------------------------------------------------------------------


def random_network(config=SMALL, seed=0, **arguments):
    """Weights under which every layer shows, statistics and biases included."""
    network, generator = CaVE(config, **arguments).eval(), torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if value.dim() > 1:
            value.normal_(0, 1.2 / value[0].numel() ** 0.5, generator=generator)
        elif key.endswith(("running_var", ".1.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1:
            value.normal_(0, 0.2, generator=generator)
    return network.double()


class Plain:
    """CaVE written down layer by layer, from a state dict."""

    def __init__(self, network):
        self.state, self.blocks = network.state_dict(), network.config.blocks

    def layer(self, name, function, x, **options):
        return function(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def block(self, name, x):
        h = self.layer(f"{name}.res.0", F.conv2d, x, padding=1)
        leaves = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (self.state[f"{name}.res.1.{leaf}"][:, None, None] for leaf in leaves)
        h = torch.clamp((h - mean) / torch.sqrt(var + 1e-4) * scale + shift, min=0)
        return x + self.layer(f"{name}.res.3", F.conv2d, h, padding=1)

    def run(self, name, x, first=0, plus=0):
        for index in range(first, first + self.blocks):
            x = self.block(f"{name}.{index}", x) + plus
        return x

    def down(self, level, x):
        stride = 2 if level == 1 else 4
        x = self.run(f"m_down{level}", x)
        return self.layer(f"m_down{level}.{self.blocks}", F.conv2d, x, stride=stride)

    def up(self, level, x):
        stride = 2 if level == 1 else 4
        x = self.layer(f"m_up{level}.0", F.conv_transpose2d, x, stride=stride)
        return self.run(f"m_up{level}", x, first=1, plus=1)

    def encoded(self, x):
        """The features, and what the decoder adds on its way."""
        passed = [self.layer("m_head", F.conv2d, x, padding=1)]
        for level in (1, 2, 3):
            passed.append(self.down(level, passed[-1]))
        return self.run("m_body_encoder", passed[-1]), passed

    def level(self, features):
        x = self.run("qf_pred", features).mean(dim=(2, 3))
        for step, activation in ((2, torch.relu), (4, torch.relu), (6, torch.sigmoid)):
            x = activation(self.layer(f"qf_pred.{self.blocks + step}", F.linear, x))
        return x[:, 0]

    def reconstructed(self, x):
        features, passed = self.encoded(x)
        h = self.run("m_body_decoder", features) + passed[3]
        for level in (3, 2, 1):
            h = self.up(level, h) + passed[level - 1]
        return self.layer("m_tail", F.conv2d, h, padding=1), self.level(features)


def extended(images, multiple, least=32):
    """To the right and at the bottom, by repetition."""
    sizes = [max(-(-side // multiple) * multiple, least) for side in images.shape[-2:]]
    missing = [(0, size - side) for size, side in zip(sizes, images.shape[-2:], strict=True)]
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), *missing), mode="edge"))


def picture(*size, seed=1):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_features_and_quality_are_those_of_the_plain_restatement(size):
    network = random_network()
    plain = Plain(network)
    expected, _ = plain.encoded(extended(picture(*size), 8))
    features = network.encode(picture(*size))
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, atol=1e-9, rtol=1e-9)
    quality = network.quality(features)
    assert quality.dtype == torch.float32
    torch.testing.assert_close(quality, (100 * (1 - plain.level(expected))).float())


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_the_reconstruction_is_that_of_the_plain_restatement_at_every_size(size):
    """The authors' own fails unless both sides, rounded up to 8, are multiples of 32."""
    network = random_network()
    expected, level = Plain(network).reconstructed(extended(picture(*size), 32))
    expected = expected[..., : size[0], : size[1]]
    actual, actual_level = network(picture(*size))
    assert actual.shape == (2, 3, *size)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(actual_level, level)


def test_training_moves_the_statistics_nine_tenths_of_the_way():
    network = random_network().train()
    norm = network.m_down1[0].res[1]
    before = norm.running_mean.clone()
    with torch.no_grad():
        x = network.m_down1[0].res[0](network.m_head(picture(32, 64)))
        network(picture(32, 64))
    torch.testing.assert_close(norm.running_mean, 0.1 * before + 0.9 * x.mean(dim=(0, 2, 3)))


def test_gradients_reach_every_parameter():
    network = random_network().train()
    image, level = network(picture(40, 64))
    (image.square().mean() + level.sum()).backward()
    unused = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == []


# --- sizes, tokens, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((256, 256), 64), ((512, 768), 384), ((480, 720), 330), ((1024, 1024), 1024), ((1352, 2040), 2646),
     ((1, 1), 1), ((31, 64), 2), ((25, 57), 2), ((33, 89), 3)],
)  # fmt: skip
def test_the_number_of_tokens_is_the_published_one(size, tokens):
    rows, columns = cells(*size)
    assert rows * columns == tokens
    network = CaVE(CaVEConfig((1, 1, 1, 3), 1), decoder=False, device="meta").eval()
    features = network.encode(torch.empty(1, 3, *size, device="meta"))
    assert features.shape == (1, 3, rows, columns)
    assert cave_tokens(features).shape == (1, tokens, 3)


def test_tokens_are_ordered_row_by_row():
    features = torch.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4)
    tokens = cave_tokens(features)
    for row in range(3):
        for column in range(4):
            assert torch.equal(tokens[:, 4 * row + column], features[:, :, row, column])


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, on any device, `meta` included."""

    def __init__(self):
        super().__init__()
        self.owners, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.owners:
            self.live += size
            self.peak = max(self.peak, self.live)
        self.owners[key] = self.owners.get(key, 0) + 1
        weakref.finalize(tensor, self.drop, key, size)

    def drop(self, key, size):
        self.owners[key] -= 1
        if not self.owners[key]:
            self.live -= size
            del self.owners[key]


def peak_bytes(function, *size, dtype=torch.float32):
    with torch.no_grad(), PeakMemory() as memory:
        function(torch.empty(1, 3, *size, device="meta", dtype=dtype))
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(480, 720), (1024, 1024), (1000, 777), (33, 17)])
@pytest.mark.parametrize("config", [CaVEConfig(), CaVEConfig((4, 64, 64, 64), 1), CaVEConfig((2, 4, 999, 64), 1)])
def test_the_estimate_of_memory_is_what_encoding_holds_at_its_peak(config, size, dtype):
    network = CaVE(config, decoder=False, device="meta", dtype=dtype).eval()
    ratio = network.activation_bytes(*size, dtype) / peak_bytes(network.encode, *size, dtype=dtype)
    assert 0.99 < ratio < 1.15


@pytest.mark.parametrize(("size", "tile"), [((2048, 1536), 256), ((768, 1032), 128), ((4096, 4096), 512)])
def test_windows_take_no_more_than_the_estimate_beside_what_is_passed_on(size, tile):
    network = CaVE(CaVEConfig(), decoder=False, device="meta").eval()
    pixels, window = size[0] * size[1], tile + 2 * 32
    passed_on = 4 * (3 * pixels + 256 * pixels // 64 + 512 * pixels // 1024)
    peak = peak_bytes(lambda x: network.encode_tiled(x, tile), *size)
    assert peak < network.activation_bytes(window, window) + passed_on
    assert peak < peak_bytes(network.encode, *size) / 3


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(("size", "tile"), [((520, 299), 64), ((520, 299), 200), ((350, 97), 8), ((40, 700), 96)])
@torch.no_grad()
def test_windows_give_the_very_features_of_the_whole_picture(blocks, size, tile):
    network = random_network(CaVEConfig((4, 6, 8, 10), blocks)).float()
    images, counted = picture(*size).float(), []
    expected = network.encode(images)
    actual = network.encode_tiled(images, tile, on_tile=lambda done, total: counted.append((done, total)))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    assert len(counted) > 4
    assert counted == [(index + 1, len(counted)) for index in range(len(counted))]


@torch.no_grad()
def test_the_paper_network_reads_32_pixels_around_a_window():
    network = random_network(CaVEConfig((1, 1, 1, 1), 4))
    assert network.config.halo == 32
    seen = []
    network.m_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[-2:])))
    network.encode_tiled(picture(256, 384), 128)
    assert seen == [(160, 160), (160, 192), (160, 160)] * 2


@torch.no_grad()
def test_tile_0_is_the_whole_picture_in_three_passes():
    network, counted = random_network(), []
    actual = network.encode_tiled(picture(100, 70), 0, on_tile=lambda *count: counted.append(count))
    assert counted == [(1, 3), (2, 3), (3, 3)]
    torch.testing.assert_close(actual, network.encode(picture(100, 70)))


def test_windows_are_refused_in_training_mode():
    with pytest.raises(ValueError, match=r"Call eval\(\) first"):
        random_network().train().encode_tiled(picture(64, 64), 32)


# --- types, start, refusals -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_layer_comes_from_the_given_operations():
    def marked(kind):
        return type(kind.__name__, (kind,), {"marked": True})

    names = ("Conv2d", "ConvTranspose2d", "BatchNorm2d", "Linear")
    operations = type("Operations", (), {name: marked(getattr(nn, name)) for name in names})
    layers = [
        module for module in CaVE(SMALL, operations=operations).modules() if list(module.parameters(recurse=False))
    ]
    assert {type(layer).__name__ for layer in layers} == set(names)
    assert all(getattr(layer, "marked", False) for layer in layers)


@torch.no_grad()
def test_bfloat16_stays_near_double_precision():
    network = random_network()
    low = CaVE(SMALL, dtype=torch.bfloat16).eval()
    low.load_state_dict(network.state_dict())
    expected, actual = network.encode(picture(64, 64)), low.encode(picture(64, 64).bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_starting_weights_are_orthogonal_and_follow_from_the_generator_alone():
    networks = [CaVE(CaVEConfig((8, 12, 16, 24), 1)) for _ in range(3)]
    for network, seed in zip(networks, (3, 3, 4), strict=True):
        network.initialize(torch.Generator().manual_seed(seed))
    first, second, third = (network.state_dict() for network in networks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key, value in first.items():
        if value.dim() > 1:
            rows = value.flatten(1)
            gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
            torch.testing.assert_close(gram, 0.04 * torch.eye(len(gram)), atol=1e-6, rtol=0)
            assert not torch.equal(value, third[key])
        elif key.endswith(("bias", "running_mean", "num_batches_tracked")):
            assert not value.any()
        elif key.endswith("running_var"):
            assert (value == 1).all()
        else:
            assert key.endswith("res.1.weight")
            assert 0.1 <= value.min() < 0.5 < value.max() <= 1


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 0, 64)])
def test_other_shapes_are_refused_in_one_sentence(shape):
    network = random_network()
    for function in (network, network.encode, lambda x: network.encode_tiled(x, 32)):
        with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
            function(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [{"widths": (1, 2, 3)}, {"widths": (0, 1, 1, 1)}, {"blocks": 0}])
def test_a_configuration_that_describes_no_network_is_refused(wrong):
    with pytest.raises(ValueError, match="four widths"):
        CaVEConfig(**wrong)


def test_the_configuration_survives_json():
    assert CaVEConfig(**json.loads(json.dumps(SMALL.to_dict()))) == SMALL
