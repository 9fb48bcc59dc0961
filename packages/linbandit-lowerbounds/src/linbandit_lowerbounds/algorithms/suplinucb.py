"""SupLinUCB (Chu, Li, Reyzin and Schapire 2011): stages of independent data.

With alpha = R sqrt(2 ln(2 A K / delta)), stages s = 1..floor(ln K) (at least 1) and widths (alpha + 1) ||x||,
the walk of `layers` explores where a width exceeds 2^{-s}, keeps ucb >= max ucb - 2^{1-s}, and exploits where
every width is at most 1 / sqrt(K). A stage learns only from rounds whose choice did not depend on its own
rewards: that is why the data sets are separate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec, no_draw

from . import layers
from .factories import factory, named


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SupLinUcbState:
    """Statistics of all stages, the number of actions A and the horizon K."""

    layers: layers.Layers
    n_actions: int = field(metadata={"static": True})
    horizon: int = field(metadata={"static": True})


class _View(NamedTuple):
    """A round seen from the state: where the walk ends, widths and upper confidence bounds of all stages."""

    end: layers.Walk
    widths: Float[Array, "stages A"]
    ucb: Float[Array, "stages A"]


@factory
def sup_lin_ucb(
    *,
    delta: float = 0.01,
    lam: float = 1.0,
    R: float = 0.5,
    explore: layers.WideRule = "max_norm",
    radius_scale: float = 1.0,
) -> Algorithm:
    """SupLinUCB: sqrt(d K) up to logarithms for finite decision sets; never needs sigma.

    Args:
        delta: failure probability, in (0, 1).
        lam: regularisation, > 0; the paper has 1.
        R: half the length of an interval that holds the noise, > 0. The paper's rewards in [0, 1] have 1/2,
            which gives its alpha = sqrt(ln(2 A K / delta) / 2); |noise| <= 1 needs 1.
        explore: which wide action is played; the paper leaves it open.
        radius_scale: multiplies the widths; 1 is the theory.

    Returns:
        The algorithm. It lists sign sets: its `init` raises ValueError for more than 12 signs.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or an option unknown.

    Source: Chu et al. 2011 (AISTATS), SupLinUCB with BaseLinUCB. docs/radii.md: the printed alpha is
        derived for rewards in an interval of length 1, per stage; over all S stages at once the logarithm
        would be ln(2 A K S / delta).
    """
    delta = checks.probability("delta", delta)
    lam, R = checks.real("lam", lam, above=0.0), checks.real("R", R, above=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)
    checks.one_of("explore", explore, layers.WIDE_RULES)

    def factor(state: SupLinUcbState) -> float:
        alpha = R * math.sqrt(2.0 * math.log(2.0 * state.n_actions * state.horizon / delta))
        return radius_scale * (alpha + 1.0)

    def init(key: Any, spec: Spec) -> SupLinUcbState:
        check_enumerable(spec.n_signs)
        stages = number_of_stages(spec.horizon)
        actions = 2**spec.n_signs if spec.n_signs else spec.n_actions
        return SupLinUcbState(layers.start(spec, jnp.full(stages, lam)), actions, spec.horizon)

    def view(state: SupLinUcbState, decision_set: AnySet) -> _View:
        listed = decision_set.enumerate()
        stages = number_of_stages(state.horizon)
        scores = layers.score(state.layers, listed, stages)
        widths = factor(state) * scores.norms
        ucb = scores.means + widths
        limits = _limits(stages)
        end = layers.walk(listed.mask, widths, ucb, limits, 2.0 * limits, 1.0 / math.sqrt(state.horizon))
        return _View(end, widths, ucb)

    def act(state: SupLinUcbState, decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        seen = view(state, decision_set)
        limits = _limits(number_of_stages(state.horizon))
        return decision_set.choice_of(layers.choose(seen.end, seen.widths, seen.ucb, limits, explore))

    def update(
        state: SupLinUcbState, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: None
    ) -> SupLinUcbState:
        end = view(state, decision_set).end
        entry = end.layer * decision_set.n_blocks + decision_set.block
        weight = end.explores.astype(reward.dtype)
        grown = layers.add(state.layers, entry, decision_set.features(choice), reward, weight)
        return SupLinUcbState(grown, state.n_actions, state.horizon)

    def width(state: SupLinUcbState, decision_set: AnySet, choice: Choice) -> Float[Array, ""]:
        seen = view(state, decision_set)
        x = decision_set.features(choice)
        entry = seen.end.layer * decision_set.n_blocks + decision_set.block
        own = factor(state) * jnp.sqrt(linalg.squared_norm(state.layers.ridge.inverse[entry], x))
        return layers.half_gap(seen.end, seen.ucb, state.layers.theta[entry] @ x, own)

    label = named("SupLinUCB", radius_scale=radius_scale, R=(R, 0.5), explore=(explore, "max_norm"))
    return Algorithm(init, act, update, "never", label, no_draw, width)


def number_of_stages(horizon: int) -> int:
    """Floor(ln K), at least 1.

    Args:
        horizon: K.
    """
    return max(1, math.floor(math.log(horizon)))


def _limits(stages: int) -> Float[Array, " stages"]:
    """2^{-s}, s = 1..stages."""
    return jnp.asarray(2.0 ** -np.arange(1.0, stages + 1.0), float)
