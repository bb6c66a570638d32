"""The protocols `quality` and `embeddings`: how well qualities are told, and how prompts lie by quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from training.evaluate.options import EvaluateOptions
from training.evaluate.pictures import Condition, Source, compressed, read_clean
from training.evaluate.results import Told
from training.evaluate.seeing import See, Seen, load_seeing, seeing
from training.evaluate.systems import RestorerOnDisk

_NEIGHBOURS = 5
_FEWEST_FOR_A_MAP = 6
_PERPLEXITY = 30.0


@dataclass(frozen=True)
class Look:
    """What was seen in one picture at one quality."""

    picture: int
    quality: int
    seen: Seen


def measure_quality(
    options: EvaluateOptions, restorers: Sequence[RestorerOnDisk], sources: Sequence[Source], device: torch.device,
    left_out: dict[str, str],
) -> tuple[list[dict[str, Any]], list[Told]]:  # fmt: skip
    """For each restorer and quality: mean absolute error, mean error, and whether it was trained on (CODiff, Fig. 7).

    Returns:
        These rows, and what was told of each picture. Pictures that cannot be read are added to `left_out`.

    Raises:
        ValueError: No restorer tells qualities.
    """
    rows, lines = [], []
    qualities, trained = options.qualities_of("quality"), set(options.trained_qualities)
    for restorer in seeing("quality", restorers):
        looks = _looks(load_seeing(restorer, device), sources, options, "quality", restorer.label, left_out)
        told = [Told(restorer.label, sources[look.picture].name, look.quality, look.seen.quality)
                for look in looks if look.seen.quality is not None]  # fmt: skip
        lines += told
        for quality in qualities:
            errors = np.array([line.told - quality for line in told if line.quality == quality])
            rows.append({
                "restorer": restorer.label, "quality": quality, "trained": quality in trained if trained else None,
                "error": float(np.abs(errors).mean()), "bias": float(errors.mean()), "pictures": len(errors),
            })  # fmt: skip
    return rows, lines


def map_embeddings(
    options: EvaluateOptions, restorers: Sequence[RestorerOnDisk], sources: Sequence[Source], device: torch.device,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """For each restorer a map of its prompts in two dimensions (t-SNE), and a figure that needs no map.

    The figure: how many of the 5 nearest prompts of other pictures, by cosine, are of the same quality; chance is one
    over the number of qualities (CODiff, Fig. 4; SODiff, Fig. 3). Pictures that cannot be read are
    added to `left_out`.

    Raises:
        ValueError: No restorer makes prompts, or the package for the map is not installed.
    """
    maps = []
    _require_sklearn()
    for restorer in seeing("embeddings", restorers):
        looks = _looks(load_seeing(restorer, device), sources, options, "embeddings", restorer.label, left_out)
        vectors = torch.stack([look.seen.embedding for look in looks if look.seen.embedding is not None]).numpy()
        if len(vectors) < _FEWEST_FOR_A_MAP:
            raise ValueError(
                f"--protocol embeddings: expected {_FEWEST_FOR_A_MAP} pictures times qualities at least, got "
                f"{len(vectors)}. Give more pictures or --qualities."
            )
        points = _flat_map(vectors, options.settings.seed)
        maps.append({
            "restorer": restorer.label, "same_quality": same_quality_share(looks, vectors),
            "chance": 1 / len(options.qualities_of("embeddings")),
            "points": [
                {"x": float(x), "y": float(y), "quality": look.quality, "picture": sources[look.picture].name}
                for (x, y), look in zip(points, looks, strict=True)
            ],
        })  # fmt: skip
    return maps


def same_quality_share(looks: Sequence[Look], vectors: np.ndarray) -> float | None:
    """The share of the nearest prompts of other pictures that are of the same quality, 0 to 1; None for one picture.

    Args:
        looks: Of which picture and quality each vector is.
        vectors: (N, D).
    """
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    likeness = units @ units.T
    pictures = np.array([look.picture for look in looks])
    qualities = np.array([look.quality for look in looks])
    likeness[pictures[:, None] == pictures[None]] = -np.inf
    others = int(np.isfinite(likeness).sum(axis=1).min())
    if not others:
        return None
    nearest = np.argsort(-likeness, axis=1, kind="stable")[:, : min(_NEIGHBOURS, others)]
    return float((qualities[nearest] == qualities[:, None]).mean())


def _looks(
    see: See, sources: Sequence[Source], options: EvaluateOptions, protocol: str, label: str, left_out: dict[str, str]
) -> list[Look]:
    looks = []
    for number, source in enumerate(tqdm(sources, unit="picture", desc=label, dynamic_ncols=True)):
        assert source.clean is not None
        try:
            clean = read_clean(source.clean)
        except (ValueError, OSError) as error:
            if source.name not in left_out:
                tqdm.write(f"left out: {source.name}: {error}")
            left_out.setdefault(source.name, str(error))
            continue
        for quality in options.qualities_of(protocol):
            degraded = compressed(clean, Condition(str(quality), quality), options.subsampling, source.name)
            with torch.inference_mode():
                looks.append(Look(number, quality, see(degraded.pixels)))
    if not looks:
        raise ValueError(f"none of the {len(sources)} pictures can be read, e.g. {sources[0].name}")
    return looks


def _require_sklearn() -> None:
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--protocol embeddings: scikit-learn, which draws the map, cannot be imported ({error}). "
            "Run `pip install scikit-learn`."
        ) from error


def _flat_map(vectors: np.ndarray, seed: int) -> np.ndarray:
    """(N, 2) by t-SNE, from the two principal components, so that the same vectors give the same map."""
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", metric="cosine", random_state=seed).fit_transform(vectors)
