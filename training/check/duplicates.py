"""Which pictures are one and the same: near-duplicates by their fingerprints, made sure of by their colours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from training.check.facts import PictureFacts

_BITS, _PARTS = 64, 5
_MOST_DIFFERENT = _PARTS - 1
"""Bits in which two versions differ at most: with so many parts, one part of their fingerprints is the same."""
_NEAR = 6.0
"""Mean difference of two versions' thumbnails, in levels of 255, at most."""
_MOST_IN_A_BUCKET = 500
"""Of more pictures with the same part, which are flat ones, only so many are compared with each other."""


def find_duplicates(facts: Sequence[PictureFacts]) -> list[list[int]]:
    """Groups of the numbers of pictures that show the same, the first of each in front; those alone are left out.

    Time grows with the pictures, not with their pairs: only those are compared of which a fifth of the fingerprint is
    the same.
    """
    parent = list(range(len(facts)))
    first_like: dict[tuple[int, bytes], int] = {}
    for number, fact in enumerate(facts):
        parent[number] = first_like.setdefault((fact.fingerprint, fact.thumbnail), number)
    thumbnails = np.stack([np.frombuffer(fact.thumbnail, np.uint8) for fact in facts]) if facts else np.empty((0, 0))
    prints = np.array([fact.fingerprint for fact in facts], np.uint64)
    for bucket in _buckets(np.array(list(first_like.values()), np.int64), prints):
        for place, first in enumerate(bucket[:-1]):
            others = bucket[place + 1 :]
            near = _bits(prints[others] ^ prints[first]) <= _MOST_DIFFERENT
            others = others[near]
            distance = np.abs(thumbnails[others].astype(np.int16) - thumbnails[first]).mean(axis=1)
            for other in others[distance <= _NEAR]:
                _join(parent, int(first), int(other))
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(facts)):
        groups[_root(parent, number)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _buckets(numbers: np.ndarray, prints: np.ndarray) -> Iterator[np.ndarray]:
    """Those of some pictures' numbers that have one part of their fingerprints in common, the likest side by side."""
    edges = np.linspace(0, _BITS, _PARTS + 1).astype(int)
    for low, high in pairwise(edges):
        part = (prints[numbers] >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.lexsort((prints[numbers], part))
        _, starts = np.unique(part[order], return_index=True)
        for bucket in np.split(numbers[order], starts[1:]):
            if len(bucket) > 1:
                yield from (bucket[at : at + _MOST_IN_A_BUCKET] for at in range(0, len(bucket), _MOST_IN_A_BUCKET))


def _bits(values: np.ndarray) -> np.ndarray:
    """How many bits are set in each of some 64-bit numbers (N,)."""
    return np.unpackbits(values[:, None].view(np.uint8), axis=1).sum(axis=1)


def _root(parent: list[int], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number


def _join(parent: list[int], first: int, other: int) -> None:
    roots = sorted((_root(parent, first), _root(parent, other)))
    parent[roots[1]] = roots[0]
