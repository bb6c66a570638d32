"""Frozen weights spread over processes (FSDP), for trainings that adapt a large base model.

What is trained, the adapters, is small: it stays whole in every process, and so do the states of its optimiser. So
checkpoints, averages and exported files are those of any other run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def spread_frozen(blocks: Sequence[nn.Module]) -> None:
    """Leave each process a share of the frozen weights; a block's are gathered while it computes.

    From then on all processes must call these blocks, in the same order.

    Args:
        blocks: Modules that are called as such, none within another.

    Raises:
        ValueError: This torch cannot do it.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ValueError(
            f"run.fsdp: it needs torch 2.7 or later, this is {torch.__version__}. Update it, or leave the option off."
        ) from error
    for block in blocks:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        if any(parameter not in trained for parameter in block.parameters()):
            fully_shard(block, reshard_after_forward=True, ignored_params=trained)


@torch.no_grad()
def share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients, float32, by their means over all processes, which must have the same ones."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
