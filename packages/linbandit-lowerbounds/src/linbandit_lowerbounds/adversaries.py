"""Choosers of sigma_k: fixed sequences, weak and strong adversaries (He and Gu 2025, Sections 4 and 5).

    Prefixed            any sequence, fixed before the first round
    RandomSigma         independent draws, uniform on a logarithmic scale
    Switching           1 until the total variance reaches a level, then 0
    StopWhenLucky       1 until the learner knows enough, then 0
    CooperativeStrong   0 on the rounds that explore, then 1; it sees the decision set first

None of them is ever handed theta: they see `Observation`s and `Transition`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Bool, Float, Int, Key

from . import checks, linalg
from .decision_sets import SignSet
from .environment import Adversary, Observation, Spec, Transition, register

# Default rule of StopWhenLucky: a sign counts as known below this probability of error.
_CERTAIN = 0.05


@register(arrays=("sigma",))
class Prefixed(Adversary):
    """A sequence that is fixed before the first round (Section 4).

    Args:
        sigma: standard deviations in [0, 1], one for each round.

    Raises:
        TypeError: if sigma is not numeric.
        ValueError: if it is not of shape (K,) with K >= 2 or leaves [0, 1].
    """

    sees = "nothing"

    def __init__(self, sigma: Any) -> None:
        self.sigma = jnp.asarray(checks.sigmas("sigma", sigma), float)

    def choose(self, state: Any, observation: Observation, draw: Any) -> Float[Array, ""]:
        """The k-th entry."""
        return self.sigma[observation.k]


@register(arrays=("low", "high"))
class RandomSigma(Adversary):
    """Independent draws: log sigma_k is uniform between log low and log high.

    Every run has its own sequence; two learners under one key meet the same.

    Args:
        low: smallest standard deviation, in (0, high].
        high: largest standard deviation, at most 1.

    Raises:
        TypeError: if a limit is no real number.
        ValueError: if a limit is out of range.
    """

    sees = "nothing"

    def __init__(self, low: float, high: float) -> None:
        smallest, largest = checks.real("low", low, above=0.0), checks.real("high", high, above=0.0)
        if largest > 1.0:
            raise ValueError(f"high must lie in (0, 1], got {high!r}")
        if smallest > largest:
            raise ValueError(f"low must be <= high = {high!r}, got {low!r}")
        self.low, self.high = jnp.asarray(smallest, float), jnp.asarray(largest, float)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Positions between the limits, uniform in [0, 1)."""
        return jax.random.uniform(key, shape)

    def choose(self, state: Any, observation: Observation, draw: Float[Array, ""]) -> Float[Array, ""]:
        """Low^(1 - u) high^u, within the limits to the last bit."""
        sigma = jnp.exp((1.0 - draw) * jnp.log(self.low) + draw * jnp.log(self.high))
        return jnp.clip(sigma, self.low, self.high)


@register(arrays=("at",))
class Switching(Adversary):
    """Full noise until the sum of variances reaches a level, none afterwards.

    The simplest adaptive adversary, and enough to defeat a single hypercube that was tuned to more variance
    than it then meets.

    Args:
        at: the level, > 0.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is not positive.
    """

    sees = "history"

    def __init__(self, at: float) -> None:
        self.at = jnp.asarray(checks.real("at", at, above=0.0), float)

    def choose(self, state: Any, observation: Observation, draw: Any) -> Float[Array, ""]:
        """1 while the variance so far is below the level, else 0."""
        return (observation.variance_sum < self.at).astype(self.at.dtype)


class Luck(NamedTuple):
    """What `StopWhenLucky` gathers from past rounds, and hands to its rule.

    Args:
        statistics: ridge regression with prior variance gap^2 for every coordinate and observations weighted
            by 1 / sigma_k^2, so that V^{-1} is a posterior covariance.
        error: posterior probability that a coordinate has the other sign than its estimate, for Gaussian
            prior and noise: 1/2 for a sign that was never offered, 0 for a bias coordinate that was.
        uncertain: how many of the coordinates of theta still have an error of 5 % or more.
        rounds: finished rounds.
        variance_sum: sum of sigma_k^2.
        stopped: the noise was turned off in an earlier round.
    """

    statistics: linalg.Ridge
    error: Float[Array, "blocks b"]
    uncertain: Int[Array, ""]
    rounds: Int[Array, ""]
    variance_sum: Float[Array, ""]
    stopped: Bool[Array, ""]


@register(arrays=("p0",), static=("rule",))
class StopWhenLucky(Adversary):
    """Full noise until the learner has been lucky, none afterwards: why one tuned instance is not enough.

    It watches what the learner plays and earns, as a spectator who knows the construction but not theta. Once
    it could name every sign with an error below 5 %, so can the learner: it turns the noise off, and what
    was tuned to a long noisy game ends early.

    Args:
        rule: Luck -> Bool[Array, ""], a pure JAX function of the history; None stops when every sign has a
            posterior error below 5 %.
        p0: the known value of theta in the bias coordinate, where sign sets have one.

    Raises:
        TypeError: if rule is not callable or p0 no real number.
        ValueError: if p0 is not finite, or (when a simulation starts) the instance has no gap.

    Source: He and Gu 2025, Section 5, the obstacle that Theorem 5.2 overcomes; the default rule is ours.
    """

    sees = "history"

    def __init__(self, rule: Callable[[Luck], Any] | None = None, *, p0: float = 1 / 3) -> None:
        if rule is not None and not callable(rule):
            raise TypeError(f"rule must be a function of the history or None, got {rule!r}")
        self.rule = rule
        self.p0 = jnp.asarray(checks.real("p0", p0), float)

    def init(self, spec: Spec) -> Luck:
        """The prior: N(0, gap^2) for every coordinate."""
        if spec.gap is None:
            raise ValueError("StopWhenLucky needs an instance with one gap for each block, this one has none")
        prior = linalg.ridge(spec, 1.0)
        inverse = prior.inverse * (spec.gap**2)[:, None, None]
        return Luck(
            prior._replace(inverse=inverse),
            jnp.full((spec.n_blocks, spec.block_dim), 0.5),
            jnp.asarray(spec.dim, jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros(()),
            jnp.zeros((), bool),
        )

    def choose(self, state: Luck, observation: Observation, draw: Any) -> Float[Array, ""]:
        """1 until the rule says stop, then 0 for good."""
        lucky = state.uncertain == 0 if self.rule is None else self.rule(state)
        return jnp.where(state.stopped | lucky, 0.0, 1.0)

    def update(self, state: Luck, transition: Transition) -> Luck:
        """The posterior of the visited block: O(b^2), however many blocks there are."""
        block, sigma = transition.decision_set.block, transition.sigma
        x, reward, known = self._without_bias(transition)
        noisy = sigma > 0.0
        weight = jnp.where(noisy, 1.0 / jnp.where(noisy, sigma, 1.0) ** 2, 0.0)
        statistics = linalg.add(state.statistics, block, x, reward, weight)
        deviation = jnp.sqrt(jnp.diagonal(linalg.at(statistics.inverse, block)))
        before = linalg.at(state.error, block)
        after = ndtr(-jnp.abs(linalg.estimate(statistics, block)) / deviation)
        after = jnp.where(known | (before == 0.0), 0.0, after)
        learned = (after < _CERTAIN).sum() - (before < _CERTAIN).sum()
        return Luck(
            statistics,
            state.error.at[block].set(after),
            state.uncertain - learned.astype(jnp.int32),
            state.rounds + 1,
            state.variance_sum + sigma**2,
            state.stopped | ~noisy,
        )

    def _without_bias(
        self, transition: Transition
    ) -> tuple[Float[Array, " b"], Float[Array, ""], Bool[Array, " b"] | bool]:
        """Features and reward without the bias, and the column of the bias if the set has one."""
        shown = transition.decision_set
        if not isinstance(shown, SignSet):
            return shown.features(transition.choice), transition.reward, False
        centred = dataclasses.replace(shown, bias=jnp.zeros_like(shown.bias))
        x = centred.features(transition.choice)
        known = (jnp.arange(x.shape[-1]) == shown.bias_column) & (shown.bias != 0.0)
        return x, transition.reward - self.p0 * shown.bias, known


@register(arrays=(), static=("rtol",))
class CooperativeStrong(Adversary):
    """No noise on the rounds in which some action lies outside the span explored so far, full noise else.

    It spends its variance where it does not hurt: a learner that explores whenever it can meets at most d
    quiet rounds, knows theta on the span exactly, and has constant regret although the sum of variances is
    K - d. So a strong adversary admits no variance-dependent lower bound.

    Args:
        rtol: relative tolerance of the span test, > 0; None takes 1e-8 in float64, 1e-4 in float32.

    Raises:
        TypeError: if rtol is no real number.
        ValueError: if it is not positive.

    Source: He and Gu 2025, Theorem 5.4.
    """

    sees = "decision_set"

    def __init__(self, *, rtol: float | None = None) -> None:
        self.rtol = None if rtol is None else checks.real("rtol", rtol, above=0.0)

    def init(self, spec: Spec) -> linalg.SpanBasis:
        """The empty span."""
        return linalg.span_basis(spec)

    def choose(self, state: linalg.SpanBasis, observation: Observation, draw: Any) -> Float[Array, ""]:
        """0 if the round can explore, else 1."""
        assert observation.decision_set is not None  # noqa: S101  (tells the type checker what it sees)
        shown = observation.decision_set.enumerate()
        new = linalg.outside(state, shown.block, shown.actions, self.rtol) & shown.mask
        return jnp.where(new.any(), 0.0, 1.0)

    def update(self, state: linalg.SpanBasis, transition: Transition) -> linalg.SpanBasis:
        """The span with the chosen action."""
        shown = transition.decision_set
        return linalg.extend(state, shown.block, shown.features(transition.choice), rtol=self.rtol)
