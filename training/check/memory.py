"""Whether what a training needs of memory is there: on the GPU for its steps, and for the pictures that are kept."""

from __future__ import annotations

from functools import reduce
from typing import Any

import psutil
import torch

from training.check.findings import Finding, amount
from training.commands import COMMANDS
from training.presets.figures import KNOWN, Known

_HOPELESS = 2
"""Times of what is there that no estimate is wrong by."""
_FOR_CPUS = ("starter", "small")
"""Presets that a machine without a GPU can train."""
_SHAPE = ("backbone", "network", "unet")


def check_memory(memory: int, command: str, config: Any, source: str = "") -> list[Finding]:
    """The memory that a step needs, and whether it is there.

    Args:
        memory: In bytes.
        command: That trains.
        config: Its configuration.
        source: Where the memory is known from.
    """
    gpu = torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if gpu else psutil.virtual_memory().available
    where = f"{torch.cuda.get_device_name(0)} has {amount(there)}" if gpu else _free_main_memory(there)
    text = f"memory: a step needs about {amount(memory)}{source}; {where}"
    if memory < there:
        return [Finding("note", f"{text}.")]
    text += (
        f": raise --run.accumulate (now {config.run.accumulate}; the same result with less), or lower --run.batch or "
        f"--data.crop.{'' if gpu else _smaller(command, config)}"
    )
    return [Finding("problem" if memory > _HOPELESS * there else "warning", text)]


def _smaller(command: str, config: Any) -> str:
    """What is said where there is no GPU: the preset for that, unless the network is that one's already."""
    presets = COMMANDS[command].presets()
    name = next((name for name in _FOR_CPUS if name in presets), None)
    if name is None or all(getattr(presets[name], part, None) == getattr(config, part, None) for part in _SHAPE):
        return ""
    return f" There is no GPU here: --preset {name} is meant for that."


def check_kept_pictures(config: Any, processes: int) -> list[Finding]:
    """The main memory that decoded pictures may take, which each data worker keeps for itself.

    Args:
        config: Of the training.
        processes: Training processes on this machine.
    """
    data, there = config.data, psutil.virtual_memory().available
    keepers = max(1, data.workers) * processes
    most = keepers * data.cache_mb * 2**20
    shared = f" in {processes} training processes" if processes > 1 else ""
    text = (
        f"memory of the data workers: decoded pictures of up to {amount(most)} ({data.workers} workers{shared}, "
        f"{data.cache_mb:g} MB each); {_free_main_memory(there)}"
    )
    if most < there:
        return [Finding("note", f"{text}.")]
    return [Finding("warning", f"{text}: lower --data.cache-mb or --data.workers, unless the set is smaller.")]


def _free_main_memory(there: int) -> str:
    return f"{amount(there)} of main memory are free"


def check_known_memory(command: str, config: Any) -> list[Finding]:
    """The memory of a training that adapts a base model, which is not loaded here: that of a preset whose step is as
    large, where there is one."""
    for name, preset in COMMANDS[command].presets().items():
        known = KNOWN.get((command, name), Known(""))
        if known.memory is not None and known.memory_from == "c" and _step(preset) == _step(config):
            source = f", as counted for the preset {name} (one card; CUDA adds one or two GiB)"
            return check_memory(int(known.memory * 2**30), command, config, source)
    return [
        Finding(
            "note",
            "memory: not estimated, for the base model is not loaded here, and no preset whose memory is known has a "
            f"step of this size. --dry-run of the training loads it; python -m training presets names {command}'s.",
        )
    ]


def _step(config: Any) -> list[Any]:
    """What the memory of a step on a base model depends on."""
    names = (
        "backbone", "data.crop", "run.precision", "base.dtype", "gradient_checkpointing", "optimizer.eight_bit",
        "unet_lora.rank", "vae_lora.rank", "loss.adversarial.discriminator", "loss.perceptual.kind",
    )  # fmt: skip
    step = [reduce(lambda part, key: getattr(part, key, None), name.split("."), config) for name in names]
    return [*step, config.run.batch // config.run.accumulate]
