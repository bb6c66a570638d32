"""Inputs that several restoring nodes have: one place says how they look and between which bounds they lie."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

_UP_TO_1: dict[str, Any] = {"max": 1.0, "step": 0.05, "round": 0.001}


def seed_input(tooltip: str) -> io.Input:
    """The seed of the noise; it stays after a run, so that the same graph gives the same picture."""
    return io.Int.Input(
        "seed", default=0, min=0, max=2**64 - 1, control_after_generate=io.ControlAfterGenerate.fixed, tooltip=tooltip
    )


def samples_input(default: int, tooltip: str) -> io.Input:
    """How many restorations are averaged."""
    return io.Int.Input("samples", default=default, min=1, max=64, tooltip=tooltip)


def share_input(name: str, default: float, tooltip: str) -> io.Input:
    """A required share, 0 to 1."""
    return io.Float.Input(name, default=default, **_UP_TO_1, min=0.0, tooltip=tooltip)


def weight_input(name: str, default: float, tooltip: str, *, lowest: float = 0.0) -> io.Input:
    """An advanced weight up to 1."""
    return io.Float.Input(
        name, default=default, **_UP_TO_1, min=lowest, optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def closed_loop_input(default: bool, tooltip: str) -> io.Input:
    """Whether results agree with the file in whole 8-bit levels, too."""
    return io.Boolean.Input("closed_loop", default=default, optional=True, advanced=True, tooltip=tooltip)


def tile_input(default: int, tooltip: str) -> io.Input:
    """The side of tiles in pixels; what 0 means is the node's."""
    return io.Int.Input(
        "tile", default=default, min=0, max=8192, step=16, optional=True, advanced=True, tooltip=tooltip
    )


def overlap_input(tooltip: str) -> io.Input:
    """What neighbouring tiles share, in pixels."""
    return io.Int.Input("overlap", default=64, min=0, max=512, step=16, optional=True, advanced=True, tooltip=tooltip)
