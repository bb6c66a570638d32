"""DDPM's UNet: the published keys, shapes and parameter counts, and the outputs of diffusers' equivalent."""

import math

import pytest
import torch
from prior_networks import NARROW_DDPM, diffusers_ddpm, randomized
from test_cave import PeakMemory

from restoration.importers._unet2d import DiffusersNames
from restoration.networks.ddpm_unet import DDPMUNet, DDPMUNetConfig, timestep_embedding

PUBLISHED = DDPMUNetConfig()
SHAPES = [
    NARROW_DDPM,
    DDPMUNetConfig(width=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(0,)),
    DDPMUNetConfig(width=64, channel_multipliers=(1, 1.5, 1), res_blocks=3, attention_levels=()),
    DDPMUNetConfig(width=32, channel_multipliers=(1,), attention_levels=(0,)),
]


def pair(config, seed=0):
    reference = randomized(diffusers_ddpm(config), seed)
    network = DDPMUNet(config).eval()
    network.load_state_dict(DiffusersNames.of(config).converted(reference.state_dict()))
    return network, reference


def test_the_published_network_has_the_published_tensors():
    """450 tensors and 113,673,219 parameters (the paper's 113.7 million), at the names of the published file."""
    state = DDPMUNet(PUBLISHED, device="meta").state_dict()
    assert len(state) == 450
    assert sum(value.numel() for value in state.values()) == 113_673_219
    some = {
        "temb.dense.0.weight": (512, 128), "temb.dense.1.bias": (512,), "conv_in.weight": (128, 3, 3, 3),
        "down.0.block.1.norm1.weight": (128,), "down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "down.4.block.0.temb_proj.weight": (512, 512), "down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "down.4.downsample.conv.weight": (512, 512, 3, 3), "mid.block_1.conv2.weight": (512, 512, 3, 3),
        "mid.attn_1.q.weight": (512, 512, 1, 1), "mid.block_2.norm2.bias": (512,),
        "up.5.block.2.conv1.weight": (512, 1024, 3, 3), "up.4.attn.2.norm.weight": (512,),
        "up.4.block.2.conv1.weight": (512, 768, 3, 3), "up.1.upsample.conv.bias": (128,),
        "up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1), "norm_out.weight": (128,),
        "conv_out.weight": (3, 128, 3, 3),
    }  # fmt: skip
    assert {key: tuple(state[key].shape) for key in some} == some
    assert not any(key.startswith(("down.5.downsample", "up.0.upsample", "down.3.attn")) for key in state)


def test_diffusers_counts_the_same():
    with torch.device("meta"):
        reference = diffusers_ddpm(PUBLISHED)
    shapes = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert DiffusersNames.of(PUBLISHED).expected() == shapes


@pytest.mark.parametrize("config", SHAPES, ids=["narrow", "attention above", "without attention", "one level"])
@torch.no_grad()
def test_outputs_equal_diffusers(config):
    network, reference = pair(config)
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 987])
    expected = reference(x, timesteps).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(network(x, timesteps), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_the_timestep_and_every_weight_count():
    network, _ = pair(SHAPES[1])
    x, one = torch.randn(1, 3, 16, 16), torch.tensor([1.0])
    before = network(x, one)
    assert not torch.allclose(before, network(x, one + 100))
    for name, parameter in network.named_parameters():
        if name.endswith(".k.bias"):
            continue  # a constant added to every key cancels in the softmax
        kept = parameter.clone()
        parameter.mul_(1.5)
        assert not torch.equal(before, network(x, one)), name
        parameter.copy_(kept)


def test_the_embedding_is_the_papers():
    """Sines before cosines, and the lowest frequency is 1/10000 (half - 1 steps), unlike guided diffusion's."""
    embedded = timestep_embedding(torch.tensor([3.0, 10000.0]), 8)
    frequencies = torch.tensor([1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])
    torch.testing.assert_close(embedded[0], torch.cat([(3 * frequencies).sin(), (3 * frequencies).cos()]))
    expected = torch.tensor([math.sin(1), math.cos(1)])
    torch.testing.assert_close(embedded[1, [3, 7]], expected, atol=1e-3, rtol=0)


def test_wrong_shapes_and_inputs_are_explained():
    with pytest.raises(ValueError, match="channels that 32 groups divide, got 48"):
        DDPMUNetConfig(width=32, channel_multipliers=(1, 1.5))
    with pytest.raises(ValueError, match=r"attention at levels 0 to 1, got \(2,\)"):
        DDPMUNetConfig(channel_multipliers=(1, 1), attention_levels=(2,))
    with pytest.raises(ValueError, match="expected a level"):
        DDPMUNetConfig(channel_multipliers=())
    network = DDPMUNet(NARROW_DDPM, device="meta")
    with pytest.raises(ValueError, match=r"multiples of 16, got \(40, 32\)"):
        network(torch.empty(1, 3, 40, 32, device="meta"), torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="not told a class"):
        network(torch.empty(1, 3, 32, 32, device="meta"), torch.zeros(1), torch.zeros(1))


def test_the_config_survives_json():
    assert DDPMUNetConfig(**NARROW_DDPM.to_dict()) == NARROW_DDPM
    assert "classes" not in NARROW_DDPM.to_dict()
    assert (PUBLISHED.classes, PUBLISHED.size_multiple, PUBLISHED.image_size) == (0, 32, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_finite_and_near(dtype):
    network, _ = pair(NARROW_DDPM)
    low = DDPMUNet(NARROW_DDPM, dtype=dtype).eval()
    low.load_state_dict(network.state_dict())
    x, timesteps = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([300])
    expected, actual = network(x, timesteps), low(x.to(dtype), timesteps)
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SHAPES[:3], ids=["narrow", "attention above", "without attention"])
@torch.no_grad()
def test_the_estimate_of_memory_is_what_it_holds_at_its_peak(config, dtype):
    """On a real device, so that attention counts; 128 x 192 in full attention would store 24576^2 pairs."""
    network = DDPMUNet(config, dtype=dtype).eval()
    size = (64, 96) if 0 in config.attention_levels else (128, 192)
    x = torch.randn(1, 3, *size).to(dtype)
    with PeakMemory() as memory:
        network(x, torch.zeros(1))
    assert 1 <= network.activation_bytes(*size, dtype) / memory.peak < 1.1
