"""Ridge regression that grows by one observation at a time, in orthogonal blocks.

    V = lam I + sum_k w_k x_k x_k',   b = sum_k w_k r_k x_k,   theta = V^{-1} b

`Ridge` holds P = V^{-1}, never V: by Sherman and Morrison an observation costs O(b^2),

    P <- P - (w / (1 + w x'Px)) (Px)(Px)',   ln det V <- ln det V + ln(1 + w x'Px).

The outer product of one vector with itself is symmetric to the last bit, so P stays symmetric. When all
features live in orthogonal blocks, V is block diagonal: keeping one b x b matrix for each block is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .environment import AnySet, Spec


class Ridge(NamedTuple):
    """Sufficient statistics of (weighted) ridge regression.

    Args:
        inverse: P = V^{-1}, one matrix for each block.
        response: b, one vector for each block.
        log_det: ln(det V / det(lam I)) over all blocks.
    """

    inverse: Float[Array, "blocks b b"]
    response: Float[Array, "blocks b"]
    log_det: Float[Array, ""]


def ridge(spec: Spec, lam: float | Float[Array, ""]) -> Ridge:
    """Statistics before the first observation, V = lam I.

    Args:
        spec: sizes of the problem.
        lam: regularisation, > 0.
    """
    eye = jnp.eye(spec.block_dim) / lam
    inverse = jnp.broadcast_to(eye, (spec.n_blocks, spec.block_dim, spec.block_dim))
    return Ridge(inverse, jnp.zeros((spec.n_blocks, spec.block_dim)), jnp.zeros(()))


def at(array: Float[Array, blocks * rest], block: Int[Array, ""]) -> Float[Array, "*rest"]:
    """Entry of one block; no gather when there is only one."""
    return array[0] if array.shape[0] == 1 else array[block]


def estimate(statistics: Ridge, block: Int[Array, ""]) -> Float[Array, " b"]:
    """Theta = P b inside a block."""
    return at(statistics.inverse, block) @ at(statistics.response, block)


def squared_norm(inverse: Float[Array, "b b"], x: Float[Array, " b"]) -> Float[Array, ""]:
    """X' P x, clipped at 0 against rounding."""
    return jnp.maximum(x @ (inverse @ x), 0.0)


def add(
    statistics: Ridge,
    block: Int[Array, ""],
    x: Float[Array, " b"],
    reward: Float[Array, ""],
    weight: float | Float[Array, ""] = 1.0,
) -> Ridge:
    """Statistics with one more observation, O(b^2).

    Args:
        statistics: what is known so far.
        block: the block of the action.
        x: features inside the block.
        reward: the observed reward.
        weight: weight of the observation, >= 0; 0 leaves everything as it is.
    """
    inverse = at(statistics.inverse, block)
    direction = inverse @ x
    grown = weight * jnp.maximum(x @ direction, 0.0)
    # sqrt(w / (1 + w q)) Px: its outer product with itself is exactly symmetric.
    scaled = direction * jnp.sqrt(weight / (1.0 + grown))
    inverse = inverse - scaled[:, None] * scaled[None, :]
    response = at(statistics.response, block) + (weight * reward) * x
    log_det = statistics.log_det + jnp.log1p(grown)
    if statistics.inverse.shape[0] == 1:
        return Ridge(inverse[None], response[None], log_det)
    return Ridge(
        statistics.inverse.at[block].set(inverse), statistics.response.at[block].set(response), log_det
    )


def half_width(
    statistics: Ridge, decision_set: AnySet, choice: Array, beta: Float[Array, ""]
) -> Float[Array, ""]:
    """Beta ||x||_P of a choice."""
    x = decision_set.features(choice)
    return beta * jnp.sqrt(squared_norm(at(statistics.inverse, decision_set.block), x))
