"""Weighted ridge regression with optimism: Weighted OFUL, Weighted OFUL+ and weighted UCB.

All play argmax <theta, x> + beta ||x||, theta from observations of weight 1 / s^2 with s a floored noise
level. With d the dimension, K the horizon and k the coming round:

    Weighted OFUL   s = max(R / sqrt(d), sigma),
                    beta_k = 8 sqrt(d ln(1 + k X^2 / (lam R^2)) ln(4 k^2 / delta))
                             + 4 sqrt(d) ln(4 k^2 / delta) + sqrt(lam) S_theta
    Weighted OFUL+  s = max(sigma, alpha, gamma ||x||^{1/2}), the norm before the update,
                    beta_k = 12 sqrt(d ln(1 + k X^2 / (alpha^2 d lam)) iota) + 30 iota R / gamma^2
                             + sqrt(lam) S_theta,   iota = ln(32 (ln(gamma^2 / alpha) + 1) k^2 / delta)
    weighted UCB    s = max(sigma, floor),
                    beta = sqrt(2 ln(det(V)^{1/2} det(lam I)^{-1/2} / delta)) + sqrt(lam) S_theta
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, Explore, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, SigmaTime, Spec, no_draw

from .factories import factory, named


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightedState:
    """Statistics, the number of finished rounds, d and the horizon K."""

    statistics: linalg.Ridge
    rounds: Int[Array, ""]
    dim: int = field(metadata={"static": True})
    horizon: int = field(metadata={"static": True})


@factory
def weighted_oful(
    *,
    delta: float = 0.01,
    lam: float = 1.0,
    R: float = 1.0,
    X: float = 1.0,
    S_theta: float = 1.0,
    radius_scale: float = 1.0,
    explore: Explore = "enumerate",
) -> Algorithm:
    """Weighted OFUL: a Bernstein radius for noise of known variance; is told sigma with the reward.

    Args:
        delta: failure probability, in (0, 1).
        lam: regularisation, > 0.
        R: bound on the noise, > 0.
        X: bound on ||x||, > 0.
        S_theta: bound on ||theta||, >= 0.
        radius_scale: multiplies the radius; 1 is the theory.
        explore: how sign sets of more than 12 signs are searched (see `SignSet.argmax_ucb`).

    Returns:
        The algorithm.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or an option unknown.

    Source: Zhou, Gu and Szepesvari 2021 (arXiv 2012.08507), Weighted OFUL. docs/radii.md: printed radius
        proved valid; our derivation needs 3.07 and 1.11 where it has 8 and 4.
    """
    delta = checks.probability("delta", delta)
    lam, R, X = (checks.real(n, v, above=0.0) for n, v in (("lam", lam), ("R", R), ("X", X)))
    S_theta = checks.real("S_theta", S_theta, at_least=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)

    def beta(state: WeightedState) -> Float[Array, ""]:
        k = 1.0 + state.rounds
        log_det = jnp.log1p(k * (X * X / (lam * R * R)))
        log_delta = _log_of_round(k, 4.0 / delta)
        root = math.sqrt(state.dim)
        radius = 8.0 * root * jnp.sqrt(log_det * log_delta) + 4.0 * root * log_delta
        return radius_scale * (radius + math.sqrt(lam) * S_theta)

    def variance(state: WeightedState, norm: Float[Array, ""], sigma: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.maximum(sigma * sigma, R * R / state.dim)

    label = named("Weighted OFUL", radius_scale=radius_scale)
    return _weighted(label, "after", lambda _: lam, beta, variance, explore)


@factory
def weighted_oful_plus(
    *,
    delta: float = 0.01,
    lam: float | None = None,
    R: float = 1.0,
    X: float = 1.0,
    S_theta: float = 1.0,
    alpha: float | None = None,
    gamma: float | None = None,
    radius_scale: float = 1.0,
    explore: Explore = "enumerate",
) -> Algorithm:
    """Weighted OFUL+: weights that also fall with the uncertainty of x; is told sigma with the reward.

    Args:
        delta: failure probability, in (0, 1).
        lam: regularisation, > 0; None takes d / S_theta^2.
        R: bound on the noise, > 0.
        X: bound on ||x||, > 0.
        S_theta: bound on ||theta||, > 0.
        alpha: smallest noise level, > 0; None takes 1 / sqrt(K).
        gamma: factor of ||x||^{1/2} in the noise level, > 0; None takes sqrt(R) / d^{1/4}.
        radius_scale: multiplies the radius; 1 is the theory.
        explore: how sign sets of more than 12 signs are searched (see `SignSet.argmax_ucb`).

    Returns:
        The algorithm. Its `init` raises ValueError if ln(gamma^2 / alpha) + 1 <= 0 (a very small K).

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or an option unknown.

    Source: Zhou and Gu 2022 (arXiv 2205.11507), Weighted OFUL+. docs/radii.md: printed radius proved
        valid for gamma^2 >= alpha; our derivation needs 3.07, 1.63 and ln(4 k^2 / delta) where it has 12, 30
        and iota.
    """
    delta = checks.probability("delta", delta)
    R, X, S_theta = (checks.real(n, v, above=0.0) for n, v in (("R", R), ("X", X), ("S_theta", S_theta)))
    optional = (("lam", lam), ("alpha", alpha), ("gamma", gamma))
    lam, alpha, gamma = (None if v is None else checks.real(n, v, above=0.0) for n, v in optional)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)

    def constants(dim: int, horizon: int) -> tuple[float, float, float]:
        """Lam, alpha and gamma of a problem."""
        return (
            dim / S_theta**2 if lam is None else lam,
            1.0 / math.sqrt(horizon) if alpha is None else alpha,
            math.sqrt(R) / dim**0.25 if gamma is None else gamma,
        )

    def regularisation(spec: Spec) -> float:
        ridge, low, factor = constants(spec.dim, spec.horizon)
        if math.log(factor**2 / low) + 1.0 <= 0.0:
            raise ValueError(
                f"ln(gamma^2 / alpha) + 1 must be > 0, got gamma = {factor!r} and alpha = {low!r} at "
                f"d = {spec.dim}, K = {spec.horizon}"
            )
        return ridge

    def beta(state: WeightedState) -> Float[Array, ""]:
        k, d = 1.0 + state.rounds, state.dim
        ridge, low, factor = constants(d, state.horizon)
        log_det = jnp.log1p(k * (X * X / (low * low * d * ridge)))
        iota = _log_of_round(k, 32.0 * (math.log(factor**2 / low) + 1.0) / delta)
        radius = 12.0 * jnp.sqrt(d * log_det * iota) + (30.0 * R / factor**2) * iota
        return radius_scale * (radius + math.sqrt(ridge) * S_theta)

    def variance(state: WeightedState, norm: Float[Array, ""], sigma: Float[Array, ""]) -> Float[Array, ""]:
        _, low, factor = constants(state.dim, state.horizon)
        return jnp.maximum(jnp.maximum(sigma * sigma, low * low), factor**2 * norm)

    label = named(
        "Weighted OFUL+", radius_scale=radius_scale, alpha=(alpha, None), gamma=(gamma, None), lam=(lam, None)
    )
    return _weighted(label, "after", regularisation, beta, variance, explore)


@factory
def weighted_ucb(
    *,
    delta: float = 0.01,
    lam: float = 1.0,
    S_theta: float = 1.0,
    floor: float = 1e-3,
    radius_scale: float = 1.0,
    explore: Explore = "enumerate",
) -> Algorithm:
    """Weighted UCB: OFUL on observations whitened by their noise level; is told sigma with the decision set.

    Args:
        delta: failure probability, in (0, 1).
        lam: regularisation, > 0.
        S_theta: bound on ||theta||, >= 0.
        floor: smallest noise level that a weight uses, > 0; rounds of sigma 0 would weigh infinitely.
        radius_scale: multiplies the radius; 1 is the theory (for noise that is sigma_k-sub-Gaussian).
        explore: how sign sets of more than 12 signs are searched (see `SignSet.argmax_ucb`).

    Returns:
        The algorithm.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or an option unknown.

    Source: Kirschner and Krause 2018 (arXiv 1801.09667); the radius is that of Abbasi-Yadkori et al. 2011.
        docs/radii.md: derived for sigma_k-sub-Gaussian noise; not valid for bounded noise that only has
        variance sigma_k^2.
    """
    delta = checks.probability("delta", delta)
    lam, floor = checks.real("lam", lam, above=0.0), checks.real("floor", floor, above=0.0)
    S_theta = checks.real("S_theta", S_theta, at_least=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)

    def beta(state: WeightedState) -> Float[Array, ""]:
        root = jnp.sqrt(state.statistics.log_det - 2.0 * math.log(delta))
        return radius_scale * (root + math.sqrt(lam) * S_theta)

    def variance(state: WeightedState, norm: Float[Array, ""], sigma: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.maximum(sigma * sigma, floor * floor)

    label = named("weighted UCB", radius_scale=radius_scale, floor=(floor, 1e-3))
    return _weighted(label, "before", lambda _: lam, beta, variance, explore)


def _weighted(
    label: str,
    needs_sigma: SigmaTime,
    regularisation: Callable[[Spec], float],
    beta: Callable[[WeightedState], Float[Array, ""]],
    variance: Callable[[WeightedState, Float[Array, ""], Float[Array, ""]], Float[Array, ""]],
    explore: Explore,
) -> Algorithm:
    """The learner that all three are: `variance` is s^2, of the state, ||x|| before the update and sigma."""
    checks.one_of("explore", explore, ("enumerate", "coordinate_ascent"))

    def init(key: Any, spec: Spec) -> WeightedState:
        if explore == "enumerate":
            check_enumerable(spec.n_signs)
        statistics = linalg.ridge(spec, regularisation(spec))
        return WeightedState(statistics, jnp.zeros((), jnp.int32), spec.dim, spec.horizon)

    def act(state: WeightedState, decision_set: AnySet, sigma: Float[Array, ""] | None, draw: Any) -> Choice:
        theta = linalg.estimate(state.statistics, decision_set.block)
        inverse = linalg.at(state.statistics.inverse, decision_set.block)
        return decision_set.argmax_ucb(theta, inverse, beta(state), explore)

    def update(
        state: WeightedState,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: Float[Array, ""],
    ) -> WeightedState:
        x = decision_set.features(choice)
        inverse = linalg.at(state.statistics.inverse, decision_set.block)
        weight = 1.0 / variance(state, jnp.sqrt(linalg.squared_norm(inverse, x)), sigma)
        statistics = linalg.add(state.statistics, decision_set.block, x, reward, weight)
        return WeightedState(statistics, state.rounds + 1, state.dim, state.horizon)

    def width(state: WeightedState, decision_set: AnySet, choice: Choice) -> Float[Array, ""]:
        return linalg.half_width(state.statistics, decision_set, choice, beta(state))

    return Algorithm(init, act, update, needs_sigma, label, no_draw, width)


def _log_of_round(k: Float[Array, ""], factor: float) -> Float[Array, ""]:
    """Ln(factor k^2)."""
    return 2.0 * jnp.log(k) + math.log(factor)
