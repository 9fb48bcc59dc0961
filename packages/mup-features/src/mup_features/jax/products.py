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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .columns import Columns, Small, appended, combined, inner, inverse_transpose, plus, without

ROUND = 1e-6
"""Directions shorter than this share of the longest wait for the next round: a round loses as many digits."""

FEW = (8, 32, 128)
"""Numbers of columns that new directions are padded to, if their arguments are more than that."""

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
"""Columns of a block: those of four products, within these bounds."""

DrawFields = Callable[[int, int, Sequence[Columns]], Columns]
"""Number of fields, of columns (the others are zero), and fields that are there; see `Fresh.on`."""

__all__ = ["Basis", "DrawFields", "Matrix", "Product", "empty_matrix", "product", "record_update"]


class Basis(NamedTuple):
    """One side of a matrix: an orthonormal basis and what the matrix makes of it.

    Attributes:
        q: blocks of orthonormal columns on the population of the argument, [M, width] each; columns that are
            not in use yet are zero.
        g: blocks of the same widths, standard normal fields on the population of the result.
        rank: columns in use.
        longest: the largest norm of an argument so far, what `tol` is relative to.
    """

    q: tuple[Columns, ...]
    g: tuple[Columns, ...]
    rank: int
    longest: float


class Matrix(NamedTuple):
    """A matrix during training, W_t = scale * W_0 - QY learned QX^T.

    Attributes:
        x: the side of W (arguments on layer l-1, results on layer l).
        y: the side of the transpose.
        learned: A above, [rank of y, rank of x] at the last update; zero for directions that are newer.
        velocity: momentum of `learned`, of the same shape.
        scale: w above, sigma at the start and smaller by weight decay; 0 where W_0 has vanished (IP).
    """

    x: Basis
    y: Basis
    learned: Small
    velocity: Small
    scale: float


class Product(NamedTuple):
    """What a product leaves behind.

    Attributes:
        value: [M, B], W x.
        coefficients: [rank, B], x in the basis; complete only if the basis was extended.
        basis: the side of the matrix after the product.
    """

    value: Columns
    coefficients: Small
    basis: Basis


def empty_matrix(scale: float) -> Matrix:
    """A matrix that has met nothing."""
    side = Basis((), (), 0, 0.0)
    return Matrix(side, side, np.zeros((0, 0)), np.zeros((0, 0)), scale)


def product(
    matrix: Matrix, x: Columns, *, transpose: bool, fresh: DrawFields, tol: float, extend: bool
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

    Raises:
        FloatingPointError: if x or its square is not finite.
    """
    near, far = (matrix.y, matrix.x) if transpose else (matrix.x, matrix.y)
    learned = matrix.learned.T if transpose else matrix.learned
    coefficients = inner(near.q, x)[: near.rank]
    response = matrix.scale * _mean_derivatives(far, x)
    response[: len(learned)] -= learned @ coefficients[: learned.shape[1]]
    value = plus(plus(_zeros(x), near.g, matrix.scale * coefficients), far.q, response)
    if matrix.scale == 0.0 and not extend:
        return Product(value, coefficients, near)
    longest = max(near.longest, np.sqrt(_gram(x).diagonal().max()))
    rest = plus(x, near.q, -coefficients)
    onlookers: tuple[Columns, ...] = ()
    width = max(SMALLEST_BLOCK, min(4 * x.shape[1], LARGEST_BLOCK))
    while True:
        gram = _gram(rest)
        if np.sqrt(gram.diagonal().max()) <= tol * longest:
            break
        directions, count = _directions((*near.q, *onlookers), rest, gram / longest**2, tol)
        columns = directions.shape[1]
        along = inner((directions,), x)
        if matrix.scale:
            fields = fresh(count, columns, near.g)
            value = plus(value, (fields,), matrix.scale * along)
        else:
            fields = _zeros(directions)
        if extend:
            coefficients = np.concatenate([coefficients, along[:count]])
            near = near._replace(
                q=appended(near.q, near.rank, directions, count, width),
                g=appended(near.g, near.rank, fields, count, width),
                rank=near.rank + count,
            )
        else:
            onlookers = (*onlookers, directions)
        rest = without(rest, (directions,))
    return Product(value, coefficients, near._replace(longest=longest) if extend else near)


def _mean_derivatives(far: Basis, x: Columns) -> Small:
    """E[dx / dG] for each field G of the other side, as <x, G>: the coefficients of Zdot, [its rank, B]."""
    return inner(far.g, x)[: far.rank]


def _zeros(like: Columns) -> Columns:
    """Zeros that lie on the devices as other columns do."""
    return combined(like, np.zeros((like.shape[1], like.shape[1])))


def _gram(x: Columns) -> Small:
    gram = inner((x,), x)
    if not np.isfinite(gram).all():
        raise FloatingPointError("signals or their squares are not finite")
    return gram


def _directions(known: Sequence[Columns], rest: Columns, gram: Small, tol: float) -> tuple[Columns, int]:
    """New directions, the longest first, zero beyond their number, and that number.

    Eigenvectors of the Gram matrix of the rests, in units of the longest argument: no order of the samples is
    preferred. Directions shorter than ROUND times the longest wait for the next round, where they no longer
    drown in its rounding. With it, eigenvectors are orthogonal to 1e-4 and what is left of the basis is below
    1e-5: both are small against 1, so that one more projection and one Cholesky factor leave rounding only.
    Twice is enough (Kahan and Parlett).
    """
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    # The sign of an eigenvector is free; the largest entry positive does not depend on the order of samples.
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(np.take_along_axis(vectors, largest[None], axis=0))
    count = max(1, int(np.sum(squares > max(tol**2, ROUND**2 * squares[0]))))
    # A few numbers of columns, as each is compiled.
    columns = next((number for number in FEW if count <= number < len(gram)), len(gram))
    mixed = np.zeros((len(vectors), columns))
    mixed[:, :count] = vectors[:, :count] / np.sqrt(squares[:count])
    new = without(combined(rest, mixed), known)
    lower = np.linalg.cholesky(inner((new,), new)[:count, :count])
    straight = np.zeros((columns, columns))
    straight[:count, :count] = inverse_transpose(lower)
    return combined(new, straight), count


def record_update(matrix: Matrix, y: Small, x: Small, lr: float, momentum: float, shrink: float) -> Matrix:
    """The matrix after a step with gradient sum_i b(i) x(i)^T, given in the bases.

    Args:
        matrix: before the step.
        y: [rank of y or fewer, B], b in the basis QY.
        x: [rank of x or fewer, B], the layer's input in the basis QX.
        lr: rate of the step.
        momentum: decay of the velocity, 0 for plain SGD.
        shrink: 1 - lr * weight decay, which multiplies the initial matrix too.
    """
    shape = matrix.y.rank, matrix.x.rank
    velocity = momentum * _enlarged(matrix.velocity, shape)
    velocity[: len(y), : len(x)] += y @ x.T
    learned = shrink * _enlarged(matrix.learned, shape) + lr * velocity
    return matrix._replace(learned=learned, velocity=velocity, scale=matrix.scale * shrink)


def _enlarged(small: Small, shape: tuple[int, int]) -> Small:
    rows, columns = small.shape
    return np.pad(small, ((0, shape[0] - rows), (0, shape[1] - columns)))
