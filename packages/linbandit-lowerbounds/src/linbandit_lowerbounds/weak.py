"""Regret against a weak adversary, which picks every variance before it sees the decision set.

One tuned instance fails here: the adversary turns the noise off when the learner has been lucky. Both
constructions run many independent games, tuned to different amounts of noise, so that whenever the noise ends
some game is tuned to it, and several copies of each, so that not all of them are lucky.

    "paper"         groups i and sub-instances j = 1..L for 2^(j-1) visits, B copies of d'' = floor(d/(L^2 B))
                    signs; with 2^(j-1) <= K_i/L < 2^j and K'' = floor(2^(j-1)/B) visits per copy,
                    Regret_i >= d'' sigma(i) sqrt(K'') / (16 sqrt 6)            if K'' >= 1.5 d''^2
    "least_loaded"  ours: guesses V_j = V1 2^(j-1), j = 1..J, B copies, M = J B blocks of d'' = floor(d/M)
                    signs with gap x / sqrt(V_j); a round goes to the block with the least variance so far, so
                    each block gets at least (S - M + 1)/M; with the largest V_j below that,
                    Regret >= B d'' x rho sqrt(V_j)                             rho = Q(x), or I(x)

With probability at least 1 - eta both hold for the sigma that was realised, adaptive or not.

Source: He and Gu 2025 (arXiv 2503.12020), theorem 5.2; docs/proofs.md, sections 7 to 9.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from . import checks
from .hypercube_bound import enough_rounds, lemma_gap, small_group_gap
from .information import chernoff_lower, normal_tail
from .lower_bound import ROUNDING, Audit, LowerBound
from .peeling import groups, number_of_groups
from .scaled_bound import mean_tail

Construction = Literal["paper", "least_loaded"]
Copies = Literal["tight", "sharp", "paper"]
CONSTRUCTIONS = ("paper", "least_loaded")
COPIES = ("tight", "sharp", "paper")

# Probability with which one copy reaches half of lemma 4.3 (docs/proofs.md, section 3): by the lemma's own
# constant, and by `pinsker_half`.
SUCCESS_TIGHT = 1 / 7
SUCCESS_SHARP = (2 * (1 - 1 / math.sqrt(18)) - 0.5) / 3.5
LEAST_LOADED_GAP = 0.7518


class CyclicLayout(NamedTuple):
    """Sizes of the paper's construction.

    Attributes:
        groups: L; group i uses sub-instances j = 1..L.
        copies: B, per sub-instance.
        block_dim: d'', signs per copy.
        horizons: K''_j = floor(2^(j-1)/B), the visits that a copy of sub-instance j is tuned to.
        gaps: |theta_i| of a copy: 1/sqrt(96 K''_j), or 1/(12 d'') where K''_j < 1.5 d''^2.
    """

    groups: int
    copies: int
    block_dim: int
    horizons: Int[ndarray, " L"]
    gaps: Float[ndarray, " L"]


class LeastLoadedLayout(NamedTuple):
    """Sizes of the least-loaded construction; block (j-1) B + b is copy b = 0..B-1 of guess j.

    Attributes:
        guesses: J.
        copies: B, per guess.
        blocks: M = J B.
        block_dim: d'', signs per block.
        variances: V_j = V1 2^(j-1).
        gaps: x / sqrt(V_j).
    """

    guesses: int
    copies: int
    blocks: int
    block_dim: int
    variances: Float[ndarray, " J"]
    gaps: Float[ndarray, " J"]


def weak_adversary_bound(
    sigma: Any,
    d: int,
    *,
    eta: float,
    construction: Construction = "paper",
    copies: Copies = "tight",
    V1: float = 1.0,
    x: float = LEAST_LOADED_GAP,
) -> LowerBound:
    """Regret that any learner exceeds with probability at least 1 - eta, whatever a weak adversary did.

    The value is for the realised variances: evaluate it on the sigma of a run and count how often regret
    falls below. It multiplies the whole numbers that an instance has; the printed closed forms divide as if
    all were exact.

    Args:
        sigma: realised standard deviations in [0, 1], shape (K,), K >= 2; zeros after an early stop.
        d: total dimension, at least `required_dimension(K, eta, construction, copies=copies)`.
        eta: failure probability in (0, 1).
        construction: "paper" or "least_loaded".
        copies: how many. "paper": ceil(ln(d K)^2), for the paper's construction alone. "tight": enough for
            eta by the constant 1/7 or Q(x). "sharp": by 0.2939 or I(x), which takes fewer; the least-loaded
            bound then has I(x), too.
        V1: smallest guess of the least-loaded construction, > 0. With several signs a block mean rewards stay
            below 1, and the bound above 0, only for V1 >= (block_dim x)^2.
        x: its scaled gap, > 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sigma leaves [0, 1] or is NaN, K < 2, eta is outside (0, 1), d is too small (the
            message says which d is needed), a name is unknown, or an option does not belong to the
            construction.

    Source: He and Gu 2025 (arXiv 2503.12020), theorem 5.2; docs/proofs.md, sections 7 to 9.
    """
    sequence = checks.sigmas("sigma", sigma)
    eta = checks.probability("eta", eta)
    checks.one_of("construction", construction, CONSTRUCTIONS)
    if construction == "paper":
        _only_least_loaded(V1, x)
        return _cyclic_bound(sigma, sequence, cyclic_layout(sequence.size, d, eta=eta, copies=copies), d, eta)
    layout = least_loaded_layout(sequence.size, d, eta=eta, copies=copies, V1=V1, x=x)
    return _least_loaded_bound(sequence, layout, d, eta, x, mean_tail(x) if copies == "sharp" else _tail(x))


def required_dimension(
    K: int,
    eta: float,
    construction: Construction,
    *,
    copies: Copies = "tight",
    V1: float = 1.0,
    x: float = LEAST_LOADED_GAP,
) -> int:
    """Smallest d for which every block of a construction gets one sign.

    Args:
        K: rounds, >= 2.
        eta: failure probability in (0, 1).
        construction: "paper" or "least_loaded".
        copies: as in `weak_adversary_bound`.
        V1: smallest guess of the least-loaded construction, > 0.
        x: its scaled gap, > 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range or does not belong to the construction.
    """
    K = checks.count("K", K, at_least=2)
    eta = checks.probability("eta", eta)
    checks.one_of("construction", construction, CONSTRUCTIONS)
    checks.one_of("copies", copies, COPIES)
    if construction == "least_loaded":
        J, B = least_loaded_sizes(K, eta, copies=copies, V1=V1, x=x)
        return J * B
    _only_least_loaded(V1, x)
    d = 1
    # copies="paper" makes B grow with d; climbing from below stops at the smallest d that is enough
    while (needed := number_of_groups(K) ** 2 * cyclic_copies(K, d, eta, copies=copies)) > d:
        d = needed
    return d


def cyclic_copies(K: int, d: int, eta: float, *, copies: Copies = "tight") -> int:
    """B of the paper's construction: ceil(ln(d K)^2), or enough for L^2 (1 - p)^B <= eta.

    Args:
        K: rounds, >= 2.
        d: total dimension; matters for copies="paper" alone.
        eta: failure probability in (0, 1).
        copies: "paper", "tight" (p = 1/7) or "sharp" (p = 0.2939).

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of range or copies is unknown.
    """
    K, d = checks.count("K", K, at_least=2), checks.count("d", d)
    eta = checks.probability("eta", eta)
    checks.one_of("copies", copies, COPIES)
    if copies == "paper":
        return math.ceil(math.log(d * K) ** 2)
    success = SUCCESS_TIGHT if copies == "tight" else SUCCESS_SHARP
    return math.ceil(math.log(number_of_groups(K) ** 2 / eta) / -math.log1p(-success))


def cyclic_layout(K: int, d: int, *, eta: float | None = None, copies: Copies = "tight") -> CyclicLayout:
    """Sizes of the paper's construction.

    Args:
        K: rounds, >= 2.
        d: total dimension, >= L^2 B.
        eta: failure probability in (0, 1); None takes the theorem's 1/K.
        copies: as in `cyclic_copies`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or d is too small.
    """
    K, d = checks.count("K", K, at_least=2), checks.count("d", d)
    eta = 1 / K if eta is None else checks.probability("eta", eta)
    L, B = number_of_groups(K), cyclic_copies(K, d, eta, copies=copies)
    block_dim = d // (L**2 * B)
    if block_dim < 1:
        needed = required_dimension(K, eta, "paper", copies=copies)
        raise ValueError(f"d must be >= {needed} for construction='paper' at K = {K}, eta = {eta:g}, got {d}")
    horizons = np.array([2 ** (j - 1) // B for j in range(1, L + 1)])
    gaps = [
        lemma_gap(int(horizon)) if enough_rounds(int(horizon), block_dim) else small_group_gap(block_dim)
        for horizon in horizons
    ]
    return CyclicLayout(L, B, block_dim, horizons, np.array(gaps))


def least_loaded_sizes(
    K: int, eta: float, *, copies: Copies = "tight", V1: float = 1.0, x: float = LEAST_LOADED_GAP
) -> tuple[int, int]:
    """(J, B): the fewest guesses with 2 V_J >= K/(J B), and B = ceil(8 ln(J/eta)/rho) copies of each.

    Args:
        K: rounds, >= 2.
        eta: failure probability in (0, 1).
        copies: "tight" (rho = Q(x)) or "sharp" (rho = I(x)).
        V1: smallest guess, > 0.
        x: scaled gap, > 0.

    Raises:
        TypeError: if a number is no real number.
        ValueError: if a number is out of range, or copies is unknown or "paper".
    """
    K, eta = checks.count("K", K, at_least=2), checks.probability("eta", eta)
    V1, x = checks.real("V1", V1, above=0.0), checks.real("x", x, above=0.0)
    checks.one_of("copies", copies, ("tight", "sharp"))
    rho = _tail(x) if copies == "tight" else mean_tail(x)
    J = 1
    while V1 * 2**J * J * (B := math.ceil(8 * math.log(J / eta) / rho)) < K:
        J += 1
    return J, B


def least_loaded_layout(
    K: int,
    d: int,
    *,
    eta: float,
    copies: Copies = "tight",
    V1: float = 1.0,
    x: float = LEAST_LOADED_GAP,
) -> LeastLoadedLayout:
    """Sizes of the least-loaded construction.

    Args:
        K: rounds, >= 2.
        d: total dimension, >= J B.
        eta: failure probability in (0, 1).
        copies: "tight" or "sharp", as in `least_loaded_sizes`.
        V1: smallest guess, > 0.
        x: scaled gap, > 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or d is too small.
    """
    K, d = checks.count("K", K, at_least=2), checks.count("d", d)
    eta = checks.probability("eta", eta)
    J, B = least_loaded_sizes(K, eta, copies=copies, V1=V1, x=x)
    if d < J * B:
        raise ValueError(
            f"d must be >= {J * B} for construction='least_loaded' at K = {K}, eta = {eta:g}, got {d}"
        )
    variances = np.ldexp(float(V1), np.arange(J))
    return LeastLoadedLayout(J, B, J * B, d // (J * B), variances, x / np.sqrt(variances))


def _cyclic_bound(
    sigma: Any, sequence: Float[ndarray, " K"], layout: CyclicLayout, d: int, eta: float
) -> LowerBound:
    """Sum over groups of half of lemma 4.3 in the largest sub-instance that was visited in full."""
    L, B, block_dim, horizons, _ = layout
    peeling = groups(sigma)
    S_i = np.bincount(peeling.index, sequence**2, minlength=L)
    audit = Audit()
    raw = every = variance = 0.0
    for i in range(1, L):
        complete = (int(peeling.counts[i]) // L).bit_length()  # 2^(j-1) <= K_i/L < 2^j
        halves = [
            block_dim * float(peeling.thresholds[i]) * math.sqrt(horizon) / (16 * math.sqrt(6))
            for horizon in horizons[:complete].tolist()
            if enough_rounds(horizon, block_dim)
        ]
        if halves:  # horizons grow with j: the last one counts if any does
            raw += halves[-1]
            every += math.fsum(halves)
            variance += float(S_i[i])
    failure = 1 - SUCCESS_TIGHT
    audit.number("groups", L)
    audit.number("copies", B)
    audit.number("block_dim", block_dim)
    audit.number("failure_tight", L**2 * failure**B)
    failure = audit.number("failure", L**2 * (1 - SUCCESS_SHARP) ** B)
    audit.number("all_sub_instances", every)
    closed = 1 / (64 * math.sqrt(3) * L**2.5 * B**1.5)
    audit.number("closed_form", closed * d * math.sqrt(float(S_i[1:].sum())))
    # rounding down costs at most 2 in d/(L^2 B) >= 1 and sqrt(2) in sqrt(K'') with 2^(j-1)/B >= 1
    audit.inequality("whole_numbers", closed * d * math.sqrt(variance) / math.sqrt(8), raw)
    return audit.conclude(
        raw,
        {"copies_suffice": failure <= eta},
        "He and Gu 2025 (arXiv 2503.12020), theorem 5.2, with explicit constants (docs/proofs.md, section 8)",
    )


def _least_loaded_bound(
    sequence: Float[ndarray, " K"], layout: LeastLoadedLayout, d: int, eta: float, x: float, rho: float
) -> LowerBound:
    """Half of the mean regret of the B copies whose guess is the largest that every block has reached."""
    J, B, M, block_dim, variances, gaps = layout
    S = float((sequence**2).sum())
    load = (S - M + 1) / M  # loads differ by at most 1, so M - 1 blocks exceed the least by at most 1 each
    reached = int(np.count_nonzero(variances <= load))
    half_means = B * block_dim * x * rho * np.sqrt(variances)
    audit = Audit()
    audit.number("guesses", J)
    audit.number("copies", B)
    audit.number("blocks", M)
    audit.number("block_dim", block_dim)
    audit.number("variance_sum", S)
    audit.number("least_load", load)
    audit.number("mean_over_max", rho)
    audit.inequality("chernoff", J * chernoff_lower(B * rho, 0.5), eta)
    audit.inequality("guesses_cover", sequence.size / M, 2 * float(variances[-1]))
    audit.number("theta_norm", block_dim * math.sqrt(B * float((gaps**2).sum())))
    audit.number("all_guesses", float(half_means[:reached].sum()))
    conditions = {
        "variance_fills_blocks": reached > 0,
        "mean_reward_le_1": block_dim * float(gaps[0]) <= 1 + ROUNDING,
    }
    source = "docs/proofs.md, section 9 (an addition of this package)"
    if not reached:
        return audit.conclude(0.0, conditions, source)
    V = audit.number("guess", float(variances[reached - 1]))
    raw = float(half_means[reached - 1])
    # what is lost if a block is charged for the whole round that takes it past V, perhaps to V + 1
    tv = 1 - 2 * _tail(x * math.sqrt(1 + 1 / V))
    overshoot = block_dim * x / math.sqrt(V) * (V - (V + 1) * tv)
    audit.inequality("overshoot", overshoot, 2 * block_dim * x * rho * math.sqrt(V))
    closed = x * rho * d * math.sqrt(max(S - M, 0.0) / 2) / (J**1.5 * math.sqrt(B))
    audit.number("closed_form", closed)
    audit.inequality("whole_numbers", closed / 2, raw)  # rounding down costs at most 2 in d/M >= 1
    return audit.conclude(raw, conditions, source)


def _tail(x: float) -> float:
    return float(normal_tail(x))


def _only_least_loaded(V1: float, x: float) -> None:
    if V1 != 1.0 or x != LEAST_LOADED_GAP:
        raise ValueError(
            f"V1 and x belong to construction='least_loaded', got V1={V1!r}, x={x!r} with 'paper'"
        )
