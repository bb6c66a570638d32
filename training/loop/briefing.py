"""What a run says of itself before it begins: what it will do, with what, and what makes that unwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from restoration.devices import accelerator_available
from training.command_line.checks import leaves, value_of
from training.command_line.files import to_plain
from training.commands import COMMANDS
from training.data.pictures import DECODE_ERRORS, opened

_FOR_GPUS = 20_000_000
"""Trained parameters above which a CPU takes many seconds for a step."""
_LOOKED_AT = 200
_LEAST_QUALITY = 75
"""As `python -m training check` has it."""


def changes(command: str, config: Any) -> str:
    """A configuration in words: the preset that it is nearest to, and what differs from that."""
    found = {name: _differing(preset, config) for name, preset in COMMANDS[command].presets().items()}
    name = min(found, key=lambda key: len(found[key]))
    listed = "".join(f"\n  {option}: {value}" for option, value in found[name].items())
    return f"configuration: preset {name}{', with' if listed else ''}{listed}"


def _differing(preset: Any, config: Any) -> dict[str, Any]:
    values = {names: to_plain(value_of(config, names)) for names in leaves(config)}
    return {".".join(names): value for names, value in values.items() if value != to_plain(value_of(preset, names))}


def warnings(command: str, model: nn.Module, pictures: Sequence[Path]) -> Iterator[str]:
    """What a person should know before the first step."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained > _FOR_GPUS and not accelerator_available():
        small = [name for name in ("starter", "small") if name in COMMANDS[command].presets()]
        hint = f" --preset {small[0]} is made for one." if small else ""
        yield f"{trained:,} parameters are trained here on a CPU, which takes weeks.{hint}"
    poor, looked_at = _poor(pictures)
    if poor:
        yield (
            f"{poor} of {looked_at} JPEGs that were looked at are below quality {_LEAST_QUALITY}: what they lack is "
            f"learnt as if it were clean. python -m training check --data FOLDER names them."
        )


def _poor(pictures: Sequence[Path]) -> tuple[int, int]:
    """How many of some JPEGs have coarse tables; only their headers are read."""
    from training.check.facts import file_quality

    files = [path for path in pictures if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file()]
    poor = looked_at = 0
    for path in files[:: max(1, len(files) // _LOOKED_AT)]:
        try:
            with opened(path) as picture:
                tables = getattr(picture, "quantization", None)
        except (*DECODE_ERRORS, OSError):  # is told of when its turn comes
            continue
        if tables:
            looked_at += 1
            poor += file_quality(tables) < _LEAST_QUALITY
    return poor, looked_at
