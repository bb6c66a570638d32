"""Every training small enough to be repeated many times, on a few pictures that are made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import test_training_prior
import test_training_quality
import test_training_saipe
import test_training_small
import torch
from PIL import Image
from tiny_text_encoder import write_text_encoder

from restoration.networks.cave import CaVEConfig
from training.commands import COMMANDS
from training.configs.cave import PRESETS as CAVE
from training.configs.common import RunConfig, ValidationConfig
from training.configs.prior import PRESETS as PRIOR
from training.configs.quality import PRESETS as QUALITY
from training.configs.saipe import TextEncoderConfig
from training.configs.sodiff import PromptedAdversarialConfig
from training.loop.checkpoint import read_checkpoint

BATCH, STEPS = 4, 10
RUN = {"images": BATCH * STEPS, "batch": BATCH, "checkpoint_every": 2 * BATCH, "keep_every": 6 * BATCH, "keep": 1}
VALIDATION = ValidationConfig(every=4 * BATCH, images=1, crop=32, qualities=(10,))


def prepare(folder: Path) -> None:
    """Pictures with captions, and what makes text states of them."""
    write_pictures(folder)
    test_training_saipe.caption_crops(folder / "pictures")
    write_text_encoder(folder / "text")


def write_pictures(folder: Path) -> None:
    """Three of them, in `pictures`."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        small = Image.fromarray(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8))
        small.resize((100, 80), Image.Resampling.BICUBIC).save(pictures / f"{number}.png")


def _shared(config: Any, folder: Path, output: Path, crop: int, **data: Any) -> Any:
    """The settings that are the same in all of them."""
    return replace(
        config,
        data=replace(config.data, train=folder / "pictures", crop=crop, **{"workers": 0, **data}),
        validation=VALIDATION,
        run=RunConfig(output=output, **RUN),
    )


def _driftrec(command: str, folder: Path, output: Path, workers: int) -> Any:
    config: Any = COMMANDS[command].presets()["starter"]
    network = replace(config.network, width=8, channel_multipliers=(1, 1), res_blocks=1)
    optimizer = replace(config.optimizer, warmup_images=8)
    return _shared(replace(config, network=network, optimizer=optimizer), folder, output, 16, workers=workers)


def _cave(folder: Path, output: Path) -> Any:
    config = replace(CAVE["small"], network=CaVEConfig(widths=(4, 4, 8, 8), blocks=1), sides=())
    return replace(_shared(config, folder, output, 64), sides=(32, 64))


def _saipe(folder: Path, output: Path) -> Any:
    encoder = TextEncoderConfig(str(folder / "text"), folder / "states")
    config = test_training_saipe.config(folder / "pictures", encoder, redraw_every=3)
    return _shared(config, folder, output, 32)


def _codiff(folder: Path, output: Path) -> Any:
    return _shared(test_training_small.codiff(_beside(folder)), folder, output, 32)


def _beside(folder: Path) -> Path:
    """Where the pictures go that those configurations bring."""
    beside = folder / "unused"
    beside.mkdir(exist_ok=True)
    return beside


def _sodiff(folder: Path, output: Path) -> Any:
    config = test_training_small.sodiff(_beside(folder))
    config = replace(config, loss=replace(config.loss, adversarial=PromptedAdversarialConfig("dct")))
    return _shared(config, folder, output, 64)


TRAININGS: dict[str, Callable[[Path, Path], Any]] = {
    "driftrec": lambda folder, output: _driftrec("driftrec", folder, output, workers=1),
    "regression": lambda folder, output: _driftrec("regression", folder, output, workers=0),
    "quality": lambda folder, output: _shared(
        replace(
            QUALITY["starter"], network=test_training_quality.SMALL, view=replace(QUALITY["starter"].view, side=40)
        ),
        folder, output, 64,
    ),
    "cave": _cave,
    "saipe": _saipe,
    "codiff": _codiff,
    "sodiff": _sodiff,
    "prior": lambda folder, output: _shared(
        replace(PRIOR["starter"], network=test_training_prior.SMALL, any_size=False), folder, output, 16
    ),
}  # fmt: skip
"""Command -> its configuration, of the folder that `prepare` filled and the folder of the run."""


def tiny(folder: Path, output: Path, name: str = "regression", **run: Any) -> Any:
    """Ten steps of four images; validated after 16 and 32 of them, saved after 8, 16, ..."""
    config = TRAININGS[name](folder, output)
    return replace(config, run=replace(config.run, **{"keep_every": 0, **run}))


def weights(output: Path) -> dict[str, torch.Tensor]:
    """What is trained and its average, of the checkpoint of a run."""
    state = read_checkpoint(output / "checkpoint.pt")
    return {**state["model"], **{f"average.{key}": value for key, value in state["average"]["values"].items()}}


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights to the bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stats(output: Path) -> list[dict[str, float]]:
    """The figures that a run wrote, line by line."""
    return [json.loads(line) for line in (output / "stats.jsonl").read_text().splitlines()]
