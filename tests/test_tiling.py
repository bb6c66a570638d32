"""Tiled results equal whole ones, tiles keep the JPEG grid, and running out of memory only makes tiles smaller."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F

from restoration.tiling import (
    TileGrid,
    Tiler,
    crop_to,
    is_out_of_memory_error,
    pad_to_multiple,
    padded_window,
    tiled,
)

SIZES = [(16, 16), (48, 400), (400, 16), (208, 336), (256, 256), (272, 256), (144, 160)]


def picture(height, width, seed=0):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tile, overlap", [(128, 32), (64, 0), (64, 32), (150, 20), (0, 32), (1000, 64)])
def test_identity_comes_back_unchanged(height, width, tile, overlap):
    images = picture(height, width)
    result = tiled(lambda x: x, [images], tile=tile, overlap=overlap)
    torch.testing.assert_close(result, images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tile, overlap", [(128, 32), (64, 0), (96, 48)])
def test_grid_is_aligned_of_one_size_and_its_weights_add_up_to_one(height, width, tile, overlap):
    grid = TileGrid(height, width, tile, overlap)
    total = torch.zeros(height, width)
    for rows, columns, weights in grid:
        assert rows.start % 16 == columns.start % 16 == 0
        assert weights.shape == (rows.stop - rows.start, columns.stop - columns.start)
        assert weights.shape == (grid.tile_height, grid.tile_width)
        assert rows.stop <= height and columns.stop <= width
        assert weights.min() > 0
        total[rows, columns] += weights
    torch.testing.assert_close(total, torch.ones(height, width))
    for starts, size, length in ((grid.tops, grid.tile_height, height), (grid.lefts, grid.tile_width, width)):
        assert all(first + size - second >= overlap for first, second in itertools.pairwise(starts))
        needed = next(n for n in itertools.count(1) if n * tile - (n - 1) * overlap >= length)
        assert len(starts) == needed and size <= tile
        assert needed == 1 or needed * (size - 16) - (needed - 1) * overlap < length, "a smaller tile would do"


def test_convolution_with_a_short_reach_is_exact_away_from_the_blend():
    """Two 5x5 convolutions reach 4 pixels: only within 4 pixels of a tile's border do tiles differ from the whole,
    and there a 32 pixel ramp gives the wrong value almost no weight."""
    images = picture(208, 336)
    kernel = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(2)) / 8

    def network(x):
        return F.conv2d(F.conv2d(x, kernel, padding=2).tanh(), kernel, padding=2)

    whole = network(images)
    error = (tiled(network, [images], tile=128, overlap=32) - whole).abs()
    unblended = (tiled(network, [images], tile=128, overlap=0) - whole).abs()
    assert error.max() < 0.1 * unblended.max()
    assert (error > 1e-5).float().mean() < 0.2
    centre = error[..., 16:80, 16:80]
    assert centre.max() < 1e-5


def test_pointwise_function_of_several_tensors_equals_the_whole_and_may_change_channels():
    images, other = picture(144, 208), picture(144, 208, seed=1)

    def function(x, y):
        return torch.cat([x * y, x - y], dim=1).half()

    result = tiled(function, [images, other], tile=64, overlap=16)
    assert result.dtype == torch.float16 and result.shape == (2, 6, 144, 208)
    torch.testing.assert_close(result, function(images, other), atol=1e-3, rtol=0)


def test_one_tile_hands_the_tensors_through_uncopied():
    images = picture(64, 64)
    assert tiled(lambda x: x, [images], tile=64, overlap=32) is images


def test_progress_counts_every_tile_once():
    seen = []
    tiled(lambda x: x, [picture(160, 160)], tile=64, overlap=16, on_tile=lambda done, total: seen.append((done, total)))
    total = len(TileGrid(160, 160, 64, 16))
    assert seen == [(done, total) for done in range(1, total + 1)]


class SmallMemory:
    """A function that fails above `limit` pixels a tile, and remembers the sides it was asked for."""

    def __init__(self, limit):
        self.limit = limit
        self.sides = []

    def __call__(self, x):
        self.sides.append(max(x.shape[-2:]))
        if x.shape[-1] * x.shape[-2] > self.limit:
            raise torch.OutOfMemoryError("simulated: out of memory")
        return x


@pytest.mark.parametrize("tile", [0, 512])
def test_out_of_memory_halves_the_tile_and_the_size_is_remembered(tile):
    images = picture(512, 768)
    function, released = SmallMemory(200 * 200), []
    tiler = Tiler(tile, overlap=64, release=lambda: released.append(True))
    torch.testing.assert_close(tiler(function, images), images, atol=1e-6, rtol=0)
    assert 128 <= tiler.tile <= 208 and len(released) == 2
    function.sides.clear()
    tiler(function, images)
    assert tiler.tile - 48 <= max(function.sides) <= tiler.tile and len(released) == 2


def test_at_the_minimum_the_original_error_is_raised():
    function = SmallMemory(0)
    tiler = Tiler(512, overlap=32)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        tiler(function, picture(512, 512))
    assert function.sides == [512, 192, 128]


def test_a_small_picture_is_not_cut_below_the_minimum():
    function = SmallMemory(0)
    with pytest.raises(torch.OutOfMemoryError):
        Tiler(0)(function, picture(112, 112))
    assert function.sides == [112]


def test_other_errors_pass_at_once():
    calls = []

    def function(x):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Tiler(0)(function, picture(512, 512))
    assert len(calls) == 1


def test_the_failed_attempts_tensors_are_freed_before_the_next_attempt():
    """A traceback kept alive would hold the failed attempt's memory, and every further attempt would fail too."""
    alive = []

    def function(x):
        assert all(reference() is None for reference in alive), "the failed attempt's tensor is still alive"
        scratch = x * 2
        if x.shape[-1] > 128:
            alive.append(weakref.ref(scratch))
            raise torch.OutOfMemoryError("simulated: out of memory")
        return scratch / 2

    gc.disable()
    try:
        result = Tiler(0)(function, picture(256, 256))
    finally:
        gc.enable()
    assert len(alive) == 1 and result.shape[-1] == 256


def test_no_tile_is_larger_than_asked_for():
    shapes = set()

    def function(x):
        shapes.add(tuple(x.shape[-2:]))
        return x

    tiled(function, [picture(400, 304)], tile=128, overlap=32)
    assert shapes == {(128, 128)}


def test_out_of_memory_is_recognised_by_type_or_words():
    assert is_out_of_memory_error(torch.OutOfMemoryError("x"))
    assert is_out_of_memory_error(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert is_out_of_memory_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"))
    assert not is_out_of_memory_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory_error(ValueError("out of memory"))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (15, 17), (16, 32), (8, 63), (9, 9)])
def test_padding_keeps_the_picture_and_mirrors_or_repeats(height, width):
    images = picture(height, width)
    padded, size = pad_to_multiple(images, 16)
    assert padded.shape[-2] % 16 == padded.shape[-1] % 16 == 0
    assert padded.shape[-2] - height < 16 and padded.shape[-1] - width < 16
    assert size == (height, width) and torch.equal(crop_to(padded, size), images)
    missing = padded.shape[-1] - width
    if missing and missing < width:
        assert torch.equal(padded[..., :height, width], images[..., width - 2])
    elif missing:
        assert torch.equal(padded[..., :height, -1], images[..., -1])


@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (130, 17), (129, 300), (333, 131), (200, 128)])
def test_a_tiler_fills_up_at_the_border_as_padding_the_whole_does(height, width):
    """Tile by tile, without the padded whole; also with pixels in memory one after the other, as an IMAGE has them."""
    images = picture(height, width)

    def function(x):
        assert x.shape[-2] % 32 == x.shape[-1] % 32 == 0 and x.is_contiguous()
        return F.avg_pool2d(x, 9, 1, padding=4)

    padded, size = pad_to_multiple(images, 32)
    expected = crop_to(tiled(function, [padded], tile=128, overlap=32, align=32), size)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        result = Tiler(128, 32)(function, given, multiple=32)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    if len(TileGrid(*padded.shape[-2:], 128, 32, 32)) > 1:
        assert result.movedim(1, -1).is_contiguous(), "an IMAGE could not be made of it without a copy"


@pytest.mark.parametrize("height, width", [(1, 1), (3, 40), (33, 17), (64, 64)])
def test_windows_of_a_padded_picture(height, width):
    images = picture(height, width)
    padded, _ = pad_to_multiple(images, 16)
    for top, left in itertools.product(range(0, padded.shape[-2], 16), range(0, padded.shape[-1], 16)):
        rows, columns = slice(top, padded.shape[-2]), slice(left, left + 16)
        assert torch.equal(padded_window(images, rows, columns, 16), padded[..., rows, columns])


def test_out_of_memory_ends_where_tiles_cannot_be_smaller_than_a_multiple():
    function = SmallMemory(0)
    with pytest.raises(torch.OutOfMemoryError):
        Tiler(512, overlap=32)(function, picture(512, 512), multiple=256)
    assert function.sides == [512, 256]


def test_impossible_grids_are_refused_in_words():
    with pytest.raises(ValueError, match="multiples"):
        TileGrid(100, 64, 32, 0)
    with pytest.raises(ValueError, match="half the tile"):
        TileGrid(128, 128, 64, 48)
    with pytest.raises(ValueError, match="one height and width"):
        tiled(lambda x, y: x, [picture(32, 32), picture(48, 48)], tile=0, overlap=0)
    with pytest.raises(ValueError, match="keep the tile's size"):
        tiled(lambda x: x[..., ::2, ::2], [picture(64, 64)], tile=32, overlap=0)
