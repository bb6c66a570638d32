"""The pictures of a set: how many, how large, broken, compressed before, twice there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.check.duplicates import find_duplicates
from training.check.facts import ESTIMATOR, PictureFacts, look_at
from training.check.findings import Finding, named, of
from training.parallel import in_processes

_FEW = 100
_CHUNK = 8
_WORSE_THAN_SEEN = 10.0
"""The estimate of a quality from pixels may be so far off."""
_FAINT_STEPS, _VISIBLE_STEPS = 1.06, 1.3
"""Of clean photographs (LIVE1) none has more than 1.05; of those compressed at quality 50 all have more than 1.07, at
10 more than 1.36."""


@dataclass(frozen=True)
class Expectation:
    """What the pictures have to be good for.

    Args:
        side: Of what is cut out of them, pixels.
        quality: JPEGs of a lower one are no ground truth.
    """

    side: int
    quality: float = 75.0


def look_at_all(paths: Sequence[Path], jobs: int = os.cpu_count() or 1) -> list[PictureFacts]:
    """Decode all pictures, with a progress bar.

    Raises:
        LostProcessError: A process was killed.
    """
    looked = in_processes(look_at, paths, jobs if len(paths) > 4 * _CHUNK else 1, _CHUNK)
    return list(tqdm(looked, total=len(paths), unit="picture", dynamic_ncols=True, desc="looking at pictures"))


def judge(name: str, facts: Sequence[PictureFacts], expected: Expectation) -> list[Finding]:
    """What is to be said of a set.

    Args:
        name: Of the set, e.g. `data.train`.
        facts: Of its pictures.
        expected: What they have to be good for.
    """
    whole = [fact for fact in facts if fact.reason is None]
    findings = [*_broken(name, facts, whole)]
    if not whole:
        return findings
    return [
        _described(name, whole),
        *findings,
        *_few(name, whole),
        *_small(name, whole, expected),
        *_compressed(name, whole, expected),
        *_twice(name, whole),
    ]


def judge_overlap(train: Sequence[PictureFacts], validation: Sequence[PictureFacts], split: bool) -> list[Finding]:
    """Pictures that are trained on and validated on.

    Args:
        train: Facts of the pictures that are trained on.
        validation: Of the others.
        split: Whether these were taken out of the same set.
    """
    ours = [fact for fact in train if fact.reason is None]
    both = [*ours, *(fact for fact in validation if fact.reason is None)]
    leaks = [
        both[number]
        for group in find_duplicates(both)
        if group[0] < len(ours)
        for number in group
        if number >= len(ours)
    ]
    if not leaks:
        return []
    advice = (
        "remove one of each two, or give --data.validation a folder of other pictures" if split
        else "remove them from one of the two"
    )  # fmt: skip
    text = (
        f"{of(len(leaks), len(validation))} for validation are trained on as well {named([f.path for f in leaks])}: "
        f"the figures will be too good; {advice}."
    )
    return [Finding("warning", text, _names(leaks))]


def _names(facts: Sequence[PictureFacts]) -> tuple[str, ...]:
    return tuple(str(fact.path) for fact in facts)


def _described(name: str, facts: Sequence[PictureFacts]) -> Finding:
    sizes = np.array([fact.width * fact.height for fact in facts]) / 1e6
    shorter = min(min(fact.width, fact.height) for fact in facts)
    return Finding(
        "note",
        f"{name}: {len(facts)} pictures of {sizes.min():.2f} to {sizes.max():.1f} megapixels (half of them above "
        f"{np.median(sizes):.2f}), shortest side {shorter}, {sizes.sum():.0f} megapixels in all.",
    )


def _broken(name: str, facts: Sequence[PictureFacts], whole: Sequence[PictureFacts]) -> list[Finding]:
    broken = [fact for fact in facts if fact.reason is not None]
    if not broken:
        return []
    level = "warning" if whole else "problem"
    advice = "they are left out; get them again or remove them" if whole else "nothing is left; get them again"
    example = f"{broken[0].path} ({broken[0].reason})"
    text = f"{name}: {of(len(broken), len(facts))} cannot be decoded, e.g. {example}: {advice}."
    return [Finding(level, text, _names(broken))]


def _few(name: str, facts: Sequence[PictureFacts]) -> list[Finding]:
    if len(facts) >= _FEW or name != "data.train":
        return []
    text = f"{name}: {len(facts)} pictures are few: a network soon knows them by heart. Some hundreds do; add some."
    return [Finding("warning", text)]


def _small(name: str, facts: Sequence[PictureFacts], expected: Expectation) -> list[Finding]:
    small = [fact for fact in facts if min(fact.width, fact.height) < expected.side]
    if not small:
        return []
    text = (
        f"{name}: {of(len(small), len(facts))} have a side below {expected.side} pixels, which are cut out of them "
        f"{named([fact.path for fact in small])}: they are mirrored at their edges, or enlarged with augmentation "
        "paper. Lower --data.crop, or leave them out."
    )
    return [Finding("warning", text, _names(small))]


def _compressed(name: str, facts: Sequence[PictureFacts], expected: Expectation) -> list[Finding]:
    """Pictures that are no ground truth, each in one of three lines: by its file, its pixels, or its grid."""
    findings: list[Finding] = []
    poor = [fact for fact in facts if fact.file_quality is not None and fact.file_quality < expected.quality]
    if poor:
        worst = min(fact.file_quality or 0 for fact in poor)
        what = f"are JPEGs of a quality below {expected.quality:g}, down to {worst:.0f}"
        findings.append(_poor(name, facts, poor, what))
    seen = [fact for fact in facts if _was_jpeg(fact, expected)]
    if seen:
        worst = min(fact.seen_quality or 0 for fact in seen)
        findings.append(_poor(name, facts, seen, f"look as if they had been JPEGs of a quality down to {worst:.0f}"))
    known = {fact.path for fact in (*poor, *seen)}
    stepped = [fact for fact in facts if fact.steps > _VISIBLE_STEPS and fact.path not in known]
    if stepped:
        findings.append(_poor(name, facts, stepped, "show the grid of a strong compression"))
    if not ESTIMATOR.exists() and any(fact.file_quality is None for fact in facts):
        text = f"{ESTIMATOR.name} is missing from the folder weights: what was a JPEG once is told by its grid alone."
        findings.append(Finding("note", text))
    return findings


def _was_jpeg(fact: PictureFacts, expected: Expectation) -> bool:
    """By its pixels. The estimate is that of photographs: a grid has to speak for it as well."""
    quality = fact.seen_quality
    return quality is not None and quality < expected.quality - _WORSE_THAN_SEEN and fact.steps > _FAINT_STEPS


def _poor(name: str, facts: Sequence[PictureFacts], poor: Sequence[PictureFacts], what: str) -> Finding:
    text = (
        f"{name}: {of(len(poor), len(facts))} {what} {named([fact.path for fact in poor])}: a network learns to leave "
        "what they have of artefacts. Leave them out, or shrink them: --data.augmentation crop --data.downscale 2 4."
    )
    return Finding("warning", text, _names(poor))


def _twice(name: str, facts: Sequence[PictureFacts]) -> list[Finding]:
    groups = find_duplicates(facts)
    if not groups:
        return []
    spare = [facts[number] for group in groups for number in group[1:]]
    example = " and ".join(str(facts[number].path) for number in groups[0][:2])
    text = (
        f"{name}: {of(len(spare), len(facts))} are there already in another file, e.g. {example}: they are seen more "
        "often than others; remove them."
    )
    return [Finding("warning", text, _names(spare))]
