"""The product of an infinite random matrix with any vector of a layer, by orthonormal bases.

For W, from population a (layer l-1) to population b (layer l), four sets of columns are kept: QX on a and QY
on b, orthonormal bases of the vectors that W and its transpose have met; GX on b and GY on a, the standard
normal fields "W q" and "W^T q". With c = <QX, x> and the rest r of x outside the basis,

    W x = sum_k c_k GX_k + |r| g + sum_m QY_m <x, GY_m>,     g a fresh field for r / |r|.

The first two terms are the Gaussian part Zhat; the last is Zdot, by Stein's lemma: x depends on the fields GY
through the products W^T y made before, and <x, GY_m> is the mean derivative. No derivative is formed and,
because QY is orthonormal, nothing is ill conditioned. The transpose is the mirror image.

Learned parts live in the same bases: W_t = w W_0 - QY A QX^T with a small matrix A, because gradients of W
are sums of b x^T with b in the span of QY and x in that of QX. History needs no storage of its own.

Source: Yang 2020 (arXiv 2009.10685, the Z^{Wx} rules); spec section c4.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .fields import Columns, inverse_transpose, mean_products

ROUND = 1e-6
"""Directions shorter than this share of the longest wait for the next round: a round loses as many digits."""

__all__ = ["Basis", "Matrix", "Product", "empty_basis", "grown", "product", "record_update"]


class Basis(NamedTuple):
    """One side of a matrix: an orthonormal basis and what the matrix makes of it. Unused columns are zero.

    Attributes:
        q: [M, capacity], orthonormal columns on the population of the argument.
        g: [M, capacity], standard normal fields on the population of the result.
        rank: columns in use.
        longest: the largest norm of an argument so far, what `tol` is relative to.
    """

    q: Columns
    g: Columns
    rank: int
    longest: Float[Array, ""]


class Matrix(NamedTuple):
    """A matrix during training, W_t = scale * W_0 - QY learned QX^T.

    Attributes:
        x: the side of W (arguments on layer l-1, results on layer l).
        y: the side of the transpose.
        learned: [capacity of y, capacity of x], A above.
        velocity: momentum of `learned`, of the same shape.
        scale: w above, sigma at the start and smaller by weight decay; 0 where W_0 has vanished (IP).
    """

    x: Basis
    y: Basis
    learned: Float[Array, "y x"]
    velocity: Float[Array, "y x"]
    scale: float


class Product(NamedTuple):
    """What a product leaves behind.

    Attributes:
        value: [M, B], W x.
        coefficients: [capacity, B], x in the basis; complete only if the basis was extended.
        basis: the side of the matrix after the product.
    """

    value: Columns
    coefficients: Float[Array, "capacity batch"]
    basis: Basis


def empty_basis(like_argument: Columns, like_result: Columns, capacity: int) -> Basis:
    """A basis without directions, laid out over devices as the populations are."""

    def zeros(like: Columns) -> Columns:
        return jnp.zeros_like(like, shape=(like.shape[0], capacity), device=like.sharding)

    return Basis(zeros(like_argument), zeros(like_result), 0, jnp.zeros(()))


def grown(matrix: Matrix, columns: int) -> Matrix:
    """The matrix with room for that many more directions on both sides, at least half as many as before.

    Room grows in few, large steps: each new shape is compiled anew.
    """
    sides = []
    for basis in (matrix.x, matrix.y):
        room, needed = basis.q.shape[1], basis.rank + columns
        if needed > room:
            more = -(-max(needed, room + room // 2) // 64) * 64 - room
            basis = Basis(
                _padded(basis.q, room + more), _padded(basis.g, room + more), basis.rank, basis.longest
            )
        sides.append(basis)
    x, y = sides
    shape = (y.q.shape[1], x.q.shape[1])
    missing = [(0, new - old) for new, old in zip(shape, matrix.learned.shape, strict=True)]
    return Matrix(x, y, jnp.pad(matrix.learned, missing), jnp.pad(matrix.velocity, missing), matrix.scale)


def product(
    matrix: Matrix,
    x: Columns,
    *,
    transpose: bool,
    fresh: Callable[[int, int, Columns], Columns],
    tol: float,
    extend: bool,
) -> Product:
    """W x, or W^T x.

    Args:
        matrix: the matrix.
        x: [M, B] on the population of the argument.
        transpose: whether W^T is meant.
        fresh: gives a number of fresh fields on the population of the result, beside those of this side, in
            columns of another number, the others zero.
        tol: directions shorter than this, relative to the longest argument so far, are dropped. Not to x
            itself: backward signals shrink as training converges, and what they move shrinks with them.
        extend: whether the basis keeps the new directions. Without, the product is that of an onlooker: it
            has the right law, and the matrix does not remember it.
    """
    near, far = (matrix.y, matrix.x) if transpose else (matrix.x, matrix.y)
    learned = matrix.learned if transpose else matrix.learned.T
    value, coefficients, rest = _known(near.q, near.g, far.q, far.g, learned, matrix.scale, x)
    if matrix.scale == 0.0 and not extend:
        return Product(value, coefficients, near)
    longest = jnp.maximum(near.longest, jnp.max(_norms(x)))
    temporary: tuple[Columns, ...] = ()
    more = True
    while more:
        found, more, directions, rest = _directions(near.q, temporary, rest, longest, tol)
        count, more = int(found), bool(more)
        if count == 0:
            break
        # As many columns each time as x has: one shape is compiled once.
        fields = fresh(count, x.shape[1], near.g) if matrix.scale else jnp.zeros_like(directions)
        value, coefficients = _add_new(value, coefficients, x, directions, fields, matrix.scale, near.rank)
        if extend:
            near = _append(near, directions, fields, count)
        else:
            temporary = (*temporary, directions)
    return Product(value, coefficients, near._replace(longest=longest) if extend else near)


def _norms(x: Columns) -> Float[Array, " columns"]:
    return jnp.sqrt(jnp.mean(x * x, axis=0))


@jax.jit
def _known(q, g, far_q, far_g, learned, scale, x):
    """The part of the product within the basis, x in the basis, and what of x lies outside.

    What rounding leaves of the basis in the rest is removed from its directions, by a second projection;
    twice is enough (Kahan and Parlett).
    """
    coefficients = mean_products(q, x)
    rest = x - q @ coefficients
    response = scale * mean_products(far_g, x) - learned.T @ coefficients
    return scale * (g @ coefficients) + far_q @ response, coefficients, rest


@jax.jit
def _directions(q, temporary, rest, longest, tol):
    """Number of new directions, whether more are left, the directions, the longest first, and what is left.

    Eigenvectors of the Gram matrix of the rests: no order of the samples is preferred. Directions
    shorter than ROUND times the longest wait for the next round, where they no longer drown in its rounding.
    With it, eigenvectors are orthogonal to 1e-4 and what is left of the basis is below 1e-5: both are small
    against 1, so that one more projection and one Cholesky factor leave rounding only.
    """
    relative = rest / jnp.where(longest > 0, longest, 1.0)
    squares, vectors = jnp.linalg.eigh(mean_products(relative, relative))
    squares, vectors = squares[::-1], vectors[:, ::-1]
    # The sign of an eigenvector is free; the largest entry positive does not depend on the order of samples.
    largest = jnp.argmax(jnp.abs(vectors), axis=0)
    vectors = vectors * jnp.sign(jnp.take_along_axis(vectors, largest[None], axis=0))
    taken = squares > jnp.maximum(tol**2, ROUND**2 * squares[0])
    new = relative @ (vectors * jnp.where(taken, 1.0 / jnp.sqrt(jnp.where(taken, squares, 1.0)), 0.0))
    for columns in (q, *temporary):
        new = new - columns @ mean_products(columns, new)
    gram = mean_products(new, new) + jnp.diag(jnp.where(taken, 0.0, 1.0))
    new = jnp.where(taken, new @ inverse_transpose(jnp.linalg.cholesky(gram)), 0.0)
    rest = rest - new @ mean_products(new, rest)
    return jnp.sum(taken), jnp.max(_norms(rest)) > tol * longest, new, rest


@jax.jit
def _add_new(value, coefficients, x, directions, fields, scale, rank):
    """Add the new directions' part to the product; their coefficients go to rows `rank` and below."""
    along = mean_products(directions, x)
    room = coefficients.shape[0]
    rows = jnp.where(rank + jnp.arange(along.shape[0]) < room, rank + jnp.arange(along.shape[0]), room)
    coefficients = coefficients.at[rows].add(along, mode="drop")
    return value + scale * (fields @ along), coefficients


def _padded(columns: Columns, width: int) -> Columns:
    missing = width - columns.shape[1]
    return jnp.pad(columns, ((0, 0), (0, missing))) if missing else columns


def _append(basis: Basis, directions: Columns, fields: Columns, count: int) -> Basis:
    """The basis with new columns behind those in use; zero columns beyond `count` are overwritten later."""
    q, g = _write(basis.q, basis.g, directions, fields, basis.rank)
    return Basis(q, g, basis.rank + count, basis.longest)


@partial(jax.jit, donate_argnums=(0, 1))
def _write(q, g, directions, fields, rank):
    start = (jnp.int32(0), jnp.asarray(rank, jnp.int32))
    return jax.lax.dynamic_update_slice(q, directions, start), jax.lax.dynamic_update_slice(g, fields, start)


@jax.jit
def record_update(learned, velocity, y, x, lr, momentum, shrink):
    """The learned part after a step with gradient sum_i b(i) x(i)^T, given in the bases.

    Args:
        learned: A before the step.
        velocity: its momentum.
        y: [capacity, B], b in the basis QY.
        x: [capacity, B], the layer's input in the basis QX.
        lr: rate of the step.
        momentum: decay of the velocity, 0 for plain SGD.
        shrink: 1 - lr * weight decay.
    """
    velocity = momentum * velocity + y @ x.T
    return shrink * learned + lr * velocity, velocity
