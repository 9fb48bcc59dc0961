"""What training did to features: change, joint space-time diversity, similarity of kernels, classes, units.

Measures of movement take features or, where a network is too wide to keep them, the inner products in which
they can be written: ||a - a0||^2 is all that the change needs, and the Gram of the rows [A0; A] is made of
the two Grams and the cross product A A0' / n. Everything else is a function of Grams. float64 throughout.

Source: Chen et al. 2025 (arXiv 2503.09565), section 6; Kornblith et al. 2019 (CKA); Song et al. 2012
(HSIC_1); Cristianini et al. 2001 (alignment); Papyan et al. 2020 (NC1).
"""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .spectra import as_features, as_gram, centred_gram, lambda_min


def change(features: ArrayLike, initial: ArrayLike, *, relative: bool = True) -> float:
    """Mean movement of the features: mean_i ||A_i - A0_i|| / ||A0_i||, the paper's first measure.

    Where features vanish at initialisation (IP) the ratio explodes; `relative=False` gives
    mean_i ||A_i - A0_i|| / sqrt(n), which stays comparable between widths.

    Args:
        features: real (samples, n), now.
        initial: real (samples, n), at initialisation.
        relative: divide by the norms at initialisation. A sample whose features were zero and still are
            counts as unmoved, one whose features were zero and are not makes the mean infinite.

    Raises:
        ValueError: if the shapes differ or entries are not finite.
    """
    A, A0 = as_features(features), as_features(initial, "initial")
    if A.shape != A0.shape:
        raise ValueError(f"initial must have the shape of features {A.shape}, got {A0.shape}")
    n = A.shape[1]
    return change_from_squares(((A - A0) ** 2).sum(1) / n, (A0**2).sum(1) / n, relative=relative)


def change_from_squares(displacement: ArrayLike, initial: ArrayLike, *, relative: bool = True) -> float:
    """The change from ||A_i - A0_i||^2 / n and ||A0_i||^2 / n of each sample.

    Args:
        displacement: real (samples,), >= 0.
        initial: real (samples,), >= 0.
        relative: as in `change`.
    """
    moved, size = np.sqrt(np.asarray(displacement, float)), np.sqrt(np.asarray(initial, float))
    if not relative:
        return float(moved.mean())
    still = (moved == 0) & (size == 0)
    with np.errstate(divide="ignore"):
        return float(np.mean(np.where(still, 0.0, moved) / np.where(still, 1.0, size)))


def joint_gram(times: Sequence[ArrayLike], *, normalize: bool = True) -> Float[np.ndarray, "rows rows"]:
    """Gram of the samples' features at several times, rows stacked time by time: the paper's third measure.

    Its smallest eigenvalue is positive only if training moved the features of every sample in a direction of
    its own. It needs n >= rows = (number of times) x samples; a narrower layer is rank-deficient whatever it
    learned, and one below 4 x rows is close to it by chance.

    Args:
        times: at least two arrays (samples, n).
        normalize: divide by n.

    Raises:
        ValueError: if there are fewer than two times or their shapes differ.

    Warns:
        UserWarning: if n < 4 x rows.
    """
    arrays = [as_features(features, f"times[{t}]") for t, features in enumerate(times)]
    if len(arrays) < 2:
        raise ValueError(f"times must hold at least 2 arrays, got {len(arrays)}")
    for t, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"times[{t}] must have the shape of times[0] {arrays[0].shape}, got {array.shape}"
            )
    n, rows = arrays[0].shape[1], len(arrays) * len(arrays[0])
    note = joint_width_note(n, rows)
    if note is not None:
        warnings.warn(note, stacklevel=2)
    stacked = np.concatenate(arrays)
    return stacked @ stacked.T / (n if normalize else 1)


def joint_gram_from_blocks(
    initial: ArrayLike, cross: ArrayLike, now: ArrayLike
) -> Float[np.ndarray, "rows rows"]:
    """The joint Gram of two times from K0, <A_i, A0_j> and K, all in one normalisation."""
    K0, K = as_gram(initial, "initial"), as_gram(now, "now")
    C = np.asarray(cross, dtype=np.float64)
    if not K0.shape == C.shape == K.shape:
        raise ValueError(f"initial, cross and now must have one shape, got {K0.shape}, {C.shape}, {K.shape}")
    return np.block([[K0, C.T], [C, K]])


def joint_width_note(n: int, rows: int) -> str | None:
    """Why the joint Gram of so many rows says little at width n; None where it does say something."""
    if n < rows:
        return f"a joint Gram of {rows} rows needs width n >= {rows}, got {n}: its lambda_min is exactly zero"
    if n < 4 * rows:
        return f"joint Gram: width {n} is below 4 x {rows} rows, so a small lambda_min may be chance"
    return None


def kernel_distance(K0: ArrayLike, K: ArrayLike) -> float:
    """1 - <K0, K> / (||K0|| ||K||) in Frobenius norm, between 0 and 1 for Grams; blind to scale."""
    return 1.0 - _cosine(*_pair(K0, K))


def relative_frobenius_change(K0: ArrayLike, K: ArrayLike) -> float:
    """||K - K0|| / ||K0|| in Frobenius norm; also the change of an empirical NTK."""
    K0, K = _pair(K0, K)
    return float(np.linalg.norm(K - K0) / _nonzero(np.linalg.norm(K0), "K0"))


def linear_cka(K: ArrayLike, L: ArrayLike, *, unbiased: bool = False) -> float:
    """Centred kernel alignment of two Grams of the same samples; 1 if the features differ by a rotation.

    Args:
        K: Gram (samples, samples).
        L: Gram (samples, samples).
        unbiased: HSIC_1 in place of the biased HSIC, whose value grows with n / samples even for unrelated
            features. It may be negative; it needs four samples, and is NaN where HSIC_1(K, K) <= 0.

    Raises:
        ValueError: if the shapes differ, a centred Gram vanishes, or there are too few samples.
    """
    K, L = _pair(K, L, names=("K", "L"))
    if not unbiased:
        return _cosine(centred_gram(K), centred_gram(L))
    if len(K) < 4:
        raise ValueError(f"the unbiased CKA needs at least 4 samples, got {len(K)}")
    own = hsic1(K, K) * hsic1(L, L)
    return hsic1(K, L) / np.sqrt(own) if own > 0 else float("nan")


def hsic1(K: ArrayLike, L: ArrayLike) -> float:
    """Unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5)."""
    K, L = _pair(K, L, names=("K", "L"))
    N = len(K)
    if N < 4:
        raise ValueError(f"hsic1 needs at least 4 samples, got {N}")
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    row_K, row_L = K.sum(1), L.sum(1)
    total = np.sum(K * L) + row_K.sum() * row_L.sum() / ((N - 1) * (N - 2)) - 2 * row_K @ row_L / (N - 2)
    return float(total / (N * (N - 3)))


def kernel_target_alignment(K: ArrayLike, targets: ArrayLike, *, centred: bool = False) -> float:
    """<K, Y Y'> / (||K|| ||Y Y'||): how much of the kernel points along the targets.

    Args:
        K: Gram (samples, samples).
        targets: real (samples,) or (samples, outputs).
        centred: centre both first.
    """
    K = as_gram(K)
    Y = np.asarray(targets, dtype=np.float64)
    Y = as_features(Y[:, None] if Y.ndim == 1 else Y, "targets")
    if len(Y) != len(K):
        raise ValueError(f"targets must have one row for each of the {len(K)} samples, got {len(Y)}")
    T = Y @ Y.T
    return _cosine(centred_gram(K), centred_gram(T)) if centred else _cosine(K, T)


def angle_matrix(K: ArrayLike) -> Float[np.ndarray, "samples samples"]:
    """Angles between the samples' features in radians; NaN where features are zero."""
    K = as_gram(K)
    norms = np.sqrt(np.maximum(np.diag(K), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        angles = np.arccos(np.clip(K / np.outer(norms, norms), -1.0, 1.0))
    # arccos near 1 turns rounding of 1e-16 into angles of 1e-8; a vector has angle zero with itself.
    np.fill_diagonal(angles, np.where(norms > 0, 0.0, np.nan))
    return angles


def class_separation(K: ArrayLike, labels: ArrayLike) -> float:
    """Tr Sigma_B / tr Sigma_W: scatter of the class means over that within classes; inf if collapsed."""
    K = as_gram(K)
    to_within, to_between, _ = _class_maps(labels, len(K))
    spread = np.trace(to_within @ K @ to_within.T) / len(K)
    return float(np.trace(to_between @ K @ to_between.T) / spread) if spread > 0 else float("inf")


def neural_collapse(K: ArrayLike, labels: ArrayLike) -> float:
    """NC1 = tr(Sigma_W pinv(Sigma_B)) / C, zero when every class has collapsed to its mean.

    The n x n covariances are not formed: with B the centred class means over sqrt(C), W the samples minus
    their class mean, tr(W'W/N pinv(B'B)) = ||pinv(B B') B W'||^2 / N, and B B', B W' follow from the Gram.

    Raises:
        ValueError: if there are fewer than two classes, or the class means coincide.
    """
    K = as_gram(K)
    to_within, to_between, C = _class_maps(labels, len(K))
    between = to_between @ K @ to_between.T
    if np.trace(between) <= 0:
        raise ValueError("labels must split the samples into classes of different means, got equal ones")
    # Centring leaves one eigenvalue at rounding level; everything below that belongs to it.
    inverse = np.linalg.pinv(between, rcond=len(K) * np.finfo(float).eps * 10, hermitian=True)
    return float(np.sum((inverse @ to_between @ K @ to_within.T) ** 2) / len(K) / C)


def dead_fraction(features: ArrayLike) -> float:
    """Fraction of units that are exactly zero for every sample (ReLU units that never fire)."""
    return float(np.mean(~as_features(features).any(0)))


def saturation_fraction(
    features: ArrayLike, low: float = -1.0, high: float = 1.0, margin: float = 0.01
) -> float:
    """Fraction of activations within `margin` x (high - low) of the ends of the activation's range.

    Args:
        features: post-activations (samples, n).
        low: lower end of the activation's range (tanh, erf: -1; sigmoid: 0).
        high: upper end.
        margin: in (0, 0.5).

    Raises:
        ValueError: if low >= high or margin is out of range.
    """
    if not low < high:
        raise ValueError(f"low must be below high, got {low!r} and {high!r}")
    if not 0 < margin < 0.5:
        raise ValueError(f"margin must be in (0, 0.5), got {margin!r}")
    A, width = as_features(features), margin * (high - low)
    return float(np.mean((low + width >= A) | (high - width <= A)))


def joint_lambda_min(times: Sequence[ArrayLike]) -> float:
    """Smallest eigenvalue of `joint_gram`."""
    return lambda_min(joint_gram(times))


def _class_maps(labels: ArrayLike, samples: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Linear maps from samples to samples minus their class mean, and to centred class means over sqrt(C)."""
    labels = np.asarray(labels)
    if labels.shape != (samples,):
        raise ValueError(f"labels must be ({samples},), one for each sample, got shape {labels.shape}")
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least 2 classes, got {len(classes)}")
    member = (labels[:, None] == classes).astype(np.float64)
    to_means = (member / member.sum(0)).T
    to_between = (to_means - to_means.mean(0)) / np.sqrt(len(classes))
    return np.eye(samples) - member @ to_means, to_between, len(classes)


def _pair(K: ArrayLike, L: ArrayLike, names: tuple[str, str] = ("K0", "K")) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_gram(K, names[0]), as_gram(L, names[1])
    if first.shape != second.shape:
        raise ValueError(f"{names[1]} must have the shape of {names[0]} {first.shape}, got {second.shape}")
    return first, second


def _cosine(K: np.ndarray, L: np.ndarray) -> float:
    sizes = [_nonzero(np.linalg.norm(matrix), "the (centred) Gram") for matrix in (K, L)]
    return float(np.sum((K / sizes[0]) * (L / sizes[1])))


def _nonzero(size: float | np.floating, name: str) -> float:
    if not size > 0:
        raise ValueError(f"{name} must not vanish, got norm {size!r}")
    return float(size)
