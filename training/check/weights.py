"""Whether the files and models that a configuration names are at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.check.findings import Finding

_WRITTEN = ("run.output", "text_encoder.cache", "data.train", "data.validation")
"""Paths that a training makes, and those that are looked at as pictures."""


def check_weights(config: Any) -> list[Finding]:
    """What is missing of the files and the pretrained models that a configuration names."""
    findings = [
        Finding("problem", f"{name}: there is no {path}. Correct the path, or get the file.")
        for name, path in _paths(config)
        if name not in _WRITTEN and not path.exists()
    ]
    findings += [Finding("problem", text) for text in _unsaid(config)]
    for name, path, parts in _pretrained(config):
        findings += _folder(name, path, parts) if Path(path).is_dir() else _hub(name, path, parts)
    return findings


def adapts_base(config: Any) -> bool:
    """Whether a base model of several GB is adapted, which is not loaded only to look at it."""
    return getattr(config, "backbone", None) == "sd2.1-base"


def _paths(config: Any, above: str = "") -> Iterator[tuple[str, Path]]:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{above}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{name}.")
        elif isinstance(value, Path):
            yield name, value


def _pretrained(config: Any) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Option, folder or name on the hub, and the parts that are needed of it."""
    if adapts_base(config):
        yield "base.path", config.base.path, ("unet", "vae", "scheduler")
        if config.loss.adversarial.discriminator == "sdxl":
            yield "loss.adversarial.sdxl", config.loss.adversarial.sdxl, ("unet",)
    if getattr(config, "align", None) == "text":
        yield "text_encoder.path", config.text_encoder.path, ("text_encoder", "tokenizer")


def _unsaid(config: Any) -> Iterator[str]:
    """What is needed to adapt a base model and was not given; its trainer says so only after it has loaded the base."""
    if not adapts_base(config):
        return
    for name in ("cave", "saipe"):
        if getattr(config, name, "") is None:
            yield f"{name}: no first stage is given. Train one (python -m training {name}), and give --{name} its file."
    perceptual = config.loss.perceptual
    if perceptual.kind != "none" and getattr(perceptual, perceptual.kind) is None:
        yield (
            f"loss.perceptual.{perceptual.kind}: no weights of {perceptual.kind.upper()} are given. Give "
            f"--loss.perceptual.{perceptual.kind} their file, or --loss.perceptual.kind none."
        )


def _folder(name: str, path: str, parts: tuple[str, ...]) -> list[Finding]:
    missing = [part for part in parts if not (Path(path) / part).is_dir()]
    missing += [
        f"the .safetensors of {part}"
        for part in parts
        if part not in ("scheduler", "tokenizer", *missing) and not any((Path(path) / part).glob("*.safetensors"))
    ]
    if not missing:
        return []
    text = f"{name}: {path} lacks {', '.join(missing)}. Give a folder in diffusers' layout with {', '.join(parts)}."
    return [Finding("problem", text)]


def _hub(name: str, path: str, parts: tuple[str, ...]) -> list[Finding]:
    """Whether a model is in the cache of the hub's library; nothing is asked of the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    files = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    try:
        absent = [
            part
            for part in parts
            if not isinstance(try_to_load_from_cache(path, f"{part}/{files.get(part, 'config.json')}"), str)
        ]
    except HFValidationError:
        text = f"{name}: {path} is neither a folder nor the name of a model on the Hugging Face hub. Correct it."
        return [Finding("problem", text)]
    if not absent:
        return []
    text = (
        f"{name}: {path} is no folder, and not in the cache of the Hugging Face hub ({', '.join(absent)}): it will be "
        f"downloaded, several GB. To do that before: hf download {path}."
    )
    return [Finding("warning", text)]
