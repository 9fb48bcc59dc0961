"""OFUL (Abbasi-Yadkori, Pal and Szepesvari 2011), and LinUCB with a constant width.

Both play argmax <theta, x> + beta ||x||. OFUL's radius is one of

    beta_k = R sqrt(2 ln(det(V)^{1/2} det(lam I)^{-1/2} / delta)) + sqrt(lam) S_theta         ("determinant")
    beta_k = R sqrt(d ln((1 + k X^2 / lam) / delta)) + sqrt(lam) S_theta                      ("trace")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, Explore, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec, no_draw

from .factories import factory, named


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OfulState:
    """Statistics, the number of finished rounds, and d."""

    statistics: linalg.Ridge
    rounds: Int[Array, ""]
    dim: int = field(metadata={"static": True})


@factory
def oful(
    *,
    delta: float = 0.01,
    lam: float = 1.0,
    R: float = 1.0,
    X: float = 1.0,
    S_theta: float = 1.0,
    radius: Literal["determinant", "trace"] = "determinant",
    radius_scale: float = 1.0,
    explore: Explore = "enumerate",
) -> Algorithm:
    """Optimism with the self-normalised confidence ellipsoid; never needs sigma.

    Args:
        delta: failure probability of the ellipsoid, in (0, 1).
        lam: regularisation, > 0.
        R: sub-Gaussian constant of the noise, > 0.
        X: bound on ||x||, > 0 (used by "trace").
        S_theta: bound on ||theta||, >= 0.
        radius: "determinant" follows the data, "trace" its worst case.
        radius_scale: multiplies the radius; 1 is the theory.
        explore: how sign sets of more than 12 signs are searched (see `SignSet.argmax_ucb`).

    Returns:
        The algorithm.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or an option unknown.

    Source: Abbasi-Yadkori et al. 2011, Theorems 1 and 2; derived in docs/radii.md.
    """
    delta = checks.probability("delta", delta)
    lam, R, X = (checks.real(n, v, above=0.0) for n, v in (("lam", lam), ("R", R), ("X", X)))
    S_theta = checks.real("S_theta", S_theta, at_least=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)
    checks.one_of("radius", radius, ("determinant", "trace"))
    shift = math.sqrt(lam) * S_theta

    def beta(state: OfulState) -> Float[Array, ""]:
        if radius == "determinant":
            root = jnp.sqrt(state.statistics.log_det - 2.0 * math.log(delta))
        else:
            root = jnp.sqrt(state.dim * (jnp.log1p(state.rounds * (X * X / lam)) - math.log(delta)))
        return radius_scale * (R * root + shift)

    label = named("OFUL", radius_scale=radius_scale, radius=(radius, "determinant"))
    return _optimistic(label, lam, beta, explore)


@factory
def linucb(*, alpha: float = 1.0, lam: float = 1.0, explore: Explore = "enumerate") -> Algorithm:
    """LinUCB: the width alpha ||x|| with a constant alpha; no guarantee, but what most libraries ship.

    Args:
        alpha: the constant, >= 0.
        lam: regularisation, > 0.
        explore: as for `oful`.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range.

    Source: Li et al. 2010 (arXiv 1003.0146), Algorithm 1, with a parameter shared by all actions.
    """
    alpha = checks.real("alpha", alpha, at_least=0.0)
    lam = checks.real("lam", lam, above=0.0)

    def beta(state: OfulState) -> Float[Array, ""]:
        return jnp.asarray(alpha, state.statistics.log_det.dtype)

    return _optimistic(f"LinUCB (alpha {alpha:g})", lam, beta, explore)


def _optimistic(
    label: str, lam: float, beta: Callable[[OfulState], Float[Array, ""]], explore: Explore
) -> Algorithm:
    checks.one_of("explore", explore, ("enumerate", "coordinate_ascent"))

    def init(key: Any, spec: Spec) -> OfulState:
        if explore == "enumerate":
            check_enumerable(spec.n_signs)
        return OfulState(linalg.ridge(spec, lam), jnp.zeros((), jnp.int32), spec.dim)

    def act(state: OfulState, decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        theta = linalg.estimate(state.statistics, decision_set.block)
        inverse = linalg.at(state.statistics.inverse, decision_set.block)
        return decision_set.argmax_ucb(theta, inverse, beta(state), explore)

    def update(
        state: OfulState,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: None,
    ) -> OfulState:
        x = decision_set.features(choice)
        statistics = linalg.add(state.statistics, decision_set.block, x, reward)
        return OfulState(statistics, state.rounds + 1, state.dim)

    def width(state: OfulState, decision_set: AnySet, choice: Choice) -> Float[Array, ""]:
        return linalg.half_width(state.statistics, decision_set, choice, beta(state))

    return Algorithm(init, act, update, "never", label, no_draw, width)
