"""Is a learner near optimal, and does it see only what it may? Its regret beside the lower bounds.

`certify` plays the learner on the instances of `families` and sets its regret beside every lower bound that
holds there. A mean that lies significantly *below* a lower bound is impossible for a learner that sees only
rewards: then it sees hidden information, or its environment is wrong. `gap_sweep` is the finer ruler: every
learner is within a factor of four of the bound on the paper's hypercube, but over the gap of the scaled
hypercube they differ.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from . import checks
from .environment import Algorithm
from .families import Case, cases, scaled_case
from .interop import ObjectLearner, from_object, play_object
from .intervals import Estimate, bootstrap_interval, mean_interval, slope_interval, wilson_interval
from .results import Result
from .simulate import adversary_of, match, simulate

CONSISTENT = "consistent with the lower bounds"
BELOW = "below lower bound"
INFORMED = "sees theta by declaration"
_SHOWN = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One case of a certificate.

    Args:
        family: the family of instances.
        d: dimension as the bound counts it.
        K: rounds.
        S: total variance that the bounds refer to.
        x: scaled gap, None where the construction fixes it.
        eta: None for bounds on the mean; else they may fail with this probability.
        regret: mean regret with its t interval.
        bootstrap: the same with its bootstrap interval.
        bounds: lower bounds by name, weakest first.
        ratios: regret / bound by name, with the t interval.
        above_half: frequency of regret >= (largest bound) / 2, with Wilson's interval.
        below: frequency of regret < (largest bound), with Wilson's interval.
        leaks: the regret is significantly below the largest bound.
    """

    family: str
    d: int
    K: int
    S: float
    x: float | None
    eta: float | None
    regret: Estimate
    bootstrap: Estimate
    bounds: dict[str, float]
    ratios: dict[str, Estimate]
    above_half: Estimate
    below: Estimate
    leaks: bool


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `certify` found.

    Args:
        algorithm: name of the learner, preset and radius scale included.
        level: coverage of the intervals.
        n_seeds: runs of each case.
        sees_theta: the learner is a yardstick that knows theta and says so.
        rows: one for each case that was run.
        worst: for every series of the scaled hypercube the row with the largest regret / (d sqrt(S)).
        exponents: fitted exponents p in regret ~ d^p, K^p, S^p, by name.
        not_run: cases that the time budget left out.
    """

    algorithm: str
    level: float
    n_seeds: int
    sees_theta: bool
    rows: tuple[Row, ...]
    worst: tuple[Row, ...]
    exponents: dict[str, Estimate]
    not_run: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """In words: below a lower bound, consistent with all of them, or a yardstick that sees theta.

        Rows are judged at a level that is shared out among them (Bonferroni), so that an honest learner is
        accused with probability at most 1 - level in all.
        """
        if self.sees_theta:
            return INFORMED
        return BELOW if any(row.leaks for row in self.rows) else CONSISTENT

    def table(self) -> str:
        """The rows as text, with verdict and exponents."""
        head = f"{self.algorithm}: {self.verdict} ({self.n_seeds} runs, {100 * self.level:g} % intervals)"
        lines = [head, ""]
        header = ["family", "d", "K", "S", "x", "regret", "bound", "value", "ratio", "P(regret >= bound/2)"]
        body = [cells for row in self.rows for cells in _cells(row)]
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        for line in [header, *body]:
            pairs = zip(line, widths, strict=True)
            aligned = [c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(pairs)]
            lines.append("  ".join(aligned).rstrip())
        if self.worst:
            lines.append("")
        for row in self.worst:
            value = _interval(row.regret.over(row.d * math.sqrt(row.S)))
            lines.append(f"worst gap at d = {row.d}, S = {row.S:.5g}: x = {row.x:g}, {value} d sqrt(S)")
        if self.exponents:
            fits = ", ".join(f"{name}^{_interval(fit)}" for name, fit in self.exponents.items())
            lines += ["", f"regret grows as {fits}"]
        lines += [f"not run: {case}" for case in self.not_run]
        return "\n".join(lines)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON, atomically.

        Args:
            path: the file; its folder must exist.
        """
        record = {
            "algorithm": self.algorithm,
            "verdict": self.verdict,
            "level": self.level,
            "n_seeds": self.n_seeds,
            "sees_theta": self.sees_theta,
            "rows": [_plain(dataclasses.asdict(row)) for row in self.rows],
            "worst": [_plain(dataclasses.asdict(row)) for row in self.worst],
            "exponents": _plain({name: fit._asdict() for name, fit in self.exponents.items()}),
            "not_run": list(self.not_run),
        }
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        path = Path(path)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws regret against the bounds, over the gap and over S, to a picture file.

        Args:
            path: the file; its ending decides the format (png, svg, pdf).

        Raises:
            ImportError: if matplotlib is missing (extra "plot").
        """
        from .plots import certificate_figure

        certificate_figure(self).savefig(path)


def certify(
    algorithm: Algorithm | ObjectLearner | type,
    *,
    family: str | Sequence[str] = "all",
    n_seeds: int = 256,
    key: Key[Array, ""],
    level: float = 0.95,
    budget_s: float | None = None,
    progress: bool = True,
) -> Certificate:
    """Plays a learner on hard instances and compares its regret with the lower bounds.

    Args:
        algorithm: an `Algorithm`, a learner from `from_object`, or a class with `act` and `update` (see
            `interop`), which is played by a Python loop.
        family: "all", or names of `families.FAMILIES`: "hypercube", "scaled", "peeling", "least_loaded".
        n_seeds: independent runs of each case, each with its own theta; at least 3.
        key: a `jax.random.key`; the same key gives every learner the same instances and noise.
        level: coverage of the intervals, in (0, 1).
        budget_s: start no further case after so many seconds; what was left out is listed.
        progress: show a bar on terminals.

    Returns:
        The certificate.

    Raises:
        TypeError: if the algorithm or another argument has the wrong type.
        ValueError: if an argument is out of range, or the learner cannot play a family.
    """
    checks.random_key("key", key)
    n_seeds = checks.count("n_seeds", n_seeds, at_least=3)
    level = checks.probability("level", level)
    budget = math.inf if budget_s is None else checks.real("budget_s", budget_s, above=0.0)
    chosen = cases(family)
    play = _player(algorithm, key, n_seeds)
    if isinstance(algorithm, Algorithm):
        for case in chosen:
            who = adversary_of(case.instance, case.adversary)
            match(algorithm, case.instance, who, case.K)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    # An accusation in any of the rows must have probability at most 1 - level.
    shared = 1.0 - (1.0 - level) / len(chosen)

    rows, results, left_out = [], [], []
    start = time.monotonic()
    for case in tqdm(chosen, unit="case", disable=None if progress else True, leave=False):
        if time.monotonic() - start > budget:
            left_out.append(_describe(case))
            continue
        result = play(case)
        results.append((case, result.regret))
        rows.append(_row(case, result.regret, level, shared, generator))
    return Certificate(
        algorithm=_name(algorithm),
        level=level,
        n_seeds=n_seeds,
        sees_theta=isinstance(algorithm, Algorithm) and algorithm.reveal is not None,
        rows=tuple(rows),
        worst=tuple(_worst(rows)),
        exponents=_exponents(results, generator, level),
        not_run=tuple(left_out),
    )


@dataclasses.dataclass(frozen=True)
class GapSweep:
    """Regret of a learner on the variance-scaled hypercube as a function of the scaled gap.

    Args:
        algorithm: name of the learner.
        d: dimension.
        S: total variance.
        x: scaled gaps gap * sqrt(S).
        regret: regret / (d sqrt(S)) at each gap, with its t interval.
        bounds: LB_seq / (d sqrt(S)) at each gap.
    """

    algorithm: str
    d: int
    S: float
    x: tuple[float, ...]
    regret: tuple[Estimate, ...]
    bounds: tuple[float, ...]

    @property
    def worst(self) -> Estimate:
        """The largest regret over the gaps: what certifies the learner."""
        return max(self.regret, key=lambda estimate: estimate.value)


def gap_sweep(
    algorithm: Algorithm | ObjectLearner | type,
    sigma: Float[np.ndarray, " K"],
    d: int,
    *,
    x: Sequence[float] = tuple(np.geomspace(0.25, 32.0, 15)),
    n_seeds: int = 256,
    key: Key[Array, ""],
    level: float = 0.95,
    progress: bool = True,
) -> GapSweep:
    """The signature of a learner: regret / (d sqrt(S)) over the gap of the variance-scaled hypercube.

    Args:
        algorithm: as for `certify`.
        sigma: standard deviations in [0, 1], shape (K,).
        d: dimension.
        x: scaled gaps, positive.
        n_seeds: runs at each gap, at least 3.
        key: a `jax.random.key`.
        level: coverage of the intervals.
        progress: show a bar on terminals.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
    """
    sequence = checks.sigmas("sigma", sigma)
    if not sequence.any():
        raise ValueError("sigma must hold a positive entry, got only zeros")
    n_seeds = checks.count("n_seeds", n_seeds, at_least=3)
    level = checks.probability("level", level)
    if not isinstance(x, Sequence | np.ndarray):
        raise TypeError(f"x must be a sequence of gaps, got {x!r}")
    gaps = tuple(checks.real("x", one, above=0.0) for one in x)
    if not gaps:
        raise ValueError("x must hold at least one gap, got none")
    play = _player(algorithm, key, n_seeds)
    swept = [scaled_case(sequence, d, one) for one in gaps]
    scale = d * math.sqrt(swept[0].S)
    regrets = [
        mean_interval(play(case).regret, level).over(scale)
        for case in tqdm(swept, unit="gap", disable=None if progress else True, leave=False)
    ]
    bounds = tuple(case.bounds["scaled_seq"].value / scale for case in swept)
    return GapSweep(_name(algorithm), d, swept[0].S, gaps, tuple(regrets), bounds)


# ---------------------------------------------------------------------------------------------- playing


def _player(
    algorithm: Algorithm | ObjectLearner | type, key: Key[Array, ""], n_seeds: int
) -> Callable[[Case], Result]:
    if isinstance(algorithm, Algorithm):

        def play(case: Case) -> Result:
            where = (case.instance, case.adversary)
            return simulate(algorithm, *where, key=key, n_seeds=n_seeds, progress=False)

        return play
    if isinstance(algorithm, type):
        algorithm = from_object(algorithm)
    if not isinstance(algorithm, ObjectLearner):
        raise TypeError(
            "algorithm must be an Algorithm, a learner from from_object, or a class with act and update, got "
            f"{algorithm!r}"
        )
    learner = algorithm

    def play_slowly(case: Case) -> Result:
        return play_object(learner, case.instance, case.adversary, key=key, n_seeds=n_seeds, progress=False)

    return play_slowly


def _name(algorithm: Algorithm | ObjectLearner | type) -> str:
    return from_object(algorithm).name if isinstance(algorithm, type) else algorithm.name


# ---------------------------------------------------------------------------------------------- judging


def _row(
    case: Case, regret: Float[np.ndarray, " n"], level: float, shared: float, generator: np.random.Generator
) -> Row:
    bounds = {name: bound.value for name, bound in case.bounds.items()}
    largest = max(bounds.values())
    mean = mean_interval(regret, level)
    under = int((regret < largest).sum())
    if case.eta is None:
        leaks = mean_interval(regret, shared).high < largest
    else:
        leaks = wilson_interval(under, regret.size, shared).low > case.eta
    return Row(
        family=case.family,
        d=case.d,
        K=case.K,
        S=case.S,
        x=case.x,
        eta=case.eta,
        regret=mean,
        bootstrap=bootstrap_interval(regret, generator, level),
        bounds=bounds,
        ratios={name: mean.over(value) for name, value in bounds.items()},
        above_half=wilson_interval(int((regret >= 0.5 * largest).sum()), regret.size, level),
        below=wilson_interval(under, regret.size, level),
        leaks=leaks,
    )


def _worst(rows: Sequence[Row]) -> list[Row]:
    series: dict[tuple[int, int, float], list[Row]] = {}
    for row in rows:
        if row.x is not None:
            series.setdefault((row.d, row.K, row.S), []).append(row)
    return [max(found, key=lambda row: row.regret.value) for found in series.values()]


def _exponents(
    results: Sequence[tuple[Case, Float[np.ndarray, " n"]]], generator: np.random.Generator, level: float
) -> dict[str, Estimate]:
    fits = {}
    for name in ("d", "K", "S"):
        points: dict[float, list[Float[np.ndarray, " n"]]] = {}
        for case, regret in results:
            if name in case.varies and regret.mean() > 0.0:
                points.setdefault(float(getattr(case, name)), []).append(regret)
        complete = len({len(sets) for sets in points.values()}) == 1
        if len(points) > 1 and complete:
            fits[name] = slope_interval(list(points), list(points.values()), generator, level)
    return fits


# ---------------------------------------------------------------------------------------------- wording


def _describe(case: Case) -> str:
    gap = "" if case.x is None else f", x = {case.x:g}"
    return f"{case.family}, d = {case.d}, K = {case.K}, S = {case.S:g}{gap}"


def _cells(row: Row) -> list[list[str]]:
    gap = "" if row.x is None else f"{row.x:g}"
    first = [row.family, str(row.d), str(row.K), f"{row.S:.5g}", gap, _interval(row.regret)]
    chance = _interval(row.above_half)
    found = []
    for i, (name, bound) in enumerate(row.bounds.items()):
        # A bound that is zero, or all but zero at a large gap, says nothing that a ratio could show.
        ratio = _interval(row.ratios[name]) if bound > _SHOWN * row.regret.value else "-"
        shown = first if i == 0 else [""] * len(first)
        found.append([*shown, name, f"{bound:.4g}", ratio, chance if i == 0 else ""])
    return found


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _plain(value: Any) -> Any:
    """Numbers that JSON has: what is not finite becomes null; an Estimate a dictionary."""
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
