"""SDXL's UNet is read from diffusers' layout, and nothing else is taken for it."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.reduced_sdxl import FULL_SDXL, write_sdxl
from training.networks.base_models import BaseModelError, load_sdxl_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def describe(folder, **changes):
    """Other values in the description, which is all that is left of the folder's `unet`."""
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (folder / "unet" / WEIGHTS).unlink()


def test_the_description_of_the_tests_is_sdxls():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SDXL)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert unet.add_embedding.linear_1.in_features == 1280 + 6 * 256


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_folder_with_unet_is_enough_and_gives_its_weights_in_float32_frozen(stored, tmp_path):
    write_sdxl(tmp_path).to(stored).save_pretrained(tmp_path / "unet")
    expected = load_file(tmp_path / "unet" / WEIGHTS)
    assert {value.dtype for value in expected.values()} == {stored}
    unet = load_sdxl_unet(str(tmp_path))
    assert unet.config.addition_embed_type == "text_time"
    assert unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key].float()) for key, value in unet.state_dict().items())
    assert {(p.dtype, p.requires_grad) for p in unet.parameters()} == {(torch.float32, False)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "in_channels 9, not 4"),  # for inpainting
        ({"addition_embed_type": None}, "addition_embed_type None, not 'text_time'"),  # SD 2.1
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep', not None"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type 'text_proj', not None"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type 'UNetMidBlock2D', not 'UNetMidBlock2DCrossAttn'"),
        (  # the refiner
            {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]},
            "down_block_types .*'DownBlock2D'., not .*'CrossAttnDownBlock2D'.",
        ),
    ],
)
def test_another_model_is_refused_by_its_description_before_its_weights_are_read(changes, message, tmp_path):
    write_sdxl(tmp_path)
    describe(tmp_path, **changes)
    with pytest.raises(BaseModelError, match=rf"its unet is not that of SDXL .{message}.*--loss\.adversarial\.sdxl"):
        load_sdxl_unet(str(tmp_path))


def test_what_is_missing_or_incomplete_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"neither a folder .* stabilityai/stable-diffusion-xl-base-1\.0 .* sd21"):
        load_sdxl_unet("nobody/no-such-model")
    with pytest.raises(BaseModelError, match=r"holds no unet of SDXL .*sdxl a folder in diffusers' layout"):
        load_sdxl_unet(str(tmp_path))
    write_sdxl(tmp_path)
    weights = tmp_path / "unet" / WEIGHTS
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if key != "add_embedding.linear_1.bias"}, weights)
    with pytest.raises(BaseModelError, match=r"holds no unet .*its weights lack add_embedding.linear_1.bias"):
        load_sdxl_unet(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(BaseModelError, match=r"holds no unet of SDXL that can be read"):
        load_sdxl_unet(str(tmp_path))
