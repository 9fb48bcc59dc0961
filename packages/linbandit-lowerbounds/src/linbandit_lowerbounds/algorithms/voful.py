"""VOFUL2 (Kim, Yang and Jun 2022): variance-adaptive optimism without an estimate of the variance.

With the residuals e_s(theta) = r_s - <theta, x_s> and features clipped at the level of a layer l = 1..Lambda,
c_s = clip(<x_s, nu>, -2^{-l}, 2^{-l}), theta belongs to the confidence set if for all nu and l

    |sum_s c_s e_s(theta)| <= width(sum_s c_s^2 e_s(theta)^2, l)

    "derived"   width(Q, l) = (3 / sqrt(2)) sqrt(L Q) + 4 2^{-l} R L,   L = ln(2 J N Lambda / delta)
    "paper"     width(Q, l) = sqrt(iota Q) + 2^{-l} R iota,   iota = 128 ln((12 K 2^Lambda)^{d+2} / delta)

with N directions nu and J = 1 + ceil(log2(K) / 2). The first is derived in docs/radii.md for a finite set of
directions. iota and Lambda = max(1, floor(log2(1 + K / d))) are *constants as remembered*, not checked
against the paper's text; any number of layers is valid in "derived".

The paper's sets are intractable: all theta of the unit ball are tested against all nu of a ball. Here both
are finite, and covering the ball at a fixed resolution takes exponentially many in d: for d <= 3.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from linbandit_lowerbounds import checks
from linbandit_lowerbounds.decision_sets import Choice, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec, no_draw

from .factories import factory, named

Constants = Literal["derived", "paper"]
Rows = tuple[tuple[float, ...], ...]
MAX_DIMENSION = 3
"""Largest dimension of the search over candidates."""


class History(NamedTuple):
    """Finished rounds.

    Args:
        actions: features x_s; rows of zeros count for nothing.
        rewards: rewards r_s.
    """

    actions: Float[Array, "n d"]
    rewards: Float[Array, " n"]


class VofulState(NamedTuple):
    """The two sums of every test, kept up to date, and the constants of its width.

    Args:
        sums: sum of c_s e_s(theta), for candidate theta, direction nu and layer.
        squares: sum of c_s^2 e_s(theta)^2.
        levels: 2^{-l} of the layers.
        root: factor of sqrt(Q) in the width.
        slope: factor of 2^{-l} in the width.
    """

    sums: Float[Array, "candidates directions layers"]
    squares: Float[Array, "candidates directions layers"]
    levels: Float[Array, " layers"]
    root: Float[Array, ""]
    slope: Float[Array, ""]


def voful_contains(
    theta: Float[Array, "*n d"],
    history: History,
    nu_set: Float[Array, "N d"],
    *,
    horizon: int,
    delta: float = 0.01,
    R: float = 1.0,
    constants: Constants = "derived",
    radius_scale: float = 1.0,
) -> Bool[Array, "*n"]:
    """Whether parameters belong to VOFUL2's confidence set after the rounds of a history.

    Costs O(rounds * N * Lambda) for each theta. With "derived" constants the true parameter belongs to the
    set after all rounds at once with probability 1 - delta, for noise bounded by R.

    Args:
        theta: one parameter or several.
        history: finished rounds.
        nu_set: the directions that are tested.
        horizon: number of rounds K that the constants are for, >= 2.
        delta: failure probability, in (0, 1).
        R: bound on |noise|, > 0.
        constants: "derived" or "paper" (as remembered).
        radius_scale: multiplies the width; 1 is the theory.

    Returns:
        One truth value for each theta.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or shapes do not fit.

    Source: Kim, Yang and Jun 2022 (arXiv 2111.03289), Algorithm 1; docs/radii.md, section 7.
    """
    theta, actions, rewards, directions = (jnp.asarray(a, float) for a in (theta, *history, nu_set))
    if actions.ndim != 2 or rewards.shape != actions.shape[:1]:
        raise ValueError(
            f"history must hold actions (n, d) and rewards (n,), got {actions.shape} and {rewards.shape}"
        )
    d = actions.shape[1]
    if directions.ndim != 2 or directions.shape[0] == 0 or directions.shape[1] != d:
        raise ValueError(f"nu_set must have shape (N, {d}) with N >= 1, got {directions.shape}")
    if theta.ndim == 0 or theta.shape[-1] != d:
        raise ValueError(f"theta must have shape (..., {d}), got {theta.shape}")
    horizon = checks.count("horizon", horizon, at_least=2)
    levels, root, slope = _width(constants, horizon, d, directions.shape[0], delta, R, radius_scale)
    residuals = rewards - theta @ actions.T
    clipped = _clip(actions @ directions.T, jnp.asarray(levels, float))
    sums = jnp.einsum("...s,snl->...nl", residuals, clipped)
    squares = jnp.einsum("...s,snl->...nl", residuals**2, clipped**2)
    width = root * jnp.sqrt(squares) + slope * jnp.asarray(levels, float)
    return (jnp.abs(sums) <= width).all((-2, -1))


def voful2(
    *,
    candidates: Any,
    nu_set: Any = None,
    delta: float = 0.01,
    R: float = 1.0,
    constants: Constants = "derived",
    radius_scale: float = 1.0,
) -> Algorithm:
    """Optimism over those candidates that belong to VOFUL2's confidence set; never needs sigma.

    Plays argmax_x max_theta <theta, x> over the candidates that are left. The cost of a round and the state
    are proportional to candidates * directions * layers, and a grid of fixed resolution has exponentially
    many candidates in d. The guarantee is for a true parameter among the candidates; when none is left (it
    was not among them, or with probability delta), those that violate their tests least stay.

    Args:
        candidates: parameters theta, shape (n, d), d <= 3.
        nu_set: directions of the tests, shape (N, d); None takes all differences of candidates, one of nu and
            -nu: the directions in which a candidate can differ from the true parameter.
        delta: failure probability, in (0, 1).
        R: bound on |noise|, > 0.
        constants: "derived" or "paper" (as remembered).
        radius_scale: multiplies the width; 1 is the theory.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of its range, a shape is wrong, or (in `init`) the problem has blocks,
            another dimension, or too many signs.

    Source: Kim, Yang and Jun 2022 (arXiv 2111.03289), Algorithm 1; docs/radii.md, section 7.
    """
    parameters = _rows("candidates", candidates)
    if len(parameters[0]) > MAX_DIMENSION:
        raise ValueError(f"candidates must have at most {MAX_DIMENSION} columns, got {len(parameters[0])}")
    directions = _differences(parameters) if nu_set is None else _rows("nu_set", nu_set)
    if len(directions[0]) != len(parameters[0]):
        raise ValueError(f"nu_set must have {len(parameters[0])} columns, got {len(directions[0])}")
    settings = {"delta": delta, "R": R, "constants": constants, "radius_scale": radius_scale}
    learner = _voful2(candidates=parameters, nu_set=directions, **settings)
    # Long lists are named by their digest.
    digest = hashlib.sha256(learner.config.encode()).hexdigest()
    return learner._replace(config=f"voful2({digest})")


@factory
def _voful2(
    *, candidates: Rows, nu_set: Rows, delta: float, R: float, constants: Constants, radius_scale: float
) -> Algorithm:
    parameters, directions = np.asarray(candidates), np.asarray(nu_set)
    _width(constants, 2, 1, 1, delta, R, radius_scale)  # what can be wrong is wrong for every horizon

    def init(key: Any, spec: Spec) -> VofulState:
        if (spec.n_blocks, spec.block_dim) != (1, parameters.shape[1]):
            raise ValueError(
                f"candidates have {parameters.shape[1]} columns, the problem has {spec.n_blocks} blocks of "
                f"{spec.block_dim}"
            )
        check_enumerable(spec.n_signs)
        sizes = (parameters.shape[1], directions.shape[0])
        levels, root, slope = _width(constants, max(spec.horizon, 2), *sizes, delta, R, radius_scale)
        empty = jnp.zeros((parameters.shape[0], directions.shape[0], levels.size))
        constant = (jnp.asarray(value, float) for value in (levels, root, slope))
        return VofulState(empty, empty, *constant)

    def act(state: VofulState, decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        listed = decision_set.enumerate()
        width = state.root * jnp.sqrt(state.squares) + state.slope * state.levels
        # Width 0 means no data yet, or a scale of 0: only an exact fit stays then.
        excess = jnp.abs(state.sums) / jnp.where(width > 0.0, width, 1.0)
        violation = jnp.where(width > 0.0, excess, jnp.where(state.sums == 0.0, 0.0, jnp.inf)).max((1, 2))
        left = violation <= jnp.maximum(violation.min(), 1.0)
        values = listed.actions @ jnp.asarray(parameters, float).T
        optimistic = jnp.where(left, values, -jnp.inf).max(1)
        return decision_set.choice_of(jnp.argmax(jnp.where(listed.mask, optimistic, -jnp.inf)))

    def update(
        state: VofulState,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: None,
    ) -> VofulState:
        x = decision_set.features(choice)
        clipped = _clip(jnp.asarray(directions, float) @ x, state.levels)
        terms = (reward - jnp.asarray(parameters, float) @ x)[:, None, None] * clipped
        return state._replace(sums=state.sums + terms, squares=state.squares + terms**2)

    label = named("VOFUL2", radius_scale=radius_scale, constants=(constants, "derived"))
    return Algorithm(init, act, update, "never", label, no_draw)


def _width(
    constants: Constants, K: int, d: int, directions: int, delta: float, R: float, radius_scale: float
) -> tuple[Float[np.ndarray, " layers"], float, float]:
    """Levels 2^{-l}, and (root, slope): the width is root sqrt(Q) + slope 2^{-l}."""
    checks.one_of("constants", constants, ("derived", "paper"))
    delta, R = checks.probability("delta", delta), checks.real("R", R, above=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)
    layers = max(1, math.floor(math.log2(1.0 + K / d)))
    levels = 0.5 ** np.arange(1, layers + 1)
    if constants == "paper":
        iota = 128.0 * ((d + 2) * (math.log(12.0 * K) + layers * math.log(2.0)) - math.log(delta))
        return levels, radius_scale * math.sqrt(iota), radius_scale * R * iota
    grid = 1 + math.ceil(0.5 * math.log2(K))
    L = math.log(2.0 * grid * directions * layers / delta)
    return levels, radius_scale * 3.0 * math.sqrt(0.5 * L), radius_scale * 4.0 * R * L


def _clip(products: Float[Array, "*n"], levels: Float[Array, " layers"]) -> Float[Array, "*n layers"]:
    """<x, nu> clipped to [-2^{-l}, 2^{-l}]."""
    return jnp.clip(products[..., None], -levels, levels)


def _rows(name: str, value: Any) -> Rows:
    array = checks.reals(name, value)
    if array.ndim != 2 or 0 in array.shape or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a finite (n, d) array with n, d >= 1, got shape {array.shape}")
    return tuple(tuple(map(float, row)) for row in array)


def _differences(parameters: Rows) -> Rows:
    """All distinct differences of parameters but zero, one of nu and -nu (they make the same test)."""
    array = np.asarray(parameters)
    differences = (array[:, None, :] - array[None, :, :]).reshape(-1, array.shape[1])
    scale = np.abs(differences).max()
    if scale == 0.0:
        raise ValueError(f"candidates must hold two different parameters, got {len(parameters)} equal ones")
    # Equal differences of a grid agree to rounding only.
    _, first = np.unique(np.round(differences / scale, 9) + 0.0, axis=0, return_index=True)
    distinct = differences[np.sort(first)]
    signs = np.sign(distinct[np.arange(len(distinct)), (distinct != 0.0).argmax(1)])
    return tuple(tuple(map(float, row)) for row in distinct[signs > 0.0])
