"""Swin transformer blocks: windows against attention over the whole map, every size, counts, stochastic depth."""

import numpy as np
import pytest
import torch
from torch import nn

from restoration.networks import swin
from restoration.networks.swin import (
    RSTB,
    LayerMaker,
    NearestUpsampler,
    SwinLayer,
    WindowAttention,
    fitted_positions,
    rising_drop_paths,
)

MAKE = LayerMaker(nn, torch.float64)
SIZES = [(8, 12), (4, 4), (7, 9), (3, 10), (1, 1), (2, 4), (9, 4)]


def drawn(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return module.eval()


def maps(*size, channels=12, seed=1):
    return torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def window_of(length, window, shift):
    """Number of the window that each position lies in; the first one is cut short by the shift."""
    return [(place - (shift if length > window else 0)) // window for place in range(length)]


@torch.no_grad()
def attended(layer, x):
    """Every position sees every other one in its window, written down as a matrix over the whole map."""
    height, width, window = *x.shape[1:3], layer.window
    rows, columns = (window_of(length, window, layer.shift) for length in (height, width))
    places = [(y, z) for y in range(height) for z in range(width)]
    scores = torch.full((len(places), len(places), layer.heads), -torch.inf, dtype=x.dtype)
    for i, (y, z) in enumerate(places):
        for j, (v, u) in enumerate(places):
            if (rows[y], columns[z]) == (rows[v], columns[u]):
                scores[i, j] = layer.bias_table[(y - v + window - 1) * (2 * window - 1) + z - u + window - 1]
    query, key, value = layer.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    outputs, width_of_head = [], x.shape[-1] // layer.heads
    for head in range(layer.heads):
        part = slice(head * width_of_head, (head + 1) * width_of_head)
        logits = query[..., part] @ key[..., part].transpose(1, 2) / width_of_head**0.5 + scores[..., head]
        outputs.append(logits.softmax(dim=-1) @ value[..., part])
    return layer.projection(torch.cat(outputs, dim=-1)).unflatten(1, (height, width))


@pytest.mark.parametrize("shift", [0, 2, 3])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_windows_are_masked_attention_over_the_whole_map(size, shift):
    layer = drawn(WindowAttention(12, 3, 4, shift, MAKE))
    expected = attended(layer, maps(*size))
    assert expected.std() > 0.1
    torch.testing.assert_close(layer(maps(*size)), expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_many_windows_are_taken_in_parts(monkeypatch):
    layer = drawn(WindowAttention(12, 3, 4, 2, MAKE))
    whole = layer(maps(13, 22))
    monkeypatch.setattr(swin, "_WINDOWS_AT_ONCE", 5)
    torch.testing.assert_close(layer(maps(13, 22)), whole, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_layer_norms_before_both_branches():
    layer = drawn(SwinLayer(12, 3, 4, 2, 2, 0.1, MAKE))
    x = maps(9, 6)
    middle = x + attended(layer.attention, layer.norm1(x))
    expand, _, contract = layer.mlp
    hidden = expand(layer.norm2(middle))
    assert hidden.shape[-1] == 24
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layer(x), middle + contract(gelu), atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_a_block_shifts_every_second_layer_and_adds_its_input():
    block = drawn(RSTB(12, 3, 5, 2, [0.0] * 3, MAKE))
    assert [layer.attention.shift for layer in block.layers] == [0, 2, 0]
    x = h = maps(11, 6)
    for layer in block.layers:
        h = layer(h)
    expected = x + block.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), expected, atol=1e-10, rtol=1e-10)


def test_parameters_are_those_of_swinir():
    dim, heads, window, hidden = 180, 6, 8, 360
    layer = 4 * dim + (dim * 3 * dim + 3 * dim) + (2 * window - 1) ** 2 * heads + (dim * dim + dim)
    layer += dim * hidden + hidden + hidden * dim + dim
    block = RSTB(dim, heads, window, 2, [0.0] * 6, LayerMaker(device="meta"))
    count = sum(parameter.numel() for parameter in block.parameters())
    assert count == 6 * layer + 9 * dim * dim + dim == 1_866_960


@torch.no_grad()
def test_the_upsampler_repeats_and_convolves_twice():
    up = drawn(NearestUpsampler(5, MAKE))
    x = maps(3, 4, channels=5).permute(0, 3, 1, 2)
    h = up.before[1](up.before[0](x))
    h = h.where(h > 0, 0.01 * h)
    for conv in up.up:
        h = conv(h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        h = h.where(h > 0, 0.2 * h)
    expected = up.last[1](up.last[0](h))
    assert expected.shape == (2, 3, 12, 16)
    torch.testing.assert_close(up(x), expected, atol=1e-9, rtol=1e-9)


# --- training ---------------------------------------------------------------------------------------------------------


def test_drop_rates_rise_linearly_over_all_blocks():
    rates = rising_drop_paths((3, 2, 4), 0.1)
    assert [len(part) for part in rates] == [3, 2, 4]
    np.testing.assert_allclose(np.concatenate(rates), np.linspace(0, 0.1, 9), atol=1e-8)


def test_training_leaves_out_branches_picture_by_picture_and_keeps_their_mean():
    layer = SwinLayer(4, 1, 2, 0, 1, 0.25, LayerMaker()).train()
    torch.manual_seed(0)
    dropped = layer._dropped(torch.ones(8000, 2, 2, 4)).flatten(1)
    assert bool((dropped == dropped[:, :1]).all())
    torch.testing.assert_close(dropped[:, 0].unique(), torch.tensor([0, 4 / 3]))
    assert abs(float(dropped.mean()) - 1) < 0.03
    assert torch.equal(layer.eval()._dropped(torch.ones(50, 2, 2, 4)), torch.ones(50, 2, 2, 4))


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        block = drawn(RSTB(8, 2, 4, 2, [0.0, 0.5], LayerMaker(nn, torch.float64, recompute=recompute))).train()
        torch.manual_seed(3)
        block(maps(6, 7, channels=8).repeat(4, 1, 1, 1)).square().sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


# --- positions, types -------------------------------------------------------------------------------------------------


def test_positions_are_interpolated_only_where_the_map_has_another_size():
    slope = torch.arange(8.0)[:, None, None].expand(8, 8, 3).contiguous()
    assert torch.equal(fitted_positions(slope, torch.empty(1, 8, 8, 3)), slope)
    fitted = fitted_positions(slope, torch.empty(1, 16, 4, 3))
    assert fitted.shape == (16, 4, 3)
    expected = ((torch.arange(4.0, 12) + 0.5) / 2 - 0.5)[:, None, None].expand(8, 4, 3)
    torch.testing.assert_close(fitted[4:12], expected, atol=0.06, rtol=0)  # torch's cubic is not exact on a slope


@torch.no_grad()
def test_half_precision_stays_near_double():
    block, low = drawn(RSTB(12, 3, 4, 2, [0.0] * 2, MAKE)), RSTB(12, 3, 4, 2, [0.0] * 2, LayerMaker(nn, torch.bfloat16))
    low.load_state_dict(block.state_dict())
    expected, actual = block(maps(9, 10)), low(maps(9, 10).bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).abs().mean() < 0.05 * expected.abs().mean()
