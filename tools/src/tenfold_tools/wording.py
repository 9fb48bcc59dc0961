"""Numbers as a reader wants them: as many digits as the interval supports, and enough to see what decided."""

from __future__ import annotations

import math
from collections.abc import Sequence


def short(value: float) -> str:
    """The number to 4 digits; thousands are written out (36864, not 3.686e+04)."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def interval(value: float, low: float, high: float, thresholds: Sequence[float] = ()) -> tuple[str, str, str]:
    """Value and ends of a finite interval, with two digits of its half width; without width, to 4 digits.

    Args:
        value: the estimate.
        low: lower end, <= value.
        high: upper end, >= value.
        thresholds: what the three numbers are compared with. A rounded number must not read like a threshold
            that it missed ("1 < 1"): it gets more digits then.
    """
    first, second, third = (
        _apart(number, _rounded(number, low, high), thresholds) for number in (value, low, high)
    )
    return first, second, third


def _rounded(number: float, low: float, high: float) -> str:
    half_width = (high - low) / 2
    if half_width == 0:
        return short(number)
    if not 1e-6 <= half_width < math.inf or max(abs(low), abs(high)) >= 1e6:
        return f"{number:.4g}"
    return f"{number:.{max(0, 1 - math.floor(math.log10(half_width)))}f}"


def _apart(number: float, text: str, thresholds: Sequence[float]) -> str:
    for digits in range(4, 18):  # 17 digits tell any two float64 apart
        if not any(float(text) == threshold != number for threshold in thresholds):
            break
        text = f"{number:.{digits}g}"
    return text


def duration(seconds: float) -> str:
    """The time in words: under 0.1 s, 0.31 s, 12 s, 3 min 5 s, 2 h 7 min."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def joined(seeds: Sequence[int]) -> str:
    """Seeds with neighbours joined: 0 to 4, 20, 22."""
    groups: list[list[int]] = []
    for seed in seeds:
        if groups and seed == groups[-1][-1] + 1:
            groups[-1].append(seed)
        else:
            groups.append([seed])
    return ", ".join(f"{g[0]} to {g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
