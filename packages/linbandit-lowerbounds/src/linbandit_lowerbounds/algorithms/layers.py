"""Layers of data that a learner walks from coarse to fine: what SAVE and SupLinUCB share.

Each layer is a ridge regression with data of its own. A round starts at layer 1 with every playable action:

    (a) every surviving action has width <= floor: play the largest upper confidence bound, learn nothing;
    (b) every one has width <= the layer's limit: keep those that score at most `slack` below the best, and
        go to the next layer;
    (c) else play a survivor whose width exceeds the limit, and add the reward to this layer alone.

All layers are scored at once, [layers, A], and the walk is a scan with masks over all of them: under `vmap`
every run takes the same steps whichever layer it stops at. Act, update and width repeat the walk; inside one
program XLA does it once. One observation touches one layer of one block, O(b^2).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from linbandit_lowerbounds import linalg
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec

WideRule = Literal["max_norm", "first", "optimistic"]
"""Which survivor (c) plays: the largest width, the lowest index, or the largest upper confidence bound."""

WIDE_RULES = ("max_norm", "first", "optimistic")


class Layers(NamedTuple):
    """Ridge statistics of all layers, and the estimates they give.

    Args:
        ridge: statistics with entry `layer * n_blocks + block` in place of a block.
        theta: P b of every entry.
    """

    ridge: linalg.Ridge
    theta: Float[Array, "layers*blocks b"]


class Scores(NamedTuple):
    """What every layer says about every action."""

    means: Float[Array, "layers A"]
    norms: Float[Array, "layers A"]


class Walk(NamedTuple):
    """Where a walk ended.

    Args:
        layer: the layer, from 0.
        alive: the surviving actions.
        explores: whether it ended in (c), and the layer will learn.
    """

    layer: Int[Array, ""]
    alive: Bool[Array, " A"]
    explores: Bool[Array, ""]


def start(spec: Spec, lam: Float[Array, " layers"]) -> Layers:
    """No observations: V = lam I in each layer.

    Args:
        spec: sizes of the problem.
        lam: regularisation of each layer, > 0.
    """
    entries = lam.shape[0] * spec.n_blocks
    inverse = jnp.eye(spec.block_dim) / jnp.repeat(lam, spec.n_blocks)[:, None, None]
    nothing = jnp.zeros((entries, spec.block_dim))
    return Layers(linalg.Ridge(inverse, nothing, jnp.zeros(())), nothing)


def score(layers: Layers, decision_set: DecisionSet, n_layers: int) -> Scores:
    """<theta, x> and ||x|| of every action in every layer.

    Args:
        layers: the statistics.
        decision_set: listed actions.
        n_layers: number of layers.
    """
    actions = decision_set.actions
    inverse, theta = layers.ridge.inverse, layers.theta
    if decision_set.n_blocks > 1:
        entries = jnp.arange(n_layers) * decision_set.n_blocks + decision_set.block
        inverse, theta = inverse[entries], theta[entries]
    # x'Px of all layers by one product, in the form whose intermediate array is smaller.
    width = actions.shape[-1]
    if width <= n_layers:
        outer = (actions[:, :, None] * actions[:, None, :]).reshape(-1, width * width)
        squares = inverse.reshape(n_layers, width * width) @ outer.T
    else:
        products = inverse.reshape(n_layers * width, width) @ actions.T
        squares = (products.reshape(n_layers, width, -1) * actions.T).sum(1)
    return Scores(theta @ actions.T, jnp.sqrt(jnp.maximum(squares, 0.0)))


def walk(
    mask: Bool[Array, " A"],
    widths: Float[Array, "layers A"],
    values: Float[Array, "layers A"],
    limits: Float[Array, " layers"],
    slack: Float[Array, " layers"],
    floor: float,
) -> Walk:
    """Goes down the layers by (a), (b), (c).

    Args:
        mask: playable actions.
        widths: uncertainty of each action.
        values: what (b) compares.
        limits: width above which an action is explored.
        slack: how far below the best a survivor may be.
        floor: width below which nothing is left to learn.
    """

    def descend(state: tuple[Array, Array, Array], row: tuple[Array, ...]) -> tuple[Any, None]:
        alive, advances, layer = state
        width, value, limit, allowed = row
        widest = jnp.where(alive, width, 0.0).max()
        best = jnp.where(alive, value, -jnp.inf).max()
        advances = advances & (widest > floor) & (widest <= limit)
        alive = alive & ((value >= best - allowed) | ~advances)
        return (alive, advances, layer + advances), None

    last = widths.shape[0] - 1
    rows = (widths[:last], values[:last], limits[:last], slack[:last])
    begin = (mask, jnp.ones((), bool), jnp.zeros((), jnp.int32))
    (alive, _, layer), _ = lax.scan(descend, begin, rows)
    widest = jnp.where(alive, widths[layer], 0.0).max()
    # Below the last layer there is none to go to: what is narrow there is exploited.
    enough = jnp.where(layer == last, jnp.maximum(limits[last], floor), floor)
    return Walk(layer, alive, widest > enough)


def choose(
    end: Walk,
    widths: Float[Array, "layers A"],
    ucb: Float[Array, "layers A"],
    limits: Float[Array, " layers"],
    rule: WideRule,
) -> Int[Array, ""]:
    """Row of the action to play, ties to the lowest index.

    Args:
        end: where the walk ended.
        widths: uncertainty of each action.
        ucb: upper confidence bounds.
        limits: width above which an action is explored.
        rule: which wide action (c) plays.
    """
    width, upper = widths[end.layer], ucb[end.layer]
    candidates = end.alive & ((width > limits[end.layer]) | ~end.explores)
    wanted = {"max_norm": width, "first": jnp.zeros_like(width), "optimistic": upper}[rule]
    value = jnp.where(end.explores, wanted, upper)
    return jnp.argmax(jnp.where(candidates, value, -jnp.inf)).astype(jnp.int32)


def half_gap(
    end: Walk,
    ucb: Float[Array, "layers A"],
    mean: Float[Array, ""],
    width: Float[Array, ""],
) -> Float[Array, ""]:
    """Half of what the layer cannot exclude as regret: max UCB of the survivors minus the action's LCB.

    It is the action's width when the action has the largest upper confidence bound, as in (a).

    Args:
        end: where the walk ended.
        ucb: upper confidence bounds of all actions.
        mean: estimated mean of the action in that layer.
        width: its confidence width there.
    """
    best = jnp.where(end.alive, ucb[end.layer], -jnp.inf).max()
    return 0.5 * (best - (mean - width))


def add(
    layers: Layers,
    entry: Int[Array, ""],
    x: Float[Array, " b"],
    reward: Float[Array, ""],
    weight: Float[Array, ""],
) -> Layers:
    """One more observation in one entry; weight 0 changes nothing.

    Args:
        layers: the statistics.
        entry: layer * n_blocks + block.
        x: features inside the block.
        reward: the observed reward.
        weight: weight of the observation, >= 0.
    """
    ridge = linalg.add(layers.ridge, entry, x, reward, weight)
    return Layers(ridge, layers.theta.at[entry].set(linalg.estimate(ridge, entry)))
