"""Linear Thompson sampling: play the best action for theta + v V^{-1/2} zeta, zeta standard normal.

    v = R                                        inflation "posterior"
    v = R sqrt(9 d ln(k / delta))                "agrawal-goyal"
    v = beta_k(delta / (4 K)), OFUL's radius     "abeille-lazaric"

The state holds a square root F of V^{-1} = F F', never V or its inverse. An observation changes it in O(b^2),

    f = F'x,   F <- F - (F f) f' / (s^2 + s),   s = sqrt(1 + f'f)        (Potter's square-root update)

because (I - ff' / (s^2 + s))^2 = I - ff' / s^2. F F' cannot lose its positive definiteness to rounding,
F zeta has covariance V^{-1} for any square root, and a sample costs one product instead of a Cholesky
factorisation and a solve in every round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from linbandit_lowerbounds import checks
from linbandit_lowerbounds.decision_sets import Choice
from linbandit_lowerbounds.environment import Algorithm, AnySet, Spec
from linbandit_lowerbounds.linalg import at

from .factories import factory, named

Inflation = Literal["posterior", "agrawal-goyal", "abeille-lazaric"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinTsState:
    """Statistics of ridge regression in square-root form.

    Args:
        root: F, one matrix for each block.
        response: b, one vector for each block.
        log_det: ln(det V / det(lam I)) over all blocks.
        rounds: finished rounds.
        dim: d.
        horizon: K.
    """

    root: Float[Array, "blocks b b"]
    response: Float[Array, "blocks b"]
    log_det: Float[Array, ""]
    rounds: Int[Array, ""]
    dim: int = field(metadata={"static": True})
    horizon: int = field(metadata={"static": True})


@factory
def lin_ts(
    *,
    inflation: Inflation = "posterior",
    delta: float = 0.01,
    lam: float = 1.0,
    R: float = 1.0,
    S_theta: float = 1.0,
    radius_scale: float = 1.0,
) -> Algorithm:
    """Linear Thompson sampling with one of three inflations; never needs sigma, never lists a sign set.

    Args:
        inflation: "posterior" samples the Gaussian posterior of prior N(0, R^2 I / lam); the others inflate
            it as their frequentist regret bounds ask.
        delta: failure probability, in (0, 1) (not used by "posterior").
        lam: regularisation, > 0.
        R: sub-Gaussian constant of the noise, > 0.
        S_theta: bound on ||theta||, >= 0 (used by "abeille-lazaric").
        radius_scale: multiplies v; 1 is the theory.

    Returns:
        The algorithm.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or an option unknown.

    Source: Agrawal and Goyal 2013 (arXiv 1209.3352); Abeille and Lazaric 2017 (arXiv 1611.06534).
        docs/radii.md: "posterior" is exact for Gaussian prior and noise, without a frequentist guarantee;
        "agrawal-goyal" derived for lam = S_theta = X = 1 and R sqrt(d ln(1 / delta)) >= 0.79;
        "abeille-lazaric" derived. The update is Potter's (Bierman 1977, Factorization
        Methods for Discrete Sequential Estimation).
    """
    delta = checks.probability("delta", delta)
    lam, R = checks.real("lam", lam, above=0.0), checks.real("R", R, above=0.0)
    S_theta = checks.real("S_theta", S_theta, at_least=0.0)
    radius_scale = checks.real("radius_scale", radius_scale, at_least=0.0)
    checks.one_of("inflation", inflation, ("posterior", "agrawal-goyal", "abeille-lazaric"))

    def spread(state: LinTsState) -> Float[Array, ""]:
        """V, scaled."""
        if inflation == "posterior":
            return jnp.asarray(radius_scale * R, state.root.dtype)
        if inflation == "agrawal-goyal":
            log_k = jnp.log(1.0 + state.rounds) - math.log(delta)
            return radius_scale * R * jnp.sqrt(9.0 * state.dim * log_k)
        log_ratio = state.log_det - 2.0 * math.log(delta / (4.0 * state.horizon))
        return radius_scale * (R * jnp.sqrt(log_ratio) + math.sqrt(lam) * S_theta)

    def init(key: Any, spec: Spec) -> LinTsState:
        root = jnp.eye(spec.block_dim) / math.sqrt(lam)
        return LinTsState(
            jnp.broadcast_to(root, (spec.n_blocks, spec.block_dim, spec.block_dim)),
            jnp.zeros((spec.n_blocks, spec.block_dim)),
            jnp.zeros(()),
            jnp.zeros((), jnp.int32),
            spec.dim,
            spec.horizon,
        )

    def draw(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> Float[Array, "*shape b"]:
        return jax.random.normal(key, (*shape, spec.block_dim))

    def act(state: LinTsState, decision_set: AnySet, sigma: None, draw: Float[Array, " b"]) -> Choice:
        return decision_set.argmax(sample(state, decision_set.block, spread(state), draw))

    def update(
        state: LinTsState, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: None
    ) -> LinTsState:
        block, x = decision_set.block, decision_set.features(choice)
        root, response = at(state.root, block), at(state.response, block)
        f = root.T @ x
        square = f @ f
        s = jnp.sqrt(1.0 + square)
        root = root - (root @ f)[:, None] * (f / (s * (s + 1.0)))[None, :]
        response = response + reward * x
        several = state.root.shape[0] > 1
        return LinTsState(
            state.root.at[block].set(root) if several else root[None],
            state.response.at[block].set(response) if several else response[None],
            state.log_det + jnp.log1p(square),
            state.rounds + 1,
            state.dim,
            state.horizon,
        )

    label = named("LinTS", radius_scale=radius_scale, inflation=(inflation, "posterior"))
    return Algorithm(init, act, update, "never", label, draw)


def sample(
    state: LinTsState, block: Int[Array, ""], spread: Float[Array, ""], normal: Float[Array, " b"]
) -> Float[Array, " b"]:
    """Theta + v F zeta inside a block; F (F'b) is the ridge estimate.

    Args:
        state: the statistics.
        block: the block of the decision set.
        spread: v.
        normal: zeta.
    """
    root = at(state.root, block)
    return root @ (root.T @ at(state.response, block) + spread * normal)
