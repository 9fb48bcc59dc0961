"""Information-directed sampling for heteroscedastic noise (Kirschner and Krause 2018).

With the statistics and the radius of weighted UCB (observations weighted by 1 / max(sigma_k, floor)^2),

    gap(x)  = max_x' (<theta, x'> + beta ||x'||) - (<theta, x> - beta ||x||)     how bad x may be
    info(x) = ln(1 + ||x||^2 / sigma_k^2) / 2                                    what x would teach, in nats

Deterministic IDS plays argmin gap^2 / info. Randomised IDS plays the distribution p over actions that
minimises (sum p gap)^2 / (sum p info); two actions suffice (Russo and Van Roy 2014), and on a pair the
minimum has a closed form: with b = gap_1 - gap_2 and e = info_1 - info_2 the ratio is convex in the
probability of the first action and stationary at

    p = gap_2 / b - 2 info_2 / e.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, DecisionSet, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec, no_draw

from .factories import factory, named

MAX_PAIRED = 256
"""Most actions of randomised IDS, which compares all pairs of them."""


class Mixture(NamedTuple):
    """A distribution over two actions.

    Args:
        first: index of one action.
        second: index of the other; the same where no mixture is better than one action.
        probability: that of the first.
    """

    first: Int[Array, ""]
    second: Int[Array, ""]
    probability: Float[Array, ""]


@factory
def ids(
    *,
    mode: Literal["deterministic", "randomised"] = "deterministic",
    delta: float = 0.01,
    lam: float = 1.0,
    S_theta: float = 1.0,
    floor: float = 1e-3,
    radius_scale: float = 1.0,
) -> Algorithm:
    """Trades regret for information; is told sigma_k with the decision set.

    An action that teaches nothing has an infinite ratio; if that holds for all, the first is played.

    Args:
        mode: "deterministic" plays the best single action, "randomised" the best mixture of two (up to 256
            actions, that is 8 signs).
        delta: failure probability of the confidence ellipsoid, in (0, 1).
        lam: regularisation, > 0.
        S_theta: bound on ||theta||, >= 0.
        floor: smallest sigma that is distinguished, > 0: quiet rounds would weigh infinitely.
        radius_scale: multiplies the radius; 1 is the theory.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, the mode unknown, or (in `init`) there are too many
            actions.

    Source: Kirschner and Krause 2018 (arXiv 1801.09667); radius derived in docs/radii.md for
        sigma_k-sub-Gaussian noise.
    """
    checks.one_of("mode", mode, ("deterministic", "randomised"))
    delta = checks.probability("delta", delta)
    lam, floor = (checks.real(n, v, above=0.0) for n, v in (("lam", lam), ("floor", floor)))
    S_theta, radius_scale = (
        checks.real(n, v, at_least=0.0) for n, v in (("S_theta", S_theta), ("radius_scale", radius_scale))
    )
    mixed = mode == "randomised"

    def beta(state: linalg.Ridge) -> Float[Array, ""]:
        return radius_scale * (jnp.sqrt(state.log_det - 2.0 * math.log(delta)) + math.sqrt(lam) * S_theta)

    def init(key: Any, spec: Spec) -> linalg.Ridge:
        check_enumerable(spec.n_signs)
        actions = max(spec.n_actions, 2**spec.n_signs)
        if mixed and actions > MAX_PAIRED:
            raise ValueError(
                f'mode="randomised" compares all pairs of at most {MAX_PAIRED} actions, got {actions}; '
                'use mode="deterministic"'
            )
        return linalg.ridge(spec, lam)

    def draw(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        return jax.random.uniform(key, shape)

    def act(state: linalg.Ridge, decision_set: AnySet, sigma: Float[Array, ""], draw: Any) -> Choice:
        listed = decision_set.enumerate()
        gap, info = gaps_and_gains(state, listed, beta(state), jnp.maximum(sigma, floor))
        if not mixed:
            return decision_set.choice_of(best_action(gap, info, listed.mask))
        mixture = best_mixture(gap, info, listed.mask)
        return decision_set.choice_of(jnp.where(draw < mixture.probability, mixture.first, mixture.second))

    def update(
        state: linalg.Ridge,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: Float[Array, ""],
    ) -> linalg.Ridge:
        weight = 1.0 / jnp.maximum(sigma, floor) ** 2
        return linalg.add(state, decision_set.block, decision_set.features(choice), reward, weight)

    def width(state: linalg.Ridge, decision_set: AnySet, choice: Choice) -> Float[Array, ""]:
        return linalg.half_width(state, decision_set, choice, beta(state))

    label = named("IDS", radius_scale=radius_scale, mode=(mode, "deterministic"), floor=(floor, 1e-3))
    return Algorithm(init, act, update, "before", label, draw if mixed else no_draw, width)


def gaps_and_gains(
    statistics: linalg.Ridge, listed: DecisionSet, beta: Float[Array, ""], sigma: Float[Array, ""]
) -> tuple[Float[Array, " A"], Float[Array, " A"]]:
    """gap(x) and info(x) of every action.

    Args:
        statistics: weighted statistics.
        listed: the actions.
        beta: confidence radius, radius scale included.
        sigma: noise level of the round, > 0.
    """
    squared = listed.squared_norms(linalg.at(statistics.inverse, listed.block))
    mean = listed.actions @ linalg.estimate(statistics, listed.block)
    width = beta * jnp.sqrt(squared)
    best = jnp.where(listed.mask, mean + width, -jnp.inf).max()
    return best - mean + width, 0.5 * jnp.log1p(squared / sigma**2)


def best_action(gap: Float[Array, " A"], info: Float[Array, " A"], mask: Bool[Array, " A"]) -> Int[Array, ""]:
    """Argmin gap^2 / info over the playable actions; ties go to the lowest index.

    Args:
        gap: gap(x).
        info: info(x) >= 0.
        mask: what may be played.
    """
    return jnp.argmin(jnp.where(mask, _ratio(gap, info), jnp.inf))


def best_mixture(gap: Float[Array, " A"], info: Float[Array, " A"], mask: Bool[Array, " A"]) -> Mixture:
    """The distribution over at most two playable actions with the smallest (E gap)^2 / E info.

    Args:
        gap: gap(x).
        info: info(x) >= 0.
        mask: what may be played.
    """
    single = best_action(gap, info, mask)
    b, e = gap[:, None] - gap, info[:, None] - info
    stationary = jnp.where((b != 0.0) & (e != 0.0), gap / _nonzero(b) - 2.0 * info / _nonzero(e), 1.0)
    p = jnp.clip(stationary, 0.0, 1.0)
    ratio = _ratio(p * gap[:, None] + (1.0 - p) * gap, p * info[:, None] + (1.0 - p) * info)
    order = jnp.arange(gap.shape[0])
    pairs = mask[:, None] & mask & (order[:, None] < order)
    ratio = jnp.where(pairs, ratio, jnp.inf)
    flat = jnp.argmin(ratio)
    first, second = flat // gap.shape[0], flat % gap.shape[0]
    better = ratio[first, second] < _ratio(gap, info)[single]
    return Mixture(
        jnp.where(better, first, single),
        jnp.where(better, second, single),
        jnp.where(better, p[first, second], 1.0),
    )


def _ratio(gap: Float[Array, "*n"], info: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """gap^2 / info, the largest number (less than what masked actions get) where nothing is learned."""
    largest = jnp.finfo(gap.dtype).max
    return jnp.where(info > 0.0, jnp.minimum(gap**2 / _nonzero(info), largest), largest)


def _nonzero(array: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where(array != 0.0, array, 1.0)
