"""Operations of a training step of each published recipe, and the pictures a second that GPUs would take of it.

Counted from shapes, nothing is computed: forward and backward of convolutions, matrix products and attention, two
operations a multiplication with its addition. Stable Diffusion 2.1-base is there as a shape alone. From a GPU's rate on
paper and the share of it that trainings reach follows what it takes; pairs a second are measured on one core here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._common import header, processor
from benchmarks.data import bundled_folder
from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.saipe import SAIPE, SAIPEConfig
from training.commands import COMMANDS
from training.data.pictures import find_images, scan_images
from training.data.views import pairs_of, seen_side
from training.networks import base_models
from training.networks.half_unet import HalfUNet

_WHOLE = ("driftrec", "regression", "prior", "cave", "saipe", "quality")
_PEAK = 989e12
"""Dense bfloat16 rate of an H100 SXM, by its data sheet; an A100's is 312e12."""


def main(arguments: list[str]) -> None:
    """`python -m benchmarks training_flops [--peak RATE] [--share S] [--gpus N ...] [--data FOLDER]`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training_flops", description=__doc__)
    parser.add_argument("--peak", type=float, default=_PEAK, help="operations a second of one GPU on paper")
    parser.add_argument("--share", type=float, default=0.35, help="of them that a training reaches")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--data", type=Path, help="folder of pictures (default: those that scikit-image carries)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    paths = scan_images(find_images(options.data or bundled_folder()))[0]
    print(f"{processor()}: pairs a second on one core; a GPU of {options.peak / 1e12:.0f} TFLOP/s of which "
          f"{options.share:.0%} are reached")  # fmt: skip
    needed = [f"images/s for {count} GPU" + "s" * (count > 1) for count in options.gpus]
    print(header("training", "GFLOP an image", "crop", *needed, "pairs/s a core", "cores a GPU"))
    for name in (*_WHOLE, "codiff", "sodiff"):
        config = COMMANDS[name].presets()["paper"]
        parts = stage_two(name, config) if name in ("codiff", "sodiff") else {"": whole(name, config)}
        total, rate = sum(parts.values()), _pairs(paths, config)
        images = options.peak * options.share / total
        cells = [f"{images * count:,.0f}" for count in options.gpus]
        print(f"| {name} | {total / 1e9:,.0f} | {seen_side(config)} | {' | '.join(cells)} | {rate:.0f} "
              f"| {images / rate:.1f} |", flush=True)  # fmt: skip
        for part, count in parts.items() if len(parts) > 1 else ():
            print(f"| - {part} | {count / 1e9:,.0f} ({count / total:.0%}) |" + " |" * (len(options.gpus) + 3))


def whole(name: str, config: Any) -> float:
    """Operations an image of a training that has no base model."""
    changes = {"align": "none"} if name == "saipe" else {}
    task = COMMANDS[name].make_task(replace(config, **changes))
    task.model.to("meta").train()
    side = (1, 3, seen_side(config), seen_side(config))
    batch = {"clean": torch.empty(side, device="meta"), "degraded": torch.empty(side, device="meta"),
             "quality": torch.empty(1, device="meta"), "index": torch.zeros(1, dtype=torch.int64)}  # fmt: skip
    return _count(lambda: task.loss(task.model, batch, torch.Generator().manual_seed(0)))


def stage_two(name: str, config: Any) -> dict[str, float]:
    """Operations an image of a second stage on Stable Diffusion 2.1-base, by part, its discriminator SD 2.1's half."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torchvision.models import vgg16

    from tests.reduced_sd21 import FULL_UNET, VAE

    generator, crop = torch.Generator(), config.data.crop
    seer: Any = CaVE(CaVEConfig(), decoder=False) if name == "codiff" else SAIPE(SAIPEConfig())
    seer.to("meta").requires_grad_(False)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**FULL_UNET), AutoencoderKL(**VAE)  # type: ignore[arg-type]
        features = vgg16().features[:30].requires_grad_(False)
    critic = HalfUNet(unet, rank=16, alpha=16.0, generator=generator, dtype=None, gradient_checkpointing=False)
    base_models.add_lora(unet, base_models.unet_targets(unet), config.unet_lora.rank, 16.0, generator)
    vae.requires_grad_(False)
    if name == "codiff":
        base_models.add_lora(vae, base_models.vae_targets(vae), config.vae_lora.rank, 16.0, generator)
    pictures, latents = _input(3, crop), _input(4, crop // 8)
    tokens, timestep = torch.empty(1, 77, 1024, device="meta"), torch.empty(1, device="meta")

    def judged(latent: Tensor) -> Tensor:
        count = len(latent)
        return critic.judge(critic.features(latent, timestep.expand(count), tokens.expand(count, -1, -1)))

    seen = _count(lambda: features(pictures)) + _count(lambda: features(pictures), gradients=False)
    perceptual = seen * (2 if config.loss.perceptual.edges else 1)
    see = seer.encode if name == "codiff" else seer.tokens
    parts = {
        "prompt": _count(lambda: see(pictures), gradients=False),
        "VAE, encoding the JPEG": _count(lambda: vae.encode(pictures.detach()).latent_dist.mean,  # type: ignore
                                         gradients=name == "codiff"),
        "UNet": _count(lambda: unet(latents, timestep, tokens).sample),
        "VAE, decoding": _count(lambda: vae.decode(latents).sample),  # type: ignore[union-attr]
        "perceptual": perceptual,
        "discriminator, for the restorer": _frozen(critic, lambda: _count(lambda: judged(latents))),
        "discriminator, its own": _count(lambda: judged(_twice(latents))),
        "VAE, encoding the clean picture": _count(lambda: vae.encode(pictures).latent_dist.mean,  # type: ignore
                                                  gradients=False),
    }  # fmt: skip
    return parts


def _twice(latents: Tensor) -> Tensor:
    return torch.cat([latents.detach(), latents.detach()])


def _input(channels: int, side: int) -> Tensor:
    return torch.empty(1, channels, side, side, device="meta", requires_grad=True)


def _frozen(network: nn.Module, work: Callable[[], float]) -> float:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    counted = work()
    for parameter in trained:
        parameter.requires_grad_(True)
    return counted


def _count(forward: Callable[[], Tensor], *, gradients: bool = True) -> float:
    """Operations of a function, and of the way back where there are gradients."""
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
        made = forward()
        made = made[0] if isinstance(made, tuple) else made
        if gradients:
            made.sum().backward()
    return float(counter.get_total_flops())


def _pairs(paths: list[Path], config: Any, seconds: float = 4.0) -> float:
    """Training pairs a second on this core, with pictures that are decoded."""
    dataset = pairs_of(replace(config, data=replace(config.data, cache_mb=4096)), paths)
    for index in range(len(paths)):
        dataset[index]
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        dataset[len(paths) + count]
        count += 1
    return count / elapsed
