"""Layer names and shapes of SD 2.1-shaped bases: those of diffusers' networks, and those that CODiff adapts."""

import json
import math

import pytest
import torch
from shared import shared_path
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.sd21_layers import (
    UNetLayout,
    VAELayout,
    codiff_unet_targets,
    codiff_vae_targets,
    lora_shapes,
    unet_layers,
    vae_encoder_layers,
)

SMALL_UNET = UNetLayout(in_channels=5, out_channels=3, block_out_channels=(32, 64, 64), layers_per_block=1,
                        attention=(False, True, False), cross_attention_dim=24)  # fmt: skip
SMALL_VAE = VAELayout(in_channels=1, latent_channels=3, block_out_channels=(32, 64), layers_per_block=3)
HEADS = (5, 10, 20, 20)


def diffusers_unet(layout):
    diffusers = pytest.importorskip("diffusers")
    names = ["CrossAttn{}Block2D" if attention else "{}Block2D" for attention in layout.attention]
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            in_channels=layout.in_channels, out_channels=layout.out_channels,
            block_out_channels=layout.block_out_channels, layers_per_block=layout.layers_per_block,
            down_block_types=[name.format("Down") for name in names],
            up_block_types=[name.format("Up") for name in reversed(names)],
            cross_attention_dim=layout.cross_attention_dim, use_linear_projection=True,
            attention_head_dim=HEADS if len(layout.attention) == 4 else 4,
        ).eval()  # fmt: skip


def diffusers_vae(layout):
    diffusers = pytest.importorskip("diffusers")
    levels = len(layout.block_out_channels)
    with torch.device("meta"):
        return diffusers.AutoencoderKL(
            in_channels=layout.in_channels, out_channels=layout.in_channels, latent_channels=layout.latent_channels,
            block_out_channels=layout.block_out_channels, layers_per_block=layout.layers_per_block,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        ).eval()  # fmt: skip


def shapes(network):
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    return {name: tuple(module.weight.shape) for name, module in layers.items()}


def of_the_encoder(layers):
    return {name: shape for name, shape in layers.items() if name.startswith(("encoder.", "quant_conv"))}


@pytest.fixture(scope="module")
def unet():
    return diffusers_unet(UNetLayout())


@pytest.fixture(scope="module")
def vae():
    return diffusers_vae(VAELayout())


def test_the_unet_has_diffusers_names_and_shapes(unet):
    assert unet_layers() == shapes(unet)
    assert unet_layers(SMALL_UNET) == shapes(diffusers_unet(SMALL_UNET))


def test_the_vae_encoder_has_diffusers_names_and_shapes(vae):
    assert vae_encoder_layers() == of_the_encoder(shapes(vae))
    assert vae_encoder_layers(SMALL_VAE) == of_the_encoder(shapes(diffusers_vae(SMALL_VAE)))


def test_codiff_adapts_everything_but_the_time_embedding():
    assert len(codiff_unet_targets()) == 258
    left_out = unet_layers().keys() - codiff_unet_targets().keys()
    assert len(left_out) == 2 + 22
    assert all(name.startswith("time_embedding.linear_") or name.endswith(".time_emb_proj") for name in left_out)
    assert len(codiff_vae_targets()) == 32


def test_codiff_adapts_exactly_the_modules_of_the_published_list():
    published = json.loads(shared_path("facts", "keys", "lora.json").read_text())
    for part, targets, lists in (
        ("unet", codiff_unet_targets(), ("le", "ld", "lo")),
        ("vae", codiff_vae_targets(), ("lvraw",)),
    ):
        assert set(targets) == {name for key in lists for name in published[key]}
        expected = {}
        for name, shape in targets.items():
            expected[f"{name}.lora_A"], expected[f"{name}.lora_B"] = lora_shapes(shape, 16)
        actual = {name.rsplit(".", 2)[0]: tuple(shape) for name, shape in published[part]}
        assert actual == expected


def test_lora_shapes_are_pefts():
    peft = pytest.importorskip("peft")
    network = nn.ModuleDict({"linear": nn.Linear(12, 20), "conv": nn.Conv2d(6, 10, 3), "point": nn.Conv2d(6, 10, 1)})
    targets = {name: tuple(module.weight.shape) for name, module in network.items()}
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=list(targets)), network)
    state = {key: tuple(value.shape) for key, value in wrapped.state_dict().items() if ".lora_" in key}
    assert len(state) == 6
    for name, shape in targets.items():
        actual = tuple(state[f"{name}.lora_{part}.default.weight"] for part in "AB")
        assert actual == lora_shapes(shape, 4)


@pytest.mark.parametrize(
    "make",
    [lambda: UNetLayout(attention=(True,)), lambda: UNetLayout(layers_per_block=0),
     lambda: VAELayout(block_out_channels=())],
)  # fmt: skip
def test_a_layout_that_describes_no_network_is_refused(make):
    with pytest.raises(ValueError, match="for each level"):
        make()


# --- the figures of the paper -----------------------------------------------------------------------------------------


def lora_parameters(targets, rank=16):
    return sum(math.prod(shape) for weight in targets.values() for shape in lora_shapes(weight, rank))


def parameters(network, prefixes=("",)):
    return sum(value.numel() for name, value in network.named_parameters() if name.startswith(prefixes))


def test_the_parameter_counts_are_the_measured_ones(unet, vae):
    cave = CaVE(CaVEConfig(), device="meta")
    encoder = parameters(cave, ("m_head", "m_down", "m_body_encoder"))
    assert (parameters(cave), encoder, parameters(cave, ("qf_pred",))) == (74_887_428, 27_739_776, 19_408_385)
    assert lora_parameters(codiff_unet_targets()) == 16_222_848
    assert lora_parameters(codiff_vae_targets()) == 1_477_424
    assert (parameters(unet), parameters(vae)) == (865_910_724, 83_653_863)
    projection = 512 * 1024 + 1024
    adapters = 16_222_848 + 1_477_424 + projection
    assert parameters(unet) + parameters(vae) + encoder + adapters == 995_529_947


def tera_macs(function):
    """Multiplications of convolutions, matrix products and attention, in units of 10^12."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2e12


def empty(*size):
    return torch.empty(size, device="meta")


def test_an_image_of_1024_pixels_costs_the_published_work(unet, vae):
    image, latent, timestep = empty(1, 3, 1024, 1024), empty(1, 4, 128, 128), torch.tensor(499)
    cave = CaVE(CaVEConfig(), device="meta").eval()
    assert f"{tera_macs(lambda: vae.encode(image)):.2f}" == "2.44"
    assert f"{tera_macs(lambda: vae.decode(latent)):.2f}" == "5.24"
    assert f"{tera_macs(lambda: unet(latent, timestep, empty(1, 1024, 1024))):.2f}" == "2.45"
    assert f"{tera_macs(lambda: unet(latent, timestep, empty(1, 77, 1024))):.2f}" == "2.34"
    assert f"{tera_macs(lambda: cave.encode(image)):.3f}" == "0.736"
    assert f"{tera_macs(lambda: cave(image)):.2f}" == "1.49"
