"""The layers' recursion of kernels over all pairs of inputs, in square tiles that bound its memory.

Expectations of products of an activation come from its closed form; else from Mehler's series, if this leaves
rounding only, which takes a few times L n 1024 numbers beside the kernel; else from quadrature.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .activations import Activation
from .dual_activations import dual, has_closed_form, trapezoid
from .mehler_series import enough_terms, expansion, product_means, square_mean

Kind = Literal["nngp", "ntk"]

__all__ = ["Kind", "stacked_kernels"]


def stacked_kernels(
    inputs: Sequence[Float[Array, "n d"]],
    stds: Float[np.ndarray, " L"],
    b_std: float,
    activation: Activation,
    points: int,
    kind: Kind,
    layers: bool,
) -> Float[Array, "layers n1 n2"]:
    """The kernel of depth L between inputs, along a first axis of length one, or what its layers give.

    Args:
        inputs: one set, whose pairs are all asked for, or rows and columns.
        stds: standard deviations of the weights of layers 2..L+1, times root of width.
        b_std: standard deviation of the biases.
        activation: of all layers.
        points: points per axis of the quadrature.
        kind: "nngp" or "ntk".
        layers: K^0, ..., K^L, or the terms of the NTK, instead of the kernel alone.
    """
    dtype = inputs[0].dtype
    rule = _rule(inputs, jnp.asarray(stds, dtype), b_std, activation, points)
    run = _symmetric if len(inputs) == 1 else _rectangular
    return run(*inputs, jnp.asarray(stds, dtype), b_std, rule, kind, layers)


class _Rule(NamedTuple):
    """How expectations of products are computed: in closed form, by a number of terms, or by quadrature."""

    activation: Activation
    points: int
    terms: int


def _rule(inputs: Sequence[Array], stds: Array, b_std: float, activation: Activation, points: int) -> _Rule:
    """The cheapest way that leaves rounding only for these inputs, else quadrature."""
    if has_closed_form(activation):
        return _Rule(activation, points, 0)
    series = _Rule(activation, points, 1)
    variances, _ = _along(jnp.concatenate(inputs), stds, b_std, series)
    return series._replace(terms=enough_terms(activation, variances))


@partial(jax.jit, static_argnames=("rule", "kind", "layers"))
def _symmetric(X, stds, b_std, rule: _Rule, kind: Kind, layers: bool):
    """The recursion on the upper triangle of tiles; the diagonal, where u = v, is exact."""
    count, size = len(X), _tile(rule, len(X))
    padded, tiles = _pad(X, size)
    recursion = _recursion(stds, b_std, kind, layers)
    variances, means = _along(padded, stds, b_std, rule)
    diagonal = recursion(lambda mean, _: mean, means, jnp.sum(padded**2, axis=1))
    side = _side(variances, rule)
    upper = jnp.stack(jnp.triu_indices(tiles), axis=1)
    blocks = jax.lax.map(_tile_kernel(padded, side, padded, side, size, rule, recursion), upper)
    depth = blocks.shape[1]
    whole = jnp.zeros((tiles, tiles, depth, size, size), blocks.dtype)
    whole = whole.at[upper[:, 1], upper[:, 0]].set(blocks.swapaxes(-1, -2))
    whole = whole.at[upper[:, 0], upper[:, 1]].set(blocks)
    whole = whole.transpose(2, 0, 3, 1, 4).reshape(depth, tiles * size, tiles * size)[:, :count, :count]
    # A diagonal tile is computed on both sides of its diagonal; keep the upper one.
    whole = jnp.triu(whole, 1) + jnp.triu(whole, 1).swapaxes(-1, -2)
    return whole + jax.vmap(jnp.diag)(diagonal[:, :count])


@partial(jax.jit, static_argnames=("rule", "kind", "layers"))
def _rectangular(X1, X2, stds, b_std, rule: _Rule, kind: Kind, layers: bool):
    """The recursion on all pairs of a row of X1 and a row of X2."""
    size = _tile(rule, max(len(X1), len(X2)))
    (rows, row_tiles), (columns, column_tiles) = _pad(X1, size), _pad(X2, size)
    row_side, column_side = (_side(_along(X, stds, b_std, rule)[0], rule) for X in (rows, columns))
    grid = jnp.stack(jnp.divmod(jnp.arange(row_tiles * column_tiles), column_tiles), axis=1)
    recursion = _recursion(stds, b_std, kind, layers)
    blocks = jax.lax.map(_tile_kernel(rows, row_side, columns, column_side, size, rule, recursion), grid)
    blocks = blocks.reshape(row_tiles, column_tiles, -1, size, size).transpose(2, 0, 3, 1, 4)
    return blocks.reshape(-1, row_tiles * size, column_tiles * size)[:, : len(X1), : len(X2)]


def _tile(rule: _Rule, count: int) -> int:
    """Side of the square of pairs computed at once: 2^16 pairs, or 2^21 nodes of quadrature."""
    if rule.terms or has_closed_form(rule.activation):
        return min(256, count)
    return max(1, min(int((2**21 / rule.points**2) ** 0.5), count))


def _pad(X: Float[Array, "n d"], size: int) -> tuple[Float[Array, "padded d"], int]:
    """Zero rows to a whole number of tiles, and how many tiles."""
    tiles = -(-len(X) // size)
    return jnp.pad(X, ((0, tiles * size - len(X)), (0, 0))), tiles


Recursion = Callable[[Callable[..., tuple[Array, Array]], Any, Array], Array]


def _recursion(stds: Array, b_std: float, kind: Kind, layers: bool) -> Recursion:
    """Function that gives the kernels, stacked first.

    It takes the function (what is known of a layer's inputs, K) -> (E[phi phi], E[phi' phi']), what is known
    with layers 1..L along the first axes, and K^0.
    """

    def run(means: Callable[..., tuple[Array, Array]], known: Any, K: Array) -> Array:
        def layer(carry, inputs):
            K, terms = carry
            here, std, index = inputs
            value, slope = means(here, K)
            K = std**2 * value + b_std**2
            if kind == "nngp":
                terms = terms.at[index].set(K) if layers else K[None]
            elif layers:
                terms = (terms * std**2 * slope).at[index].set(K)
            else:
                terms = terms * std**2 * slope + K
            return (K, terms), None

        depth = len(stds)
        terms = jnp.zeros((depth + 1 if layers else 1, *K.shape), K.dtype).at[0].set(K)
        (_, terms), _ = jax.lax.scan(layer, (K, terms), (known, stds, 1 + jnp.arange(depth)))
        return terms

    return run


@partial(jax.jit, static_argnames="rule")
def _along(
    X: Float[Array, "n d"], stds: Array, b_std: float, rule: _Rule
) -> tuple[Float[Array, "L n"], tuple[Float[Array, "L n"], Float[Array, "L n"]]]:
    """Variances that enter layers 1..L, and E[phi^2], E[phi'^2] there: integrals over one axis."""
    activation = rule.activation

    def means(q: Array) -> tuple[Array, Array]:
        if has_closed_form(activation):
            return dual(activation)(q, q, q)
        if rule.terms:
            return square_mean(activation.phi, q), square_mean(activation.dphi, q)
        # The rule of the pairs, of which these are the limit.
        nodes, weights = (jnp.asarray(part, q.dtype) for part in trapezoid(rule.points))
        u = jnp.sqrt(q)[:, None] * nodes
        return activation.phi(u) ** 2 @ weights, activation.dphi(u) ** 2 @ weights

    def layer(q, std):
        value, slope = means(q)
        return std**2 * value + b_std**2, (q, (value, slope))

    return jax.lax.scan(layer, jnp.sum(X**2, axis=1), stds)[1]


def _side(variances: Float[Array, "L n"], rule: _Rule) -> Any:
    """What pairs of inputs share: of each layer and input the variance, or its terms of the series."""
    if not rule.terms:
        return variances
    return jax.vmap(lambda q: expansion(rule.activation, q, rule.terms))(variances)


def _tile_kernel(rows, row_side, columns, column_side, size: int, rule: _Rule, recursion: Recursion):
    """Function of a pair of tile numbers that gives the kernels there."""

    def means(sides: tuple[Any, Any], K: Array) -> tuple[Array, Array]:
        if rule.terms:
            return product_means(*sides, K)
        a, b = sides
        a, b = jnp.broadcast_to(a[:, None], K.shape), jnp.broadcast_to(b, K.shape)
        return dual(rule.activation, rule.points)(a, b, K)

    def tile(index: Array) -> Array:
        def part(array: Array, k: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, k * size, size, axis)

        K = part(rows, index[0], 0) @ part(columns, index[1], 0).T
        # Inputs lie along the last axis.
        here = jax.tree.map(lambda array: part(array, index[0], array.ndim - 1), row_side)
        there = jax.tree.map(lambda array: part(array, index[1], array.ndim - 1), column_side)
        return recursion(means, (here, there), K)

    return tile
