"""Orthogonalised updates: which axes of a leaf form the matrix, its polar factor, and the scale.

Newton-Schulz starts from X = M / (||M||_F + eps) and repeats X <- p1 X + (p2 A + p3 A^2) X with A = X X^T, so
that every singular value s goes through the quintic p1 s + p2 s^3 + p3 s^5. With the coefficients of Muon
five steps bring s in [0.05, 1] into [0.68, 1.14]: the result is near the polar factor U V^T, it does not
converge to it.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 4, eqs 3.20-3.21; Liu et al. 2025 (arXiv 2510.21800).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SCALES = ("none", "sqrt_ratio", "rms")


def newton_schulz(
    matrix: Float[Array, "*batch rows cols"],
    *,
    steps: int | Int[Array, ""] = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float | Float[Array, ""] = 1e-7,
) -> Float[Array, "*batch rows cols"]:
    """Approximate polar factor of each matrix by the quintic Newton-Schulz iteration.

    Works on the smaller side. A zero matrix gives zero. Products run in the matrix's own
    dtype at JAX's default precision; `jax.default_matmul_precision` raises it on accelerators.

    Args:
        matrix: one matrix or a stack of them.
        steps: number of iterations, >= 0; a Python int is unrolled, a traced value becomes a loop.
        coefficients: the three coefficients of the quintic.
        eps: added to the Frobenius norm, >= 0.

    Source: Yuan et al. 2025, Section 3.3.3; the coefficients are those of Muon (Jordan 2024).
    """
    p1, p2, p3 = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.matrix_transpose(matrix) if tall else matrix
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + jnp.asarray(eps, x.dtype)
    x = x / jnp.where(norm == 0, 1, norm)

    def iterate(_: Any, x: jax.Array) -> jax.Array:
        gram = x @ jnp.matrix_transpose(x)
        return p1 * x + (p2 * gram + p3 * (gram @ gram)) @ x

    if isinstance(steps, int):
        for step in range(steps):
            x = iterate(step, x)
    else:
        x = jax.lax.fori_loop(0, steps, iterate, x)
    return jnp.matrix_transpose(x) if tall else x


def polar_factor(matrix: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows cols"]:
    """Exact polar factor U V^T of each matrix by the singular value decomposition.

    Directions whose singular value is zero to rounding are left out, so a zero matrix gives zero and the
    result depends on the matrix only, not on the basis that the decomposition happened to pick for the null
    space.

    Args:
        matrix: one matrix or a stack of them.
    """
    if matrix.size == 0:
        return matrix
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    tolerance = max(matrix.shape[-2:]) * jnp.finfo(matrix.dtype).eps * values[..., :1]
    # ~(<=) instead of (>): NaN values must stay NaN in the product and not be dropped.
    kept = jnp.where(values <= tolerance, 0, 1).astype(matrix.dtype)
    return (left * kept[..., None, :]) @ right


class MatrixView(NamedTuple):
    """How a leaf is read as a stack of matrices: `batch` indexes the stack, `rows`, `cols` are flattened."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def shape(self, leaf_shape: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of each matrix."""
        return math.prod(leaf_shape[i] for i in self.rows), math.prod(leaf_shape[i] for i in self.cols)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as an array of shape (*batch, rows, columns)."""
        order = self.batch + self.rows + self.cols
        batch_shape = tuple(leaf.shape[i] for i in self.batch)
        return leaf.transpose(order).reshape(batch_shape + self.shape(leaf.shape))

    def from_matrix(self, matrix: jax.Array, leaf_shape: Sequence[int]) -> jax.Array:
        """Undo `to_matrix` for a leaf of the given shape."""
        order = self.batch + self.rows + self.cols
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([leaf_shape[i] for i in order]).transpose(inverse)


def matrix_view(spec: Any, leaf_shape: Sequence[int]) -> MatrixView | None:
    """Read one entry of `weight_dimension_numbers`; None for a leaf that is not a matrix.

    Args:
        spec: None for the default (fewer than two axes: not a matrix; else rows = axis 0, columns = the
            rest), or (row axes, column axes), each an int or a sequence of ints; axes in neither group index
            a stack. `optax.contrib.MuonDimensionNumbers` is read by its field names: output axes are rows.
        leaf_shape: shape of the leaf.

    Raises:
        ValueError: if the axes do not exist, repeat, or a group is empty.
    """
    ndim = len(leaf_shape)
    if spec is None:
        return MatrixView((), (0,), tuple(range(1, ndim))) if ndim >= 2 else None
    if hasattr(spec, "reduction_axis"):
        spec = (spec.output_axis, spec.reduction_axis)
    if not (isinstance(spec, Sequence) and not isinstance(spec, str) and len(spec) == 2):
        raise ValueError(f"weight_dimension_numbers must hold None or (row axes, column axes), got {spec!r}")
    groups = [(group,) if isinstance(group, int) else tuple(group) for group in spec]
    for axis in groups[0] + groups[1]:
        if not isinstance(axis, int) or not -ndim <= axis < ndim:
            raise ValueError(
                f"weight_dimension_numbers must name axes of the shape {tuple(leaf_shape)}, got {spec!r}"
            )
    rows, cols = (tuple(axis % ndim for axis in group) for group in groups)
    if not rows or not cols or len(set(rows + cols)) < len(rows + cols):
        raise ValueError(
            f"weight_dimension_numbers needs two disjoint non-empty groups of axes, got {spec!r}"
        )
    return MatrixView(tuple(i for i in range(ndim) if i not in rows + cols), rows, cols)


def update_scale(scale: Any, rows: int, cols: int) -> Any:
    """Factor of an orthogonalised update of a (rows, cols) matrix: by name, or a number as it is."""
    if scale == "sqrt_ratio":
        return math.sqrt(max(1.0, rows / cols)) if cols else 1.0
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, cols))
    return 1.0 if isinstance(scale, str) else scale
