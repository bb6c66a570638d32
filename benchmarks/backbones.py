"""Shapes of the small one-step UNet, each trained for the same seconds of computing: quality for its price.

Every row sees the same crops in the same order, as many as it has time for, and learns with the same settings; it is
then measured on the middle of LIVE1's pictures. `pixels` puts the picture's pixels, unshuffled, in the place of its
DCT: the control.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._common import SHARED, centre, evaluation_pictures, heading, jpeg_of, mean, measure
from restoration.networks.dct_codec import DCTCodec
from restoration.networks.small_unet import SmallUNetConfig
from training.configs.codiff import PRESETS, CoDiffConfig
from training.data.pairs import IndexSampler, PairDataset, make_loader
from training.data.pictures import find_images
from training.loop.checkpoint import Average
from training.loop.optimizers import Learner, learning_rate
from training.trainers.small_codiff import SmallCoDiffTask

_SEEN = 64
_BATCH, _WARMUP = 2, 200  # a short training wants many steps
_ENDLESS = 10**7
_SIDE = 128


@dataclass(frozen=True)
class Row:
    """A shape: the UNet, what its latent is, and the side of the windows that self-attention stays in."""

    unet: SmallUNetConfig
    pixels: bool = False
    window: int = 0


_CHOSEN = SmallUNetConfig((160,), 2, (False,))
ROWS = {
    "one level, 160": Row(_CHOSEN),
    "one level, 160, norms of Stable Diffusion": Row(replace(_CHOSEN, norm_eps=1e-5)),
    "one level, 160, full self-attention": Row(replace(_CHOSEN, self_attention=True)),
    "one level, 160, window self-attention": Row(replace(_CHOSEN, self_attention=True), window=4),
    "one level, 160, pixels": Row(_CHOSEN, pixels=True),
    "one level, 192, 1 layer": Row(SmallUNetConfig((192,), 1, (False,))),
    "one level, 128, 2 layers": Row(SmallUNetConfig((128,), 2, (False,))),
    "one level, 128, 3 layers": Row(SmallUNetConfig((128,), 3, (False,))),
    "two levels, 160, 1 layer": Row(SmallUNetConfig((160, 160), 1, (False, False))),
    "two levels, 128, 2 layers": Row(SmallUNetConfig((128, 128), 2, (False, False))),
    "two levels, 96, 1 layer, attention in all": Row(SmallUNetConfig((96, 192), 1, (True, True))),
}


class UnshuffledPixels(DCTCodec):
    """The control: each 8x8 block as its 192 pixels, measured and scaled in the same way."""

    def encode(self, images: Tensor) -> Tensor:
        return (F.pixel_unshuffle(images.float() - 0.5, 8)) / self._divisors(images)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents.float() * self._divisors(latents), 8) + 0.5


class WindowAttention:
    """A diffusers attention processor: self-attention in square windows of a square map, cross-attention as usual."""

    def __init__(self, side: int, usual: Callable[..., Tensor]) -> None:
        self.side, self.usual = side, usual

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: object
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return self.usual(attn, hidden_states, encoder_hidden_states, **others)
        batch, positions, channels = hidden_states.shape
        count = round(positions**0.5) // self.side
        windows = hidden_states.view(batch, count, self.side, count, self.side, channels).transpose(2, 3)
        attended = self.usual(attn, windows.reshape(-1, self.side**2, channels), None, **others)
        return attended.view(batch, count, count, self.side, self.side, channels).transpose(2, 3).reshape_as(
            hidden_states
        )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print a Markdown table, a row for each shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks backbones", description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "train", help="pictures to train on")
    parser.add_argument("--cave", type=Path, help="CaVE to start from (default: a new one)")
    parser.add_argument("--seconds", type=float, default=150, help="of computing that each row is trained for")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    print(heading(options.device))
    print("| network | parameters | crops | 1024x1024 s | PSNR gain QF 10 | QF 40 |\n|---|---|---|---|---|---|")
    for name in options.rows:
        task = _make(ROWS[name], _config(options.data, options.cave, ROWS[name].unet))
        images = _train(task, options.device, options.seconds)
        gains = [_gain(task, quality, options.device) for quality in (10, 40)]
        count = sum(parameter.numel() for parameter in task.model.backbone.network.parameters())
        taken = _time(task, options.device)
        print(f"| {name} | {count:,} | {images:,} | {taken:.2f} | {gains[0]:.3f} | {gains[1]:.3f} |", flush=True)


def _config(data: Path, cave: Path | None, unet: SmallUNetConfig) -> CoDiffConfig:
    starter = PRESETS["starter"]
    return replace(
        starter,
        data=replace(starter.data, train=data, workers=1),
        cave=cave,
        unet=unet,
        optimizer=replace(starter.optimizer, warmup_images=_WARMUP),
        run=replace(starter.run, batch=_BATCH),
    )


def _make(row: Row, config: CoDiffConfig) -> SmallCoDiffTask:
    task = SmallCoDiffTask(config)
    if row.pixels:
        task.model.backbone.codec = UnshuffledPixels()
    if row.window:
        network = task.model.backbone.network
        usual = next(iter(network.attn_processors.values()))
        network.set_attn_processor(WindowAttention(row.window, usual))  # type: ignore[arg-type]
    return task


def _train(task: SmallCoDiffTask, device: str, seconds: float) -> int:
    """Trains until its steps have taken so long; the learning rate falls with the time. Returns the crops seen."""
    config = task.config
    data, batch_size = config.data, config.run.batch
    dataset = PairDataset(
        find_images(data.train), data.crop, data.degradation, seed=0, augmentation=data.augmentation, flips=True,
        rotations=True, downscale=data.downscale, cache_mb=data.cache_mb,
    )  # fmt: skip
    crops = [dataset[index] for index in range(_SEEN)]
    task.look(*(torch.stack([crop[key] for crop in crops]) for key in ("degraded", "clean")))
    task.model.to(device)
    learner, average = Learner(task.model, config.optimizer), Average(task.model, config.optimizer.ema_decay)
    generator, spent, images = torch.Generator(device=device).manual_seed(0), 0.0, 0
    rate = replace(config.optimizer, warmup_images=0)
    clock = time.process_time if device == "cpu" else time.perf_counter
    for batch in make_loader(dataset, IndexSampler(0, _ENDLESS, 0, 1, batch_size), batch_size, data.workers):
        start = clock()
        rise = min(1.0, (images + batch_size) / config.optimizer.warmup_images)
        learner.begin(rise * learning_rate(rate, round(1000 * spent), 0, round(1000 * seconds)))
        moved = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = task.loss(task.model, moved, generator)
        loss.backward()
        learner.step(None)
        average.update(task.model)
        spent, images = spent + clock() - start, images + batch_size
        if spent >= seconds:
            break
    average.swap(task.model)
    task.model.eval()
    return images


@torch.no_grad()
def _gain(task: SmallCoDiffTask, quality: int, device: str) -> float:
    """Mean PSNR over that of the JPEG, dB."""
    rows = []
    for _, picture in evaluation_pictures(None):
        clean = centre(picture, _SIDE)
        jpeg = jpeg_of(clean, quality)
        restored = task.restore(jpeg.to(device), 0).cpu()
        before, after = (measure(image, clean[None], None)["psnr"] for image in (jpeg, restored))
        rows.append({"gain": after - before})
    return mean(rows)["gain"]


@torch.no_grad()
def _time(task: SmallCoDiffTask, device: str, repeats: int = 3) -> float:
    """Seconds for one picture of 1024x1024, the least of some, in single precision."""
    picture = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        float(task.model(picture).pictures[0, 0, 0, 0])
        taken.append(time.perf_counter() - start)
    return min(taken)
