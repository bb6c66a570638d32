"""The part of a restorer file that adapts a base model: low-rank changes (LoRA) of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .restorer_file import RestorerFile, RestorerFileError

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes of a network's layers: W + alpha / rank * B A (Hu et al. 2022, section 4.1).

    Args:
        layers: Name of each layer, as diffusers names it, to A (rank, in, ...) and B (out, rank, ...).
        rank: Of all of them.
        alpha: The scale, times the rank.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float

    def delta(self, name: str) -> Tensor:
        """What is added to the weight of a layer, in its shape (out, in) or (out, in, height, width)."""
        down, up = self.layers[name]
        flat = up.float().flatten(1) @ down.float().flatten(1)
        return (flat * (self.alpha / self.rank)).view(up.shape[0], *down.shape[1:])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight that a layer must have."""
        down, up = self.layers[name]
        return (up.shape[0], *down.shape[1:])


def read_lora(file: RestorerFile, part: str) -> LoRA:
    """The LoRA that a file holds under `part` (`unet_lora` or `vae_lora`).

    Raises:
        RestorerFileError: Its description or its tensors are incomplete, or do not agree.
    """
    rank, alpha = _rank_and_alpha(file.metadata.config.get(part), file.name, part)
    tensors = file.part(part)
    names = sorted({key.removesuffix(_DOWN).removesuffix(_UP) for key in tensors})
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        down, up = tensors.get(name + _DOWN), tensors.get(name + _UP)
        if down is None or up is None or not _agree(down, up, rank):
            raise RestorerFileError(
                f"{file.name}: expected {part}.{name} to have matrices A and B of rank {rank}, got "
                f"{_shape(down)} and {_shape(up)}. Export or download the file again."
            )
        layers[name] = (down, up)
    if not layers:
        raise RestorerFileError(f"{file.name}: its part {part} is empty. Export or download the file again.")
    return LoRA(layers, rank, alpha)


def _rank_and_alpha(config: Any, name: str, part: str) -> tuple[int, float]:
    rank, alpha = (config.get("rank"), config.get("alpha")) if isinstance(config, dict) else (None, None)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise RestorerFileError(
            f"{name}: expected its description to give rank and alpha of {part}, got {config!r}. Export the file again."
        )
    return rank, float(alpha)


def _agree(down: Tensor, up: Tensor, rank: int) -> bool:
    sizes = down.dim() == up.dim() and down.dim() in (2, 4) and down.shape[0] == rank == up.shape[1]
    return sizes and all(side == 1 for side in up.shape[2:])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
