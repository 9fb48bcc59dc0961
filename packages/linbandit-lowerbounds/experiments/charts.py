"""The figures of the claims: those of `linbandit_lowerbounds.plots` on the report's canvas, and two more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import NullFormatter

from linbandit_lowerbounds import plots
from linbandit_lowerbounds.certify import GapSweep
from linbandit_lowerbounds.intervals import Estimate
from tenfold_tools.claims import Figure, Number


def intervals(title: str, rows: Mapping[str, Number], axis: str, *references: float) -> Figure:
    """Each number as a point with its interval, one labelled row per number; lines at the references."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for row, number in enumerate(rows.values()):
            axes.plot([number.low, number.high], [row, row], color="C0")
            axes.plot(number.value, row, "o", color="C0")
        for reference in references:
            axes.axvline(reference, linestyle=":", color=matplotlib.rcParams["text.color"])
        axes.set(xlabel=axis, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))

    return Figure(title, draw)


def sandwich(
    title: str,
    quantity: Any,
    x: Sequence[float],
    bounds: Mapping[str, Sequence[float]],
    curves: Mapping[str, Sequence[Estimate]],
    rates: Mapping[str, Sequence[float]],
) -> Figure:
    """Regret of learners between lower bounds and published rates, over d, K or S."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        plots.sandwich(axes, x, bounds, curves, rates, quantity=quantity)
        axes.legend(fontsize="xx-small", ncols=2)

    return Figure(title, draw)


def gap_profile(title: str, sweeps: Sequence[GapSweep]) -> Figure:
    """Regret / (d sqrt(S)) of each learner over the scaled gap, above LB_seq."""

    def draw(canvas: Any) -> None:
        plots.gap_profile(canvas.subplots(), sweeps)

    return Figure(title, draw)


def histogram(title: str, regret: np.ndarray, bound: float, name: str) -> Figure:
    """Regret of single runs beside the bound and its half."""

    def draw(canvas: Any) -> None:
        plots.regret_histogram(canvas.subplots(), regret, bound, name=name)

    return Figure(title, draw)


def below_a_limit(title: str, regret: Mapping[str, np.ndarray], limit: float, name: str) -> Figure:
    """Regret of single runs, one histogram per game, and what none of them may exceed."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        bins = np.linspace(0.0, limit, 49)
        for number, (game, values) in enumerate(regret.items()):
            axes.hist(values, bins=bins, color=f"C{number % 6}", alpha=0.6, label=game)
        axes.axvline(limit, linestyle="dashed", color=plots.THEORY, label=name)
        axes.set(xlabel="regret of a run", ylabel="runs")
        axes.legend(fontsize="small")

    return Figure(title, draw)


def visits(title: str, sigma: np.ndarray) -> Figure:
    """Visits of the sub-instances of the cyclic construction, beside those they are tuned to."""

    def draw(canvas: Any) -> None:
        plots.cyclic_visits(canvas.subplots(), sigma)

    return Figure(title, draw)


def scatter(title: str, clouds: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Regret of each run over its bound, one cloud per name, log-log, with the line of equality."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        everything = np.concatenate([np.ravel(values) for cloud in clouds.values() for values in cloud])
        ends = [everything[everything > 0].min(), everything.max()]
        axes.plot(ends, ends, linestyle=":", color=matplotlib.rcParams["text.color"])
        for number, (name, (xs, ys)) in enumerate(clouds.items()):
            axes.plot(xs, ys, "o", markersize=3, alpha=0.5, color=f"C{number % 6}", label=name)
        axes.set(xlabel="bound", ylabel="regret", xscale="log", yscale="log")
        axes.legend(fontsize="xx-small")

    return Figure(title, draw)


def grouped_bars(title: str, axis: str, groups: Mapping[str, Mapping[str, float]]) -> Figure:
    """One group of horizontal bars per key, one bar per inner name, on a logarithmic axis."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        names = list(dict.fromkeys(name for values in groups.values() for name in values))
        height = 0.8 / len(names)
        for number, name in enumerate(names):
            at = [row + (number - (len(names) - 1) / 2) * height for row in range(len(groups))]
            widths = [values.get(name, np.nan) for values in groups.values()]
            axes.barh(at, widths, height, color=f"C{number % 6}", label=name, alpha=1 - 0.5 * (number // 6))
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set(xlabel=axis, xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize="x-small", ncols=2)

    return Figure(title, draw)
