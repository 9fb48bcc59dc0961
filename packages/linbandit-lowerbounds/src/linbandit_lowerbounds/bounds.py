"""Regret lower bounds that need no simulator, and the rates they are compared with.

    hypercube_bound      one variance: Lemma 4.3 of the paper, tightened, and for few rounds
    prefixed_bound       a known variance sequence: Theorem 4.1, its sums, and our log-free bound
    weak_adversary_bound in `weak`: variances chosen in play
    jia_bound, lattimore_szepesvari_bound, oful_upper_bound, rate     results of other papers

All of it is float64 arithmetic on the host: the numbers do not depend on JAX's x64 mode, and no function
may be called on traced values.

Source: He and Gu 2025 (arXiv 2503.12020); docs/proofs.md.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from . import checks
from .hypercube_bound import HYPERCUBE_KINDS, HypercubeKind, hypercube_bound
from .lower_bound import Audit, LowerBound
from .peeling import Dims, groups
from .peeling_bound import PEELING_KINDS, PeelingKind, peeling_bound, shares_suffice
from .published_bounds import (
    RATES,
    Rate,
    jia_bound,
    jia_rate,
    lattimore_szepesvari_bound,
    oful_upper_bound,
    rate,
)
from .scaled_bound import SCALED_KINDS, ScaledKind, scaled_bound

__all__ = [
    "HYPERCUBE_KINDS",
    "PREFIXED_KINDS",
    "RATES",
    "Audit",
    "HypercubeKind",
    "LowerBound",
    "Rate",
    "hypercube_bound",
    "jia_bound",
    "jia_rate",
    "lattimore_szepesvari_bound",
    "oful_upper_bound",
    "prefixed_bound",
    "rate",
]

PREFIXED_KINDS = (*PEELING_KINDS, *SCALED_KINDS)


def prefixed_bound(
    sigma: Any,
    d: int,
    *,
    dims: Dims = "occupied",
    delta: float | None = None,
    kind: Literal[
        "theorem",
        "eq42",
        "eq42_sharp",
        "lemma_sum",
        "tight_sum",
        "scaled_end",
        "scaled_seq",
        "scaled_two_point",
    ] = "theorem",
) -> LowerBound:
    """Lower bound on the expected regret of any learner when the variance sequence is fixed and known to it.

    The first five kinds bound regret on peeling instances and lose a factor of log K; "tight_sum" is about
    the instance whose group i has noise min sigma_k over the group, the others about noise sigma(i). The
    last three bound regret on the variance-scaled hypercube and lose none.

    Args:
        sigma: standard deviations in [0, 1], shape (K,), K >= 2. Anything that NumPy can read.
        d: dimension, >= 1.
        dims: how the peeling kinds share d among the groups; see `linbandit_lowerbounds.peeling.groups`.
        delta: gap D of the scaled kinds, > 0; None takes x* / sqrt(S) with the x* that is best for many
            rounds.
        kind: which formula; see the modules `peeling_bound` and `scaled_bound`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sigma leaves [0, 1] or is NaN, K < 2, d < 1, dims or kind is unknown, delta <= 0, or
            an option is given to a kind that has no use for it.

    Source: He and Gu 2025 (arXiv 2503.12020), theorem 4.1; docs/proofs.md, sections 4 to 6.
    """
    sequence = checks.sigmas("sigma", sigma)
    d = checks.count("d", d)
    checks.one_of("kind", kind, PREFIXED_KINDS)
    if kind in SCALED_KINDS:
        if not (isinstance(dims, str) and dims == "occupied"):
            raise ValueError(f"dims must be left alone with kind={kind!r}, which has no groups, got {dims!r}")
        gap = None if delta is None else checks.real("delta", delta, above=0.0)
        return scaled_bound(sequence, d, gap, cast("ScaledKind", kind))
    if delta is not None:
        raise ValueError(
            f"delta must be None with kind={kind!r}, whose gaps are those of lemma 4.3, got {delta!r}"
        )
    peeling = groups(sigma, d, dims=dims)
    return peeling_bound(
        sequence, peeling, cast("PeelingKind", kind), one_dim_per_group=shares_suffice(peeling, dims)
    )
