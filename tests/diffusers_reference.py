"""One step by diffusers with peft: what One-Step Denoise must equal, written down independently."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from restoration.restorer_file import RestorerFile


def adapted(module: nn.Module, names: list[str], file: RestorerFile, part: str) -> nn.Module:
    """A diffusers network with a restorer's LoRA, by peft."""
    lora = file.metadata.config[part]
    config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=names)
    module = inject_adapter_in_model(config, module)
    outcome = set_peft_model_state_dict(module, file.part(part))
    assert not outcome.unexpected_keys
    return module.eval()


def schedule_at(timesteps: list[float]) -> Tensor:
    """abar of diffusers' schedule, interpolated by numpy in the log signal-to-noise ratio; float64 (B, 1, 1, 1)."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    abar = scheduler.alphas_cumprod.double().numpy()
    log_snr = np.interp(timesteps, np.arange(1000), np.log(abar / (1 - abar)))
    return torch.from_numpy(1 / (1 + np.exp(-log_snr))).view(-1, 1, 1, 1)


@torch.no_grad()
def one_step(unet: nn.Module, latent: Tensor, prompt: Tensor, timesteps: list[float]) -> Tensor:
    """x0 of a latent (B, 4, h, w) that the VAE encoded, by a UNet of diffusers; computed in float64 around it."""
    z = latent * 0.18215
    eps = unet(z, torch.tensor(timesteps), encoder_hidden_states=prompt).sample
    abar = schedule_at(timesteps)
    return (((z.double() - (1 - abar).sqrt() * eps.double()) / abar.sqrt()) / 0.18215).float()
