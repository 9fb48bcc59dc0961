"""Peeling: rounds grouped by the size of their noise, and dimensions shared out among the groups.

    L     = ceil(log2 K) + 1
    K_0   = {k : sigma_k <= 1/K}
    K_i   = {k : 2^(i-1)/K < sigma_k <= 2^i/K},   i = 1 .. L-1,   threshold sigma(i) = 2^(i-1)/K

Inside a group the noise is known up to a factor of two, so a group can be treated as one game of constant
variance.

The comparisons are made in the floating type of sigma against 2^i * round(1/K), a correctly rounded value
of 2^i/K: sigma = 2^i/K computed in that type falls in group i and not above, in float32 and float64, for
every K.

Source: He and Gu 2025 (arXiv 2503.12020), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from . import checks

Dims: TypeAlias = Literal["equal", "occupied", "best"] | Sequence[int] | np.ndarray
DIMS_RULES = ("equal", "occupied", "best")


class Peeling(NamedTuple):
    """Groups of rounds with similar noise.

    Attributes:
        index: group of every round.
        L: number of groups, empty ones included.
        thresholds: sigma(i) = 2^(i-1)/K, below the noise of every round of group i; 0 for group 0.
        counts: K_i, rounds per group.
        dims: d_i, dimensions per group; zeros where no d was given.
    """

    # hides tuple.index, which nobody calls on a record of arrays
    index: Int[ndarray, " K"]  # pyright: ignore[reportIncompatibleMethodOverride]
    L: int
    thresholds: Float[ndarray, " L"]
    counts: Int[ndarray, " L"]
    dims: Int[ndarray, " L"]


def groups(sigma: Any, d: int | None = None, *, dims: Dims = "occupied") -> Peeling:
    """Groups of a variance sequence, and the dimension of each group's block.

    Args:
        sigma: standard deviations in [0, 1], one per round, K >= 2 of them.
        d: dimensions to share out; None leaves all dims at 0 (or takes the sum of an explicit vector).
        dims: "equal": floor(d/L) each, the remainder to the groups of highest variance, so that d < L
            leaves the low groups empty. "occupied" (default): the same over the non-empty groups i >= 1
            alone; group 0 gets nothing, unless there is no other. "best": all of d to the group with the
            largest sqrt(K_i) sigma(i) among those with K_i >= 1.5 d^2, else to the one with the largest K_i
            sigma(i). Or a vector of L non-negative integers.

    Raises:
        TypeError: if sigma or dims are not numbers of the right kind.
        ValueError: if sigma leaves [0, 1], d < 1, or an explicit vector has the wrong length, sign or sum.

    Source: He and Gu 2025, section 4; "occupied" and "best" are additions of this package.
    """
    K = checks.sigmas("sigma", sigma).size
    index = group_index(sigma, K)
    L = number_of_groups(K)
    counts = np.bincount(index, minlength=L)
    thresholds = lower_thresholds(K)
    if d is None and isinstance(dims, str):
        checks.one_of("dims", dims, DIMS_RULES)
        shares = np.zeros(L, np.int64)
    else:
        shares = split_dims(d, counts, thresholds, dims)
    return Peeling(index, L, thresholds, counts, shares)


def number_of_groups(K: int) -> int:
    """L = ceil(log2 K) + 1, exactly.

    Args:
        K: number of rounds, >= 2.

    Raises:
        TypeError: if K is not an integer.
        ValueError: if K < 2.
    """
    return (checks.count("K", K, at_least=2) - 1).bit_length() + 1


def lower_thresholds(K: int) -> Float[ndarray, " L"]:
    """sigma(i) = 2^(i-1)/K for i = 1 .. L-1, and 0 for group 0: the noise level a group may be given safely.

    Args:
        K: number of rounds, >= 2.

    Raises:
        TypeError: if K is not an integer.
        ValueError: if K < 2.
    """
    levels = np.ldexp(1.0 / K, np.arange(-1, number_of_groups(K) - 1))
    levels[0] = 0.0
    return levels


def upper_thresholds(K: int, dtype: Any = np.float64) -> Float[ndarray, " L"]:
    """2^i/K for i = 0 .. L-1 in a floating type: a round is in the first group i with sigma <= 2^i/K.

    Multiplying by two is exact, so all of them are the rounded 1/K shifted; the last one is at least 1.

    Args:
        K: number of rounds, >= 2.
        dtype: floating type in which sigma is stored.

    Raises:
        TypeError: if K is not an integer.
        ValueError: if K < 2.
    """
    L = number_of_groups(K)
    one = np.dtype(dtype).type(1)
    return np.ldexp(one / np.dtype(dtype).type(K), np.arange(L))


def group_index(sigma: Any, K: int) -> Int[ndarray, " rounds"]:
    """Group of each sigma in a horizon of K rounds, which need not be the number of entries.

    Args:
        sigma: standard deviations in [0, 1], any number of them.
        K: horizon, >= 2.

    Raises:
        TypeError: if sigma is not made of real numbers, or K is not an integer.
        ValueError: if K < 2, or an entry is outside [0, 1] or NaN.
    """
    values = np.asarray(sigma)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"sigma must lie in [0, 1], got {sigma!r}")
    # types narrower than float32 cannot hold 1/K: they are widened, which is exact
    dtype = np.float32 if values.dtype == np.float32 else np.float64
    return np.searchsorted(upper_thresholds(K, dtype), values.astype(dtype), side="left")


def split_dims(
    d: int | None, counts: Int[ndarray, " L"], thresholds: Float[ndarray, " L"], dims: Dims
) -> Int[ndarray, " L"]:
    """Integer dimensions d_i with sum d. The paper divides d by L as if that were an integer.

    Args:
        d: total, >= 1; None only with an explicit vector.
        counts: K_i.
        thresholds: sigma(i).
        dims: as in `groups`.

    Raises:
        TypeError: if d or the entries of dims are not integers.
        ValueError: if d < 1, the rule is unknown, or an explicit vector has the wrong length, sign or sum.
    """
    L = len(counts)
    if not isinstance(dims, str):
        return _explicit(d, L, dims)
    checks.one_of("dims", dims, DIMS_RULES)
    d = checks.count("d", d)
    occupied = 1 + np.flatnonzero(counts[1:])
    if dims == "equal":
        return _spread(d, L, np.arange(L))
    if not occupied.size:
        return _spread(d, L, np.array([0]))
    if dims == "occupied":
        return _spread(d, L, occupied)
    large = occupied[2 * counts[occupied] >= 3 * d**2]
    if large.size:
        best = large[np.argmax(np.sqrt(counts[large]) * thresholds[large])]
    else:
        best = occupied[np.argmax(counts[occupied] * thresholds[occupied])]
    return _spread(d, L, np.array([best]))


def _spread(d: int, L: int, members: np.ndarray) -> np.ndarray:
    """D over the members evenly, what is left over to the last ones (the highest variances)."""
    share, rest = divmod(d, len(members))
    dims = np.zeros(L, np.int64)
    dims[members] = share
    dims[members[len(members) - rest :]] += 1
    return dims


def _explicit(d: int | None, L: int, dims: Any) -> np.ndarray:
    vector = np.asarray(dims)
    if not np.issubdtype(vector.dtype, np.integer):
        raise TypeError(f"dims must be integers or one of {list(DIMS_RULES)}, got {dims!r}")
    if vector.shape != (L,):
        raise ValueError(f"dims must have one entry for each of the L = {L} groups, got shape {vector.shape}")
    if (vector < 0).any():
        raise ValueError(f"dims must be >= 0, got {dims!r}")
    total = int(vector.sum())
    if d is not None and total != checks.count("d", d):
        raise ValueError(f"dims must sum to d = {d}, got the sum {total}")
    if total < 1:
        raise ValueError(f"dims must sum to d >= 1, got the sum {total}")
    return vector.astype(np.int64)
