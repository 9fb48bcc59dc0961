"""Intervals that the checks of this package judge by, and the verdict that follows from one.

A verdict is read off an interval, never off a mean: inside the accepted range it is PASS, outside of it FAIL,
astride a limit INCONCLUSIVE. Fewer than three seeds support no statement: their interval is infinite.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
MIN_SEEDS = 3


class Estimate(NamedTuple):
    """A number and its confidence interval.

    Attributes:
        value: the estimate.
        low: lower limit, -inf where nothing is known.
        high: upper limit, inf where nothing is known.
    """

    value: float
    low: float
    high: float

    def within(self, low: float, high: float) -> Outcome:
        """Whether the number lies in [low, high], as far as its interval can tell.

        Args:
            low: lower end of what is accepted.
            high: upper end.
        """
        if low <= self.low and self.high <= high:
            return "PASS"
        return "FAIL" if self.high < low or self.low > high else "INCONCLUSIVE"

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def check_level(level: float) -> None:
    """Refuse a coverage outside (0, 1).

    Args:
        level: the coverage.

    Raises:
        ValueError: if it is outside.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level!r}")


def mean_interval(samples: Float[np.ndarray, " n"], level: float = 0.95) -> Estimate:
    """Mean of independent samples with Student's interval; nothing is known where a sample is not finite.

    Args:
        samples: one number per seed, at least one.
        level: coverage in (0, 1).

    Raises:
        ValueError: if the level is outside (0, 1).
    """
    check_level(level)
    values = np.asarray(samples, np.float64)
    mean = float(values.mean()) if np.isfinite(values).all() else math.nan
    if values.size < MIN_SEEDS or math.isnan(mean):
        return Estimate(mean, -math.inf, math.inf)
    quantile = float(special.stdtrit(values.size - 1, 0.5 + 0.5 * level))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Estimate(mean, mean - half, mean + half)


def slopes_of_log(
    widths: Float[np.ndarray, " widths"], sizes: Float[np.ndarray, "widths *rest"]
) -> Float[np.ndarray, "*rest"]:
    """Exponent p of size = C width^p by least squares of log size against log width.

    Args:
        widths: at least two different positive numbers.
        sizes: non-negative; a size that is zero or not finite makes its slope nan.
    """
    x = np.log(np.asarray(widths, np.float64))
    x -= x.mean()
    usable = np.isfinite(sizes) & (sizes > 0.0)
    y = np.log(np.where(usable, sizes, np.nan))
    return np.tensordot(x, y, axes=1) / float(x @ x)
