"""Noise from explicit generators, one for each sample: the same on every device, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Noise(Protocol):
    """Where a sampler takes its random numbers from."""

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, device and dtype of `like`."""
        ...


@dataclass(frozen=True)
class SampleNoise:
    """Normal noise for a batch of samples, each from a generator of its own.

    A sample's noise therefore depends neither on its place in the batch nor on the batch's size.

    Args:
        generators: One for each sample; their devices are where the numbers are drawn.
    """

    generators: Sequence[torch.Generator]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise (B, C, H, W) of the shape, device and dtype of `like`; drawn in float32.

        Raises:
            ValueError: The batch has not one image for each generator.
        """
        if len(like) != len(self.generators):
            raise ValueError(f"expected a batch of {len(self.generators)}, one for each generator, got {len(like)}.")
        drawn = [
            torch.randn((1, *like.shape[1:]), generator=generator, device=generator.device, dtype=torch.float32)
            for generator in self.generators
        ]
        return torch.cat([one.to(like) for one in drawn])


def sample_generator(seed: int, number: int) -> torch.Generator:
    """The noise of one of the samples that are averaged; the first one's does not depend on how many there are."""
    state = np.random.SeedSequence([seed & (2**64 - 1), number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
