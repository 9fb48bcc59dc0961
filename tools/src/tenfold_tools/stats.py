"""Intervals for experiments: means over seeds, paired differences, rates on log-log axes, timing ratios.

A verdict is read off an interval, never off a mean. Which interval suits which measurement:

- a mean over a handful of seeds: Student's t, mean +- t_{n-1} s / sqrt(n). It is exact for normal samples
  and the only one here that stays honest at n = 3 to 10, where a bootstrap is too narrow;
- two arms run on the same seeds: the same, on the differences (`paired_difference`);
- a statistic without a formula, n >= 15 or so: bias-corrected accelerated bootstrap (`bootstrap_interval`);
- a rate y = C x^p: the slope of log y against log x (`loglog_slope`);
- two timings measured side by side: the median of the pairwise ratios (`paired_ratio`).

Every function is deterministic: random resampling takes a seed.

Source: Efron, "Better bootstrap confidence intervals", JASA 1987 (the BCa interval, computed by SciPy).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

__all__ = [
    "Estimate",
    "bootstrap_interval",
    "loglog_slope",
    "paired_difference",
    "paired_ratio",
    "t_interval",
]

UNKNOWN = (-math.inf, math.inf)
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the point estimate.
        low: lower limit of the interval, -inf when nothing is known.
        high: upper limit of the interval, +inf when nothing is known.
    """

    value: float
    low: float
    high: float


def t_interval(samples: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of independent samples.

    Args:
        samples: one number per seed or repetition, at least one.
        level: coverage in (0, 1).

    Returns:
        The limits (low, high); (-inf, inf) for fewer than 3 samples, because two seeds support no statement.

    Raises:
        ValueError: if samples are not a non-empty finite vector or level is outside (0, 1).
    """
    sample = _vector(samples, "samples")
    _check_level(level)
    if sample.size < MIN_SAMPLES:
        return UNKNOWN
    mean = float(sample.mean())
    standard_error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    half_width = float(scipy_stats.t.ppf((1 + level) / 2, sample.size - 1)) * standard_error
    return mean - half_width, mean + half_width


def bootstrap_interval(
    samples: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    *,
    method: Literal["BCa", "percentile"] = "BCa",
) -> tuple[float, float]:
    """Bootstrap interval for any statistic of independent samples.

    BCa corrects the percentile interval for bias and skewness of the statistic, which a mean of skewed losses
    needs. Where it is undefined (a statistic that no single sample moves, such as the median of tied values)
    the percentile interval is returned. For fewer than about 15 samples prefer `t_interval`.

    Args:
        samples: one number per independent repetition, at least one.
        statistic: function of a vector; called once with `axis=-1` if it accepts `axis`, else per resample.
        level: coverage in (0, 1).
        resamples: bootstrap resamples, >= 100.
        seed: seed of the resampling; the same seed gives the same interval.
        method: "BCa", or "percentile" for statistics that are not smooth (quantiles).

    Returns:
        The limits (low, high); (-inf, inf) for fewer than 3 samples; (v, v) when all samples equal v.

    Raises:
        ValueError: if samples are not a non-empty finite vector, level is outside (0, 1), resamples < 100, or
            method is unknown.

    Source: Efron 1987.
    """
    sample = _vector(samples, "samples")
    _check_level(level)
    if resamples < 100:
        raise ValueError(f"resamples must be >= 100, got {resamples!r}")
    if method not in ("BCa", "percentile"):
        raise ValueError(f"method must be 'BCa' or 'percentile', got {method!r}")
    if sample.size < MIN_SAMPLES:
        return UNKNOWN
    if np.all(sample == sample[0]):
        value = float(statistic(sample))
        return value, value
    limits = _resampled(sample, statistic, level, resamples, seed, method)
    if any(map(math.isnan, limits)):
        limits = _resampled(sample, statistic, level, resamples, seed, "percentile")
    return limits


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of a - b with Student's interval, where a[i] and b[i] share a seed (data order, initial weights).

    Pairing removes what the two arms have in common, which is most of the spread between seeds.

    Args:
        a: one number per seed.
        b: one number per seed, in the same order.
        level: coverage in (0, 1).

    Returns:
        The mean difference; its interval is infinite for fewer than 3 pairs.

    Raises:
        ValueError: if the lengths differ, an entry is not finite, or level is outside (0, 1).
    """
    first, second = _pair(a, b)
    difference = first - second
    low, high = t_interval(difference, level)
    return Estimate(float(difference.mean()), low, high)


def loglog_slope(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Estimate:
    """Exponent p of y = C x^p: the least-squares slope of log y against log x.

    For one curve the interval is the regression's t interval on n - 2 degrees of freedom: it takes the
    residuals for independent noise. Given one row per seed, the slope is fitted row by row and the interval
    is Student's over the rows. Prefer that: the points of a single run are correlated, its seeds are not.

    Args:
        x: positive abscissae, at least two different ones.
        y: positive values: a vector as long as x, or a matrix (seeds, len(x)).
        level: coverage in (0, 1).

    Returns:
        The slope; its interval is infinite for two points or for fewer than 3 rows.

    Raises:
        ValueError: if shapes do not match, a value is not finite and > 0, all x are equal, or level is
            outside (0, 1).
    """
    log_x = np.log(_positive(_vector(x, "x"), "x"))
    values = _finite(np.asarray(y, dtype=float), "y")
    _check_level(level)
    if values.ndim not in (1, 2) or values.shape[-1] != log_x.size or values.shape[0] == 0:
        raise ValueError(
            f"y must have shape ({log_x.size},) or (seeds, {log_x.size}) to match x, got {values.shape}"
        )
    if np.unique(log_x).size < 2:
        raise ValueError("x must hold at least two different values to have a slope")
    log_y = np.log(_positive(values, "y"))
    centred = log_x - log_x.mean()
    spread = float(centred @ centred)
    slopes = log_y @ centred / spread
    if log_y.ndim == 2:
        low, high = t_interval(slopes, level)
        return Estimate(float(slopes.mean()), low, high)
    slope = float(slopes)
    freedom = log_x.size - 2
    if freedom == 0:
        return Estimate(slope, *UNKNOWN)
    residuals = log_y - log_y.mean() - slope * centred
    standard_error = math.sqrt(float(residuals @ residuals) / freedom / spread)
    half_width = float(scipy_stats.t.ppf((1 + level) / 2, freedom)) * standard_error
    return Estimate(slope, slope - half_width, slope + half_width)


def paired_ratio(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Estimate:
    """Typical ratio a / b of quantities measured side by side: exp of the median of log(a[i] / b[i]).

    Timings have a hard floor and a long tail of interruptions, so the median is taken: one descheduled round
    moves a mean of ratios, geometric or not, and leaves the median alone. Ratios are formed within a round,
    so that a machine that warms up or is shared slows both sides alike. Taking logarithms makes the answer
    the same whichever side is the denominator. The interval is a percentile bootstrap: the median is not
    smooth, and the jackknife that BCa relies on is inconsistent for it.

    Args:
        a: positive measurements, one per round.
        b: positive measurements of the baseline in the same rounds.
        level: coverage in (0, 1).
        resamples: bootstrap resamples, >= 100.
        seed: seed of the resampling.

    Returns:
        The ratio; its interval is (0, inf) for fewer than 3 rounds.

    Raises:
        ValueError: if the lengths differ, a value is not finite and > 0, level is outside (0, 1) or
            resamples < 100.
    """
    first, second = _pair(a, b)
    log_ratio = np.log(_positive(first, "a")) - np.log(_positive(second, "b"))
    low, high = bootstrap_interval(log_ratio, np.median, level, resamples, seed, method="percentile")
    return Estimate(float(np.exp(np.median(log_ratio))), float(np.exp(low)), float(np.exp(high)))


def _resampled(
    sample: NDArray[np.float64],
    statistic: Callable[..., Any],
    level: float,
    resamples: int,
    seed: int,
    method: Literal["BCa", "percentile"],
) -> tuple[float, float]:
    with warnings.catch_warnings():
        # SciPy warns where BCa is undefined; the caller of this function handles the NaN it then returns.
        warnings.simplefilter("ignore")
        result = scipy_stats.bootstrap(
            (sample,),
            statistic,
            confidence_level=level,
            n_resamples=resamples,
            batch=max(1, 2_000_000 // sample.size),
            method=method,
            rng=np.random.default_rng(seed),
        )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=float)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {vector.shape}")
    return _finite(vector, name)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _vector(a, "a"), _vector(b, "b")
    if first.size != second.size:
        raise ValueError(f"a and b must be paired, got lengths {first.size} and {second.size}")
    return first, second


def _finite(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    bad = np.argwhere(~np.isfinite(values))
    if bad.size:
        where = tuple(int(i) for i in bad[0])
        raise ValueError(f"{name} must be finite, got {values[where]} at index {list(where)}")
    return values


def _positive(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    bad = np.argwhere(values <= 0)
    if bad.size:
        where = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{name} must be > 0 (its logarithm is taken), got {values[where]} at index {list(where)}"
        )
    return values


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
