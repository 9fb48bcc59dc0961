"""A weak adversary against one tuned hypercube, which it breaks, and against many (Theorem 5.2).

Sigma is 1 until the adversary stops, then 0, so all that a bound needs of the realised sequence is its total
variance. The learners play the sign of each posterior mean or its upper quantile: the strongest that we have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import zoo
from sizes import Weak
from stage import Stage, frequency, mean

from linbandit_lowerbounds.adversaries import Luck, StopWhenLucky, Switching
from linbandit_lowerbounds.environment import Adversary
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.multi_instances import CyclicMultiInstance, LeastLoadedInstance
from linbandit_lowerbounds.scaled_bound import END_GAP, end_constant
from linbandit_lowerbounds.weak import Construction, required_dimension, weak_adversary_bound
from tenfold_tools.claims import Number

CONSTANT = 0.5 * end_constant(END_GAP)
"""0.17: half of what LB_end promises against a sequence that was fixed before."""

HINT = 0.45

NOTE = (
    "The bound of the single instance, 0.17 d sqrt(S at stop), is half of what LB_end promises a sequence "
    "that was fixed before. Against it the adversary stops once the posterior error of every sign is below "
    "45 % (chosen on another key). With the default 5 % it would rarely stop before the end, since the "
    "instance is tuned so that the signs are not known by then. Multi instances have scalar blocks "
    "(d = required_dimension). Against the cyclic one noise stops at K/2, since at K/4 its bound is 0."
)


@dataclass(frozen=True)
class Broken:
    """Runs against one adversary, and the bound that each should have reached.

    Args:
        adversary: its name.
        regret: regret of every run.
        variance: total variance of every run.
        bound: bound of every run.
        blocks: hypercubes in the instance.
        most: the largest regret that any policy can have.
    """

    adversary: str
    regret: np.ndarray
    variance: np.ndarray
    bound: np.ndarray
    blocks: int
    most: np.ndarray

    @property
    def below(self) -> np.ndarray:
        """Runs whose regret stays below the bound."""
        return self.regret < self.bound


def stops_at_a_hint(luck: Luck) -> jax.Array:
    """Every sign has a posterior error below 45 %: the learner has had a little luck, with all of them."""
    return (luck.error < HINT).all()


def adversaries(size: Weak) -> list[tuple[str, Adversary]]:
    """Those that are set on the single instance; the last one is not judged."""
    found: list[tuple[str, Adversary]] = [
        ("stops at S/100", Switching(size.K / 100)),
        ("stops at the first hint", StopWhenLucky(stops_at_a_hint)),
    ]
    return [*found, ("stops when all signs are known", StopWhenLucky())] if size.patient else found


def against_one(on: Stage, name: str, adversary: Adversary, d: int, K: int, runs: int) -> Broken:
    """One hypercube with the gap x* / sqrt(K), tuned to a total variance of K, and 0.17 d sqrt(S at stop)."""
    instance = VarianceScaledHypercube(np.ones(K), d, END_GAP / np.sqrt(K))
    result = on.play(zoo.learner("Bayes-UCB"), instance, adversary, runs=runs)
    variance = result.variance_sum
    most = 2 * d * END_GAP / np.sqrt(K) * variance
    return Broken(name, result.regret, variance, CONSTANT * d * np.sqrt(variance), 1, most)


@dataclass(frozen=True)
class Game:
    """One adversary against many hypercubes: Switching at a share of K, or (None) until all is known."""

    construction: Construction
    K: int
    eta: float
    runs: int
    share: float | None

    @property
    def label(self) -> str:
        """For numbers and figures."""
        what = "known signs" if self.share is None else f"{self.share:g} K"
        return f"{self.construction.replace('_', ' ')}, K {self.K}, eta {self.eta:g}, stops at {what}"

    @property
    def adversary(self) -> Adversary:
        """Who chooses sigma."""
        return StopWhenLucky() if self.share is None else Switching(self.share * self.K)


def games(size: Weak) -> list[Game]:
    """The games of a scale; where it is patient, each also against `StopWhenLucky`."""
    found = []
    for construction, K, eta, runs, share in size.games:
        found += [Game(construction, K, eta, runs, s) for s in ((share, None) if size.patient else (share,))]
    return found


def against_many(on: Stage, game: Game) -> Broken:
    """The smallest instance of a construction for K and eta, and its bound at the variance of each run."""
    K, eta, construction = game.K, game.eta, game.construction
    d = required_dimension(K, eta, construction)
    instance: Any
    if construction == "least_loaded":
        instance = LeastLoadedInstance(K, d, eta)
    else:
        instance = CyclicMultiInstance(K, d, eta=eta)
    # Once noise has stopped for good every round has the single action 0: nothing is left to play.
    rounds = K if game.share is None else min(K, math.ceil(game.share * K) + 1)
    learner = zoo.learner("posterior signs")
    result = on.play(learner, instance, game.adversary, runs=game.runs, horizon=rounds)

    @cache
    def bound(variance: int) -> float:
        sigma = (np.arange(K) < variance).astype(float)
        return weak_adversary_bound(sigma, d, eta=eta, construction=construction).value

    bounds = np.array([bound(round(float(variance))) for variance in result.variance_sum])
    return Broken(
        game.label,
        result.regret,
        result.variance_sum,
        bounds,
        instance.n_blocks,
        np.full(bounds.size, np.inf),
    )


def details(single: list[Broken], many: Mapping[Game, Broken], size: Weak) -> list[Number]:
    """When the adversaries stopped, and how far regret is from the bounds that hold."""
    return [
        *[mean(f"total variance / K, {b.adversary}", b.variance, size.K) for b in single],
        *[frequency(f"ends before the last round, {b.adversary}", b.variance < size.K) for b in single],
        *[mean(f"regret / bound, {g.label}", b.regret / b.bound) for g, b in many.items()],
        *[Number(f"hypercubes, {g.label}", b.blocks) for g, b in many.items()],
    ]
