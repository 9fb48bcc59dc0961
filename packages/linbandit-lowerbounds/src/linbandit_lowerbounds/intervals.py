"""Confidence intervals for what simulations measure: means, frequencies, and slopes on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from . import checks

_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A number and its confidence interval.

    Args:
        value: the estimate.
        low: lower limit.
        high: upper limit.
    """

    value: float
    low: float
    high: float

    def over(self, divisor: float) -> Estimate:
        """The estimate divided by a positive number; nan where it is 0.

        Args:
            divisor: the number.
        """
        if divisor <= 0.0:
            return Estimate(math.nan, math.nan, math.nan)
        return Estimate(*(limit / divisor for limit in self))


def mean_interval(samples: Float[np.ndarray, " n"], level: float = 0.95) -> Estimate:
    """Mean of independent samples with its Student t interval; infinite for a single sample.

    Args:
        samples: at least one number.
        level: coverage in (0, 1).

    Raises:
        ValueError: if there is no sample or level is not in (0, 1).
    """
    level = checks.probability("level", level)
    values = np.asarray(samples, np.float64)
    if values.size == 0:
        raise ValueError("samples must hold at least one number, got none")
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, -math.inf, math.inf)
    quantile = float(special.stdtrit(values.size - 1, 0.5 + 0.5 * level))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Estimate(mean, mean - half, mean + half)


def bootstrap_interval(
    samples: Float[np.ndarray, " n"], generator: np.random.Generator, level: float = 0.95
) -> Estimate:
    """Mean of independent samples with its percentile bootstrap interval (2000 resamples).

    Args:
        samples: at least one number.
        generator: source of the resamples.
        level: coverage in (0, 1).
    """
    values = np.asarray(samples, np.float64)
    picks = generator.integers(0, values.size, (_RESAMPLES, values.size))
    tail = 0.5 - 0.5 * checks.probability("level", level)
    low, high = np.quantile(values[picks].mean(1), [tail, 1.0 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> Estimate:
    """A frequency with Wilson's score interval, which stays inside [0, 1].

    Args:
        successes: how often it happened.
        trials: out of how many, >= 1.
        level: coverage in (0, 1).

    Raises:
        TypeError: if a count is no integer.
        ValueError: if 0 <= successes <= trials, trials >= 1 does not hold.
    """
    trials = checks.count("trials", trials)
    successes = checks.count("successes", successes, at_least=0)
    if successes > trials:
        raise ValueError(f"successes must be <= trials = {trials}, got {successes!r}")
    z = float(special.ndtri(0.5 + 0.5 * checks.probability("level", level)))
    share, ratio = successes / trials, z * z / trials
    centre = (share + 0.5 * ratio) / (1.0 + ratio)
    half = z / (1.0 + ratio) * math.sqrt(share * (1.0 - share) / trials + 0.25 * ratio / trials)
    # At the ends the limit is the share itself, which rounding must not pass.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def slope_interval(
    x: Sequence[float],
    samples: Sequence[Sequence[Float[np.ndarray, " n"]]],
    generator: np.random.Generator,
    level: float = 0.95,
) -> Estimate:
    """Exponent p of mean ~ x^p: least squares on logarithms, with a bootstrap over runs.

    Every point is the largest mean of several sets of runs (the gaps of a sweep); a resample draws the runs
    of each set anew and takes the largest mean again.

    Args:
        x: positive abscissae, at least two different ones.
        samples: for every x the sets of positive numbers.
        generator: source of the resamples.
        level: coverage in (0, 1).

    Raises:
        ValueError: if there are fewer than two different abscissae.
    """
    if len(set(x)) < 2:
        raise ValueError(f"x must hold at least two different values, got {list(x)!r}")
    logs = np.log(np.asarray(x, np.float64))
    centred = logs - logs.mean()
    weights = centred / (centred @ centred)
    resampled = np.stack([_largest_mean(sets, generator) for sets in samples], axis=1)
    means = np.array([max(float(np.mean(one)) for one in sets) for sets in samples])
    slopes = np.log(resampled) @ weights
    tail = 0.5 - 0.5 * checks.probability("level", level)
    low, high = np.quantile(slopes, [tail, 1.0 - tail])
    value = float(np.log(means) @ weights)
    # The maximum over sets is biased upwards in resamples; the interval must still hold the estimate.
    return Estimate(value, min(float(low), value), max(float(high), value))


def _largest_mean(
    sets: Sequence[Float[np.ndarray, " n"]], generator: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    means = []
    for one in sets:
        values = np.asarray(one, np.float64)
        picks = generator.integers(0, values.size, (_RESAMPLES, values.size))
        means.append(values[picks].mean(1))
    return np.max(means, axis=0)
