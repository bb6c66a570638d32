"""Windows give the result of the whole picture: at every size, stride and tile, with the halo that a network needs."""

import pytest
import torch
import torch.nn.functional as F

from restoration.tiling import tile_count, tiled_exactly


def kernel(outputs, inputs, size, seed):
    return torch.randn(outputs, inputs, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KERNELS = [kernel(4, 2, 3, 1), kernel(4, 4, 5, 2), kernel(5, 4, 2, 3), kernel(3, 5, 3, 4), kernel(3, 3, 3, 5)]


def network(x):
    """Stride 6; reaches 1 + 2 positions, and 2 more at half the size."""
    x = F.conv2d(x, KERNELS[0], padding=1).tanh()
    x = F.conv2d(x, KERNELS[1], bias=torch.ones(4, dtype=torch.float64), padding=2).tanh()
    x = F.conv2d(x, KERNELS[2], stride=2).tanh()
    x = F.conv2d(x, KERNELS[3], padding=1).tanh()
    return F.conv2d(x, KERNELS[4], stride=3)


def picture(height, width):
    return torch.rand(2, 2, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [(48, 60), (61, 47), (6, 101), (11, 6), (23, 23)])
@pytest.mark.parametrize("tile", [1, 6, 13, 24, 40, 1000, 0])
def test_windows_equal_the_whole_at_every_size(size, tile):
    x = picture(*size)
    expected = network(x)
    assert expected.shape[-2:] == (size[0] // 6, size[1] // 6)
    actual = tiled_exactly(network, x, stride=6, halo=6, tile=tile)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_a_halo_narrower_than_the_receptive_field_shows():
    x = picture(48, 60)
    differences = (tiled_exactly(network, x, stride=6, halo=0, tile=12) - network(x)).abs()
    assert differences.max() > 0.01
    assert tiled_exactly(network, x, stride=6, halo=12, tile=12).sub(network(x)).abs().max() < 1e-12


def test_windows_lie_on_the_grid_and_are_never_larger_than_asked():
    x = torch.arange(101.0).expand(1, 1, 101, 101)
    seen = []

    def function(window):
        seen.append((window.shape[-2:], int(window[0, 0, 0, 0])))
        return window[..., 3::4, 3::4]

    result = tiled_exactly(function, x, stride=4, halo=8, tile=27)
    assert torch.equal(result, x[..., 3::4, 3::4])
    assert len(seen) == 5 * 5
    assert all(first % 4 == 0 for _, first in seen)
    assert all(side <= 24 + 2 * 8 for size, _ in seen for side in size)


def test_every_window_is_reported_and_a_report_may_end_the_work():
    seen = []
    tiled_exactly(lambda x: x, picture(30, 20), stride=1, halo=0, tile=10, on_tile=lambda *count: seen.append(count))
    assert seen == [(index, 6) for index in range(1, 7)]
    assert tile_count(30, 20, stride=1, tile=10) == 6
    assert tile_count(30, 20, stride=1, tile=0) == 1

    def stop(done, total):
        seen.append(done)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tiled_exactly(lambda x: x, picture(30, 20), stride=1, halo=0, tile=10, on_tile=stop)
    assert seen[6:] == [1]


def test_windows_move_to_the_device_and_results_come_back():
    def function(window):
        assert window.device.type == "meta"
        return torch.full((2, 7, window.shape[-2], window.shape[-1]), 3, dtype=torch.float16)

    result = tiled_exactly(function, picture(16, 24), stride=1, halo=2, tile=8, device="meta")
    assert result.device.type == "cpu"
    assert torch.equal(result, torch.full((2, 7, 16, 24), 3, dtype=torch.float16))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stride": 0}, "stride of at least 1"), ({"halo": 3}, "multiple of it"), ({"halo": -4}, "multiple of it"),
     ({"tile": -1}, "not negative"), ({"stride": 64}, "at least the stride, 64, got 32")],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiled_exactly(lambda x: x, picture(32, 32), **{"stride": 4, "halo": 0, "tile": 8, **options})


def test_a_function_of_another_stride_is_refused():
    with pytest.raises(ValueError, match=r"return a window of \(4, 4\), got \(16, 16\)"):
        tiled_exactly(lambda x: x, picture(32, 32), stride=4, halo=0, tile=16)
