"""The Performer (Choromanski et al. 2021, "Rethinking Attention with Performers"): attention in linear time and memory.

FAVOR+ replaces exp(q.k) by an unbiased estimate phi(q).phi(k) with positive, orthogonal random features (its Lemma 1
and section 2.4), so the sum over keys is taken once for all queries. Not causal.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .swin import LayerMaker, recomputed

_TOKENS_AT_ONCE = 4096


class Performer(nn.Module):
    """Layers of x + attention(norm(x)), x + feed_forward(norm(x)).

    Their random features belong to whoever calls it, as they are neither trained nor constant.

    Args:
        dim: Width of the tokens.
        depth: Layers.
        heads: Attention heads.
        dim_head: Width of each of them.
        ff_mult: Width inside the feed-forward layers in units of `dim`.
        make: The maker of its layers.
    """

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, ff_mult: int, make: LayerMaker) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PerformerLayer(dim, heads, dim_head, ff_mult, make) for _ in range(depth))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Tokens (B, N, dim) to the same shape, with the features (depth, M, dim_head) of `orthogonal_features`."""
        for layer, own in zip(self.layers, features, strict=True):
            x = layer(x, own)
        return x


class PerformerLayer(nn.Module):
    """One of the layers of a Performer."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int, make: LayerMaker) -> None:
        super().__init__()
        self.heads, self.recompute = heads, make.recompute
        self.norm1 = make.norm(dim)
        self.to_qkv = make.linear(dim, 3 * heads * dim_head, bias=False)
        self.projection = make.linear(heads * dim_head, dim)
        self.norm2 = make.norm(dim)
        self.feed_forward = nn.Sequential(make.linear(dim, ff_mult * dim), nn.GELU(), make.linear(ff_mult * dim, dim))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._run, x, features)
        return self._run(x, features)

    def _run(self, x: Tensor, features: Tensor) -> Tensor:
        x = x + self.projection(self._mixed(self.norm1(x), features))
        return x + self.feed_forward(self.norm2(x))

    def _mixed(self, x: Tensor, features: Tensor) -> Tensor:
        query, key, value = rearrange(self.to_qkv(x), "b n (k h d) -> k b h n d", k=3, h=self.heads).unbind()
        return rearrange(favor_attention(query, key, value, features), "b h n d -> b n (h d)")


class AttentionPool(nn.Module):
    """Multi-head attention of queries (B, Q, dim) over what is pooled, (B, N, dim)."""

    def __init__(self, dim: int, heads: int, make: LayerMaker) -> None:
        super().__init__()
        self.heads = heads
        self.to_query, self.to_key, self.to_value, self.projection = (make.linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, pooled: Tensor) -> Tensor:
        parts = (self.to_query(queries), self.to_key(pooled), self.to_value(pooled))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).flatten(2))


def favor_attention(
    query: Tensor, key: Tensor, value: Tensor, features: Tensor, *, tokens_at_once: int = _TOKENS_AT_ONCE
) -> Tensor:
    """softmax(query key^T / sqrt(D)) value, estimated with random features, in memory linear in the tokens.

    Computed in single precision at least, whatever the types and under autocast, too. Exponents are stabilised with no
    change to the result and no epsilon: for each feature the largest exponent of all keys is taken from the keys and
    given to the queries, whose own largest is then a factor of the numerator and the denominator.

    Args:
        query: (B, heads, N, D).
        key: (B, heads, K, D).
        value: (B, heads, K, E).
        features: (M, D), see `orthogonal_features`.
        tokens_at_once: Tokens whose features are held at the same time; changes nothing but memory (without gradients).

    Returns:
        (B, heads, N, E), in the type of `value`.
    """
    with _no_autocast(query.device):
        dtype = torch.promote_types(query.dtype, torch.float32)
        matrix = features.to(device=query.device, dtype=dtype).t() * query.shape[-1] ** -0.25
        maxima, sums, total = _summed_keys(key, value, matrix, tokens_at_once)
        parts = []
        for part in query.split(tokens_at_once, dim=2):
            exponents = (part.to(dtype) @ matrix).add_(maxima)
            weights = exponents.sub_(exponents.detach().amax(dim=-1, keepdim=True)).exp_()
            parts.append(((weights @ sums) / (weights @ total)).to(value.dtype))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _summed_keys(key: Tensor, value: Tensor, matrix: Tensor, tokens_at_once: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all keys the largest exponents, (B, heads, 1, M), and relative to them phi(key)^T value and phi(key)^T 1."""
    maxima: Tensor | None = None
    sums = total = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    for part, values in zip(key.split(tokens_at_once, dim=2), value.split(tokens_at_once, dim=2), strict=True):
        keys = part.to(matrix.dtype)
        exponents = keys @ matrix
        exponents.sub_(keys.square().sum(dim=-1, keepdim=True) * (0.5 * key.shape[-1] ** -0.5))
        largest = exponents.detach().amax(dim=2, keepdim=True)
        if maxima is not None:
            largest = torch.maximum(largest, maxima)
            shrink = (maxima - largest).exp().transpose(2, 3)
            sums, total = sums * shrink, total * shrink
        weights = exponents.sub_(largest).exp_().transpose(2, 3)
        maxima, sums = largest, sums + weights @ values.to(matrix.dtype)
        total = total + weights.sum(dim=-1, keepdim=True)
    assert maxima is not None
    return maxima, sums, total


def favor_bytes(tokens: int, heads: int, dim_head: int, features: int) -> int:
    """Bytes that `favor_attention` of a picture takes beside its arguments and its result, without gradients."""
    return 4 * heads * (min(tokens, _TOKENS_AT_ONCE) * (features + 4 * dim_head) + features * (2 * dim_head + 2))


def orthogonal_features(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Random features (count, dim) in single precision, on the generator's device.

    Each is standard normal on its own, which makes the estimate unbiased; those within a block of `dim` are orthogonal,
    which lessens its variance (section 2.4): rows of random rotations with the lengths of independent Gaussian vectors.
    """
    blocks = []
    for start in range(0, count, dim):
        draws = torch.randn(dim, dim, generator=generator, device=generator.device).cpu().double()
        rotation, triangle = torch.linalg.qr(draws)
        rotation = rotation * triangle.diagonal().sign()
        blocks.append(rotation.t()[: count - start])
    lengths = torch.randn(count, dim, generator=generator, device=generator.device).cpu().double().norm(dim=1)
    return (torch.cat(blocks) * lengths[:, None]).float().to(generator.device)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
