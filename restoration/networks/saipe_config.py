"""The shape of SAIPE, and the bounds of what is built from a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SHRINK, PATCH = 4, 8
"""Pixels along each side of a position of the map, and positions that are fused to one."""
MULTIPLE = SHRINK * PATCH
"""Pixels along each side of a position of the map that the prompt is pooled from."""
_RESOLUTIONS = ("resize", "native")
_RANGES = {
    "dim": (3, 512), "heads": (1, 64), "window": (2, 32), "mlp_ratio": (1, 8), "drop_path": (0, 0.9),
    "performer_depth": (1, 16), "performer_heads": (1, 32), "performer_dim_head": (1, 256), "features": (1, 4096),
    "performer_mult": (1, 8), "context_dim": (1, 4096), "tokens": (1, 1024), "pool_heads": (1, 64),
    "image_side": (MULTIPLE, 1024),
}  # fmt: skip
"""Bounds of a configuration, which may come from a file of anybody's."""
_MOST_BLOCKS, _MOST_LAYERS, _MOST_WEIGHTS = 8, 24, 500_000_000


@dataclass(frozen=True)
class SAIPEConfig:
    """Everything that is needed to rebuild the network.

    Args:
        dim: Channels of the Swin transformer and width of the Performer.
        down_depths: Layers of each residual Swin block of the encoder.
        up_depths: Of the decoder; the paper says fewer, and no number.
        heads: Attention heads of the Swin transformer.
        window: Side of its windows, in positions of 4 pixels.
        mlp_ratio: Width of its feed-forward layers in units of `dim`.
        drop_path: How often training leaves out a branch of its last layer; of the others less, down to never.
        performer_depth: Layers of the Performer.
        performer_heads: Its heads.
        performer_dim_head: Width of each.
        performer_mult: Width of its feed-forward layers in units of `dim`.
        features: Random features of each of its layers, d ln(d) of the width of a head.
        context_dim: Width of the tokens.
        tokens: Their number.
        pool_heads: Heads of the attention that pools them.
        resolution: What pictures of another size than `image_side` are: "resize" stretches them to that square, as the
            group does; "native" keeps their size and interpolates the learned positions.
        image_side: Pixels along each side of the pictures that the positions are learned for.
    """

    dim: int = 180
    down_depths: tuple[int, ...] = (6, 6)
    up_depths: tuple[int, ...] = (4, 4)
    heads: int = 6
    window: int = 8
    mlp_ratio: float = 2.0
    drop_path: float = 0.1
    performer_depth: int = 4
    performer_heads: int = 6
    performer_dim_head: int = 128
    performer_mult: int = 4
    features: int = 621
    context_dim: int = 1024
    tokens: int = 77
    pool_heads: int = 8
    resolution: str = "resize"
    image_side: int = 512

    def __post_init__(self) -> None:
        for name in ("down_depths", "up_depths"):
            depths = getattr(self, name)
            if not isinstance(depths, list | tuple) or not 1 <= len(depths) <= _MOST_BLOCKS or not all(
                _is_number(depth, int) and 1 <= depth <= _MOST_LAYERS for depth in depths
            ):  # fmt: skip
                raise ValueError(
                    f"SAIPE: expected {name} of 1 to {_MOST_BLOCKS} blocks, each of 1 to {_MOST_LAYERS} layers, got "
                    f"{depths!r}."
                )
            object.__setattr__(self, name, tuple(depths))
        for name, (least, most) in _RANGES.items():
            value, whole = getattr(self, name), name not in ("mlp_ratio", "drop_path")
            if not _is_number(value, int if whole else (int, float)) or not least <= value <= most:
                raise ValueError(f"SAIPE: expected {name} from {least} to {most}, got {value!r}.")
        for name, unit in (("dim", self.heads), ("context_dim", self.pool_heads), ("image_side", MULTIPLE)):
            if getattr(self, name) % unit:
                raise ValueError(f"SAIPE: expected {name} to be a multiple of {unit}, got {getattr(self, name)}.")
        if self.resolution not in _RESOLUTIONS:
            raise ValueError(f"SAIPE: expected a resolution of {' or '.join(_RESOLUTIONS)}, got {self.resolution!r}.")

        if self._weights() > _MOST_WEIGHTS:
            raise ValueError(
                f"SAIPE: expected at most {_MOST_WEIGHTS:,} weights, got about {self._weights():,}: {self}."
            )

    def _weights(self) -> int:
        """About how many there are, by the largest layers."""
        swin = sum(self.down_depths + self.up_depths) * (4 + 2 * self.mlp_ratio) * self.dim**2
        inner = self.performer_heads * self.performer_dim_head
        performer = self.performer_depth * (4 * self.dim * inner + 2 * self.performer_mult * self.dim**2)
        positions = 2 * self.dim * (self.image_side // SHRINK) ** 2
        pooling = self.context_dim * (self.dim * PATCH**2 + 4 * self.context_dim + self.tokens)
        return round(swin + performer + positions + pooling)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _is_number(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
