"""SD 2.1-base with a restorer's changes in its weights, against the same changes beside the weights, by peft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from restoration.diffusion.one_step import alphas_cumprod_sd
from restoration.restorer_file import RestorerFileError, read_restorer
from tests.reduced_sd21 import reduced_base, write_codiff, write_sodiff
from tests.restore_folders import cut, levels, restore, save
from training.networks.base_models import BaseModelError, add_lora, lora_layers
from training.restore.adapted_base import load_adapted_base

CPU = torch.device("cpu")


def peft_network(kind, part: str, file) -> torch.nn.Module:
    """diffusers' network as it is stored, with the file's low-rank changes as adapters of their own."""
    network = kind.from_pretrained(reduced_base().folder, subfolder="vae" if kind is AutoencoderKL else "unet")
    tensors, scale = file.part(part), file.metadata.config[part]
    names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    add_lora(network, names, scale["rank"], scale["alpha"], torch.Generator().manual_seed(0))
    for name, down, up in lora_layers(network):
        down.data.copy_(tensors[f"{name}.lora_A.weight"])
        up.data.copy_(tensors[f"{name}.lora_B.weight"])
    return network.eval()


@torch.no_grad()
def test_codiff_encodes_denoises_and_decodes_as_peft_does(tmp_path: Path) -> None:
    file = read_restorer(write_codiff(tmp_path / "codiff.safetensors"))
    adapted = load_adapted_base(file, str(reduced_base().folder), CPU, torch.float32)
    vae, unet = peft_network(AutoencoderKL, "vae_lora", file), peft_network(UNet2DConditionModel, "unet_lora", file)
    for name, value in file.part("unet.conv_in").items():
        getattr(unet.conv_in.base_layer, name).copy_(value)
    generator = torch.Generator().manual_seed(0)
    image, tokens = torch.rand((1, 3, 32, 48), generator=generator), torch.randn((1, 3, 1024), generator=generator)

    latent = 0.18215 * vae.encode(2 * image - 1).latent_dist.mode()
    torch.testing.assert_close(adapted.encode(image), latent, rtol=0, atol=1e-4)
    noise = unet(latent, 499, tokens).sample
    abar = alphas_cumprod_sd()[499].item()
    clean = (latent - (1 - abar) ** 0.5 * noise) / abar**0.5
    found = adapted.denoise(latent, tokens, torch.tensor([499.0]))
    assert (clean - latent).std() > 0.1
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-4 * float(clean.abs().max()))
    decoded = (vae.decode(clean / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(adapted.decode(clean), decoded, rtol=0, atol=1e-3)


@pytest.mark.parametrize("write", [write_codiff, write_sodiff])
def test_the_command_restores_with_adapters_of_sd21(write, tmp_path: Path) -> None:
    restorer, jpeg = write(tmp_path / "adapter.safetensors"), save(tmp_path / "a.jpg", cut(72, 64))
    with pytest.raises(ValueError, match=r"give --base the folder of Stable Diffusion 2\.1-base"):
        restore(jpeg, tmp_path / "b.png", restorer)
    options = ["--base", str(reduced_base().folder), "--no-consistency"]
    assert restore(jpeg, tmp_path / "b.png", restorer, *options) == 0
    found = levels(tmp_path / "b.png")
    assert found.shape == (64, 72, 3) and np.abs(found.astype(int) - levels(jpeg)).mean() > 5


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = read_restorer(write_codiff(tmp_path / "codiff.safetensors"))
    with pytest.raises(BaseModelError, match=r"Give --base a folder"):
        load_adapted_base(file, str(tmp_path), CPU, torch.float32)
    name = "unet_lora.mid_block.resnets.0.conv1"
    for side in ("A", "B"):
        file.tensors[f"{name}9.lora_{side}.weight"] = file.tensors.pop(f"{name}.lora_{side}.weight")
    with pytest.raises(RestorerFileError, match=r"expected mid_block\.resnets\.0\.conv19 of the base model"):
        load_adapted_base(file, str(reduced_base().folder), CPU, torch.float32)
