"""The hard instances a learner is certified on, with what theory says about each.

A `Case` is one simulation: instance, adversary, and the lower bounds that hold for it, weakest first. Most
bounds are on the expected regret over a uniformly drawn theta; that of the weak adversary holds with
probability 1 - eta.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from . import checks
from .adversaries import Switching
from .bounds import prefixed_bound
from .composites import PeelingInstance
from .environment import Adversary, Instance
from .hypercube_bound import hypercube_bound
from .hypercubes import BernoulliHypercube, VarianceScaledHypercube
from .lower_bound import LowerBound
from .multi_instances import LeastLoadedInstance
from .weak import required_dimension, weak_adversary_bound

SCALED_GAPS = (0.5, 0.7518, 1.2469, 2.5, 5.0, 10.0)
"""Scaled gaps x = gap sqrt(S) of the certificate: the two optima of the bounds, and around them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One instance to be played and what is known about it.

    Args:
        family: name of the family.
        instance: the environment.
        adversary: the chooser of sigma_k; None plays the instance's own sequence.
        d: dimension as the bound counts it.
        K: rounds.
        S: total variance.
        x: scaled gap, None where the construction fixes it.
        bounds: name -> lower bound, weakest first.
        eta: None if the bounds are on the mean; else they hold with probability 1 - eta.
        varies: the quantity whose exponent the case helps to fit ("d", "K", "S"), and the series it belongs
            to.
    """

    family: str
    instance: Instance
    adversary: Adversary | None
    d: int
    K: int
    S: float
    x: float | None
    bounds: Mapping[str, LowerBound]
    eta: float | None = None
    varies: tuple[str, ...] = ()


def cases(family: str | Sequence[str] = "all") -> list[Case]:
    """The cases of the named families, in the order in which they are run.

    Args:
        family: "all", one name of `FAMILIES`, or several.

    Raises:
        TypeError: if it is neither a name nor a sequence of names.
        ValueError: if a name is unknown or none is given.
    """
    names = list(FAMILIES) if isinstance(family, str) and family == "all" else family
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'family must be "all" or names of families, got {family!r}')
    if not names:
        raise ValueError('family must name at least one family or be "all", got none')
    for name in names:
        checks.one_of("family", name, tuple(FAMILIES))
    return [case for name in names for case in FAMILIES[name]()]


def hypercube_case(K: int, d: int, varies: tuple[str, ...] = ()) -> Case:
    """The paper's Bernoulli hypercube with its three bounds (Lemma 4.3).

    Args:
        K: rounds.
        d: hidden signs.
        varies: see `Case`.
    """
    bounds = {kind: hypercube_bound(K, d, kind=kind) for kind in ("lemma", "pinsker_half", "tight")}
    return Case("hypercube", BernoulliHypercube(K, d), None, d, K, float(K), None, bounds, varies=varies)


def scaled_case(sigma: Float[np.ndarray, " K"], d: int, x: float, varies: tuple[str, ...] = ()) -> Case:
    """The variance-scaled hypercube at the gap x / sqrt(S), with the bounds at that gap.

    They hold at every gap: the condition ||theta|| <= 1 of `prefixed_bound` is about the normal form of the
    problem, not about the proof, and would blind the certificate at large gaps.

    Args:
        sigma: standard deviations.
        d: dimension.
        x: scaled gap.
        varies: see `Case`.
    """
    S = float((np.asarray(sigma, np.float64) ** 2).sum())
    gap = x / math.sqrt(S)
    kinds: tuple[Literal["scaled_end", "scaled_seq"], ...] = ("scaled_end", "scaled_seq")
    bounds = {kind: _at_any_norm(prefixed_bound(sigma, d, delta=gap, kind=kind)) for kind in kinds}
    instance = VarianceScaledHypercube(sigma, d, gap)
    return Case("scaled", instance, None, d, len(sigma), S, x, bounds, varies=varies)


def peeling_case(sigma: Float[np.ndarray, " K"], d: int) -> Case:
    """The paper's peeling construction (Theorem 4.1).

    Args:
        sigma: standard deviations.
        d: dimension, shared by the occupied groups.
    """
    kinds = ("theorem", "eq42_sharp", "lemma_sum", "tight_sum")
    bounds = {kind: prefixed_bound(sigma, d, kind=kind) for kind in kinds}
    S = float((np.asarray(sigma, np.float64) ** 2).sum())
    return Case("peeling", PeelingInstance(sigma, d), None, d, len(sigma), S, None, bounds)


def least_loaded_case(K: int, eta: float, at: float) -> Case:
    """The least-loaded instance against a weak adversary that stops when the total variance reaches `at`.

    Args:
        K: rounds.
        eta: probability with which the bound may fail.
        at: total variance after which sigma is 0.
    """
    d = required_dimension(K, eta, "least_loaded")
    sigma = (np.arange(K) < at).astype(np.float64)
    bound = weak_adversary_bound(sigma, d, eta=eta, construction="least_loaded")
    instance = LeastLoadedInstance(K, d, eta)
    return Case("least_loaded", instance, Switching(at), d, K, float(at), None, {"least_loaded": bound}, eta)


def _at_any_norm(bound: LowerBound) -> LowerBound:
    conditions = {name: holds for name, holds in bound.conditions.items() if name != "theta_norm_le_1"}
    return bound._replace(value=bound.steps["raw"], conditions=conditions)


def _hypercubes() -> list[Case]:
    series = {(500, 2): ("K",), (2000, 2): ("K",), (8000, 2): ("K",), (2000, 4): ()}
    return [hypercube_case(K, d, varies) for (K, d), varies in series.items()]


def _peelings() -> list[Case]:
    sigma = np.exp(np.random.default_rng(0).uniform(np.log(0.01), 0.0, 2048))
    return [peeling_case(np.sort(sigma), 16), peeling_case(np.repeat([1.0, 0.1], 1024), 8)]


def _scaled() -> list[Case]:
    found = []
    for d in (1, 2, 4):
        for level in (1.0, 0.5, 0.25):
            if level < 1.0 and d < 4:
                continue
            varies = tuple(name for name, part in (("d", level == 1.0), ("S", d == 4)) if part)
            found += [scaled_case(np.full(1000, level), d, x, varies) for x in SCALED_GAPS]
    mixed = np.exp(np.random.default_rng(1).uniform(np.log(0.05), 0.0, 1000))
    return found + [scaled_case(mixed, 4, x) for x in SCALED_GAPS]


def _least_loaded() -> list[Case]:
    return [least_loaded_case(20_000, 0.1, 10_000.0)]


FAMILIES: Mapping[str, Callable[[], list[Case]]] = {
    "hypercube": _hypercubes,
    "scaled": _scaled,
    "peeling": _peelings,
    "least_loaded": _least_loaded,
}
"""Names of the families, cheapest and most telling first."""
