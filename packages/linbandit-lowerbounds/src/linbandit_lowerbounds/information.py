"""Divergences and tail inequalities that the proofs of regret lower bounds use, in float64 on the host.

    KL(p || q) = p ln(p/q) + (1-p) ln((1-p)/(1-q))           Bernoulli
    KL         = ln(s_q/s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2      Gaussian
    TV        <= sqrt(KL/2)                                  Pinsker
    TV        <= sqrt(1 - exp(-KL)) <= 1 - exp(-KL)/2        Bretagnolle and Huber, two forms
    P(Y >= t) >= (E Y - t) / (max Y - t)                     reverse Markov

Every function takes numbers or arrays (they broadcast) and returns float64, whatever JAX's x64 mode is.
None may be called on traced values.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from . import checks

_erfc = np.frompyfunc(math.erfc, 1, 1)


def normal_tail(x: Any) -> float | Float[ndarray, "*shape"]:
    """Q(x) = P(N(0, 1) > x), accurate in relative terms far into the tail.

    Args:
        x: any real numbers.

    Raises:
        TypeError: if x cannot be read as numbers.
        ValueError: if x is NaN.

    Source: Q(x) = erfc(x / sqrt(2)) / 2.
    """
    x = _numbers("x", x)
    return _unwrap(0.5 * np.asarray(_erfc(x / math.sqrt(2.0)), np.float64))


def kl_bernoulli(p: Any, q: Any) -> float | Float[ndarray, "*shape"]:
    """KL(Bernoulli(p) || Bernoulli(q)) in nats; infinite where p puts mass and q puts none.

    Args:
        p: success probability of the first law, in [0, 1].
        q: success probability of the second law, in [0, 1].

    Raises:
        TypeError: if an argument cannot be read as numbers.
        ValueError: if an argument is outside [0, 1] or NaN.

    Source: Cover and Thomas, Elements of Information Theory, section 2.3; 0 ln 0 = 0.
    """
    p = _numbers("p", p, lower=0.0, upper=1.0)
    q = _numbers("q", q, lower=0.0, upper=1.0)
    value = _entropy_term(p, q) + _entropy_term(np.asarray(1.0 - p), np.asarray(1.0 - q))
    return _unwrap(np.maximum(value, 0.0))


def kl_gaussian(
    mean_p: Any, mean_q: Any, variance_p: Any = 1.0, variance_q: Any = None
) -> float | Float[ndarray, "*shape"]:
    """KL(N(mean_p, variance_p) || N(mean_q, variance_q)) in nats.

    A variance of zero is a point mass. Two equal point masses have divergence 0 (the formula's 0/0); every
    other pair with a zero variance is singular and has divergence infinity. A noiseless round may therefore
    offer no choice in an instance whose proof adds up divergences.

    Args:
        mean_p: mean of the first law.
        mean_q: mean of the second law.
        variance_p: variance of the first law, >= 0.
        variance_q: variance of the second law, >= 0; None takes variance_p.

    Raises:
        TypeError: if an argument cannot be read as numbers.
        ValueError: if a variance is negative, or anything is NaN or infinite.

    Source: Lattimore and Szepesvari, Bandit Algorithms (2020), section 14.3.
    """
    mean_p, mean_q = _numbers("mean_p", mean_p, finite=True), _numbers("mean_q", mean_q, finite=True)
    variance_p = _numbers("variance_p", variance_p, lower=0.0, finite=True)
    variance_q = (
        variance_p if variance_q is None else _numbers("variance_q", variance_q, lower=0.0, finite=True)
    )
    mean_p, mean_q, variance_p, variance_q = np.broadcast_arrays(mean_p, mean_q, variance_p, variance_q)
    regular = (variance_p > 0.0) & (variance_q > 0.0)
    v_p, v_q = np.where(regular, variance_p, 1.0), np.where(regular, variance_q, 1.0)
    with np.errstate(over="ignore"):  # beyond the largest float the divergence is infinite
        shape = v_p / v_q - 1.0 - (np.log(v_p) - np.log(v_q))
        value = 0.5 * shape + 0.5 * ((mean_p - mean_q) / np.sqrt(v_q)) ** 2
    same_point = (variance_p == 0.0) & (variance_q == 0.0) & (mean_p == mean_q)
    return _unwrap(np.where(regular, value, np.where(same_point, 0.0, math.inf)))


def tv_gaussian(mean_p: Any, mean_q: Any, variance: Any = 1.0) -> float | Float[ndarray, "*shape"]:
    """Exact total variation 2 Phi(|mean_p - mean_q| / (2 s)) - 1 of two normal laws with one variance s^2.

    Variance zero: 0 if the means agree, else 1.

    Args:
        mean_p: mean of the first law.
        mean_q: mean of the second law.
        variance: common variance, >= 0.

    Raises:
        TypeError: if an argument cannot be read as numbers.
        ValueError: if the variance is negative, or anything is NaN or infinite.

    Source: the two densities cross half way between the means.
    """
    mean_p, mean_q = _numbers("mean_p", mean_p, finite=True), _numbers("mean_q", mean_q, finite=True)
    variance = _numbers("variance", variance, lower=0.0, finite=True)
    gap, variance = np.broadcast_arrays(np.abs(mean_p - mean_q), variance)
    scale = np.where(variance > 0.0, np.sqrt(variance), 1.0)
    value = np.asarray(_erf(gap / scale / math.sqrt(8.0)), np.float64)
    return _unwrap(np.where(variance > 0.0, value, (gap > 0.0).astype(np.float64)))


def pinsker(kl: Any) -> float | Float[ndarray, "*shape"]:
    """Upper bound min(1, sqrt(KL / 2)) on total variation.

    Args:
        kl: divergence in nats, in [0, inf].

    Raises:
        TypeError: if kl cannot be read as numbers.
        ValueError: if kl is negative or NaN.

    Source: Tsybakov, Introduction to Nonparametric Estimation (2009), lemma 2.5.
    """
    return _unwrap(np.minimum(np.sqrt(0.5 * _numbers("kl", kl, lower=0.0)), 1.0))


def bretagnolle_huber(kl: Any) -> float | Float[ndarray, "*shape"]:
    """Upper bound 1 - exp(-KL) / 2 on total variation: the form that bandit proofs quote.

    Weaker than `bretagnolle_huber_root` everywhere; never vacuous, unlike Pinsker's.

    Args:
        kl: divergence in nats, in [0, inf].

    Raises:
        TypeError: if kl cannot be read as numbers.
        ValueError: if kl is negative or NaN.

    Source: Lattimore and Szepesvari (2020), theorem 14.2.
    """
    return _unwrap(1.0 - 0.5 * np.exp(-_numbers("kl", kl, lower=0.0)))


def bretagnolle_huber_root(kl: Any) -> float | Float[ndarray, "*shape"]:
    """Upper bound sqrt(1 - exp(-KL)) on total variation: the original, sharper form.

    Smaller than Pinsker's bound from KL = 1.594 on, and smaller than `bretagnolle_huber` everywhere.

    Args:
        kl: divergence in nats, in [0, inf].

    Raises:
        TypeError: if kl cannot be read as numbers.
        ValueError: if kl is negative or NaN.

    Source: Bretagnolle and Huber (1979); Canonne, A short note on an inequality between KL and TV (2022).
    """
    return _unwrap(np.sqrt(-np.expm1(-_numbers("kl", kl, lower=0.0))))


def tv_upper(kl: Any) -> float | Float[ndarray, "*shape"]:
    """Smaller of Pinsker's and Bretagnolle and Huber's (root form) bounds on total variation.

    Args:
        kl: divergence in nats, in [0, inf].

    Raises:
        TypeError: if kl cannot be read as numbers.
        ValueError: if kl is negative or NaN.
    """
    return _unwrap(np.minimum(np.asarray(pinsker(kl)), np.asarray(bretagnolle_huber_root(kl))))


def reverse_markov(mean: float, maximum: float, threshold: float) -> float:
    """Lower bound max(0, (mean - threshold) / (maximum - threshold)) on P(Y >= threshold) for Y <= maximum.

    Turns a bound on expected regret into one that holds with constant probability, where the worst regret
    is only a constant factor above the mean.

    Args:
        mean: E Y, or a lower bound on it; at most maximum.
        maximum: upper limit of Y.
        threshold: level, below maximum.

    Raises:
        TypeError: if an argument is no real number.
        ValueError: if mean > maximum or threshold >= maximum, or anything is not finite.

    Source: E Y <= threshold (1 - P) + maximum P; docs/proofs.md, section 3.
    """
    mean, maximum = checks.real("mean", mean), checks.real("maximum", maximum)
    threshold = checks.real("threshold", threshold)
    if mean > maximum:
        raise ValueError(f"mean must be <= maximum = {maximum!r}, got {mean!r}")
    if threshold >= maximum:
        raise ValueError(f"threshold must be < maximum = {maximum!r}, got {threshold!r}")
    return max(0.0, (mean - threshold) / (maximum - threshold))


def chernoff_lower(mean: float, fraction: float, *, form: Literal["square", "exact"] = "square") -> float:
    """Upper bound on P(sum <= (1 - fraction) mean), the sum of independent summands in [0, 1].

    Args:
        mean: expected sum, or a lower bound on it, >= 0.
        fraction: relative shortfall in [0, 1].
        form: "square" for exp(-fraction^2 mean / 2), "exact" for the smaller
            exp(-mean (fraction + (1 - fraction) ln(1 - fraction))).

    Raises:
        TypeError: if a number is no real number.
        ValueError: if mean < 0, fraction is outside [0, 1] or form is unknown.

    Source: Mitzenmacher and Upfal, Probability and Computing (2017), theorem 4.5.
    """
    mean, fraction = checks.real("mean", mean, at_least=0.0), checks.real("fraction", fraction, at_least=0.0)
    if fraction > 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    checks.one_of("form", form, ("square", "exact"))
    if form == "square":
        return math.exp(-0.5 * fraction**2 * mean)
    kept = 1.0 - fraction
    return math.exp(-mean * (fraction + (kept * math.log(kept) if kept > 0.0 else 0.0)))


_erf = np.frompyfunc(math.erf, 1, 1)


def _entropy_term(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """P ln(p / q) with 0 ln 0 = 0 and p ln(p / 0) = inf."""
    p, q = np.broadcast_arrays(p, q)
    safe_p, safe_q = np.where(p > 0.0, p, 1.0), np.where(q > 0.0, q, 1.0)
    # log1p keeps the digits where p and q are close and the two terms of the divergence nearly cancel; far
    # apart, their quotient may overflow, and their logarithms do not
    close = (safe_p > 0.5 * safe_q) & (safe_p < 2.0 * safe_q)
    ratio = np.where(close, safe_p - safe_q, 0.0) / np.where(close, safe_q, 1.0)
    term = p * np.where(close, np.log1p(ratio), np.log(safe_p) - np.log(safe_q))
    return np.where(p == 0.0, 0.0, np.where(q == 0.0, math.inf, term))


def _numbers(
    name: str, value: Any, *, lower: float = -math.inf, upper: float = math.inf, finite: bool = False
) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {value!r}") from error
    allowed = (array >= lower) & (array <= upper)
    if finite:
        allowed &= np.isfinite(array)
    if not allowed.all():
        bad = float(array[~allowed].flat[0])
        rule = "finite" if finite and not math.isfinite(bad) else f"in [{lower:g}, {upper:g}]"
        raise ValueError(f"{name} must be {rule}, got {bad!r}")
    return array


def _unwrap(value: Any) -> float | np.ndarray:
    """A float for scalars, so that results print and compare like numbers."""
    return float(value) if np.ndim(value) == 0 else value
