"""Two steps of a second stage on the reduced SD 2.1, a discriminator included; as a script, for `torchrun`:
`spread_training.py NAME FOLDER FSDP` prints how many megabytes of weights the first process holds at the end.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import codiff_overfit
import numpy as np
import sodiff_overfit
from reduced_sd21 import reduced_base
from torch import nn

from training.configs.codiff import AdversarialConfig
from training.loop.session import Session


def make_config(name: str, folder: Path, *, fsdp: bool) -> Any:
    """Crops of 64 pixels, two in a batch; weights that move by 1e-3 in a step."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "patches").exists():
        codiff_overfit.make_patches(folder / "patches", np.random.default_rng(0))
    base = reduced_base().folder
    if name == "codiff":
        config: Any = codiff_overfit.tiny_config(base, folder)
        adversarial: Any = AdversarialConfig(rank=2, alpha=1.0)
    else:
        config = sodiff_overfit.tiny_config(base, folder)
        adversarial = replace(config.loss.adversarial, discriminator="sd21")
    optimizer = replace(config.optimizer, learning_rate=1e-3)
    return replace(
        config, loss=replace(config.loss, adversarial=adversarial), optimizer=optimizer, critic_optimizer=optimizer,
        run=replace(config.run, images=4, batch=2, fsdp=fsdp),
    )  # fmt: skip


def megabytes(*networks: nn.Module) -> float:
    """Of the weights that this process holds."""
    held = {id(p): p for network in networks for p in network.parameters()}.values()
    local = (p.to_local() if hasattr(p, "to_local") else p for p in held)
    return sum(value.numel() * value.element_size() for value in local) / 2**20


if __name__ == "__main__":
    name, folder, fsdp = sys.argv[1:]
    session = Session(name, make_config(name, Path(folder), fsdp=bool(int(fsdp))))
    session.train()
    if session.state.is_main_process:
        print(f"megabytes of weights: {megabytes(session.task.model, session.task.critic):.1f}")
