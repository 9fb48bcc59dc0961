"""Regret for a prefixed variance sequence by peeling: Theorem 4.1 and the sums it is made of.

    (4.1)  E Regret_i >= 1{K_i >= 1.5 d_i^2} d_i sqrt(K_i) sigma(i) / (8 sqrt 6)
                      >= d_i sqrt(S_i) / (16 sqrt 6) - d_i^2 sigma(i) / 16,   S_i = sum of sigma_k^2
    (4.2)  E Regret   >= d sqrt(sum_{i>=1} S_i) / (16 sqrt 6 L) - d^2 / (4 L^2)
    (4.3)  S_0 <= 1
    theorem            E Regret >= d sqrt(S - 1) / (32 sqrt 6 L)          if S >= 1 + 384 d^2
    eq42_sharp         as (4.2) with d^2 / (8 L^2), since sum_i sigma(i) < 2
    lemma_sum          sum over i >= 1 of the first line of (4.1) with the integer d_i
    tight_sum          with min sigma_k in place of sigma(i), the exact divergence, the small-group gap

The printed formulas divide d by L; an instance has whole dimensions. They are returned only where the whole
dimensions reach them (condition "integer_dims"), by `pinsker_half`, which on the same instance is 1.53 times
the first line of (4.1).

Source: He and Gu 2025 (arXiv 2503.12020), theorem 4.1; docs/proofs.md, section 6.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .hypercube_bound import enough_rounds, tight_hypercube
from .lower_bound import ROUNDING, Audit, LowerBound
from .peeling import Dims, Peeling

PeelingKind = Literal["theorem", "eq42", "eq42_sharp", "lemma_sum", "tight_sum"]
PEELING_KINDS = ("theorem", "eq42", "eq42_sharp", "lemma_sum", "tight_sum")

# for p0 = 1/3: 1 - TV is 1 - 1/sqrt(18) instead of 1/2
PINSKER_HALF_OVER_LEMMA = 2 * (1 - 1 / math.sqrt(18))

PAPER = "He and Gu 2025 (arXiv 2503.12020)"
_SOURCES = {
    "theorem": f"{PAPER}, theorem 4.1",
    "eq42": f"{PAPER}, eq. 4.2",
    "eq42_sharp": f"{PAPER}, eq. 4.2 with sum sigma(i) < 2 (docs/proofs.md, section 6)",
    "lemma_sum": f"{PAPER}, eq. 4.1, first line, integer dimensions",
    "tight_sum": "docs/proofs.md, sections 1, 2 and 6 (an addition of this package)",
}


def peeling_bound(
    sigma: Float[ndarray, " K"], peeling: Peeling, kind: PeelingKind, *, one_dim_per_group: bool
) -> LowerBound:
    """The bound of one kind with the audit of its steps; `prefixed_bound` checks the arguments.

    Args:
        sigma: standard deviations in [0, 1].
        peeling: groups of sigma with dimensions.
        kind: which formula.
        one_dim_per_group: whether d is at least the number of groups that share it.
    """
    audit = Audit()
    d = int(peeling.dims.sum())
    L = audit.number("groups", peeling.L)
    S_i = np.bincount(peeling.index, sigma**2, minlength=peeling.L)
    S = audit.number("variance_sum", float((sigma**2).sum()))
    S_noisy = float(S_i[1:].sum())
    lemma_sum = audit.number("lemma_sum", math.fsum(_lemma(i, peeling) for i in range(1, peeling.L)))
    if kind == "lemma_sum":
        _audit_groups(audit, peeling, S_i)
        return audit.conclude(lemma_sum, {}, _SOURCES[kind])
    if kind == "tight_sum":
        raw = math.fsum(tight_groups(sigma, peeling))
        return audit.conclude(raw, {}, _SOURCES[kind])
    main = d * math.sqrt(S_noisy) / (16 * math.sqrt(6) * L)
    eq42 = audit.number("eq42", main - d**2 / (4 * L**2))
    sharp = audit.number("eq42_sharp", main - d**2 / (8 * L**2))
    theorem = audit.number("theorem", d * math.sqrt(max(S - 1, 0.0)) / (32 * math.sqrt(6) * L))
    conditions = {"d_ge_groups": one_dim_per_group}
    if kind == "theorem":
        enough_variance = 384 * d**2 + 1
        conditions["variance_sum_ge_1_plus_384_d2"] = enough_variance <= S
        if enough_variance <= S:
            audit.inequality("theorem_below_eq42", theorem, eq42)
    raw = {"theorem": theorem, "eq42": eq42, "eq42_sharp": sharp}[kind]
    _audit_groups(audit, peeling, S_i)
    audit.inequality("group_0_variance", float(S_i[0]), 1 / len(sigma))  # K terms of at most 1/K^2
    audit.inequality("thresholds_sum_below_2", float(peeling.thresholds.sum()), 2.0)
    audit.inequality("root_of_sum_below_sum_of_roots", math.sqrt(S_noisy), float(np.sqrt(S_i[1:]).sum()))
    reached = audit.number("pinsker_half_sum", PINSKER_HALF_OVER_LEMMA * lemma_sum)
    conditions["integer_dims"] = raw <= reached * (1 + ROUNDING)
    return audit.conclude(raw, conditions, _SOURCES[kind])


def shares_suffice(peeling: Peeling, dims: Dims) -> bool:
    """Whether every group that is served gets a dimension: d >= L for "equal", else one per noisy group.

    Args:
        peeling: groups with dimensions.
        dims: the rule, or an explicit vector.
    """
    if isinstance(dims, str) and dims == "equal":
        return int(peeling.dims.sum()) >= peeling.L
    if isinstance(dims, str) and dims == "best":
        return True
    return bool((peeling.dims[1:][peeling.counts[1:] > 0] > 0).all())


def tight_groups(sigma: Float[ndarray, " K"], peeling: Peeling) -> list[float]:
    """Tight hypercube bound per group i >= 1, with K_i rounds, d_i signs and noise min sigma_k.

    Args:
        sigma: standard deviations.
        peeling: groups with dimensions.
    """
    lowest = np.full(peeling.L, math.inf)
    np.minimum.at(lowest, peeling.index, sigma)
    return [
        tight_hypercube(int(peeling.counts[i]), int(peeling.dims[i]), float(lowest[i]), 1 / 3, Audit())
        if peeling.counts[i] and peeling.dims[i]
        else 0.0
        for i in range(1, peeling.L)
    ]


def _lemma(i: int, peeling: Peeling) -> float:
    """First line of (4.1)."""
    K_i, d_i = int(peeling.counts[i]), int(peeling.dims[i])
    return (
        d_i * math.sqrt(K_i) * float(peeling.thresholds[i]) / (8 * math.sqrt(6))
        if enough_rounds(K_i, d_i)
        else 0.0
    )


def _audit_groups(audit: Audit, peeling: Peeling, S_i: np.ndarray) -> None:
    """Second line of (4.1) for every group; the worst one is kept."""
    worst = math.inf
    for i in range(1, peeling.L):
        d_i, threshold = int(peeling.dims[i]), float(peeling.thresholds[i])
        line = d_i * math.sqrt(S_i[i]) / (16 * math.sqrt(6)) - d_i**2 * threshold / 16
        slack = _lemma(i, peeling) - line
        if slack < worst:
            worst = slack
            audit.inequality("eq41_second_line", line, _lemma(i, peeling))
