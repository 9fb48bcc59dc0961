"""A paper's claims as objects: what is said, how it is measured, and what the measurement decides.

An experiment is a function from a `Run` (scale, seeds, device) to a `Measurement` (named numbers with 95 %
intervals, and criteria on them). `@claim` turns it into a `Claim`: the sentence, and where the paper says it:

    @claim("R1", sentence="The exact correction lowers the estimator's error.", source="Yuan et al., eq. 3.4",
           required_from="quick", seeds={"quick": 4, "laptop": 10, "full": 30}, first_seed=100)
    def exact_correction(run: Run) -> Measurement:
        ratios = [error_ratio(seed) for seed in run.track(run.seeds, "seeds")]
        ratio = Number.mean("error ratio", ratios, published=0.07)
        return Measurement([ratio], [below(ratio, 0.4)])

The verdict is decided by the interval, never by the mean:

    below(number, t):  high < t  -> PASS,   low >= t -> FAIL,   otherwise INCONCLUSIVE
    claim:             all criteria PASS -> PASS,   any FAIL -> FAIL,   otherwise INCONCLUSIVE

`python -m tenfold_tools.claims` runs the claims of every package (see `claims_runner`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from tenfold_tools.wording import interval, short

if TYPE_CHECKING:
    import matplotlib.figure

SCALES = ("quick", "laptop", "full")
"""From the smallest to the largest; what is required at one scale is required at every larger one."""

T = TypeVar("T")


class Verdict(StrEnum):
    """What a run says about a claim."""

    PASS = "PASS"  # noqa: S105
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT-RUN"
    ERROR = "ERROR"


class NotRun(Exception):  # noqa: N818  (a verdict, not a mistake)
    """Raised by an experiment that cannot give a verdict here, with the reason (needs a GPU, another scale).

    Args:
        reason: one sentence for the report.
        measurement: numbers that were measured nevertheless; shown, but they decide nothing.
    """

    def __init__(self, reason: str, measurement: Measurement | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.measurement = measurement


# ---------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True, init=False)
class Number:
    """A named, measured number with its 95 % interval.

    Args:
        name: what was measured, in the paper's words.
        value: the measured value (the mean over seeds where chance plays a part).
        low: lower end of the interval; the value itself where no chance is involved (default).
        high: upper end of the interval; likewise.
        unit: "s", "nats", "%"; empty for a pure number.
        published: what the paper reports for it, as a number or a short text.

    Raises:
        ValueError: if the name is empty or a finite value lies outside [low, high].
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    published: float | str | None

    def __init__(
        self,
        name: str,
        value: float,
        low: float | None = None,
        high: float | None = None,
        unit: str = "",
        published: float | str | None = None,
    ) -> None:
        value = float(value)
        low = value if low is None else float(low)
        high = value if high is None else float(high)
        if not name:
            raise ValueError("name of a Number must not be empty")
        if math.isfinite(value) and not low <= value <= high:
            raise ValueError(f"{name!r} must satisfy low <= value <= high, got {low!r}, {value!r}, {high!r}")
        if published is not None and not isinstance(published, str):
            published = float(published)
        for key, entry in [("name", name), ("value", value), ("low", low), ("high", high)]:
            object.__setattr__(self, key, entry)
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "published", published)

    @classmethod
    def mean(
        cls, name: str, samples: Iterable[float], unit: str = "", published: float | str | None = None
    ) -> Number:
        """Mean over seeds with its 95 % t-interval; the interval is infinite with fewer than 3 samples.

        Two seeds do give a t-interval, but its quantile (12.7) says more of the seeds than of the claim.

        Args:
            name: what was measured.
            samples: one value per seed, at least one. A sample that is not finite makes the mean not finite.
            unit: unit of the samples.
            published: what the paper reports.

        Raises:
            ValueError: if there is no sample.
        """
        values = [float(sample) for sample in samples]
        if not values:
            raise ValueError(f"samples of {name!r} must hold at least one value, got none")
        value = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
        low, high = -math.inf, math.inf
        if math.isfinite(value):
            from tenfold_tools.stats import t_interval  # scipy behind it: loaded when an interval is wanted

            low, high = t_interval(values, level=0.95)
            # Equal samples: the mean of the interval may be one rounding away from ours.
            low, high = min(float(low), value), max(float(high), value)
        return cls(name, value, low, high, unit, published)

    @property
    def bounded(self) -> bool:
        """Whether value and interval are all finite: only then can a criterion PASS."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    def text(self, *thresholds: float) -> str:
        """`name: 0.070 [0.050, 0.090] unit`, without the interval where no chance is involved.

        Args:
            thresholds: what it is compared with; rounding does not make it look equal to one.
        """
        if self.bounded:
            value, low, high = interval(self.value, self.low, self.high, thresholds)
            shown = value if self.low == self.high else f"{value} [{low}, {high}]"
        else:
            shown = short(self.value) + (" (no interval)" if math.isfinite(self.value) else "")
        return f"{self.name}: {shown} {self.unit}".rstrip()


# ---------------------------------------------------------------------------------------------- criteria


@dataclass(frozen=True)
class Criterion:
    """One condition on the numbers, and what the interval says about it: PASS, FAIL or INCONCLUSIVE."""

    text: str
    verdict: Verdict

    def __post_init__(self) -> None:
        if self.verdict not in (Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE):
            raise ValueError(
                f"verdict of a Criterion must be PASS, FAIL or INCONCLUSIVE, got {self.verdict!r}"
            )


def _decide(number: Number, text: str, *, passes: bool, fails: bool) -> Criterion:
    """FAIL for a value that is not finite (the experiment broke down); PASS only on a bounded interval."""
    if fails or not math.isfinite(number.value):
        return Criterion(text, Verdict.FAIL)
    return Criterion(text, Verdict.PASS if passes and number.bounded else Verdict.INCONCLUSIVE)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def below(number: Number, threshold: float) -> Criterion:
    """PASS if the whole interval is below the threshold, FAIL if none of it is."""
    t = _finite("threshold", threshold)
    return _decide(number, f"{number.text(t)} < {t:g}", passes=number.high < t, fails=number.low >= t)


def above(number: Number, threshold: float) -> Criterion:
    """PASS if the whole interval is above the threshold, FAIL if none of it is."""
    t = _finite("threshold", threshold)
    return _decide(number, f"{number.text(t)} > {t:g}", passes=number.low > t, fails=number.high <= t)


def within(number: Number, low: float, high: float) -> Criterion:
    """PASS if the whole interval lies in [low, high], FAIL if none of it does."""
    low, high = _finite("low", low), _finite("high", high)
    if low > high:
        raise ValueError(f"within needs low <= high, got {low!r} and {high!r}")
    passes = low <= number.low and number.high <= high
    fails = number.high < low or number.low > high
    return _decide(number, f"{number.text(low, high)} in [{low:g}, {high:g}]", passes=passes, fails=fails)


def not_above(number: Number, threshold: float) -> Criterion:
    """FAIL only if the whole interval is above the threshold (significantly above), else PASS.

    An unbounded interval (fewer than 3 seeds) reaches below anything and shows nothing: INCONCLUSIVE.
    """
    t = _finite("threshold", threshold)
    text = f"{number.text(t)} not significantly above {t:g}"
    return _decide(number, text, passes=number.low <= t, fails=number.low > t)


def at_least(k: int, criteria: Iterable[Criterion]) -> Criterion:
    """PASS if at least `k` criteria PASS, FAIL if too few can still pass, else INCONCLUSIVE.

    Raises:
        ValueError: if k is not between 1 and the number of criteria.
    """
    criteria = list(criteria)
    if not 1 <= k <= len(criteria):
        raise ValueError(f"k must be between 1 and the number of criteria ({len(criteria)}), got {k!r}")
    passed = sum(c.verdict is Verdict.PASS for c in criteria)
    open_ = sum(c.verdict is Verdict.INCONCLUSIVE for c in criteria)
    text = f"at least {k} of {len(criteria)}: " + "; ".join(f"{c.text} ({c.verdict})" for c in criteria)
    if passed >= k:
        return Criterion(text, Verdict.PASS)
    return Criterion(text, Verdict.INCONCLUSIVE if passed + open_ >= k else Verdict.FAIL)


# ---------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Figure:
    """A picture of a measurement.

    Args:
        title: one line; also the text for readers who do not see the picture.
        draw: draws on an empty matplotlib Figure. It is called twice, under a light and a dark style, so it
            takes its colours from the property cycle ("C0", "C1", ...) and leaves text and axes to the style;
            what matplotlib draws black (the error bars of `bar`) wants `matplotlib.rcParams["text.color"]`.
    """

    title: str
    draw: Callable[[matplotlib.figure.Figure], None]


@dataclass(frozen=True)
class Measurement:
    """What an experiment hands back.

    Args:
        numbers: everything worth reading, with intervals; names are unique.
        criteria: the conditions that decide. Without any, nothing is decided: INCONCLUSIVE.
        configurations: every configuration that was run, as JSON-like dictionaries.
        figures: pictures for the report.
        note: a remark for the reader (a departure from the paper, a caveat).

    Raises:
        ValueError: if two numbers share a name.
        TypeError: if numbers or criteria hold anything else.
    """

    numbers: Sequence[Number]
    criteria: Sequence[Criterion]
    configurations: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Figure] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("numbers", Number), ("criteria", Criterion), ("figures", Figure)):
            for entry in getattr(self, name):
                if not isinstance(entry, kind):
                    raise TypeError(f"{name} must hold only {kind.__name__}, got {type(entry).__name__}")
        names = [number.name for number in self.numbers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names of numbers must be unique, got {twice} more than once")

    @property
    def verdict(self) -> Verdict:
        """All criteria PASS -> PASS, any FAIL -> FAIL, otherwise (or without criteria) INCONCLUSIVE."""
        verdicts = {criterion.verdict for criterion in self.criteria}
        if Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.PASS if verdicts == {Verdict.PASS} else Verdict.INCONCLUSIVE


# ---------------------------------------------------------------------------------------------- claims


Tracker = Callable[[Iterable[Any], str], Iterator[Any]]
"""Iterates over its first argument and shows progress under its second."""


def _untracked(iterable: Iterable[Any], description: str) -> Iterator[Any]:  # noqa: ARG001
    return iter(iterable)


@dataclass(frozen=True)
class Run:
    """The circumstances of one run of an experiment.

    Args:
        scale: "quick", "laptop" or "full".
        seeds: the seeds to use, at least one.
        device: "cpu", "cuda" or "cuda:N", as torch writes it.
        tracker: how `track` shows progress; the default shows nothing.
    """

    scale: str
    seeds: tuple[int, ...]
    device: str = "cpu"
    tracker: Tracker = field(default=_untracked, repr=False, compare=False)

    def track(self, iterable: Iterable[T], description: str) -> Iterator[T]:
        """Iterates, with a progress bar that carries the description."""
        return self.tracker(iterable, description)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper and the experiment that tests it; made by `claim`, which describes the fields."""

    id: str
    sentence: str
    source: str
    required_from: str | None
    seeds: Mapping[str, int] | None
    first_seed: int
    experiment: Callable[[Run], Measurement]

    def required(self, scale: str) -> bool:
        """Whether a FAIL at this scale fails the command: from `required_from` upwards."""
        return self.required_from is not None and SCALES.index(scale) >= SCALES.index(self.required_from)

    def seeds_at(self, scale: str, count: int | None = None) -> tuple[int, ...]:
        """The seeds of a run: first_seed, first_seed + 1, ...

        Args:
            scale: "quick", "laptop" or "full".
            count: how many instead of the claim's own number; a claim without chance keeps its single seed.
        """
        if self.seeds is None:
            return (self.first_seed,)
        return tuple(range(self.first_seed, self.first_seed + (count or self.seeds[scale])))

    def __call__(self, run: Run) -> Measurement:
        """Runs the experiment.

        Raises:
            TypeError: if it returns anything but a Measurement.
        """
        measurement = self.experiment(run)
        if not isinstance(measurement, Measurement):
            raise TypeError(f"claim {self.id} must return a Measurement, got {type(measurement).__name__}")
        return measurement


def claim(
    id: str,  # noqa: A002
    *,
    sentence: str,
    source: str,
    required_from: str | None = None,
    seeds: Mapping[str, int] | None = None,
    first_seed: int = 0,
) -> Callable[[Callable[[Run], Measurement]], Claim]:
    """Decorator that turns an experiment into a Claim.

    Args:
        id: short name, unique in its package: a letter, then letters, digits, ".", "_" or "-".
        sentence: the claim in one sentence, as a reader would say it.
        source: where the paper says it (theorem, table, figure).
        required_from: the smallest scale at which a FAIL fails the command; None only reports.
        seeds: how many seeds at each of "quick", "laptop" and "full", each >= 1; None if chance plays no part
            (the run then has the single seed `first_seed`).
        first_seed: the first seed >= 0; the others follow it.

    Raises:
        ValueError: if any of these rules is broken.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", id):
        raise ValueError(f'id must be a letter followed by letters, digits, ".", "_" or "-", got {id!r}')
    if not sentence.strip() or not source.strip():
        raise ValueError(f"sentence and source of {id} must not be empty, got {sentence!r} and {source!r}")
    if required_from is not None and required_from not in SCALES:
        raise ValueError(f"required_from of {id} must be in {SCALES} or None, got {required_from!r}")
    if seeds is not None and (set(seeds) != set(SCALES) or any(count < 1 for count in seeds.values())):
        raise ValueError(f"seeds of {id} must give a count >= 1 for each of {SCALES}, got {dict(seeds)!r}")
    if first_seed < 0:
        raise ValueError(f"first_seed of {id} must be >= 0, got {first_seed!r}")

    def decorate(experiment: Callable[[Run], Measurement]) -> Claim:
        return Claim(id, sentence, source, required_from, seeds, first_seed, experiment)

    return decorate


if __name__ == "__main__":
    # This file is `__main__` here; the experiments see it as `tenfold_tools.claims`, and so must the runner.
    from tenfold_tools.claims_runner import main

    sys.exit(main())
