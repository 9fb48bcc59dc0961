"""Columns of numbers over a population of points: the few operations that touch all M of them.

The limit is made of these. Each is compiled once for each shape. Matrices with a row for each column, not for
each point, are NumPy arrays on the host. Many columns are kept in blocks: more of them compile nothing new.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

Columns = Float[Array, "points columns"]
Small = Float[np.ndarray, "rows columns"]

__all__ = [
    "Columns",
    "Small",
    "appended",
    "combined",
    "inner",
    "inverse_transpose",
    "mean_products",
    "plus",
    "without",
]


@jax.jit
def mean_products(u: Columns, v: Columns) -> Float[Array, "u v"]:
    """<u, v> of all pairs of columns: the mean of u v over the population."""
    return u.T @ v / u.shape[0]


@jax.jit
def combined(columns: Columns, small: Float[Array, "columns others"]) -> Columns:
    """Linear combinations of columns."""
    return columns @ small


@jax.jit
def _plus(value: Columns, columns: Columns, small: Float[Array, "columns others"]) -> Columns:
    return value + columns @ small


def inner(blocks: Sequence[Columns], v: Columns) -> Small:
    """<u, v> for the columns u of all blocks, on the host: [columns of all blocks, columns of v]."""
    made = [mean_products(block, v) for block in blocks]  # all under way before the first is waited for
    return np.concatenate([np.zeros((0, v.shape[1])), *(np.asarray(part) for part in made)])


def plus(value: Columns, blocks: Sequence[Columns], small: Small) -> Columns:
    """Value plus combinations of the columns of all blocks; `small` may end before they do.

    Args:
        value: [M, B].
        blocks: [M, its width] each.
        small: [columns in use, B]; columns beyond are not in use and zero.
    """
    row = 0
    for block in blocks:
        rows = small[row : row + block.shape[1]]
        row += block.shape[1]
        if 0 < len(rows) < block.shape[1]:
            rows = np.concatenate([rows, np.zeros((block.shape[1] - len(rows), rows.shape[1]))])
        if len(rows):
            value = _plus(value, block, rows)
    return value


def without(value: Columns, blocks: Sequence[Columns]) -> Columns:
    """Value less its projection on the columns of all blocks, which are orthonormal; none may stand twice."""
    return plus(value, blocks, -inner(blocks, value))


def appended(
    blocks: tuple[Columns, ...], used: int, new: Columns, count: int, width: int
) -> tuple[Columns, ...]:
    """Blocks with the first `count` columns of `new` behind the `used` columns that they hold.

    Args:
        blocks: [M, its width] each.
        used: columns that they hold.
        new: [M, count or more].
        count: columns to append.
        width: of blocks to be made.
    """
    made, end = [], 0
    for block in blocks:
        start, end = end, end + block.shape[1]
        outside = used + count <= start or used >= end
        made.append(block if outside else _written(block, new, used - start, count))
    while end < used + count:
        made.append(_new_block(new, used - end, count, width))
        end += width
    return tuple(made)


def _placed(new: Columns, first: Array | int, count: Array | int, width: int) -> Columns:
    """Column j of `new` at first + j of a block, as far as it has such a column; zeros elsewhere."""
    source = jnp.arange(width) - first
    here = (source >= 0) & (source < count)
    return jnp.where(here, jnp.take(new, source, axis=1, mode="clip"), 0.0)


@jax.jit
def _written(block: Columns, new: Columns, first: int, count: int) -> Columns:
    return block + _placed(new, first, count, block.shape[1])


@partial(jax.jit, static_argnums=3)
def _new_block(new: Columns, first: int, count: int, width: int) -> Columns:
    return _placed(new, first, count, width)


def inverse_transpose(lower: Small) -> Small:
    """Inverse of the transpose of a small triangular matrix: a product with it beats solving for M rows."""
    return scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).T
