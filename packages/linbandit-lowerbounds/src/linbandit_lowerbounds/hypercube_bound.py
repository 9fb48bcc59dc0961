"""Regret on the Bernoulli hypercube with a fixed variance: Lemma 4.3, its tight form, and few rounds.

    gap D = sqrt(p0/K) / (4 sqrt 2),   actions a in {-1, 1}^d,   mu uniform on {-D, D}^d,
    reward sigma * Bernoulli(p0 + <mu, a>),   K >= d^2 / (2 p0)

    E Regret >= d D sigma K (1 - TV)                 TV of two environments that differ in one sign
    lemma:        KL <= 16 D^2 K / p0 = 1/2,          TV <= 1/2
    pinsker_half: KL <= 1 / (12 (1 - 3 p0 / 4)),      TV <= sqrt(KL / 2)
    tight:        KL = K * exact maximum,             TV <= min(sqrt(KL / 2), sqrt(1 - exp(-KL)))

With fewer rounds than d^2 / (2 p0) the lemma says nothing. Then D = p0 / (4 d) keeps the probabilities in
range, and the tight form still gives at least a constant times sigma K (sigma K / 18 for p0 = 1/3).

Source: He and Gu 2025 (arXiv 2503.12020), lemma 4.3; Zhou, Gu and Szepesvari 2021, lemma C.8;
docs/proofs.md 1, 2.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from . import checks
from .information import kl_bernoulli, pinsker, reverse_markov, tv_upper
from .lower_bound import Audit, LowerBound

HypercubeKind = Literal["lemma", "pinsker_half", "tight"]
HYPERCUBE_KINDS = ("lemma", "pinsker_half", "tight")

LEMMA_SOURCE = "He and Gu 2025 (arXiv 2503.12020), lemma 4.3"
TIGHT_SOURCE = "docs/proofs.md, section 1 (steps of lemma 4.3 of He and Gu 2025 without Taylor expansion)"
SMALL_SOURCE = "docs/proofs.md, section 2 (fewer rounds than lemma 4.3 of He and Gu 2025 asks for)"


def hypercube_bound(
    K: int,
    d: int,
    sigma: float = 1.0,
    p0: float = 1 / 3,
    kind: HypercubeKind = "lemma",
    *,
    strict: bool = False,
) -> LowerBound:
    """Lower bound on E Regret(K) of any learner on the Bernoulli hypercube of d hidden signs.

    On this instance the worst regret is 4 times the lemma and random play has exactly twice it, so every
    learner is within a factor 4 of the bound: it certifies, it does not rank.

    Args:
        K: rounds, >= 2.
        d: hidden signs, >= 1; the linear model has one more coordinate for the base probability.
        sigma: noise scale in [0, 1].
        p0: base probability in (0, 1/3].
        kind: "lemma" (the paper's constant), "pinsker_half" (closed form), "tight" (exact divergence; falls
            back to the small-group gap when K < d^2 / (2 p0), where the other kinds are 0).
        strict: raise when K < d^2 / (2 p0) instead.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if K < 2, d < 1, sigma is outside [0, 1], p0 is outside (0, 1/3], kind is unknown, or K
            is too small under strict.

    Source: He and Gu 2025 (arXiv 2503.12020), lemma 4.3 = Zhou, Gu and Szepesvari 2021, lemma C.8, times
    sigma.
    """
    K, d = checks.count("K", K, at_least=2), checks.count("d", d)
    sigma, p0 = _sigma(sigma), base_probability(p0)
    checks.one_of("kind", kind, HYPERCUBE_KINDS)
    enough = enough_rounds(K, d, p0)
    if strict and not enough:
        raise ValueError(f"K must be >= d^2 / (2 p0) = {d**2 / (2 * p0):g} under strict=True, got {K}")
    audit = Audit()
    if kind == "tight":
        raw = tight_hypercube(K, d, sigma, p0, audit)
        return audit.conclude(raw, {}, TIGHT_SOURCE if enough else SMALL_SOURCE)
    gap = audit.number("gap", lemma_gap(K, p0))
    scale = d * gap * sigma * K
    if kind == "lemma":
        kl = 16 * gap**2 * K / p0
        source = LEMMA_SOURCE
    else:
        kl = 2 * gap**2 * K / (0.75 * p0 * (1 - 0.75 * p0))
        source = TIGHT_SOURCE
    tv = float(pinsker(kl))
    raw = scale * (1 - tv)
    if enough:
        _audit_chain(audit, K, d, p0, gap, kl, tv)
    _audit_range(audit, scale, raw)
    return audit.conclude(raw, {"K_ge_d2_over_2p0": enough}, source)


def lemma_gap(K: int, p0: float = 1 / 3) -> float:
    """D = sqrt(p0/K) / (4 sqrt 2); 1/sqrt(96 K) for p0 = 1/3.

    Args:
        K: rounds.
        p0: base probability.
    """
    return math.sqrt(p0 / K) / (4 * math.sqrt(2))


def small_group_gap(d: int, p0: float = 1 / 3) -> float:
    """D = p0 / (4 d), the largest gap that keeps every probability in [3 p0/4, 5 p0/4].

    Args:
        d: hidden signs.
        p0: base probability.
    """
    return p0 / (4 * d)


def enough_rounds(K: int, d: int, p0: float = 1 / 3) -> bool:
    """K >= d^2 / (2 p0), in integers for the paper's p0 = 1/3 (K >= 1.5 d^2).

    Args:
        K: rounds.
        d: hidden signs.
        p0: base probability.
    """
    return 3 * d**2 <= 2 * K if p0 == 1 / 3 else 2 * p0 * K >= d**2


def max_kl_per_round(d: int, gap: float, p0: float) -> float:
    """Largest divergence of one reward when one sign flips, over all actions and both directions.

    The two success probabilities are q and q + 2 gap with q in [p0 - d gap, p0 + (d - 2) gap]. KL is
    jointly convex in its arguments, hence convex in q along this segment, and the maximum is at an end.

    Args:
        d: hidden signs.
        gap: D.
        p0: base probability.
    """
    ends = (p0 - d * gap, p0 + (d - 2) * gap)
    return max(float(kl) for q in ends for kl in (kl_bernoulli(q + 2 * gap, q), kl_bernoulli(q, q + 2 * gap)))


def tight_hypercube(K: int, d: int, sigma: float, p0: float, audit: Audit) -> float:
    """D d sigma K (1 - TV) with the exact divergence; arguments are not checked and K = 1 is fine.

    Args:
        K: rounds, >= 1.
        d: hidden signs, >= 1.
        sigma: noise scale.
        p0: base probability.
        audit: receives the steps.
    """
    small = not enough_rounds(K, d, p0)
    gap = small_group_gap(d, p0) if small else lemma_gap(K, p0)
    kl = K * max_kl_per_round(d, gap, p0)
    tv = float(tv_upper(kl))
    scale = d * gap * sigma * K
    audit.number("gap", gap)
    audit.number("small_group", float(small))
    _audit_chain(audit, K, d, p0, gap, kl, tv)
    _audit_range(audit, scale, scale * (1 - tv))
    if small:  # KL <= 1 / (12 (1 - 3 p0/4)) holds for this gap too, since K < d^2 / (2 p0)
        floor = 0.25 * p0 * sigma * K * (1 - math.sqrt(1 / (24 * (1 - 0.75 * p0))))
        audit.inequality("small_group_floor", floor, scale * (1 - tv))
    return scale * (1 - tv)


def base_probability(p0: Any) -> float:
    """p0 in (0, 1/3].

    Args:
        p0: what was given.

    Raises:
        TypeError: if p0 is no real number.
        ValueError: if it is out of range.
    """
    number = checks.real("p0", p0)
    if not 0.0 < number <= 1 / 3:
        raise ValueError(f"p0 must be in (0, 1/3], got {p0!r}")
    return number


def _sigma(sigma: Any) -> float:
    number = checks.real("sigma", sigma, at_least=0.0)
    if number > 1.0:
        raise ValueError(f"sigma must lie in [0, 1], got {sigma!r}")
    return number


def _audit_chain(audit: Audit, K: int, d: int, p0: float, gap: float, kl: float, tv: float) -> None:
    """Every inequality between the exact divergence of one reward and the number of wrong signs."""
    exact = max_kl_per_round(d, gap, p0)
    integral = 2 * gap**2 / (0.75 * p0 * (1 - 0.75 * p0))
    audit.number("kl", kl)
    audit.number("tv", tv)
    audit.inequality("probabilities_in_range", d * gap, p0 / 4)
    audit.inequality("kl_exact_below_integral", exact, integral)
    audit.inequality("kl_integral_below_lemma", integral, 16 * gap**2 / p0)
    audit.inequality("kl_chain_rule", K * exact, kl)
    audit.inequality("pinsker", float(tv_upper(K * exact)), tv)
    audit.inequality("wrong_signs", K * (1 - tv) / 2, K * (1 - float(tv_upper(K * exact))) / 2)


def _audit_range(audit: Audit, scale: float, raw: float) -> None:
    """Regret of the worst and of random play, and how often any learner reaches d D sigma K / 4.

    With the gap of lemma 4.3 that is half of its bound.
    """
    audit.number("max_regret", 2 * scale)
    audit.number("random_regret", scale)
    audit.number("probability_half_lemma", reverse_markov(raw, 2 * scale, scale / 4) if scale > 0 else 0.0)
