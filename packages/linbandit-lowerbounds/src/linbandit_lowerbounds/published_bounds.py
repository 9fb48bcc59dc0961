"""Bounds and rates of other papers, for comparison in one table and one plot.

What is here:

    Lattimore and Szepesvari 2020, theorem 24.1      exp(-2)/8 d sigma sqrt(K)
    Jia, Qian, Rakhlin and Wei 2024                  a budget of noise for m = d // A contexts of A arms
    Abbasi-Yadkori, Pal and Szepesvari 2011          OFUL's regret from above
    rates                                            what others state without constants
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from . import checks
from .lower_bound import Audit, LowerBound

RATES = ("save", "dani", "li-wang-zhou", "chu")


class Rate(NamedTuple):
    """A regret rate without its constant: a slope to compare with, not a number to hold against data.

    Attributes:
        name: short name.
        value: the formula's number, with constant 1.
        formula: in terms of d, K, S = sum sigma_k^2 and A.
        side: whether regret is bounded from "lower" or "upper".
        source: where it is stated.
    """

    name: str
    value: float
    formula: str
    side: Literal["lower", "upper"]
    source: str


def lattimore_szepesvari_bound(K: int, d: int, sigma: float = 1.0) -> LowerBound:
    """exp(-2)/8 d sigma sqrt(K): Gaussian noise of one variance, actions [-1, 1]^d.

    The variance-scaled hypercube at constant sigma gives 31 times as much (0.5298 against 0.0169).

    Args:
        K: rounds, >= 2.
        d: dimension, >= 1.
        sigma: standard deviation in [0, 1].

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if K < 2, d < 1 or sigma is outside [0, 1].

    Source: Lattimore and Szepesvari, Bandit Algorithms (2020), theorem 24.1, times sigma.
    """
    K, d = checks.count("K", K, at_least=2), checks.count("d", d)
    sigma = checks.real("sigma", sigma, at_least=0.0)
    if sigma > 1.0:
        raise ValueError(f"sigma must lie in [0, 1], got {sigma!r}")
    raw = math.exp(-2) / 8 * d * sigma * math.sqrt(K)
    return Audit().conclude(raw, {}, "Lattimore and Szepesvari 2020, theorem 24.1, times sigma")


def jia_bound(d: int, A: int, Lambda: float) -> LowerBound:
    """Regret under a budget of noise: m = d // A contexts in turn, each a bandit of A arms.

    The noise has variance 1 for floor(Lambda) rounds and 0 afterwards. Context c sees n_c of the
    floor(Lambda) noisy rounds, so regret is at least sum_c sqrt((A - 1) n_c) / 27. Where m divides Lambda
    this is sqrt((A - 1) m Lambda) / 27 (steps["closed_form"], which otherwise is slightly larger).

    Args:
        d: dimension, >= A.
        A: arms, >= 2.
        Lambda: budget sum sigma_k^2, > 0; the paper's name for S.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if A < 2, d < A or Lambda is not positive.

    Source: Jia, Qian, Rakhlin and Wei 2024 (arXiv 2410.12713) for the setting; Lattimore and Szepesvari
    2020, theorem 15.2, for each context.
    """
    A = checks.count("A", A, at_least=2)
    d = checks.count("d", d, at_least=A)
    Lambda = checks.real("Lambda", Lambda, above=0.0)
    audit = Audit()
    m = d // A
    rounds, longer = divmod(math.floor(Lambda), m)
    audit.number("contexts", m)
    audit.number("rounds_per_context", rounds)
    raw = math.sqrt(A - 1) / 27 * ((m - longer) * math.sqrt(rounds) + longer * math.sqrt(rounds + 1))
    closed = audit.number("closed_form", math.sqrt((A - 1) * m * Lambda) / 27)
    audit.inequality("whole_rounds", raw, closed)
    return audit.conclude(
        raw,
        {"rounds_per_context_ge_arms_minus_1": rounds >= A - 1},
        "Jia et al. 2024 (arXiv 2410.12713), realised by theorem 15.2 of Lattimore and Szepesvari 2020",
    )


def jia_rate(protocol: Literal["weak", "strong"], *, d_elu: int, A: int, Lambda: float, T: int) -> Rate:
    """Rates of Jia et al. for an eluder dimension, A arms, a budget Lambda of noise and T rounds.

    Args:
        protocol: "weak" (variances fixed before the decision set; stated for d_elu <= sqrt(A T)) or "strong".
        d_elu: eluder dimension, >= 1.
        A: arms, >= 2.
        Lambda: budget, >= 0.
        T: rounds, >= 1.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of range, protocol is unknown, or d_elu > sqrt(A T) under "weak".

    Source: Jia, Qian, Rakhlin and Wei 2024 (arXiv 2410.12713).
    """
    checks.one_of("protocol", protocol, ("weak", "strong"))
    d_elu, A = checks.count("d_elu", d_elu), checks.count("A", A, at_least=2)
    Lambda, T = checks.real("Lambda", Lambda, at_least=0.0), checks.count("T", T)
    source = "Jia, Qian, Rakhlin and Wei 2024 (arXiv 2410.12713)"
    if protocol == "weak":
        if d_elu**2 > A * T:
            raise ValueError(f"d_elu must be <= sqrt(A T) = {math.sqrt(A * T):g} under 'weak', got {d_elu}")
        value = math.sqrt(min(A, d_elu) * Lambda) + d_elu
        return Rate("jia-weak", value, "sqrt(min(A, d_elu) Lambda) + d_elu", "lower", source)
    value = min(math.sqrt(d_elu * Lambda) + d_elu, math.sqrt(A * T))
    return Rate("jia-strong", value, "min(sqrt(d_elu Lambda) + d_elu, sqrt(A T))", "lower", source)


def oful_upper_bound(
    d: int,
    K: int,
    *,
    delta: float = 0.01,
    lam: float = 1.0,
    R: float = 1.0,
    X: float = 1.0,
    S_theta: float = 1.0,
) -> float:
    """OFUL's regret from above, with probability 1 - delta.

    4 sqrt(K d ln(lam + K X^2/d)) (sqrt(lam) S_theta + R sqrt(2 ln(1/delta) + d ln(1 + K X^2/(lam d)))).

    Stated for mean rewards in [-1, 1] and lam >= max(1, X^2).

    Args:
        d: dimension, >= 1.
        K: rounds, >= 1.
        delta: failure probability in (0, 1).
        lam: ridge penalty, >= max(1, X^2).
        R: sub-Gaussian scale of the noise, >= 0.
        X: bound on the norm of an action, > 0.
        S_theta: bound on the norm of the parameter, >= 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of range.

    Source: Abbasi-Yadkori, Pal and Szepesvari 2011, theorem 3 (printed with X where X^2 is meant).
    """
    d, K = checks.count("d", d), checks.count("K", K)
    delta, R = checks.probability("delta", delta), checks.real("R", R, at_least=0.0)
    X, S_theta = checks.real("X", X, above=0.0), checks.real("S_theta", S_theta, at_least=0.0)
    lam = checks.real("lam", lam, at_least=max(1.0, X**2))
    radius = math.sqrt(lam) * S_theta + R * math.sqrt(
        2 * math.log(1 / delta) + d * math.log1p(K * X**2 / (lam * d))
    )
    return 4 * math.sqrt(K * d * math.log(lam + K * X**2 / d)) * radius


def rate(name: Literal["save", "dani", "li-wang-zhou", "chu"], d: int, sigma: Any) -> Rate:
    """A published rate at a dimension and a variance sequence.

    Args:
        name: "save" (upper bound of SAVE, variance-dependent), "dani", "li-wang-zhou" or "chu" (lower
            bounds that know K alone).
        d: dimension, >= 1.
        sigma: standard deviations in [0, 1], shape (K,), K >= 2.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the name is unknown, d < 1, or sigma leaves [0, 1].

    Source: the paper named in the result's `source`.
    """
    checks.one_of("name", name, RATES)
    d = checks.count("d", d)
    sequence = checks.sigmas("sigma", sigma)
    K, S = sequence.size, float((sequence**2).sum())
    if name == "save":
        source = "Zhao, He, Zhou, Zhang and Gu 2023 (arXiv 2302.10371)"
        return Rate(name, d * math.sqrt(S) + d, "d sqrt(S) + d, up to logarithms", "upper", source)
    if name == "dani":
        return Rate(name, d * math.sqrt(K), "d sqrt(K)", "lower", "Dani, Hayes and Kakade 2008")
    if name == "li-wang-zhou":
        source = "Li, Wang and Zhou 2019, 2^(d/2) actions"
        return Rate(name, d * math.sqrt(K * math.log(K)), "d sqrt(K ln K)", "lower", source)
    return Rate(name, math.sqrt(d * K), "sqrt(d K)", "lower", "Chu, Li, Reyzin and Schapire 2011")
