"""Pictures of regret beside its bounds (extra "plot"), drawn on axes that the caller made.

    sandwich           regret of learners between lower bounds and published rates, over d, K or S
    gap_profile        regret / (d sqrt S) over the scaled gap: a learner's signature
    regret_histogram   single runs beside half the bound
    cyclic_visits      which sub-instance of the cyclic construction got the visits it was tuned to
    certificate_figure a `Certificate` at a glance

Learners take the colours C0, C1, .. of the current style in turn and markers of their own; everything that is
theory has the colour C5 and no markers. Nothing is black, so that a dark style works, and pyplot's global
state is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from . import checks
from .intervals import Estimate, wilson_interval
from .peeling import groups

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        'linbandit_lowerbounds.plots needs matplotlib: pip install "linbandit-lowerbounds[plot]"'
    ) from error

if TYPE_CHECKING:
    from .certify import Certificate, GapSweep, Row

Numbers = Sequence[float] | Sequence[int] | np.ndarray

THEORY = "C5"
_LEARNERS = 5
_MARKERS = "osD^vP*X"
_DASHES = ("solid", "dashed", "dashdot", (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1)))
_QUANTITIES = {"d": "dimension d", "K": "rounds K", "S": r"total variance $S=\sum\sigma_k^2$"}


def sandwich(
    axes: Axes,
    x: Numbers,
    bounds: Mapping[str, Numbers],
    curves: Mapping[str, Sequence[Estimate]],
    rates: Mapping[str, Numbers] | None = None,
    *,
    quantity: Literal["d", "K", "S"] = "d",
) -> None:
    """Regret between lower bounds and rates, on logarithmic axes.

    Args:
        axes: where to draw.
        x: values of the quantity, increasing and positive.
        bounds: name -> lower bound at each x; zeros (a condition fails) leave a gap, and the legend says so
            where all are zero.
        curves: learner -> mean regret at each x, with its interval.
        rates: name -> rate at each x. Rates have no constants: each is scaled to meet the highest curve at
            the first x.
        quantity: what x is.

    Raises:
        ValueError: if x is not increasing and positive, there are no curves, a length differs from that of
            x, or the quantity is unknown.
    """
    checks.one_of("quantity", quantity, tuple(_QUANTITIES))
    at = np.asarray(x, np.float64)
    if at.ndim != 1 or not at.size or not (at > 0).all() or not (np.diff(at) > 0).all():
        raise ValueError(f"x must be increasing and positive, got {x!r}")
    if not curves:
        raise ValueError("curves must hold at least one learner, got none")
    for kind, entries in (("bounds", bounds), ("curves", curves), ("rates", rates or {})):
        for name, values in entries.items():
            if len(values) != at.size:
                raise ValueError(f"{kind}[{name!r}] must have {at.size} values, got {len(values)}")
    for number, (name, estimates) in enumerate(curves.items()):
        _curve(axes, at, estimates, number, name)
    for (name, values), dashes in zip(bounds.items(), cycle(_DASHES), strict=False):
        positive = _positive(values)
        label = name if np.isfinite(positive).any() else f"{name} (0: a condition fails)"
        axes.plot(at, positive, color=THEORY, linestyle=dashes, label=label)
    top = max(estimates[0].value for estimates in curves.values())
    for name, values in (rates or {}).items():
        scaled = np.asarray(values, np.float64) * (top / values[0])
        axes.plot(at, scaled, color=THEORY, linestyle="dotted", alpha=0.6, label=f"rate {name} (scaled)")
    axes.set(xscale="log", yscale="log", xlabel=_QUANTITIES[quantity], ylabel="regret")
    axes.legend(fontsize="small")


def gap_profile(axes: Axes, sweeps: Sequence[GapSweep]) -> None:
    """Regret / (d sqrt(S)) over the scaled gap x, with the lower bound LB_seq; the worst gap is marked.

    Args:
        axes: where to draw.
        sweeps: as `gap_sweep` gives them, one for each learner.

    Raises:
        ValueError: if there are none.
    """
    if not sweeps:
        raise ValueError("sweeps must hold at least one GapSweep, got none")
    for number, sweep in enumerate(sweeps):
        colour = _curve(axes, np.asarray(sweep.x), sweep.regret, number, sweep.algorithm)
        worst = sweep.regret.index(sweep.worst)
        ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": colour}
        axes.plot([sweep.x[worst]], [sweep.worst.value], marker="o", linestyle="none", **ring)
    drawn = {(sweep.x, sweep.bounds) for sweep in sweeps}
    for i, (x, bounds) in enumerate(sorted(drawn)):
        label = r"$\mathrm{LB_{seq}}$" if i == 0 else None
        axes.plot(x, _positive(bounds), color=THEORY, linestyle="dashed", label=label)
    axes.set(xscale="log", yscale="log", xlabel=r"scaled gap $x=\Delta\sqrt{S}$")
    axes.set_ylabel(r"regret / ($d\sqrt{S}$)")
    _cut_below(axes, [estimate.value for sweep in sweeps for estimate in sweep.regret])
    axes.legend(fontsize="small")


def regret_histogram(
    axes: Axes, regret: Float[np.ndarray, " seeds"], bound: float, *, name: str, bins: int = 30
) -> None:
    """Regret of single runs, the lower bound LB on its mean, and LB/2 with P(regret >= LB/2).

    Args:
        axes: where to draw.
        regret: regret of each run.
        bound: LB, > 0.
        name: the learner.
        bins: number of bins.

    Raises:
        TypeError: if a number is none.
        ValueError: if regret is no non-empty vector of finite numbers, or bound <= 0 (nothing to compare
            with).
    """
    bound, bins = checks.real("bound", bound, above=0.0), checks.count("bins", bins)
    values = np.asarray(regret, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"regret must be a vector of finite numbers, got shape {values.shape}")
    share = wilson_interval(int((values >= 0.5 * bound).sum()), values.size)
    axes.hist(values, bins=bins, color="C0", alpha=0.7, label=name)
    label = f"LB/2: P = {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] above"
    axes.axvline(0.5 * bound, color=THEORY, linestyle="dashed", label=label)
    axes.axvline(bound, color=THEORY, label="LB (on the mean)")
    axes.axvline(float(values.mean()), color="C1", linestyle="dashdot", label="mean")
    axes.set(xlabel="regret of a run", ylabel="runs")
    axes.legend(fontsize="small")


def cyclic_visits(axes: Axes, sigma: Any, *, largest: int = 4) -> None:
    """Visits of the sub-instances of `CyclicMultiInstance`, beside those they are tuned to.

    Round t of group i goes to sub-instance j = 1 + t mod L, tuned to 2^(j-1) visits. Whatever number of
    rounds an adversary grants a group, one j fits: the last whose tuning is at most its visits (ringed).

    Args:
        axes: where to draw.
        sigma: the standard deviations that an adversary chose, in [0, 1].
        largest: how many groups to draw, those with the most rounds.

    Raises:
        TypeError: if sigma is not numeric.
        ValueError: if sigma leaves [0, 1] or no round belongs to a group i >= 1.
    """
    largest = checks.count("largest", largest)
    found = groups(sigma)
    order = np.argsort(-found.counts[1:], kind="stable")[:largest] + 1
    shown = [int(i) for i in order if found.counts[i] > 0]
    if not shown:
        raise ValueError("sigma must have a round with sigma_k > 1/K, got none")
    j = np.arange(1, found.L + 1)
    tuned = 2.0 ** (j - 1)
    for number, i in enumerate(shown):
        visits = np.ceil(np.maximum(found.counts[i] - (j - 1), 0) / found.L)
        colour, marker = f"C{number % _LEARNERS}", _MARKERS[number % len(_MARKERS)]
        label = f"group {i}: {found.counts[i]} rounds"
        axes.plot(j, _positive(visits), color=colour, marker=marker, linestyle="none", label=label)
        fit = int(np.flatnonzero(tuned <= visits).max())
        ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": colour}
        axes.plot([j[fit]], [visits[fit]], marker="o", linestyle="none", **ring)
    axes.plot(j, tuned, color=THEORY, linestyle="dashed", label=r"tuned to $2^{j-1}$")
    axes.set(yscale="log", xlabel="sub-instance j", ylabel="visits")
    axes.legend(fontsize="small")


def certificate_figure(certificate: Certificate) -> Figure:
    """Regret of a certificate's cases against their bounds: over the scaled gap, and over S.

    Args:
        certificate: as `certify` gives it.

    Returns:
        A figure that belongs to no window; save it with `savefig`.

    Raises:
        ValueError: if no case was run.
    """
    if not certificate.rows:
        raise ValueError("certificate must hold at least one row, got none")
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    over_gap, over_variance = figure.subplots(1, 2)
    _over_gap(over_gap, certificate.rows)
    _over_variance(over_variance, certificate.rows)
    figure.suptitle(f"{certificate.algorithm}: {certificate.verdict}")
    return figure


def _over_gap(axes: Axes, rows: Sequence[Row]) -> None:
    series: dict[tuple[int, int, float], list[Row]] = {}
    for row in rows:
        if row.x is not None:
            series.setdefault((row.d, row.K, row.S), []).append(row)
    for number, ((d, K, S), found) in enumerate(series.items()):
        found = sorted(found, key=lambda row: row.x or 0.0)
        unit = d * math.sqrt(S)
        x = np.array([row.x for row in found], np.float64)
        colour = _curve(axes, x, [row.regret.over(unit) for row in found], number, f"d={d}, K={K}, S={S:.4g}")
        bound = [max(row.bounds.values()) / unit for row in found]
        axes.plot(x, _positive(bound), color=colour, linestyle="dashed", alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel=r"scaled gap $x=\Delta\sqrt{S}$")
    axes.set_ylabel(r"regret / ($d\sqrt{S}$); dashed: bound")
    if series:
        regret = [row.regret.value / (row.d * math.sqrt(row.S)) for row in rows if row.x is not None]
        _cut_below(axes, regret)
        axes.legend(fontsize="small")


def _over_variance(axes: Axes, rows: Sequence[Row]) -> None:
    families = list(dict.fromkeys(row.family for row in rows))
    for number, family in enumerate(families):
        found = [row for row in rows if row.family == family]
        S = [row.S for row in found]
        colour, marker = f"C{number % _LEARNERS}", _MARKERS[number % len(_MARKERS)]
        per_dim = [row.regret.over(float(row.d)) for row in found]
        bars = {"yerr": _distances(per_dim), "capsize": 2, "linestyle": "none"}
        values = [estimate.value for estimate in per_dim]
        axes.errorbar(S, values, color=colour, marker=marker, label=family, **bars)
        bound = [max(row.bounds.values()) / row.d for row in found]
        axes.plot(S, _positive(bound), color=colour, marker="_", markersize=12, linestyle="none")
    axes.set(xscale="log", yscale="log", xlabel=_QUANTITIES["S"], ylabel="regret / d; dash: bound")
    axes.legend(fontsize="small")


def _curve(
    axes: Axes, x: Float[np.ndarray, " n"], estimates: Sequence[Estimate], number: int, label: str
) -> str:
    """A learner's curve with a band for its intervals; returns its colour."""
    colour, marker = f"C{number % _LEARNERS}", _MARKERS[number % len(_MARKERS)]
    values, low, high = (_positive(column) for column in zip(*estimates, strict=True))
    axes.plot(x, values, color=colour, marker=marker, markersize=4, label=label)
    # Logarithmic axes have no zero: a band that reaches it ends at the smallest positive number nearby.
    floor = np.where(np.isnan(low), 1e-3 * values, low)
    axes.fill_between(x, floor, high, color=colour, alpha=0.2, linewidth=0)
    return colour


def _cut_below(axes: Axes, regret: Numbers) -> None:
    """Bounds at large gaps fall below 1e-12, which would flatten everything else."""
    lowest = np.nanmin(_positive(regret), initial=math.inf)
    if math.isfinite(lowest):
        axes.set_ylim(bottom=lowest / 30)


def _distances(estimates: Sequence[Estimate]) -> Float[np.ndarray, "2 n"]:
    below = [estimate.value - estimate.low for estimate in estimates]
    above = [estimate.high - estimate.value for estimate in estimates]
    return np.array([below, above])


def _positive(values: Any) -> Float[np.ndarray, " n"]:
    """What a logarithmic axis can show; the rest becomes nan, a gap in the line."""
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array) & (array > 0.0), array, np.nan)
