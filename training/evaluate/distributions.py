"""How far two sets of pictures lie apart: Fréchet and kernel distance of features, as FID and KID take them."""

from __future__ import annotations

import numpy as np

from training.evaluate.metrics import NotMeasuredError

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, where sets are larger than a subset (torch-fidelity, clean-fid)."""
_SEED = 2020
_TOLERANCE = 1e-6


def frechet_distance(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray,
                     other_covariance: np.ndarray) -> float:  # fmt: skip
    """Squared Fréchet distance of two normal distributions (Dowson and Landau 1982).

    |m - n|^2 + tr(C) + tr(D) - 2 tr((C D)^(1/2)). The last trace is the nuclear norm of the product of roots of the two
    matrices, so that singular ones need no constant on the diagonal.

    Args:
        mean: (D,).
        covariance: (D, D), symmetric, not negative.
        other_mean: (D,).
        other_covariance: (D, D), the same.

    Raises:
        ValueError: Shapes do not fit, or a matrix is no covariance.
    """
    size = mean.shape[-1] if mean.ndim else 0
    if mean.shape != (size,) or other_mean.shape != (size,):
        raise ValueError(f"expected two means of equal length, got shapes {mean.shape} and {other_mean.shape}.")
    return _frechet(mean, _root(covariance, size), other_mean, _root(other_covariance, size))


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of the normal distributions with the means and (unbiased) covariances of two sets of features.

    It depends on the size of the sets: with fewer pictures than features it is too large, and only sets of equal size
    are to be compared (Chong and Forsyth 2020).

    Args:
        features: (N, D), one row a picture, N of at least 2.
        reference: (M, D), the same.

    Raises:
        NotMeasuredError: A set has fewer than two pictures.
        ValueError: Shapes do not fit, or features are not finite.
    """
    _check_sets("FID", features, reference)
    (mean, factor), (other_mean, other_factor) = _statistics(features), _statistics(reference)
    return _frechet(mean, factor, other_mean, other_factor)


def kid(features: np.ndarray, reference: np.ndarray, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE,
        generator: np.random.Generator | None = None) -> float:  # fmt: skip
    """Kernel distance (Bińkowski et al. 2018): squared MMD of the kernel (x y / D + 1)^3, unbiased, also below zero.

    Sets that fit into a subset are compared as a whole. Of larger ones random subsets are, and the mean is taken.

    Args:
        features: (N, D), one row a picture, N of at least 2.
        reference: (M, D), the same.
        subsets: How many.
        subset_size: Pictures in each; fewer where a set has fewer.
        generator: Chooses the subsets; a new one with the same seed each time where None is given.

    Raises:
        NotMeasuredError: A set has fewer than two pictures.
        ValueError: Shapes do not fit, features are not finite, or a number is out of range.
    """
    _check_sets("KID", features, reference)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"KID: expected at least 1 subset of at least 2 pictures, got {subsets} of {subset_size}.")
    x, y = features.astype(np.float64), reference.astype(np.float64)
    if max(len(x), len(y)) <= subset_size:
        return polynomial_mmd(x, y)
    generator = generator or np.random.default_rng(_SEED)
    size = min(subset_size, len(x), len(y))
    chosen = ([generator.choice(one, size, replace=False) for one in (x, y)] for _ in range(subsets))
    return float(np.mean([polynomial_mmd(*pair) for pair in chosen]))


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) of (N, D) and (M, D), kernel of KID."""
    return _mean_of_others(_kernel(x, x)) + _mean_of_others(_kernel(y, y)) - 2 * float(_kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_others(kernel: np.ndarray) -> float:
    """Mean of a square matrix without its diagonal."""
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))


def _statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,), and R with R^T R = the covariance, (min(N, D), D)."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    return mean, np.asarray(np.linalg.qr(factor, mode="r")) if len(factor) > factor.shape[1] else factor


def _root(covariance: np.ndarray, size: int) -> np.ndarray:
    """R (D, D) with R^T R = the covariance."""
    if covariance.shape != (size, size) or not np.allclose(covariance, covariance.T):
        raise ValueError(f"expected a symmetric covariance of {size}x{size} numbers, got shape {covariance.shape}.")
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -_TOLERANCE * max(values[-1], 1e-300):
        raise ValueError(f"expected a covariance, which has no negative eigenvalue, got one of {values[0]:.3g}.")
    noise = size * np.finfo(np.float64).eps * values[-1]  # its root would not be small
    return np.sqrt(np.where(values > noise, values, 0))[:, None] * vectors.T


def _frechet(mean: np.ndarray, root: np.ndarray, other_mean: np.ndarray, other_root: np.ndarray) -> float:
    spread = (root**2).sum() + (other_root**2).sum() - 2 * np.linalg.norm(root @ other_root.T, "nuc")
    return max(0.0, float(((mean - other_mean) ** 2).sum() + spread))


def _check_sets(name: str, features: np.ndarray, reference: np.ndarray) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        shapes = f"{features.shape} and {reference.shape}"
        raise ValueError(f"{name}: expected features (N, D) and (M, D) of one network, got shapes {shapes}.")
    if min(len(features), len(reference)) < 2:
        raise NotMeasuredError(f"{name}: expected sets of at least 2 pictures, got {len(features)}, {len(reference)}.")
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise ValueError(f"{name}: features are not finite.")
