"""Tiles are normalised by what the whole picture says, not by what each of them happens to show."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.tiling import SharedStatistics, Tiler, sample_of


def picture(height: int, width: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Noise on a ramp: brightness and contrast differ from place to place."""
    noise = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    ramp = torch.linspace(0, 1, width)
    return noise * (0.2 + ramp) + 2 * ramp * torch.linspace(0, 1, height)[:, None]


class Network(nn.Module):
    """Two pointwise layers with a norm before each: what a tile changes is the statistics alone."""

    def __init__(self, operations: Any = nn, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        factory = {"dtype": dtype}
        self.first, self.second = operations.GroupNorm(3, 3, **factory), operations.GroupNorm(4, 8, **factory)
        self.lift, self.back = operations.Conv2d(3, 8, 1, **factory), operations.Conv2d(8, 3, 1, **factory)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.silu(self.second(self.lift(self.first(x)))))


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_with_the_statistics_of_the_whole_are_the_whole(batch: int) -> None:
    """Measured on the very whole; each picture of a batch has its own."""
    images, network = picture(64, 96, batch=batch), Network()
    images[1:] *= 0.3
    whole = network(images)
    shared = SharedStatistics(network)
    shared.measure(network, images)
    tiler = Tiler(32, 0)
    torch.testing.assert_close(tiler(partial(shared.apply, network), images), whole, atol=1e-5, rtol=1e-5)
    assert (tiler(network, images) - whole).abs().max() > 0.5, "without them tiles must differ, or this shows nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_single(dtype: torch.dtype) -> None:
    """A mean far from zero beside a small deviation: normalising in half precision would be off by whole deviations."""
    norm = nn.GroupNorm(2, 4, dtype=dtype).requires_grad_(False)
    x = (200 + torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(3))).to(dtype)
    shared = SharedStatistics(norm)
    shared.measure(norm, x)
    exact = F.group_norm(x.double(), 2, eps=norm.eps)
    found = shared.apply(norm, x)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 2 * (norm(x) - exact).abs().max() + 1e-2


def test_the_tiler_samples_once_and_brings_tiles_nearer_to_the_whole() -> None:
    images, network = picture(256, 256), Network()
    whole, sizes, seen = network(images), [], []

    def function(x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[-2:]))
        return network(x)

    run = partial(Tiler(128, 32), function, images, on_tile=lambda *done: seen.append(done))
    alone = run()
    tiles = len(sizes)
    together = run(network=network)
    assert len(sizes) == 2 * tiles + 1 and sizes.pop(tiles) == (128, 128) and set(sizes) == {(112, 112)}
    assert seen[-1] == (tiles + 1, tiles + 1) and len(seen) == 2 * tiles + 1
    assert (together - whole).abs().mean() < 0.25 * (alone - whole).abs().mean()


def test_one_tile_keeps_its_own_statistics_and_needs_no_sample() -> None:
    images, network = picture(96, 96), Network()
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return network(x)

    assert torch.equal(Tiler(128, 32)(function, images, network=network), network(images)) and len(calls) == 1


def test_norms_are_left_as_they_were_even_when_a_tile_fails() -> None:
    """Also the forward that offloading has put on a norm, as accelerate does."""
    network, images = Network(), picture(256, 256)
    hooked = network.first.forward
    network.first.forward = lambda x: hooked(x)  # type: ignore[method-assign]
    mine = network.first.forward

    def function(x: Tensor) -> Tensor:
        network(x)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        Tiler(128, 32)(function, images, network=network)
    assert vars(network.first)["forward"] is mine and "forward" not in vars(network.second)


def test_smaller_tiles_after_running_out_of_memory_have_a_new_sample() -> None:
    network, images, sides = Network(), picture(512, 512), []

    def function(x: Tensor) -> Tensor:
        sides.append(x.shape[-1])
        if x.shape[-1] > 128:
            raise torch.OutOfMemoryError("simulated: out of memory")
        return network(x)

    tiler = Tiler(256, 32)
    result = tiler(function, images, network=network)
    assert sides[:2] == [256, 128] and tiler.tile == 128
    whole, alone = network(images), Tiler(128, 32)(network, images)
    assert (result - whole).abs().mean() < 0.25 * (alone - whole).abs().mean()


def test_any_size_is_sampled_and_tiled_in_multiples() -> None:
    """A picture one pixel too large: what the network sees is filled up, what comes back is not."""
    network, images, sizes = Network(), picture(129, 301), set()

    def function(x: Tensor) -> Tensor:
        sizes.update(x.shape[-2:])
        return network(x)

    result = Tiler(128, 32)(function, images, network=network, multiple=32)
    assert result.shape == images.shape and sizes == {96, 128}
    assert (result - network(images)).abs().mean() < 0.25 * (
        Tiler(128, 32)(network, images) - network(images)
    ).abs().mean()
    low = images[..., :40, :]
    assert Tiler(128, 32)(function, low, network=network, multiple=32).shape == low.shape and sizes == {128, 96, 64}


def test_another_number_of_evaluations_is_refused() -> None:
    network, images, calls = Network(), picture(256, 256), []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return network(x) if len(calls) == 1 else network(network(x))

    with pytest.raises(ValueError, match="evaluate every tile as it did the sample"):
        Tiler(128, 32)(function, images, network=network)


@pytest.mark.comfyui
def test_comfyui_s_layers_with_weights_of_another_type(comfy: SimpleNamespace) -> None:
    """manual_cast brings weights of half precision to the input's type inside of the layer's own forward."""
    import comfy.ops  # type: ignore[import-not-found]

    images = picture(64, 96)
    network = Network(comfy.ops.manual_cast, torch.float16)
    whole = network(images)
    assert whole.dtype == torch.float32
    shared = SharedStatistics(network)
    assert len(shared.norms) == 2
    shared.measure(network, images)
    torch.testing.assert_close(Tiler(32, 0)(partial(shared.apply, network), images), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (64, 400), (1008, 720), (513, 529), (4101, 512)])
@pytest.mark.parametrize("tile", [(16, 16), (64, 64), (256, 128), (512, 512), (1024, 1024)])
def test_a_sample_comes_from_everywhere_on_the_grid_of_the_jpeg(size: tuple[int, int], tile: tuple[int, int]) -> None:
    height, width = size
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))[None]
    sample = sample_of(places, tile)
    for axis, (length, side) in enumerate(zip(size, tile, strict=True)):
        found = sample[0, axis].select(1 - axis, 0)
        assert torch.equal(sample[0, axis], found.unsqueeze(1 - axis).expand_as(sample[0, axis]))
        if length <= side:
            assert torch.equal(found[:length], torch.arange(length)) and len(found) == -(-length // 16) * 16
            continue
        assert side / 2 < len(found) <= side
        assert torch.equal(found % 16, torch.arange(len(found)) % 16), "blocks are cut"
        assert len(found.unique()) == len(found)
        if side >= 256:
            starts = [0, *(found.diff() > 1).nonzero().flatten().add(1).tolist()]
            assert len(starts) == side // 128 or length < 2 * side
            assert (found.float().mean() - length / 2).abs() < 0.02 * length + 8
