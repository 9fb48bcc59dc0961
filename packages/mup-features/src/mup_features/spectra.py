"""Gram matrices of features and what their eigenvalues say; float64 throughout.

With features A (N samples x n) the Gram is K = A A' / n; the paper's has no 1/n (`normalize=False`). Features
of the samples are linearly independent exactly if lambda_min(K) > 0, and how far from dependent they are is a
matter of the whole spectrum:

    stable rank tr K / lambda_max        effective rank exp(-sum p log p), p = lambda / tr K
    participation ratio (sum lambda)^2 / sum lambda^2

Eigenvalues come back raw. Rounding moves each by up to about N eps lambda_max (`eigenvalue_floor`), so a
computed lambda_min may be slightly negative: clip it for display, never before a judgement.

Source: Chen et al. 2025 (arXiv 2503.09565), section 6; Roy and Vetterli 2007 for the effective rank.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

EPS = float(np.finfo(np.float64).eps)


def gram(features: ArrayLike, *, normalize: bool = True) -> Float[np.ndarray, "samples samples"]:
    """Gram matrix of the rows.

    Args:
        features: real (samples, n), any float type; the products are taken in float64.
        normalize: divide by n, so that the entries stay of order one as the width grows.

    Raises:
        ValueError: if features is no finite matrix with at least one row and column.
    """
    features = as_features(features)
    return features @ features.T / (features.shape[1] if normalize else 1)


def centred_gram(K: ArrayLike) -> Float[np.ndarray, "samples samples"]:
    """Gram of the features after their mean over the samples is subtracted: H K H, H = I - 11'/N."""
    K = as_gram(K)
    return K - K.mean(0) - K.mean(1)[:, None] + K.mean()


def spectrum(K: ArrayLike) -> Float[np.ndarray, " samples"]:
    """Eigenvalues in ascending order, raw (tiny negative ones are rounding)."""
    return np.linalg.eigvalsh(as_gram(K))


def lambda_min(K: ArrayLike) -> float:
    """Smallest eigenvalue, raw."""
    return float(spectrum(K)[0])


def centred_lambda_min(K: ArrayLike) -> float:
    """Smallest eigenvalue of the centred Gram besides the zero that centring makes.

    It is the smallest over directions orthogonal to (1, ..., 1). Nearly constant features (sigmoid) look
    almost dependent in lambda_min because of their common mean; here that mean is gone.

    Raises:
        ValueError: if K is no Gram of at least two samples.
    """
    K = as_gram(K)
    if len(K) < 2:
        raise ValueError(f"K must have at least 2 samples to be centred, got {len(K)}")
    # The constant direction is lifted to the trace, above every other eigenvalue.
    return float(np.linalg.eigvalsh(centred_gram(K) + np.trace(K) / len(K))[0])


def eigenvalue_floor(K: ArrayLike) -> float:
    """What rounding alone can do to an eigenvalue: N eps ||K||_2, the usual threshold of a numerical rank."""
    return _floor(spectrum(K))


def numerical_rank(K: ArrayLike) -> int:
    """Number of eigenvalues above `eigenvalue_floor`."""
    return _numerical_rank(spectrum(K))


def stable_rank(K: ArrayLike) -> float:
    """Tr K / lambda_max, between 1 and N; 0 for K = 0."""
    return _stable_rank(spectrum(K))


def effective_rank(K: ArrayLike) -> float:
    """Exp of the entropy of the normalised eigenvalues, between 1 and N; 0 for K = 0."""
    return _effective_rank(spectrum(K))


def participation_ratio(K: ArrayLike) -> float:
    """(sum lambda)^2 / sum lambda^2, between 1 and N; 0 for K = 0."""
    return _participation_ratio(spectrum(K))


def condition_number(K: ArrayLike) -> float:
    """lambda_max / lambda_min; infinite where lambda_min does not exceed `eigenvalue_floor`."""
    return _condition_number(spectrum(K))


def spectral_measures(K: ArrayLike) -> dict[str, float]:
    """All measures of one Gram from one eigendecomposition.

    Returns:
        lambda_min, lambda_max, floor, numerical_rank, stable_rank, effective_rank, participation_ratio,
        condition_number; with two samples or more also centred_lambda_min.
    """
    K = as_gram(K)
    values = np.linalg.eigvalsh(K)
    found = {
        "lambda_min": float(values[0]),
        "lambda_max": float(values[-1]),
        "floor": _floor(values),
        "numerical_rank": _numerical_rank(values),
        "stable_rank": _stable_rank(values),
        "effective_rank": _effective_rank(values),
        "participation_ratio": _participation_ratio(values),
        "condition_number": _condition_number(values),
    }
    return found | ({"centred_lambda_min": centred_lambda_min(K)} if len(K) > 1 else {})


def jackknife_lambda_min(K: ArrayLike) -> tuple[float, float]:
    """lambda_min of the mean of replicated Grams, and its standard error by the jackknife over replicas.

    The mean of the replicas' own lambda_min would be biased downwards: noise always lowers the smallest
    eigenvalue on average.

    Args:
        K: real (replicas, samples, samples), at least two replicas.

    Raises:
        ValueError: if there are fewer than two replicas, or one is no Gram.
    """
    replicas = np.asarray(K, dtype=np.float64)
    if replicas.ndim != 3 or len(replicas) < 2:
        raise ValueError(f"K must be (replicas >= 2, samples, samples), got shape {replicas.shape}")
    R = len(replicas)
    total = replicas.sum(0)
    left_out = np.array([lambda_min((total - replica) / (R - 1)) for replica in replicas])
    stderr = np.sqrt((R - 1) / R * np.sum((left_out - left_out.mean()) ** 2))
    return lambda_min(total / R), float(stderr)


def as_features(features: ArrayLike, name: str = "features") -> Float[np.ndarray, "samples n"]:
    """The array in float64.

    Raises:
        ValueError: if it is no finite real matrix with at least one row and one column.
    """
    array = _real(features, name)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be (samples >= 1, n >= 1), got shape {array.shape}")
    return array


def as_gram(K: ArrayLike, name: str = "K") -> Float[np.ndarray, "samples samples"]:
    """The matrix in float64, made exactly symmetric.

    Raises:
        ValueError: if it is not square, finite and symmetric (up to 1e-6 of its largest entry, which leaves
            room for one that was computed in float32).
    """
    array = _real(K, name)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(f"{name} must be (samples, samples) with samples >= 1, got shape {array.shape}")
    asymmetry, size = float(np.abs(array - array.T).max()), float(np.abs(array).max())
    if asymmetry > 1e-6 * size:
        raise ValueError(f"{name} must be symmetric, got a difference of {asymmetry:.3g} from {size:.3g}")
    return (array + array.T) / 2


def _real(value: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {(~np.isfinite(array)).sum()} entries that are not")
    return array


def _floor(values: np.ndarray) -> float:
    return float(len(values) * EPS * np.abs(values).max())


def _numerical_rank(values: np.ndarray) -> int:
    return int(np.sum(values > _floor(values)))


def _stable_rank(values: np.ndarray) -> float:
    return float(values.sum() / values[-1]) if values[-1] > 0 else 0.0


def _effective_rank(values: np.ndarray) -> float:
    positive = values[values > 0]
    if not len(positive):
        return 0.0
    shares = positive / positive.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _participation_ratio(values: np.ndarray) -> float:
    squares = np.sum((values / (values[-1] or 1.0)) ** 2)
    return float(np.sum(values / (values[-1] or 1.0)) ** 2 / squares) if values[-1] > 0 else 0.0


def _condition_number(values: np.ndarray) -> float:
    return float(values[-1] / values[0]) if values[0] > _floor(values) else float("inf")
