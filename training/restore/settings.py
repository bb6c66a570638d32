"""How `python -m training restore` restores: the options that say it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro

Sampler = Literal["ode_2m", "sde_2m", "ode_1", "sde_1", "euler_maruyama", "euler_heun", "rk45"]
unsaid = partial(tyro.conf.arg, help_behavior_hint="")
"""An option whose help text says itself what holds without it."""

_Number = Annotated[int | None, unsaid(metavar="NUMBER")]


@dataclass(frozen=True)
class RestoreSettings:
    """How pictures are restored; None is what suits the restorer, and the only value of what it does not have.

    Args:
        strength: 0 gives the picture back, 1 the full restoration; in between the two are blended.
        seed: Of the noise; for driftrec and prior (default: 0). The same seed gives the same picture, alone or among
            others.
        samples: Restorations that are averaged; for driftrec (default: 1) and prior (default: 8). Few keep more
            texture, many come closer to the original on average, and take longer.
        steps: Evaluations of the network for each sample; for driftrec (default: 10) and prior (default: 20).
        sampler: How the diffusion runs backwards; for driftrec (default: ode_2m).
        quality: In place of the JPEG quality that is seen in each picture, 0 to 100; for sodiff. Lower restores more
            strongly.
        class_label: What all pictures show; for a prior that was trained on classes.
        tile: Side in pixels of the tiles in which large pictures run, 0 for whole pictures (default: 1024, or as the
            restorer was trained). Smaller ones take less memory; on a GPU they are halved where memory runs out.
        overlap: Pixels that neighbouring tiles share at least, where they are blended (default: 64; 256 for adapters).
        consistency: Whether results of JPEGs are held to what is certain.

    Raises:
        ValueError: A number is out of range.
    """

    strength: float = 1.0
    seed: _Number = None
    samples: _Number = None
    steps: _Number = None
    sampler: Annotated[
        Sampler | None, unsaid(metavar="{ode_2m,sde_2m,ode_1,sde_1,euler_maruyama,euler_heun,rk45}")
    ] = None  # fmt: skip
    quality: Annotated[float | None, unsaid(metavar="QUALITY")] = None
    class_label: _Number = None
    tile: Annotated[int | None, unsaid(metavar="PIXELS")] = None
    overlap: Annotated[int | None, unsaid(metavar="PIXELS")] = None
    consistency: Annotated[
        bool,
        unsaid(
            help="Do not hold results to their JPEG. Without this they are: encoded again with its tables they give "
            "its own coefficients, which keeps colours and brightness."
        ),
    ] = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"expected --strength from 0 to 1, got {self.strength:g}.")
        for name, least in {"seed": 0, "samples": 1, "steps": 1, "class_label": 0, "tile": 0, "overlap": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least {least}, got {value}.")
        if self.quality is not None and not 0 <= self.quality <= 100:
            raise ValueError(f"expected --quality from 0 to 100, got {self.quality:g}.")
