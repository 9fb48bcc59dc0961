"""Regret on the variance-scaled hypercube: a bound for a prefixed variance sequence without a logarithm.

    actions sigma_k^2 a, a in {-1, 1}^d,   theta uniform on {-D, D}^d,   noise N(0, sigma_k^2),
    V_k = sum_{j<=k} sigma_j^2

Flipping one sign moves the mean by 2 D sigma_k^2, so the log-likelihood ratio after k rounds is exactly
N(2 D^2 V_k, 4 D^2 V_k) for every learner, and TV = 2 Phi(D sqrt(V_k)) - 1. With Q = 1 - Phi and S = V_K:

    LB_end(D) = 2 d D S Q(D sqrt S)  <=  LB_seq(D) = 2 d D sum_k sigma_k^2 Q(D sqrt(V_{k-1}))
    D = x / sqrt(S):   LB_end = 2 x Q(x) d sqrt(S),   LB_seq >= 2 x I(x) d sqrt(S)
    I(x) = Q(x) + (Phi(x) - 1/2 - x phi(x)) / x^2

The maxima are 0.3399 (x = 0.7518) and 0.5298 (x = 1.2469). With rewards +-sigma_k instead of Gaussian noise,
two_point(D) = d D S (1 - sqrt(4/3) D sqrt S), at most sqrt(3)/8 d sqrt(S).

Source: docs/proofs.md, sections 4 and 5 (an addition of this package).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .information import kl_bernoulli, normal_tail
from .lower_bound import ROUNDING, Audit, LowerBound

ScaledKind = Literal["scaled_end", "scaled_seq", "scaled_two_point"]
SCALED_KINDS = ("scaled_end", "scaled_seq", "scaled_two_point")

# x* that maximises 2 x Q(x), 2 x I(x) and x (1 - sqrt(4/3) x); tests find them again by optimisation.
END_GAP = 0.7517915246935646
SEQ_GAP = 1.2468586746246107
TWO_POINT_GAP = math.sqrt(3) / 4
_OPTIMUM = {"scaled_end": END_GAP, "scaled_seq": SEQ_GAP, "scaled_two_point": TWO_POINT_GAP}


def mean_tail(x: float) -> float:
    """I(x), the mean of Q(x sqrt(u)) over u uniform on [0, 1]: the average probability of a wrong sign.

    Args:
        x: scaled gap D sqrt(S), > 0.

    Source: docs/proofs.md, section 4; integration by parts.
    """
    if x < 0.5:  # Phi - 1/2 - x phi = phi(0) sum_n (-1)^(n+1) 2n x^(2n+1) / ((2n+1) 2^n n!): no cancellation
        terms = [
            (-1) ** (n + 1) * 2 * n * x ** (2 * n - 1) / ((2 * n + 1) * 2**n * math.factorial(n))
            for n in range(1, 12)
        ]
        excess = math.fsum(terms) / math.sqrt(2 * math.pi)
    else:
        phi = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        excess = (0.5 * math.erf(x / math.sqrt(2)) - x * phi) / x**2
    return float(normal_tail(x)) + excess


def end_constant(x: float) -> float:
    """2 x Q(x): LB_end in units of d sqrt(S) at the scaled gap x.

    Args:
        x: scaled gap D sqrt(S), > 0.
    """
    return 2 * x * float(normal_tail(x))


def seq_constant(x: float) -> float:
    """2 x I(x): LB_seq in units of d sqrt(S) is at least this, and tends to it for many rounds.

    Args:
        x: scaled gap D sqrt(S), > 0.
    """
    return 2 * x * mean_tail(x)


def lb_end(variance: Float[ndarray, " K"], d: int, gap: float) -> float:
    """2 d D S Q(D sqrt S).

    Args:
        variance: sigma_k^2.
        d: dimension.
        gap: D.
    """
    S = float(variance.sum())
    return 2 * d * gap * S * float(normal_tail(gap * math.sqrt(S)))


def lb_seq(variance: Float[ndarray, " K"], d: int, gap: float) -> float:
    """2 d D sum_k sigma_k^2 Q(D sqrt(V_{k-1})) with V_0 = 0.

    Args:
        variance: sigma_k^2.
        d: dimension.
        gap: D.
    """
    return 2 * d * gap * float(variance @ np.asarray(normal_tail(gap * np.sqrt(_before(variance)))))


def two_point(variance: Float[ndarray, " K"], d: int, gap: float) -> float:
    """D d S (1 - sqrt(4/3) D sqrt S), which may be negative.

    Args:
        variance: sigma_k^2.
        d: dimension.
        gap: D.
    """
    S = float(variance.sum())
    return d * gap * S * (1 - math.sqrt(4 * S / 3) * gap)


def scaled_bound(sigma: Float[ndarray, " K"], d: int, delta: float | None, kind: ScaledKind) -> LowerBound:
    """The bound of one kind with the audit of its steps; `prefixed_bound` checks the arguments.

    Args:
        sigma: standard deviations in [0, 1].
        d: dimension.
        delta: gap D; None takes x* / sqrt(S).
        kind: which formula.
    """
    variance = sigma**2
    S = float(variance.sum())
    audit = Audit()
    audit.number("variance_sum", S)
    section = 5 if kind == "scaled_two_point" else 4
    source = f"docs/proofs.md, section {section} (an addition of this package)"
    if S == 0.0:
        return audit.conclude(0.0, {"variance_sum_positive": False}, source)
    gap = audit.number("gap", _OPTIMUM[kind] / math.sqrt(S) if delta is None else delta)
    audit.number("scaled_gap", gap * math.sqrt(S))
    audit.number("max_regret", 2 * d * gap * S)
    norm = audit.number("theta_norm", d * gap)
    if kind == "scaled_two_point":
        raw = two_point(variance, d, gap)
        _audit_two_point(audit, variance, d, gap, raw)
        # ||theta|| <= 1/2 keeps the probabilities in [1/4, 3/4], where the divergence was bounded
        return audit.conclude(raw, {"theta_norm_le_half": norm <= 0.5 + ROUNDING}, source)
    end, seq = lb_end(variance, d, gap), lb_seq(variance, d, gap)
    _audit_gaussian(audit, S, d, gap, end, seq)
    raw = end if kind == "scaled_end" else seq
    return audit.conclude(raw, {"theta_norm_le_1": norm <= 1 + ROUNDING}, source)


def _before(variance: Float[ndarray, " K"]) -> Float[ndarray, " K"]:
    """V_{k-1} for every round."""
    return np.concatenate(([0.0], np.cumsum(variance)[:-1]))


def _audit_gaussian(audit: Audit, S: float, d: int, gap: float, end: float, seq: float) -> None:
    """Pinsker <= LB_end <= continuous limit <= LB_seq <= random play."""
    x, unit = gap * math.sqrt(S), d * math.sqrt(S)
    tv = 1 - 2 * float(normal_tail(x))
    audit.number("kl", 2 * x**2)
    audit.number("tv", tv)
    audit.inequality("pinsker", tv, x)
    audit.inequality("pinsker_below_end", d * gap * S * (1 - x), end)
    audit.inequality("end_below_continuous", end, seq_constant(x) * unit)
    audit.inequality("continuous_below_seq", seq_constant(x) * unit, seq)
    audit.inequality("seq_below_random", seq, d * gap * S)


def _audit_two_point(audit: Audit, variance: Float[ndarray, " K"], d: int, gap: float, raw: float) -> None:
    """Exact divergence of one reward, and what counting round by round would add."""
    S = float(variance.sum())
    audit.number("kl", 8 / 3 * gap**2 * S)
    audit.number("tv", math.sqrt(4 * S / 3) * gap)
    if d * gap <= 0.5:  # sigma = 1, at the most extreme mean that the gap allows
        low = 0.5 - 0.5 * d * gap
        exact = max(float(kl_bernoulli(low + gap, low)), float(kl_bernoulli(low, low + gap)))
        audit.inequality("kl_exact_below_integral", exact, 8 / 3 * gap**2)
    right = np.maximum(1 - np.sqrt(4 / 3 * _before(variance)) * gap, 0.0)
    seq = audit.number("two_point_seq", d * gap * float(variance @ right))
    audit.inequality("two_point_below_seq", raw, seq)
    audit.inequality("two_point_below_optimum", raw, math.sqrt(3) / 8 * d * math.sqrt(S))
