"""FAVOR+: its estimate of the softmax kernel, exact attention in the limit, stability, memory; attention pooling."""

import math

import numpy as np
import pytest
import torch
from test_cave import PeakMemory
from torch import nn

from restoration.networks.performer import AttentionPool, Performer, favor_attention, orthogonal_features
from restoration.networks.swin import LayerMaker


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape, count=3, scale=1.0, seed=0):
    generator = seeded(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def plain_favor(query, key, value, features):
    """The estimate as the paper writes it (Lemma 1), without any stabilisation."""
    side = query.shape[-1] ** 0.25

    def phi(x):
        return torch.exp(x / side @ features.double().T - (x / side).square().sum(-1, keepdim=True) / 2)

    weights = phi(query) @ phi(key).transpose(-1, -2)
    return weights @ value / weights.sum(-1, keepdim=True)


# --- the random features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim"), [(16, 16), (40, 16), (5, 16), (621, 128)])
def test_features_within_a_block_are_orthogonal(count, dim):
    features = orthogonal_features(count, dim, seeded())
    assert features.shape == (count, dim) and features.dtype == torch.float32
    for block in features.double().split(dim):
        unit = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block), dtype=torch.float64), atol=1e-6, rtol=0)


def test_each_feature_is_standard_normal_on_its_own():
    features = orthogonal_features(8 * 4000, 8, seeded()).double()
    assert float(features.mean(dim=0).abs().max()) < 0.03
    torch.testing.assert_close(features.T.cov(), torch.eye(8, dtype=torch.float64), atol=0.04, rtol=0)
    lengths = features.square().sum(dim=1)  # chi squared of 8 degrees, not the constant 8
    assert abs(float(lengths.mean()) - 8) < 0.1 and abs(float(lengths.var()) - 16) < 1
    assert abs(float((features[:, 0] ** 4).mean()) - 3) < 0.2


def test_the_same_generator_gives_the_same_features_and_goes_on():
    generator = seeded()
    first, second = (orthogonal_features(6, 4, generator) for _ in range(2))
    assert torch.equal(first, orthogonal_features(6, 4, seeded()))
    assert not torch.equal(first, second)


def test_the_kernel_estimate_is_unbiased_and_varies_less_than_with_independent_features():
    query = key = torch.full((8,), 0.25**0.5 / 8**0.5, dtype=torch.float64)  # close, where orthogonality gains most
    exact = math.exp(float(query @ key))

    def estimates(features):
        phi = [torch.exp(features.double().view(-1, 8, 8) @ x - x @ x / 2) for x in (query, key)]
        return (phi[0] * phi[1]).mean(dim=1)

    orthogonal = estimates(orthogonal_features(8 * 20000, 8, seeded()))
    independent = estimates(torch.randn(8 * 20000, 8, generator=seeded()))
    error = orthogonal.std() / math.sqrt(len(orthogonal))
    assert error < 0.01 * exact
    assert abs(orthogonal.mean() - exact) < 4 * error
    assert orthogonal.var() < 0.93 * independent.var()


# --- the attention ----------------------------------------------------------------------------------------------------


def test_attention_is_the_papers_formula():
    arguments = (*inputs(2, 3, 17, 8), orthogonal_features(40, 8, seeded()))
    torch.testing.assert_close(favor_attention(*arguments), plain_favor(*arguments), atol=1e-12, rtol=1e-10)


def test_the_error_against_softmax_attention_falls_as_features_grow():
    query, key, value = inputs(1, 2, 50, 16, scale=0.4)
    exact = nn.functional.scaled_dot_product_attention(query, key, value)
    errors = []
    for count in (16, 64, 256, 1024, 4096):
        draws = [favor_attention(query, key, value, orthogonal_features(count, 16, seeded(i))) for i in range(10)]
        errors.append(float(np.mean([(draw - exact).square().mean().sqrt() for draw in draws])))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert ratios.min() > 1.6 and 1.8 < ratios.mean() < 2.4  # as 1 / sqrt(count)
    assert errors[-1] < 0.03 * float(exact.std())


@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_large_numbers_stay_exact_in_single_precision(scale):
    """In the paper's formula they overflow or vanish; an epsilon would make the attention uniform instead."""
    query, key, value = inputs(1, 2, 30, 8, scale=scale)
    features = orthogonal_features(32, 8, seeded()).double()
    side = 8**0.25
    logs = [x / side @ features.T - half for x, half in ((query, 0), (key, (key / side).square().sum(-1, True) / 2))]
    weights = (logs[0][..., :, None, :] + logs[1][..., None, :, :]).logsumexp(dim=-1).softmax(dim=-1)
    expected = weights @ value
    actual = favor_attention(query.float(), key.float(), value.float(), features.float())
    assert expected.std() > 0.1 * scale
    torch.testing.assert_close(actual.double(), expected, atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_what_goes_in_and_out(dtype):
    query, key, value = (x.to(dtype) for x in inputs(1, 2, 40, 8, scale=4))
    features = orthogonal_features(32, 8, seeded())
    exact = favor_attention(query.double(), key.double(), value.double(), features)
    actual = favor_attention(query, key, value, features)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, atol=1e-3, rtol=4 * torch.finfo(dtype).eps)


def test_autocast_does_not_reach_inside():
    arguments = (*(x.float() for x in inputs(1, 2, 40, 8, scale=3)), orthogonal_features(32, 8, seeded()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = favor_attention(*arguments)
    assert torch.equal(inside, favor_attention(*arguments))


@pytest.mark.parametrize("tokens_at_once", [1, 7, 29, 100])
def test_taking_tokens_in_parts_changes_nothing(tokens_at_once):
    arguments = (*inputs(2, 3, 30, 8, scale=3), orthogonal_features(16, 8, seeded()))
    whole, parts = favor_attention(*arguments), favor_attention(*arguments, tokens_at_once=tokens_at_once)
    torch.testing.assert_close(parts, whole, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("tokens_at_once", [2, 100])
def test_gradients_are_those_of_the_estimate(tokens_at_once):
    arguments = [x.requires_grad_() for x in inputs(1, 2, 5, 4)]
    features = orthogonal_features(6, 4, seeded()).double()
    assert torch.autograd.gradcheck(
        lambda *x: favor_attention(*x, features, tokens_at_once=tokens_at_once), arguments, atol=1e-6
    )


@torch.no_grad()
def test_memory_is_linear_in_the_tokens():
    def peak(tokens):
        x = torch.zeros(1, 1, tokens, 2)
        with PeakMemory() as memory:
            favor_attention(x, x, x, torch.zeros(4, 2))
        return memory.peak

    assert 1.5 < peak(65536) / peak(32768) < 2.2
    assert peak(65536) < 65536 * 100


# --- the network ------------------------------------------------------------------------------------------------------


def small_performer(depth=2):
    network, generator = Performer(12, depth, 3, 8, 4, LayerMaker(nn, torch.float64)), seeded(1)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return network, torch.stack([orthogonal_features(20, 8, generator) for _ in range(depth)])


@torch.no_grad()
def test_layers_norm_before_their_branches_and_have_features_of_their_own():
    network, features = small_performer()
    (x,) = inputs(2, 9, 12, count=1)
    expected = x
    for layer, own in zip(network.layers, features, strict=True):
        query, key, value = layer.to_qkv(layer.norm1(expected)).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        mixed = plain_favor(query, key, value, own).transpose(1, 2).reshape(2, 9, 24)
        expected = expected + layer.projection(mixed)
        expand, _, contract = layer.feed_forward
        expected = expected + contract(nn.functional.gelu(expand(layer.norm2(expected))))
    assert layer.to_qkv.bias is None and expand.out_features == 48
    torch.testing.assert_close(network(x, features), expected, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(network(x, features.flip(0)), expected, atol=1e-3)


@torch.no_grad()
def test_it_is_not_causal():
    network, features = small_performer()
    (x,) = inputs(1, 9, 12, count=1)
    order = torch.randperm(9, generator=seeded())
    torch.testing.assert_close(network(x[:, order], features), network(x, features)[:, order], atol=1e-10, rtol=0)


@torch.no_grad()
def test_pooling_is_torchs_multi_head_attention():
    pool, reference = AttentionPool(16, 4, LayerMaker(nn, torch.float64)), nn.MultiheadAttention(16, 4).double()
    for parameter in pool.parameters():
        parameter.normal_(0, 0.3, generator=seeded(parameter.numel()))
    layers = (pool.to_query, pool.to_key, pool.to_value)
    reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
    reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    reference.out_proj.load_state_dict(pool.projection.state_dict())
    (queries,), (pooled,) = inputs(2, 5, 16, count=1), inputs(2, 9, 16, count=1, seed=1)
    expected = reference(*(x.transpose(0, 1) for x in (queries, pooled, pooled)))[0].transpose(0, 1)
    torch.testing.assert_close(pool(queries, pooled), expected)
