"""A random matrix that is drawn where it is looked at (Gaussian conditioning), and one that is drawn whole.

W_0 is n x n with independent N(mean, std^2) entries. Let QX be the orthonormal directions it was applied to
so far, HX their images, QY the directions its transpose met and HY their images, all as rows. Given these,
W_0 acts on a new unit vector q orthogonal to QX as

    W_0 q = QY^T (HY q) + (I - QY^T QY) g,      g ~ N(0, std^2 I)

(here for mean 0; a mean is added as a rank-one term). So a run of a width-n net needs no n x n matrix, and
the distribution of everything it computes is exact. Training adds terms b x^T with b in the span of QY and x
in that of QX, hence W_t = scale W_0 + QY^T learned QX with a small matrix `learned`.

Source: section c4, method "width"; the conditioning is that of Bolthausen 2014 and Bayati and Montanari 2011.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .width_sharding import spread

Rows = Float[Array, "batch width"]
Coefficients = Float[Array, "batch capacity"]
Scalar = Float[Array, ""]

DEPENDENT = 1e-7
"""A row adds no direction if less than this share of it is new: Gram matrices see the square."""

__all__ = [
    "DenseMatrix",
    "Draw",
    "RevealedMatrix",
    "dense_matrix",
    "grown",
    "orthonormal_rest",
    "revealed_matrix",
]


class Draw(NamedTuple):
    """What one product needs to meet new directions.

    Attributes:
        fresh: [batch, n], independent N(0, Var(W_0)) entries.
        mean: of the entries of W_0.
        offset: row of the basis where new directions go.
    """

    fresh: Rows
    mean: Scalar
    offset: Int[Array, ""]


class RandomMatrix(Protocol):
    """What a hidden layer needs of its weights."""

    def forward(self, x: Rows, draw: Draw) -> "tuple[Rows, Coefficients, RandomMatrix]":
        """W_t x for each row, the rows' coefficients for `updated`, and the matrix that knows of it."""
        ...

    def backward(self, b: Rows, draw: Draw) -> "tuple[Rows, Coefficients, RandomMatrix]":
        """The same for the transpose."""
        ...

    def updated(self, b: Coefficients, x: Coefficients, rate: Scalar, momentum: Scalar, shrink: Scalar):
        """The matrix after v <- momentum v + sum_j b_j x_j^T, W <- shrink W - rate v."""
        ...

    def spread_over(self, mesh: Mesh | None) -> "RandomMatrix":
        """The same matrix with its axis over the width cut into a part for each device."""
        ...


class DenseMatrix(NamedTuple):
    """The matrix itself: cheaper once more directions are met than a quarter of the width.

    Attributes:
        weight: [n, n], W_t.
        velocity: [n, n].
    """

    weight: Float[Array, "width width"]
    velocity: Float[Array, "width width"]

    def forward(self, x: Rows, draw: Draw) -> "tuple[Rows, Rows, DenseMatrix]":  # noqa: ARG002
        """W_t x for each row, the rows, and the matrix."""
        return x @ self.weight.T, x, self

    def backward(self, b: Rows, draw: Draw) -> "tuple[Rows, Rows, DenseMatrix]":  # noqa: ARG002
        """W_t^T b for each row, the rows, and the matrix."""
        return b @ self.weight, b, self

    def updated(self, b: Rows, x: Rows, rate: Scalar, momentum: Scalar, shrink: Scalar) -> "DenseMatrix":
        """The matrix after one step of SGD."""
        velocity = momentum * self.velocity + b.T @ x
        return DenseMatrix(shrink * self.weight - rate * velocity, velocity)

    def spread_over(self, mesh: Mesh | None) -> "DenseMatrix":
        """The same matrix, its rows spread over devices."""
        return DenseMatrix(spread(self.weight, mesh, 0), spread(self.velocity, mesh, 0))


class RevealedMatrix(NamedTuple):
    """The matrix as far as it is known. Unused rows of the bases are zero.

    Attributes:
        qx: [capacity of x, n], orthonormal directions met by W.
        hx: [capacity of x, n], their images under W_0 without its mean.
        qy: [capacity of y, n], directions met by the transpose.
        hy: [capacity of y, n], their images.
        learned: [capacity of y, capacity of x].
        velocity: of `learned`.
        scale: what weight decay has left of W_0.
    """

    qx: Rows
    hx: Rows
    qy: Rows
    hy: Rows
    learned: Float[Array, "capacity_y capacity_x"]
    velocity: Float[Array, "capacity_y capacity_x"]
    scale: Scalar

    def forward(self, x: Rows, draw: Draw) -> "tuple[Rows, Coefficients, RevealedMatrix]":
        """W_t x for each row, coefficients of the rows in the basis, and the matrix that now knows them."""
        new = orthonormal_rest(self.qx, x)
        fresh = jnp.where(jnp.any(new != 0, axis=1, keepdims=True), draw.fresh, 0)
        image = (new @ self.hy.T) @ self.qy + fresh - (fresh @ self.qy.T) @ self.qy
        qx = jax.lax.dynamic_update_slice_in_dim(self.qx, new, draw.offset, 0)
        hx = jax.lax.dynamic_update_slice_in_dim(self.hx, image, draw.offset, 0)
        c = x @ qx.T
        value = self.scale * (c @ hx + draw.mean * jnp.sum(x, axis=1, keepdims=True))
        return value + (c @ self.learned.T) @ self.qy, c, self._replace(qx=qx, hx=hx)

    def backward(self, b: Rows, draw: Draw) -> "tuple[Rows, Coefficients, RevealedMatrix]":
        """The same for the transpose, whose bases are those of W exchanged."""
        value, c, matrix = self._transposed().forward(b, draw)
        return value, c, matrix._transposed()

    def updated(
        self, b: Coefficients, x: Coefficients, rate: Scalar, momentum: Scalar, shrink: Scalar
    ) -> "RevealedMatrix":
        """The matrix after one step of SGD, in coefficients."""
        velocity = momentum * self.velocity + b.T @ x
        learned = shrink * self.learned - rate * velocity
        return self._replace(learned=learned, velocity=velocity, scale=shrink * self.scale)

    def spread_over(self, mesh: Mesh | None) -> "RevealedMatrix":
        """The same matrix, its bases spread over devices; what is small is not."""
        qx, hx, qy, hy = (spread(basis, mesh) for basis in (self.qx, self.hx, self.qy, self.hy))
        return self._replace(qx=qx, hx=hx, qy=qy, hy=hy)

    def _transposed(self) -> "RevealedMatrix":
        return RevealedMatrix(self.qy, self.hy, self.qx, self.hx, self.learned.T, self.velocity.T, self.scale)


def dense_matrix(key: PRNGKeyArray, width: int, std: Scalar, mean: Scalar) -> DenseMatrix:
    """A matrix drawn whole."""
    weight = mean + std * jax.random.normal(key, (width, width))
    return DenseMatrix(weight, jnp.zeros_like(weight))


def revealed_matrix(width: int, capacity_x: int, capacity_y: int) -> RevealedMatrix:
    """A matrix of which nothing is known, with room for that many directions on either side."""
    x, y = jnp.zeros((capacity_x, width)), jnp.zeros((capacity_y, width))
    small = jnp.zeros((capacity_y, capacity_x))
    return RevealedMatrix(x, x, y, y, small, small, jnp.ones(()))


def grown(matrix: RevealedMatrix, capacity_x: int, capacity_y: int) -> RevealedMatrix:
    """The same matrix with more room; leading axes of replicas are kept."""
    more_x = capacity_x - matrix.qx.shape[-2]
    more_y = capacity_y - matrix.qy.shape[-2]

    def pad(array: Array, rows: int, columns: int) -> Array:
        return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, rows), (0, columns)])

    return RevealedMatrix(
        pad(matrix.qx, more_x, 0),
        pad(matrix.hx, more_x, 0),
        pad(matrix.qy, more_y, 0),
        pad(matrix.hy, more_y, 0),
        pad(matrix.learned, more_y, more_x),
        pad(matrix.velocity, more_y, more_x),
        matrix.scale,
    )


def orthonormal_rest(basis: Float[Array, "capacity width"], rows: Rows) -> Rows:
    """Orthonormal rows that span the given rows together with those of `basis`; zero rows if fewer do.

    Block Gram-Schmidt by shifted Cholesky factors, twice: what one round leaves of earlier directions and of
    the shift, the next removes. Each row depends on earlier ones only, so that rounding stays rounding: which
    direction gets which fresh numbers does not hang on it, as it would with eigenvectors.
    """
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    rest = rows / jnp.where(norms > 0, norms, 1)
    shift = DEPENDENT**2
    for _ in range(2):
        rest = rest - (rest @ basis.T) @ basis
        gram = rest @ rest.T
        factor = jnp.linalg.cholesky(gram + shift * jnp.eye(len(rows)))
        # What is new of a row, beyond the shift and the rounding of its products.
        new = jnp.diag(factor) ** 2 > 2 * shift + 1e-13 * jnp.diag(gram)
        # Solving for the rows themselves would gather the whole width on every device.
        inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(rows)), lower=True)
        rest = jnp.where(new[:, None], inverse @ rest, 0)
    return rest
