"""NCSN++: the published keys, shapes and parameter counts, and the outputs of an independent build from diffusers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig, _fit, fir_downsample, fir_upsample

PAPER = NCSNppConfig()

# The published module list (DriftRec's NCSN++ at its default options): what each of all_modules.0 to 76 is.
PUBLISHED = [
    ("fourier", 128), ("linear", 256, 512), ("linear", 512, 512), ("conv", 6, 128),
    ("res", 128, 128, False), ("res", 128, 128, False), ("res", 128, 128, True), ("combine", 128),
    ("res", 128, 128, False), ("res", 128, 128, False), ("res", 128, 128, True), ("combine", 128),
    ("res", 128, 256, True), ("res", 256, 256, False), ("res", 256, 256, True), ("combine", 256),
    ("res", 256, 256, False), ("res", 256, 256, False), ("res", 256, 256, True), ("combine", 256),
    ("res", 256, 256, False), ("attn", 256), ("res", 256, 256, False), ("attn", 256),
    ("res", 256, 256, True), ("combine", 256),
    ("res", 256, 256, False), ("res", 256, 256, False), ("res", 256, 256, True), ("combine", 256),
    ("res", 256, 256, False), ("res", 256, 256, False),
    ("res", 256, 256, False), ("attn", 256), ("res", 256, 256, False),
    *[("res", 512, 256, True)] * 3, ("norm", 256), ("conv", 256, 6), ("res", 256, 256, True),
    *[("res", 512, 256, True)] * 3, ("norm", 256), ("conv", 256, 6), ("res", 256, 256, True),
    *[("res", 512, 256, True)] * 3, ("attn", 256), ("norm", 256), ("conv", 256, 6), ("res", 256, 256, True),
    *[("res", 512, 256, True)] * 3, ("norm", 256), ("conv", 256, 6), ("res", 256, 256, True),
    ("res", 512, 256, True), ("res", 512, 256, True), ("res", 384, 256, True),
    ("norm", 256), ("conv", 256, 6), ("res", 256, 256, True),
    ("res", 384, 128, True), ("res", 256, 128, True), ("res", 256, 128, True),
    ("norm", 128), ("conv", 128, 6), ("res", 128, 128, True),
    *[("res", 256, 128, True)] * 3, ("norm", 128), ("conv", 128, 6),
]  # fmt: skip


def published_shapes(kind, *sizes):
    if kind == "fourier":
        return {"W": sizes}
    if kind == "linear":
        return {"weight": (sizes[1], sizes[0]), "bias": (sizes[1],)}
    if kind == "conv":
        return {"weight": (sizes[1], sizes[0], 3, 3), "bias": (sizes[1],)}
    if kind == "norm":
        return {"weight": sizes, "bias": sizes}
    if kind == "combine":
        return {"Conv_0.weight": (sizes[0], 6, 1, 1), "Conv_0.bias": sizes}
    if kind == "attn":
        channels = sizes[0]
        nins = [(f"NIN_{i}.{leaf}", shape) for i in range(4) for leaf, shape in (("W", (channels,) * 2), ("b", sizes))]
        return {"GroupNorm_0.weight": sizes, "GroupNorm_0.bias": sizes, **dict(nins)}
    inputs, outputs, shortcut = sizes
    layers = {
        "GroupNorm_0": (inputs,), "Conv_0": (outputs, inputs, 3, 3), "Dense_0": (outputs, 512),
        "GroupNorm_1": (outputs,), "Conv_1": (outputs, outputs, 3, 3),
    }  # fmt: skip
    if shortcut:
        layers["Conv_2"] = (outputs, inputs, 1, 1)
    return {f"{key}.{leaf}": shape if leaf == "weight" else shape[:1] for key, shape in layers.items()
            for leaf in ("weight", "bias")}  # fmt: skip


def parameters(config):
    return sum(parameter.numel() for parameter in NCSNpp(config, device="meta").parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [(PAPER, 65_623_359), (NCSNppConfig(in_channels=3), 65_574_561),
     (NCSNppConfig(in_channels=3, conditional=False), 59_598_753)],
)  # fmt: skip
def test_the_parameter_counts_are_the_published_ones(config, expected):
    assert parameters(config) == expected


def test_the_paper_configuration_has_exactly_the_authors_keys_and_shapes():
    assert len(PUBLISHED) == 77
    expected = {"output_layer.weight": (3, 6, 1, 1), "output_layer.bias": (3,)}
    for index, row in enumerate(PUBLISHED):
        expected |= {f"all_modules.{index}.{key}": shape for key, shape in published_shapes(*row).items()}
    actual = {key: tuple(value.shape) for key, value in NCSNpp(PAPER, device="meta").state_dict().items()}
    assert actual == expected
    assert len(actual) == 647


def test_only_the_fourier_frequencies_are_frozen():
    frozen = [key for key, value in NCSNpp(PAPER, device="meta").named_parameters() if not value.requires_grad]
    assert frozen == ["all_modules.0.W"]


# --- the same network, built from diffusers' blocks -------------------------------------------------------------------


def diffusers_build(config):
    """UNet2DModel; what the library fixes for the published sizes (3-channel pyramids, 32 groups) follows the width."""
    diffusers = pytest.importorskip("diffusers")
    widths = tuple(config.width * multiplier for multiplier in config.channel_multipliers)
    levels = len(widths)
    down = ["AttnSkipDownBlock2D" if level in config.attention_levels else "SkipDownBlock2D" for level in range(levels)]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    unet = diffusers.UNet2DModel(
        in_channels=config.in_channels, out_channels=config.in_channels, block_out_channels=widths,
        layers_per_block=config.res_blocks, time_embedding_type="fourier", down_block_types=down, up_block_types=up,
        mid_block_scale_factor=math.sqrt(2), norm_eps=1e-6, norm_num_groups=None, attention_head_dim=None,
    )  # fmt: skip
    for block in [*unet.down_blocks, *unet.up_blocks]:
        if getattr(block, "skip_conv", None) is not None:
            old, pyramid = block.skip_conv, config.in_channels
            sizes = (pyramid, old.out_channels) if block in list(unet.down_blocks) else (old.in_channels, pyramid)
            block.skip_conv = nn.Conv2d(*sizes, old.kernel_size, padding=old.padding)
    for norm in (module for module in unet.modules() if isinstance(module, nn.GroupNorm)):
        norm.num_groups = min(norm.num_channels // 4, 32)
    return unet.eval()


def copy_layers(pairs):
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.weight.copy_(ours.W.t() if hasattr(ours, "W") else ours.weight)
            theirs.bias.copy_(ours.b if hasattr(ours, "b") else ours.bias)


def copy_resnet(ours, theirs):
    pairs = [(ours.GroupNorm_0, theirs.norm1), (ours.Conv_0, theirs.conv1), (ours.Dense_0, theirs.time_emb_proj),
             (ours.GroupNorm_1, theirs.norm2), (ours.Conv_1, theirs.conv2)]  # fmt: skip
    if theirs.conv_shortcut is not None:
        pairs.append((ours.Conv_2, theirs.conv_shortcut))
    assert (ours.Conv_2 is None) == (theirs.conv_shortcut is None)
    copy_layers(pairs)


def copy_attention(ours, theirs):
    copy_layers([(ours.GroupNorm_0, theirs.group_norm), (ours.NIN_0, theirs.to_q), (ours.NIN_1, theirs.to_k),
                 (ours.NIN_2, theirs.to_v), (ours.NIN_3, theirs.to_out[0])])  # fmt: skip


def copy_to_diffusers(network, unet):
    """Walk both networks side by side; returns how many of our modules were used."""
    modules = iter(network.all_modules)
    with torch.no_grad():
        unet.time_proj.weight.copy_(next(modules).W)
    copy_layers([(next(modules), unet.time_embedding.linear_1), (next(modules), unet.time_embedding.linear_2)])
    copy_layers([(next(modules), unet.conv_in)])
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            copy_resnet(next(modules), resnet)
            if attention is not None:
                copy_attention(next(modules), attention)
        if block.resnet_down is not None:
            copy_resnet(next(modules), block.resnet_down)
            copy_layers([(next(modules).Conv_0, block.skip_conv)])
    copy_resnet(next(modules), unet.mid_block.resnets[0])
    copy_attention(next(modules), unet.mid_block.attentions[0])
    copy_resnet(next(modules), unet.mid_block.resnets[1])
    for block in unet.up_blocks:
        for resnet in block.resnets:
            copy_resnet(next(modules), resnet)
        for attention in getattr(block, "attentions", []):
            copy_attention(next(modules), attention)
        last = block.resnet_up is None
        copy_layers([(next(modules), unet.conv_norm_out if last else block.skip_norm),
                     (next(modules), unet.conv_out if last else block.skip_conv)])  # fmt: skip
        if not last:
            copy_resnet(next(modules), block.resnet_up)
    assert next(modules, None) is None


def random_network(config, seed=0):
    """Weights of ordinary sizes in every layer, biases and near-zero layers included, so that every layer shows.

    The frequencies are lowered: at their usual scale single precision leaves 3e-5 in the phase.
    """
    network = NCSNpp(config).eval()
    generator = torch.Generator().manual_seed(seed)
    network.initialize(generator)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key == "all_modules.0.W":
                parameter.mul_(1 / 16)
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1 and parameter.abs().max() < 1e-3:
                bound = math.sqrt(3 / parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
    return network


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (NCSNppConfig(width=16), (64, 128)),
        (NCSNppConfig(width=32, channel_multipliers=(1, 2, 2), attention_levels=(1,)), (24, 16)),
        (NCSNppConfig(width=16, channel_multipliers=(1, 3), attention_levels=(), res_blocks=1, in_channels=3), (6, 10)),
    ],
)
@torch.no_grad()
def test_it_equals_the_same_network_built_from_diffusers(config, size):
    network, unet = random_network(config), diffusers_build(config)
    copy_to_diffusers(network, unet)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((2, config.in_channels, *size), generator=generator)
    sigma = torch.tensor([0.02, 0.7])
    scaled = unet(x, sigma).sample  # diffusers divides its output by the noise level
    expected = network.output_layer(scaled * sigma[:, None, None, None])
    actual = network(x, sigma)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# --- sizes, types, start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (131, 97)])
@torch.no_grad()
def test_any_size_goes_through_all_seven_levels_and_is_kept(size):
    network = random_network(NCSNppConfig(width=8))
    out = network(torch.rand(1, 6, *size), torch.tensor([0.5]))
    assert out.shape == (1, 3, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("missing", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_what_an_odd_size_lost_is_filled_with_the_last_row_and_column(missing):
    """As the authors pad: to the right and at the bottom, by repetition."""
    h = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    like = torch.empty(1, 1, 4 + missing[0], 6 + missing[1])
    expected = np.pad(h.numpy(), ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])), mode="edge")
    np.testing.assert_array_equal(_fit(h, like).numpy(), expected)


@torch.no_grad()
def test_patches_quarter_the_work_and_keep_the_size():
    config = NCSNppConfig(width=16, channel_multipliers=(1, 2), attention_levels=(), patch_size=2)
    network = random_network(config)
    assert config.size_multiple == 4
    assert network.all_modules[3].weight.shape == (16, 24, 3, 3)
    assert network.output_layer.weight.shape == (12, 24, 1, 1)
    seen = []
    network.all_modules[3].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    assert network(torch.rand(1, 6, 12, 20), torch.tensor([0.5])).shape == (1, 3, 12, 20)
    assert seen == [(6, 10)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_finite_and_near_single_precision(dtype):
    config = NCSNppConfig(width=16, channel_multipliers=(1, 2, 2), attention_levels=(1,))
    network = random_network(config)
    x, sigma = torch.rand(1, 6, 20, 24), torch.tensor([0.03])
    expected = network(x, sigma)
    low = NCSNpp(config, dtype=dtype).eval()
    low.load_state_dict(network.state_dict())
    actual = low(x.to(dtype), sigma)
    assert actual.dtype == dtype
    assert low.all_modules[0].W.dtype == torch.float32
    assert (actual.float() - expected).abs().mean() < (
        0.05 if dtype == torch.bfloat16 else 0.01
    ) * expected.abs().mean()


def test_starting_weights_follow_from_the_generator_alone():
    config = NCSNppConfig(width=16, channel_multipliers=(1, 2), attention_levels=(1,))
    states = []
    for seed in (3, 3, 4):
        network = NCSNpp(config)
        network.initialize(torch.Generator().manual_seed(seed))
        states.append(network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["all_modules.3.weight"], states[2]["all_modules.3.weight"])


@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_a_fresh_network_returns_almost_nothing(conditional):
    network = NCSNpp(
        NCSNppConfig(width=16, channel_multipliers=(1, 2, 2), attention_levels=(), conditional=conditional)
    )
    network.initialize(torch.Generator().manual_seed(0))
    out = network(torch.rand(1, 6, 16, 16), torch.tensor([0.5]) if conditional else None)
    assert out.abs().max() < 1e-3


def test_starting_weights_have_the_published_spread():
    """Uniform with variance 1 over the mean of both fans; frequencies normal with deviation 16; NIN with a tenth."""
    network = NCSNpp(NCSNppConfig(width=128, channel_multipliers=(1, 1), attention_levels=(1,)))
    network.initialize(torch.Generator().manual_seed(0))
    state = network.state_dict()
    res_conv, attention = state["all_modules.4.Conv_0.weight"], state["all_modules.9.NIN_1.W"]
    assert res_conv.std().item() == pytest.approx(math.sqrt(1 / (128 * 9)), rel=0.02)
    assert attention.std().item() == pytest.approx(math.sqrt(0.1 / 128), rel=0.03)
    assert state["all_modules.0.W"].std().item() == pytest.approx(16, rel=0.2)
    assert state["all_modules.4.Conv_1.weight"].abs().max() < 1e-5
    assert state["all_modules.9.NIN_3.W"].abs().max() < 1e-5


def test_the_filters_keep_a_constant_inside_and_halve_or_double_the_size():
    x = torch.full((1, 2, 9, 12), 0.7)
    down, up = fir_downsample(x), fir_upsample(x)
    assert down.shape == (1, 2, 4, 6)
    assert up.shape == (1, 2, 18, 24)
    torch.testing.assert_close(down[..., 1:-1, 1:-1], torch.full((1, 2, 2, 4), 0.7))
    torch.testing.assert_close(up[..., 1:-1, 1:-1], torch.full((1, 2, 16, 22), 0.7))


def test_a_conditional_network_asks_for_its_noise_level():
    network = NCSNpp(NCSNppConfig(width=8, channel_multipliers=(1,), attention_levels=()))
    with pytest.raises(ValueError, match="expected the noise level"):
        network(torch.rand(1, 6, 8, 8))


def test_dropout_acts_in_training_only():
    config = NCSNppConfig(width=16, channel_multipliers=(1, 1), attention_levels=(), dropout=0.5)
    network = random_network(config)
    x, sigma = torch.rand(1, 6, 8, 8), torch.tensor([0.5])
    assert torch.equal(network(x, sigma), network(x, sigma))
    torch.manual_seed(0)
    network.train()
    assert not torch.equal(network(x, sigma), network(x, sigma))
