"""Guided diffusion's UNet: published keys, shapes and parameter counts, and the outputs of diffusers' equivalent."""

from dataclasses import replace

import pytest
import torch
from prior_networks import NARROW_ADM, diffusers_adm, randomized
from test_cave import PeakMemory

from restoration.importers._unet2d import DiffusersNames
from restoration.networks.adm_unet import ADMUNet, ADMUNetConfig

UNCONDITIONAL = ADMUNetConfig()
CONDITIONAL = ADMUNetConfig(classes=1000)
LARGE = ADMUNetConfig(
    channel_multipliers=(0.5, 1, 1, 2, 2, 4, 4), attention_levels=(4, 5, 6), classes=1000, image_size=512
)  # fmt: skip
NARROW = replace(NARROW_ADM, head_channels=32)
SHAPES = {
    "narrow": NARROW,
    "several heads": replace(NARROW, width=64, head_channels=16, attention_levels=(1, 2, 3)),
    "classes": replace(NARROW, classes=7, attention_levels=(2, 3)),
    "half as wide first": replace(
        NARROW, width=64, channel_multipliers=(0.5, 1, 1, 1.5), classes=5, res_blocks=2, attention_levels=(0, 2)
    ),
    "noise alone": replace(NARROW, out_channels=3, res_blocks=2, attention_levels=()),
    "no attention": replace(NARROW, attention_levels=(), middle_attention=False),
    "16 groups": replace(NARROW, width=16, norm_groups=16, head_channels=16),
}


def pair(config, seed=0):
    reference = randomized(diffusers_adm(config), seed)
    network = ADMUNet(config).eval()
    network.load_state_dict(DiffusersNames.of(config).converted(reference.state_dict()))
    return network, reference


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(UNCONDITIONAL, 552_814_086, 566), (CONDITIONAL, 553_838_086, 567), (LARGE, 558_997_638, 645)],
    ids=["256x256_diffusion_uncond.pt", "256x256_diffusion.pt", "512x512_diffusion.pt"],
)
def test_the_published_networks_have_the_published_tensors(config, parameters, tensors):
    state = ADMUNet(config, device="meta").state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters
    with torch.device("meta"):
        reference = diffusers_adm(config).state_dict()
    assert sum(value.numel() for value in reference.values()) == parameters
    assert DiffusersNames.of(config).expected() == {key: tuple(value.shape) for key, value in reference.items()}


def test_the_published_names():
    state = ADMUNet(CONDITIONAL, device="meta").state_dict()
    some = {
        "time_embed.0.weight": (1024, 256), "time_embed.2.bias": (1024,), "label_emb.weight": (1000, 1024),
        "input_blocks.0.0.weight": (256, 3, 3, 3), "input_blocks.1.0.in_layers.0.weight": (256,),
        "input_blocks.1.0.emb_layers.1.weight": (512, 1024), "input_blocks.3.0.out_layers.3.weight": (256, 256, 3, 3),
        "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1), "input_blocks.10.1.norm.weight": (512,),
        "input_blocks.10.1.qkv.weight": (1536, 512, 1), "input_blocks.17.1.proj_out.weight": (1024, 1024, 1),
        "middle_block.0.in_layers.2.weight": (1024, 1024, 3, 3), "middle_block.1.qkv.bias": (3072,),
        "middle_block.2.out_layers.0.weight": (1024,), "output_blocks.0.0.in_layers.2.weight": (1024, 2048, 3, 3),
        "output_blocks.2.2.in_layers.2.weight": (1024, 1024, 3, 3),
        "output_blocks.11.1.in_layers.2.weight": (512, 512, 3, 3), "output_blocks.17.0.in_layers.0.weight": (512,),
        "out.0.weight": (256,), "out.2.weight": (6, 256, 3, 3),
    }  # fmt: skip
    assert {key: tuple(state[key].shape) for key in some} == some
    assert not any(key.startswith(("input_blocks.9.1.", "input_blocks.18.", "output_blocks.17.1.")) for key in state)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_outputs_equal_diffusers(config):
    network, reference = pair(config)
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    timesteps, labels = torch.tensor([0, 987]), torch.tensor([0, 4]) if config.classes else None
    expected = reference(x, timesteps, labels).sample
    assert expected.std() > 0.1
    actual = network(x, timesteps, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_attention_reads_the_published_order_of_channels():
    """Heads first, each with its query, key and value (QKVAttentionLegacy); not all queries, all keys, all values."""
    network, _ = pair(SHAPES["several heads"])
    block, x = network.middle_block[1], torch.randn(2, 256, 3, 5)
    qkv = block.qkv(block.norm(x).flatten(2)).reshape(2 * 16, 3 * 16, 15)
    query, key, value = qkv.split(16, dim=1)
    weights = torch.einsum("bct,bcs->bts", query, key).div(4).softmax(dim=-1)
    mixed = torch.einsum("bts,bcs->bct", weights, value).reshape(2, 256, 15)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed).reshape(x.shape), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_timestep_and_every_weight_count():
    network, _ = pair(replace(SHAPES["classes"], channel_multipliers=(1, 2), attention_levels=(1,)))
    x, one, label = torch.randn(1, 3, 16, 16), torch.tensor([1.0]), torch.tensor([3])
    before = network(x, one, label)
    assert not torch.allclose(before, network(x, one + 100, label))
    assert not torch.allclose(before, network(x, one, label + 1))
    for name, parameter in network.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.5)
        assert not torch.equal(before, network(x, one, label)), name
        parameter.copy_(kept)


def test_labels_are_checked():
    with pytest.raises(ValueError, match="is told a class"):
        ADMUNet(SHAPES["classes"], device="meta")(torch.empty(1, 3, 32, 32, device="meta"), torch.zeros(1))
    with pytest.raises(ValueError, match="is not told a class"):
        ADMUNet(NARROW, device="meta")(torch.empty(1, 3, 32, 32, device="meta"), torch.zeros(1), torch.zeros(1))


def test_wrong_shapes_are_explained():
    with pytest.raises(ValueError, match="channels that 32 groups divide, got 48"):
        replace(NARROW, channel_multipliers=(1, 1.5), attention_levels=())
    with pytest.raises(ValueError, match="attention at levels 0 to 3, got"):
        replace(NARROW, attention_levels=(4,))
    with pytest.raises(ValueError, match="heads of 48 divide, got 64 at level 1"):
        replace(NARROW, head_channels=48)


def test_the_config_survives_json():
    for config in (*SHAPES.values(), LARGE):
        assert ADMUNetConfig(**config.to_dict()) == config
    assert (LARGE.size_multiple, UNCONDITIONAL.size_multiple, replace(NARROW, patch_size=2).size_multiple) == (
        64,
        32,
        16,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [NARROW, SHAPES["several heads"], SHAPES["no attention"]])
@torch.no_grad()
def test_the_estimate_of_memory_is_what_it_holds_at_its_peak(config, dtype):
    """On a real device, so that attention counts: it must not store the matrix of all pairs of pixels."""
    network = ADMUNet(config, dtype=dtype).eval()
    x = torch.randn(1, 3, 128, 192).to(dtype)
    with PeakMemory() as memory:
        network(x, torch.zeros(1))
    assert 1 <= network.activation_bytes(128, 192, dtype) / memory.peak < 1.35
