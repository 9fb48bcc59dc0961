"""The assumptions and conclusions of the global-convergence theorem as checks on numbers.

    assumption 4.1   check_data                      no two samples look alike from a third
    assumption 4.3   check_activation                phi is GOOD
    theorem 4.5      check_independence              features of distinct samples stay independent
    (its proof)      covariance_preservation_error   Gaussian parts keep the covariance of what they multiply
    corollary 4.6    global_min_certificate          a vanishing gradient means a vanishing error

`activation_checks` and `certificates` hold the second and the last.

Source: Chen et al. 2025 (arXiv 2503.09565), sections 4 and 5.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .activation_checks import ActivationReport, check_activation
from .certificates import (
    Certificate,
    TangentCertificate,
    global_min_certificate,
    tangent_certificate,
    tangent_kernel,
)
from .spectra import EPS, as_features, as_gram

Reading = Literal["distinct", "inclusive"]
Layered = Mapping[int, ArrayLike] | Sequence[ArrayLike]

__all__ = [
    "ActivationReport",
    "Certificate",
    "DataReport",
    "IndependenceEntry",
    "IndependenceReport",
    "TangentCertificate",
    "check_activation",
    "check_data",
    "check_independence",
    "covariance_preservation_error",
    "global_min_certificate",
    "tangent_certificate",
    "tangent_kernel",
]


@dataclass(frozen=True)
class DataReport:
    """Whether the data satisfy assumption 4.1.

    Attributes:
        holds: reading -> whether it is satisfied.
        failing_triples: reading -> triples (i, j, k) with |<xi_i, xi_j>| = |<xi_i, xi_k>|. Of several equal
            products only neighbours are listed, and at most `max_triples`.
        failing_count: reading -> number of such neighbours in all.
        orthogonal_pairs: pairs i <= j with <xi_i, xi_j> = 0; i = j is a zero sample.
        margins: reading -> smallest gap of the products, as a cosine: ||xi_i|| max_j ||xi_j|| is 1.
        product_margin: smallest |cosine| of two different samples; 0 if a sample is zero.
        duplicates: pairs of equal samples.
        negated: pairs with xi_j = -xi_i.
    """

    holds: dict[str, bool]
    failing_triples: dict[str, list[tuple[int, int, int]]]
    failing_count: dict[str, int]
    orthogonal_pairs: list[tuple[int, int]]
    margins: dict[str, float]
    product_margin: float
    duplicates: list[tuple[int, int]]
    negated: list[tuple[int, int]]


@dataclass(frozen=True)
class IndependenceEntry:
    """Independence of the features of one layer at one step.

    Attributes:
        layer: 1..L.
        kind: "pre" or "post".
        step: index of the recorded step.
        lambda_min: smallest eigenvalue of the Gram, raw.
        threshold: what it must exceed: rounding, or a number of standard errors.
        status: "independent"; "dependent" (at rounding level); "unresolved" (within the standard errors);
            "exempt" (first pre-activations, which are linear in inputs that are dependent themselves).
    """

    layer: int
    kind: Literal["pre", "post"]
    step: int
    lambda_min: float
    threshold: float
    status: Literal["independent", "dependent", "unresolved", "exempt"]


@dataclass(frozen=True)
class IndependenceReport:
    """Independence at every layer and step.

    Attributes:
        entries: one for each layer, kind and step.
    """

    entries: tuple[IndependenceEntry, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that the theorem speaks about is independent."""
        return not self.failures

    @property
    def failures(self) -> tuple[IndependenceEntry, ...]:
        """Entries that are dependent or unresolved."""
        return tuple(entry for entry in self.entries if entry.status in ("dependent", "unresolved"))

    @property
    def smallest(self) -> IndependenceEntry:
        """The entry with the smallest lambda_min in units of its threshold, exempt ones aside."""
        judged = [entry for entry in self.entries if entry.status != "exempt"] or list(self.entries)
        return min(judged, key=lambda entry: entry.lambda_min / (entry.threshold or EPS))


def check_data(
    X: ArrayLike,
    readings: Literal["both", "distinct", "inclusive"] = "both",
    *,
    tol: float | None = None,
    max_triples: int = 100,
) -> DataReport:
    """Whether |<xi_i, xi_j>| != |<xi_i, xi_k>| for j != k, and <xi_i, xi_j> != 0.

    The published statement leaves open whether j or k may equal i. With "distinct" i, j, k differ; with
    "inclusive" j or k may be i (and <xi_i, xi_i> != 0 is asked). Duplicates, negated copies, one-hot inputs
    violate both; continuous data satisfy both almost surely.

    Args:
        X: inputs, real (samples >= 1, dimension).
        readings: which to check.
        tol: products closer than this, as a cosine, count as equal; None takes 4 dimension eps.
        max_triples: how many failing triples and pairs to list.

    Raises:
        ValueError: if X is not finite or not a matrix, or an option is out of range.

    Source: Chen et al. 2025 (arXiv 2503.09565), assumption 4.1.
    """
    X = as_features(X, "X")
    if readings not in ("both", "distinct", "inclusive"):
        raise ValueError(f"readings must be 'both', 'distinct' or 'inclusive', got {readings!r}")
    level = 4 * X.shape[1] * EPS if tol is None else tol
    if not level >= 0:
        raise ValueError(f"tol must be >= 0, got {tol!r}")
    chosen: list[Reading] = ["distinct", "inclusive"] if readings == "both" else [readings]
    norms = np.linalg.norm(X, axis=1)
    safe = np.where(norms > 0, norms, 1.0)
    products = np.abs(X @ X.T)
    cosines = products / np.outer(safe, safe)
    near_zero = np.triu(cosines <= level)
    orthogonal = [(int(i), int(j)) for i, j in np.argwhere(near_zero)]
    apart = cosines[~np.eye(len(X), dtype=bool)]
    holds, triples, counts, margins = {}, {}, {}, {}
    for reading in chosen:
        gaps, order = _sorted_gaps(products / (safe[:, None] * safe.max()), reading)
        equal = np.argwhere(gaps <= level)
        triples[reading] = [
            (int(i), *sorted((int(order[i, a]), int(order[i, a + 1])))) for i, a in equal[:max_triples]
        ]
        counts[reading] = len(equal)
        margins[reading] = float(gaps.min()) if gaps.size else float("inf")
        zero = any(reading == "inclusive" or i != j for i, j in orthogonal)
        holds[reading] = not len(equal) and not zero
    copies = list(_copies(X))
    return DataReport(
        holds,
        triples,
        counts,
        orthogonal[:max_triples],
        margins,
        float(apart.min()) if apart.size else float("inf"),
        [(i, j) for i, j, sign in copies if sign > 0],
        [(i, j) for i, j, sign in copies if sign < 0],
    )


def check_independence(
    K_pre: Layered,
    K_post: Layered,
    rank_X: int,
    stderr: Mapping[str, Layered] | None = None,
    *,
    standard_errors: float = 5.0,
) -> IndependenceReport:
    """Whether the features of distinct samples are linearly independent in every layer at every step.

    First pre-activations h^1 = W^1 xi are linear in the inputs: they cannot be independent where the inputs
    are not (rank_X < samples), and are then reported as exempt.

    Args:
        K_pre: Grams of pre-activations: layer (from 1) -> (samples, samples) or (steps, samples, samples), or
            a sequence over layers.
        K_post: the same of post-activations.
        rank_X: rank of the inputs.
        stderr: "K_pre" and "K_post" -> standard errors in the same form: of lambda_min, (steps,) or a number,
            or of the entries of the Gram, whose worst combination then counts (|v|' S |v| for the eigenvector
            v, as entries of one simulation are correlated).
        standard_errors: how many of them lambda_min must exceed.

    Raises:
        ValueError: if shapes disagree or a Gram is not finite.

    Source: Chen et al. 2025 (arXiv 2503.09565), theorem 4.5.
    """
    if rank_X < 0:
        raise ValueError(f"rank_X must be >= 0, got {rank_X!r}")
    if not standard_errors > 0:
        raise ValueError(f"standard_errors must be > 0, got {standard_errors!r}")
    unknown = set(stderr or ()) - {"K_pre", "K_post"}
    if unknown:
        raise ValueError(f"stderr must have the keys 'K_pre' and 'K_post', got {sorted(unknown)[0]!r}")
    entries = []
    kinds: tuple[tuple[Literal["pre", "post"], Layered], ...] = (("pre", K_pre), ("post", K_post))
    for kind, grams in kinds:
        errors = dict(_layers((stderr or {}).get(f"K_{kind}", {})))
        for layer, stack in _layers(grams):
            steps = np.asarray(stack, dtype=np.float64)
            steps = steps[None] if steps.ndim == 2 else steps
            spread = _per_step(errors.get(layer), len(steps), f"stderr of K_{kind}[{layer}]")
            for step, K in enumerate(steps):
                K = as_gram(K, f"K_{kind}[{layer}][{step}]")
                values, vectors = np.linalg.eigh(K)
                floor = len(K) * EPS * float(np.abs(values).max())
                error = None if spread is None else _eigenvalue_error(spread[step], vectors[:, 0])
                threshold = max(floor, standard_errors * (error or 0.0))
                smallest = float(values[0])
                if kind == "pre" and layer == 1 and rank_X < len(K):
                    status = "exempt"
                elif smallest > threshold:
                    status = "independent"
                else:
                    status = "dependent" if error is None or smallest <= floor else "unresolved"
                entries.append(IndependenceEntry(layer, kind, step, smallest, threshold, status))
    if not entries:
        raise ValueError("K_pre and K_post must hold at least one Gram, got none")
    return IndependenceReport(tuple(entries))


def covariance_preservation_error(trajectory: Any) -> dict[int, float]:
    """How far the Gaussian parts of W_0 v_s are from the covariance sigma^2 E[v_s v_t], layer by layer.

    In the limit the fields Zhat of the products W_0 v_0, W_0 v_1, ... are jointly Gaussian with exactly this
    covariance at all training times, although the v depend on W_0; the proof of theorem 4.5 rests on it.

    Args:
        trajectory: layer -> (covariance, moments), where covariance (k, k) is that of the fields, or fields
            (k, M) are M samples of them, and moments (k, k) is sigma^2 E[v_s v_t]; or an object with such a
            dictionary in the attribute `gaussian_covariances`.

    Returns:
        layer -> ||covariance - moments|| / ||moments|| in Frobenius norm.

    Raises:
        TypeError: if trajectory is neither.
        ValueError: if shapes disagree, entries are not finite, or the moments vanish.
    """
    pairs = (
        trajectory if isinstance(trajectory, Mapping) else getattr(trajectory, "gaussian_covariances", None)
    )
    if not isinstance(pairs, Mapping):
        raise TypeError(
            "trajectory must be a mapping from layer to (covariance, moments), or have one in the attribute "
            f"gaussian_covariances, got {type(trajectory).__name__}"
        )
    errors = {}
    for layer, (fields, moments) in pairs.items():
        moments = as_gram(moments, f"moments of layer {layer}")
        covariance = as_features(fields, f"covariance of layer {layer}")
        if len(covariance) != len(moments):
            raise ValueError(
                f"covariance of layer {layer} must have {len(moments)} rows as its moments, "
                f"got {len(covariance)}"
            )
        if covariance.shape[1] != len(moments):
            covariance = covariance @ covariance.T / covariance.shape[1]
        size = float(np.linalg.norm(moments))
        if size == 0:
            raise ValueError(f"moments of layer {layer} must not vanish")
        errors[layer] = float(np.linalg.norm(covariance - moments)) / size
    return errors


def _sorted_gaps(products: np.ndarray, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Gaps between neighbours of each sorted row, and which samples the sorted places belong to."""
    N = len(products)
    columns = np.tile(np.arange(N), (N, 1))
    if reading == "distinct":
        keep = ~np.eye(N, dtype=bool)
        columns, products = columns[keep].reshape(N, N - 1), products[keep].reshape(N, N - 1)
    order = np.argsort(products, axis=1)
    gaps = np.diff(np.take_along_axis(products, order, axis=1), axis=1)
    return gaps, np.take_along_axis(columns, order, axis=1)


def _copies(X: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Pairs of neighbours among rows that are equal up to sign, with the sign."""
    first = np.take_along_axis(X, np.argmax(X != 0, axis=1)[:, None], axis=1)[:, 0]
    sign = np.where(first < 0, -1, 1)
    groups: dict[bytes, int] = {}
    # Adding zero turns -0.0 into 0.0, whose bytes differ.
    for row, canonical in enumerate(X * sign[:, None] + 0.0):
        key = canonical.tobytes()
        if key in groups:
            yield groups[key], row, int(sign[groups[key]] * sign[row])
        groups[key] = row


def _layers(grams: Layered) -> list[tuple[int, ArrayLike]]:
    return list(grams.items()) if isinstance(grams, Mapping) else list(enumerate(grams, start=1))


def _per_step(errors: ArrayLike | None, steps: int, name: str) -> Float[np.ndarray, "steps ..."] | None:
    if errors is None:
        return None
    array = np.asarray(errors, dtype=np.float64)
    array = array[None] if array.ndim in (0, 2) else array
    if len(array) != steps or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} must be finite, >= 0 and for {steps} steps, got shape {np.shape(errors)}")
    return array


def _eigenvalue_error(spread: np.ndarray, vector: np.ndarray) -> float:
    """Standard error of lambda_min: given, or at most |v|' S |v| from those of the entries."""
    return float(spread) if spread.ndim == 0 else float(np.abs(vector) @ spread @ np.abs(vector))
