"""The runs of C9: learners at several levels of noise, from above the lower bounds."""

from __future__ import annotations

import charts
import numpy as np
import zoo
from sizes import Adaptive
from stage import Stage, ratio

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.bounds import prefixed_bound, rate
from linbandit_lowerbounds.environment import Instance
from linbandit_lowerbounds.intervals import mean_interval
from linbandit_lowerbounds.results import Result
from tenfold_tools.claims import Figure, Number

Levels = dict[float, Result]


def over_levels(on: Stage, name: str, instance: Instance, size: Adaptive, runs: int) -> Levels:
    """A learner at every constant level of noise, with the same contexts and standardised noise."""
    algorithm = zoo.learner(name)
    record = "checkpoints" if name in size.reported else "total"
    return {
        level: on.play(algorithm, instance, Prefixed(np.full(size.K, level)), runs=runs, record=record)
        for level in size.levels
    }


def fall(name: str, at: Levels, size: Adaptive) -> Number:
    """How many times less regret there is at the lowest level of noise than at the highest."""
    high, low = size.levels[0], size.levels[-1]
    return ratio(f"regret at sigma {high:g} / at {low:g}, {name}", at[high].regret, at[low].regret)


def halves(name: str, result: Result, size: Adaptive) -> Number:
    """Mean regret of the second half of the rounds over that of the first: 1 for linear regret."""
    assert result.checkpoints is not None  # noqa: S101  (recorded above)
    rounds, regret = result.checkpoints.rounds, result.checkpoints.regret.mean(1)
    middle = float(np.interp(rounds[-1] / 2, rounds, regret))
    label = f"regret in the second half / in the first, {name}, sigma {size.levels[0]:g}"
    return Number(label, (float(regret[-1]) - middle) / middle)


def sandwich(size: Adaptive, found: dict[str, Levels]) -> Figure:
    """Regret over S between the lower bounds of hard instances and the rate of SAVE."""
    levels = sorted(size.levels)
    sequences = [np.full(size.K, level) for level in levels]
    kinds = {"LB_seq": "scaled_seq", "tight sum": "tight_sum", "(4.2)": "eq42_sharp"}
    return charts.sandwich(
        f"Regret on random contexts over S (d {size.d}, K {size.K}); the bounds are for hard instances",
        "S",
        [float(sigma @ sigma) for sigma in sequences],
        {
            label: [prefixed_bound(sigma, size.d, kind=kind).value for sigma in sequences]
            for label, kind in kinds.items()
        },
        {name: [mean_interval(at[level].regret) for level in levels] for name, at in found.items()},
        {"d sqrt(S) + d": [rate("save", size.d, sigma).value for sigma in sequences]},
    )
