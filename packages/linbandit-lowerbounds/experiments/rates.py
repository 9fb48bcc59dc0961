"""How regret grows with S and d on the variance-scaled hypercube: the worst gap, then the best learner.

For each (d, S): every learner is swept over the gaps x / sqrt(S) on runs of their own, which choose its worst
gap, and the learner whose worst is smallest; then fresh runs measure it there. So the measured minimum of
maxima is not biased by its own noise. All gaps keep ||theta|| = d gap <= 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import charts
import numpy as np
import zoo
from stage import SELECTION, Stage, mean

from linbandit_lowerbounds.bounds import prefixed_bound, rate
from linbandit_lowerbounds.certify import GapSweep
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.intervals import Estimate, mean_interval, slope_interval
from linbandit_lowerbounds.scaled_bound import END_GAP, SEQ_GAP
from tenfold_tools.claims import Figure, Number

GAPS = (END_GAP, SEQ_GAP, 1.75, 2.5)


@dataclass(frozen=True)
class Point:
    """A dimension and a total variance S, spread over the first `noisy` of K rounds; the rest is silent.

    A silent round has the single action 0: it changes nothing but keeps the shapes of the compiled program.
    """

    d: int
    K: int
    S: float
    noisy: int

    @property
    def sigma(self) -> np.ndarray:
        """Standard deviation of each round."""
        return np.where(np.arange(self.K) < self.noisy, math.sqrt(self.S / self.noisy), 0.0)

    def instance(self, x: float) -> VarianceScaledHypercube:
        """The hypercube of gap x / sqrt(S)."""
        return VarianceScaledHypercube(self.sigma, self.d, x / math.sqrt(self.S))


@dataclass(frozen=True)
class Worst:
    """What one learner does at one point: regret over the gaps, and fresh runs at the worst of them."""

    point: Point
    learner: str
    profile: dict[float, np.ndarray]
    gap: float
    regret: np.ndarray

    @property
    def selected_by(self) -> float:
        """Mean regret at the worst gap on the runs that select."""
        return float(self.profile[self.gap].mean())


def lines(dims: Iterable[int], S: Iterable[float], K: int) -> dict[str, list[Point]]:
    """Points along S (smaller variance of all rounds) and K (fewer rounds) at the smallest d, and along d."""
    dims, totals = sorted(dims), sorted(S)
    return {
        "S": [Point(dims[0], K, total, K) for total in totals],
        "d": [Point(d, K, totals[-1], K) for d in dims],
        "K": [Point(dims[0], K, float(round(total)), round(total)) for total in totals],
    }


def worst_gap(on: Stage, name: str, point: Point, runs: int, gaps: Iterable[float] = GAPS) -> Worst:
    """Sweeps the gaps on the selecting runs and measures the worst gap on others."""
    allowed = [x for x in gaps if point.d * x <= math.sqrt(point.S)]
    algorithm = zoo.learner(name)
    selecting = runs if point.d <= 4 else max(3, runs // 8)  # 2^d actions; and regret varies less
    profile = {
        x: on.play(algorithm, point.instance(x), runs=selecting, stream=SELECTION).regret for x in allowed
    }
    gap = max(allowed, key=lambda x: profile[x].mean())
    return Worst(point, name, profile, gap, on.play(algorithm, point.instance(gap), runs=runs).regret)


def best_learner(found: Iterable[Worst]) -> Worst:
    """The learner whose worst is smallest, as the selecting runs have it."""
    return min(found, key=lambda worst: worst.selected_by)


Found = Mapping[tuple[Point, str], Worst]
_NONE = Estimate(math.nan, math.nan, math.nan)


def exponent(name: str, line: list[Point], best: Mapping[Point, Worst], on: Stage) -> Number:
    """Fitted exponent of the best learner's regret along d, K or S, with a bootstrap over runs."""
    regrets = [[best[point].regret] for point in line]
    fit = slope_interval([_value(point, name) for point in line], regrets, on.generator())
    return Number(f"exponent of {name}", *fit)


def level(worst: Worst) -> Number:
    """Regret at the worst gap in units of d sqrt(S)."""
    p = worst.point
    name = (
        f"regret / (d sqrt(S)), {worst.learner}, d {p.d}, S {p.S:.4g} in {p.noisy} rounds, x {worst.gap:.3g}"
    )
    return mean(name, worst.regret, p.d * math.sqrt(p.S))


def _value(point: Point, name: str) -> float:
    return float(point.noisy if name == "K" else getattr(point, name))


def configurations(found: Found, best: Mapping[Point, Worst]) -> list[dict[str, Any]]:
    """Every point and learner, every gap that was swept, and which were chosen."""
    return [
        asdict(point)
        | {"learner": name, "gaps": list(worst.profile), "gap": worst.gap, "best": best[point] is worst}
        | {"runs": worst.regret.size, "selecting runs": worst.profile[worst.gap].size}
        for (point, name), worst in found.items()
    ]


def sandwich(name: str, line: list[Point], found: Found) -> Figure:
    """Regret of every learner at its worst gap along d, K or S, between the lower bounds and SAVE's rate."""
    kinds = {"LB_seq": "scaled_seq", "LB_end": "scaled_end", "tight sum": "tight_sum", "(4.2)": "eq42_sharp"}
    bounds = {
        label: [prefixed_bound(p.sigma, p.d, kind=kind).value for p in line] for label, kind in kinds.items()
    }
    curves = {
        learner: [mean_interval(found[p, learner].regret) if (p, learner) in found else _NONE for p in line]
        for learner in dict.fromkeys(learner for _, learner in found)
        if (line[0], learner) in found
    }
    rates = {"d sqrt(S) + d": [rate("save", p.d, p.sigma).value for p in line]}
    title = f"Regret at each learner's worst gap along {name}, between bounds and rate"
    return charts.sandwich(title, name, [_value(p, name) for p in line], bounds, curves, rates)


def profile(point: Point, found: Found) -> Figure:
    """Regret / (d sqrt(S)) of each learner over the gap at one point."""
    scale = point.d * math.sqrt(point.S)
    sweeps = []
    for (at, name), worst in found.items():
        if at == point:
            gaps = tuple(worst.profile)
            bounds = [
                prefixed_bound(point.sigma, point.d, kind="scaled_seq", delta=x / math.sqrt(point.S)).value
                for x in gaps
            ]
            estimates = tuple(mean_interval(r).over(scale) for r in worst.profile.values())
            sweeps.append(GapSweep(name, point.d, point.S, gaps, estimates, tuple(b / scale for b in bounds)))
    return charts.gap_profile(f"Regret over the gap, d {point.d}, S {point.S:.4g}", sweeps)
