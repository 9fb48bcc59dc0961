"""SAVE (Zhao, He, Zhou, Zhang and Gu 2023): adapts to the variance without being told it.

With alpha = 1 / (R K^{3/2}), layers l = 1..ceil(log2(1 / alpha)), limits 2^{-l} and Sigma_l = 2^{-2l} I at
first, the walk of `layers` explores where ||x|| > 2^{-l} with weight w^2 = 2^{-2l} / ||x||^2, eliminates what
is more than 2 * 2^{-l} beta_l below the best estimate, and exploits where ||x|| <= alpha. The radius of layer
l in round k:

    theory     16 2^{-l} sqrt((8 V + 6 R^2 ln(4 (k+1)^2 L / delta) + 2^{4-2l}) ln(4 k^2 L / delta))
               + 6 2^{-l} R ln(4 k^2 L / delta) + 2^{1-l},                   2^{1-l} in the first round
    practical  c 2^{-l} sqrt(V + 4^{-l} R^2 ln(4 k^2 L / delta)) + 2^{-l},
               c 2^{-l} sqrt(R^2 ln(4 L / delta)) + 2^{-l} in the first round

L is the number of layers, V the residual sum of squares of the layer; "theory" replaces it by R^2 times the
number of observations while 2^l < 64 sqrt(ln(4 (k+1)^2 L / delta)), which at laptop scale is always.

V costs O(b^2): V = J - 2^{-2l} ||theta||^2 with the ridge loss J = sum w^2 r^2 - b'theta, over all blocks. J
is not computed as that difference but grows by w^2 (r - x'theta)^2 / (1 + w^2 ||x||^2), which cannot cancel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec, no_draw

from . import layers
from .factories import factory, named

Preset = Literal["theory", "practical"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SaveState:
    """Everything SAVE remembers.

    Args:
        layers: statistics of all layers.
        loss: ridge loss J of each layer, over all blocks.
        size: ||theta||^2 of each layer, over all blocks.
        count: observations in each layer.
        radius: radius of the coming round, unscaled.
        rounds: finished rounds.
        horizon: K.
    """

    layers: layers.Layers
    loss: Float[Array, " layers"]
    size: Float[Array, " layers"]
    count: Int[Array, " layers"]
    radius: Float[Array, " layers"]
    rounds: Int[Array, ""]
    horizon: int = dataclasses.field(metadata={"static": True})


class _View(NamedTuple):
    """A round seen from the state: where the walk ends, and the scores that led there."""

    end: layers.Walk
    scores: layers.Scores
    ucb: Float[Array, "layers A"]


@factory
def save(
    *,
    delta: float = 0.01,
    R: float = 1.0,
    preset: Preset = "theory",
    explore: layers.WideRule | None = None,
    c: float = 1.0,
    radius_scale: float = 1.0,
) -> Algorithm:
    """SAVE: variance-dependent regret without knowing sigma.

    Args:
        delta: failure probability, in (0, 1).
        R: bound on the noise, > 0.
        preset: "theory", or "practical" (ours, no proof): the empirical variance at every layer, and radii
            that change only where something was learned.
        explore: which wide action is played; None takes "max_norm" under "theory" and "optimistic" under
            "practical". The paper leaves it open, and at laptop scale it decides everything.
        c: factor of the practical radius, > 0.
        radius_scale: multiplies the radii where they are used; 1 is the preset's own.

    Returns:
        The algorithm. It lists sign sets: its `init` raises ValueError for more than 12 signs.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, an option unknown, or c given under "theory".

    Source: Zhao et al. 2023 (arXiv 2302.10371), Algorithm 1. docs/radii.md: printed radius of "theory" proved
        valid for ||theta|| <= 2 in both branches; our derivation needs about a fifteenth of it. No proof for
        "practical".
    """
    delta = checks.probability("delta", delta)
    R, c = checks.real("R", R, above=0.0), checks.real("c", c, above=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)
    checks.one_of("preset", preset, ("theory", "practical"))
    default: layers.WideRule = "max_norm" if preset == "theory" else "optimistic"
    rule = default if explore is None else explore
    checks.one_of("explore", rule, layers.WIDE_RULES)
    if preset == "theory" and c != 1.0:
        raise ValueError(f'c must be 1 under preset="theory", which has no such factor, got {c!r}')

    def init(key: Any, spec: Spec) -> SaveState:
        check_enumerable(spec.n_signs)
        count = number_of_layers(R, spec.horizon)
        limits = _limits(count)
        nothing = jnp.zeros(count)
        if preset == "theory":
            radius = 2.0 * limits
        else:
            radius = limits * (c * R * math.sqrt(math.log(4.0 * count / delta)) + 1.0)
        return SaveState(
            layers.start(spec, limits**2),
            nothing,
            nothing,
            jnp.zeros(count, jnp.int32),
            radius,
            jnp.zeros((), jnp.int32),
            spec.horizon,
        )

    def view(state: SaveState, decision_set: AnySet) -> _View:
        listed = decision_set.enumerate()
        count = state.radius.shape[0]
        limits = _limits(count)
        beta = radius_scale * state.radius
        scores = layers.score(state.layers, listed, count)
        alpha = 1.0 / (R * state.horizon**1.5)
        end = layers.walk(listed.mask, scores.norms, scores.means, limits, 2.0 * limits * beta, alpha)
        return _View(end, scores, scores.means + beta[:, None] * scores.norms)

    def act(state: SaveState, decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        seen = view(state, decision_set)
        limits = _limits(state.radius.shape[0])
        return decision_set.choice_of(layers.choose(seen.end, seen.scores.norms, seen.ucb, limits, rule))

    def update(
        state: SaveState, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: None
    ) -> SaveState:
        end = view(state, decision_set).end
        x = decision_set.features(choice)
        layer, entry = end.layer, end.layer * decision_set.n_blocks + decision_set.block
        limits = _limits(state.radius.shape[0])
        square = linalg.squared_norm(state.layers.ridge.inverse[entry], x)
        # An action of norm 0 is never explored: the divisor only has to be harmless then.
        weight = jnp.where(end.explores, limits[layer] ** 2 / jnp.where(square > 0.0, square, 1.0), 0.0)
        here = end.explores & (jnp.arange(limits.shape[0]) == layer)
        before = state.layers.theta[entry]
        grown = layers.add(state.layers, entry, x, reward, weight)
        after = grown.theta[entry]
        surprise = weight * (reward - x @ before) ** 2 / (1.0 + weight * square)
        # In one block ||theta||^2 is known afresh; in several only the change is.
        size = after @ after
        if decision_set.n_blocks > 1:
            size = state.size[layer] + (size - before @ before)
        state = dataclasses.replace(
            state,
            layers=grown,
            loss=state.loss + jnp.where(here, surprise, 0.0),
            size=jnp.where(here, size, state.size),
            count=state.count + here,
            rounds=state.rounds + 1,
        )
        if preset == "theory":
            radius = _theory_radius(state, delta, R)
        else:
            radius = jnp.where(here, _practical_radius(state, delta, R, c), state.radius)
        return dataclasses.replace(state, radius=radius)

    def width(state: SaveState, decision_set: AnySet, choice: Choice) -> Float[Array, ""]:
        seen = view(state, decision_set)
        x = decision_set.features(choice)
        entry = seen.end.layer * decision_set.n_blocks + decision_set.block
        norm = jnp.sqrt(linalg.squared_norm(state.layers.ridge.inverse[entry], x))
        own = radius_scale * state.radius[seen.end.layer] * norm
        return layers.half_gap(seen.end, seen.ucb, state.layers.theta[entry] @ x, own)

    label = named(
        "SAVE", preset=preset, radius_scale=radius_scale, explore=(rule, default), c=(float(c), 1.0)
    )
    return Algorithm(init, act, update, "never", label, no_draw, width)


def number_of_layers(R: float, horizon: int) -> int:
    """Ceil(log2(R K^{3/2})), at least 1; exact at powers of two.

    Args:
        R: bound on the noise.
        horizon: K.
    """
    mantissa, exponent = math.frexp(R * horizon**1.5)
    return max(1, exponent - (mantissa == 0.5))


def residual_squares(state: SaveState) -> Float[Array, " layers"]:
    """V of every layer: sum w^2 (r - <theta, x>)^2, clamped at 0 against rounding.

    Args:
        state: the state of SAVE.
    """
    return jnp.maximum(state.loss - _limits(state.loss.shape[0]) ** 2 * state.size, 0.0)


def _theory_radius(state: SaveState, delta: float, R: float) -> Float[Array, " layers"]:
    count = state.loss.shape[0]
    limits = _limits(count)
    k = 1.0 + state.rounds
    log_k = 2.0 * jnp.log(k) + math.log(4.0 * count / delta)
    log_next = 2.0 * jnp.log(k + 1.0) + math.log(4.0 * count / delta)
    deep = 1.0 / limits >= 64.0 * jnp.sqrt(log_next)
    variance = jnp.where(deep, residual_squares(state), R * R * state.count)
    inside = 8.0 * variance + 6.0 * R * R * log_next + 16.0 * limits**2
    return limits * (16.0 * jnp.sqrt(inside * log_k) + 6.0 * R * log_k + 2.0)


def _practical_radius(state: SaveState, delta: float, R: float, c: float) -> Float[Array, " layers"]:
    count = state.loss.shape[0]
    limits = _limits(count)
    log_k = 2.0 * jnp.log(1.0 + state.rounds) + math.log(4.0 * count / delta)
    return limits * (c * jnp.sqrt(residual_squares(state) + (limits * R) ** 2 * log_k) + 1.0)


def _limits(count: int) -> Float[Array, " layers"]:
    """2^{-l}, l = 1..count."""
    return jnp.asarray(2.0 ** -np.arange(1.0, count + 1.0), float)
