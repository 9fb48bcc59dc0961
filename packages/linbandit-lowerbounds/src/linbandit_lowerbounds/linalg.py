"""Ridge regression and bases of spans that grow by one observation at a time, in orthogonal blocks.

    V = lam I + sum_k w_k x_k x_k',   b = sum_k w_k r_k x_k,   theta = V^{-1} b

`Ridge` holds P = V^{-1}, never V: by Sherman and Morrison an observation costs O(b^2),

    P <- P - (w / (1 + w x'Px)) (Px)(Px)',   ln det V <- ln det V + ln(1 + w x'Px).

The outer product of one vector with itself is symmetric to the last bit, so P stays symmetric. When all
features live in orthogonal blocks, V is block diagonal: keeping one b x b matrix for each block is exact.

`SpanBasis` is the noiseless counterpart: an orthonormal basis of what was played, with the value <theta, q>
of every basis vector, so that whatever lies in the span is predicted exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


def at(array: Float[Array, "blocks ..."], block: Int[Array, ""]) -> Float[Array, ...]:
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


# ---------------------------------------------------------------------------------------------- spans


class SpanBasis(NamedTuple):
    """Orthonormal basis of the actions explored so far, and what is known of theta on it.

    Args:
        vectors: basis vectors as rows, zero rows beyond the rank; one matrix for each block.
        values: <theta, q> of every row.
        rank: number of basis vectors of each block.
    """

    vectors: Float[Array, "blocks b b"]
    values: Float[Array, "blocks b"]
    rank: Int[Array, " blocks"]


def span_basis(spec: Spec) -> SpanBasis:
    """The empty span.

    Args:
        spec: sizes of the problem.
    """
    blocks, width = spec.n_blocks, spec.block_dim
    empty = jnp.zeros((blocks, width, width)), jnp.zeros((blocks, width))
    return SpanBasis(*empty, jnp.zeros(blocks, jnp.int32))


def span_tolerance(dtype: jnp.dtype) -> float:
    """Default relative tolerance of a span test: 1e-8 in float64, 1e-4 in float32.

    Both are about the square root of the rounding unit: far above the rounding of a projection, far below
    the distance of a generic action from a subspace.

    Args:
        dtype: floating point type of the actions.
    """
    return 1e-8 if dtype == jnp.float64 else 1e-4


def outside(
    basis: SpanBasis, block: Int[Array, ""], actions: Float[Array, "A b"], rtol: float | None = None
) -> Bool[Array, " A"]:
    """Which actions lie outside the span: their distance from it exceeds rtol times their length.

    Args:
        basis: the span.
        block: the block of the actions.
        actions: features inside the block.
        rtol: relative tolerance; None takes `span_tolerance`.
    """
    rest, _ = _project(at(basis.vectors, block), actions)
    return _is_new(rest, actions, rtol)


def extend(
    basis: SpanBasis,
    block: Int[Array, ""],
    x: Float[Array, " b"],
    reward: float | Float[Array, ""] = 0.0,
    rtol: float | None = None,
) -> SpanBasis:
    """The span with one more action; unchanged if the action lies inside.

    Args:
        basis: the span.
        block: the block of the action.
        x: features inside the block.
        reward: its noiseless reward <theta, x>.
        rtol: relative tolerance; None takes `span_tolerance`.
    """
    vectors, values, rank = (at(array, block) for array in basis)
    rest, coefficients = _project(vectors, x[None])
    new = _is_new(rest, x[None], rtol)[0]
    length = jnp.where(new, jnp.sqrt((rest[0] * rest[0]).sum()), 1.0)
    here = new & (jnp.arange(vectors.shape[0]) == rank)
    vectors = jnp.where(here[:, None], rest[0] / length, vectors)
    values = jnp.where(here, (reward - coefficients[0] @ values) / length, values)
    rank = rank + here.any()
    if basis.rank.shape[0] == 1:
        return SpanBasis(vectors[None], values[None], rank[None])
    return SpanBasis(
        basis.vectors.at[block].set(vectors),
        basis.values.at[block].set(values),
        basis.rank.at[block].set(rank),
    )


def _project(
    vectors: Float[Array, "b b"], actions: Float[Array, "A b"]
) -> tuple[Float[Array, "A b"], Float[Array, "A b"]]:
    """What is left of the actions outside the span, and their coefficients inside.

    Gram-Schmidt done twice: the second pass removes what rounding left of the first, after which the rest
    is orthogonal to working precision (as after modified Gram-Schmidt, but in two matrix products).
    """
    first = actions @ vectors.T
    rest = actions - first @ vectors
    second = rest @ vectors.T
    return rest - second @ vectors, first + second


def _is_new(rest: Float[Array, "A b"], actions: Float[Array, "A b"], rtol: float | None) -> Bool[Array, " A"]:
    tolerance = span_tolerance(actions.dtype) if rtol is None else rtol
    return (rest * rest).sum(-1) > tolerance**2 * (actions * actions).sum(-1)
