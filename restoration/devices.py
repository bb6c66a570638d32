"""What this machine computes on."""

from __future__ import annotations

import torch


def accelerator_available() -> bool:
    """Whether there is a CUDA, Metal or Intel GPU that torch can use."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
