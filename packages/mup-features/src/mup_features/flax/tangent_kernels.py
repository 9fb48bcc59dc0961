"""The empirical neural tangent kernel of any flax nnx model.

    Theta[i, c, j, d] = sum over parameters p of  df_c(x_i)/dp  df_d(x_j)/dp

Jacobians of a block of samples (vmap over jacrev, jitted once) are contracted on the host in float64,
whatever `jax_enable_x64` says; `rates` weights each parameter's part.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mup_features.similarity import kernel_distance, relative_frobenius_change

# Bytes of Jacobians in one block.
_BUDGET = 1 << 28


def empirical_ntk(
    model: nnx.Module,
    X: Array,
    *,
    outputs: bool = False,
    rates: Mapping[str, float] | None = None,
    block_size: int | None = None,
) -> Float[np.ndarray, "samples samples"] | Float[np.ndarray, "samples outputs samples outputs"]:
    """The kernel at the model's present parameters, in evaluation mode; the model stays as it is.

    Args:
        model: maps (batch, ...) to (batch, ...) with independent samples; all other axes are outputs. Its
            nnx.Param variables count.
        X: inputs (samples, ...).
        outputs: return all pairs of outputs; otherwise the mean over equal ones, (1/C) sum_c Theta[i,c,j,c].
        rates: path of a parameter ("fc.kernel") -> weight of its part, >= 0; those not named have weight 1.
        block_size: samples in a block; None takes as many as fit 256 MB of Jacobians.

    Raises:
        TypeError: if model is no nnx.Module.
        ValueError: if X is empty, the model has no parameters, or an option is out of range.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    if jnp.ndim(X) < 1 or not len(X):
        raise ValueError(f"X must be an array (samples >= 1, ...), got {jnp.shape(X)}")
    copied = nnx.merge(*nnx.split(model))
    copied.eval()
    graph, parameters, rest = nnx.split(copied, nnx.Param, ...)
    named = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(parameters))]
    weights = _weights(named, rates)
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be >= 1 or None, got {block_size!r}")

    def of_sample(values: Any, x: Array) -> Array:
        return jnp.reshape(nnx.merge(graph, values, rest)(x[None]), -1)

    jacobians = jax.jit(jax.vmap(jax.jacrev(of_sample), (None, 0)))
    X = jnp.asarray(X)
    C = jax.eval_shape(of_sample, parameters, X[0]).size
    size = block_size or _fitting_block(parameters, C)
    blocks = [X[start : start + size] for start in range(0, len(X), size)]
    Theta = np.zeros((len(X), C, len(X), C))
    for i, first in enumerate(blocks):
        J = _matrices(jacobians(parameters, first), len(first) * C)
        for j, second in enumerate(blocks[: i + 1]):
            other = J if j == i else _matrices(jacobians(parameters, second), len(second) * C)
            part = sum(w * (a @ b.T) for w, a, b in zip(weights, J, other, strict=True))
            part = np.reshape(part, (len(first), C, len(second), C))
            rows = slice(i * size, i * size + len(first))
            columns = slice(j * size, j * size + len(second))
            Theta[rows, :, columns] = part
            Theta[columns, :, rows] = part.transpose(2, 3, 0, 1)
    return Theta if outputs else np.einsum("icjc->ij", Theta) / C


def ntk_change(before: nnx.Module, after: nnx.Module, X: Array, **options: Any) -> dict[str, float]:
    """How far the tangent kernel moved: `kernel_distance` (blind to scale) and `relative_frobenius_change`.

    Args:
        before: the model at the earlier time.
        after: the model at the later time.
        X: inputs.
        options: of `empirical_ntk`, but for `outputs`.
    """
    K0, K = (empirical_ntk(model, X, **options) for model in (before, after))
    return {
        "kernel_distance": kernel_distance(K0, K),
        "relative_frobenius_change": relative_frobenius_change(K0, K),
    }


def _matrices(jacobian: Any, rows: int) -> list[Float[np.ndarray, "rows entries"]]:
    return [np.asarray(leaf).reshape(rows, -1).astype(np.float64) for leaf in jax.tree.leaves(jacobian)]


def _weights(named: list[str], rates: Mapping[str, float] | None) -> list[float]:
    if not named:
        raise ValueError("model must have an nnx.Param, got none")
    given = dict(rates or {})
    unknown = sorted(set(given) - set(named))
    if unknown:
        raise ValueError(f"rates must be keyed by parameters of the model, got {unknown[0]!r}")
    if given and min(given.values()) < 0:
        raise ValueError(f"rates must be >= 0, got {min(given.values())!r}")
    return [given.get(name, 1.0) for name in named]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(part, "key", part)) for part in path)


def _fitting_block(parameters: Any, C: int) -> int:
    each = C * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameters))
    return max(1, _BUDGET // max(each, 1))
