"""Sizes of an nnx model's entries, and whether they are those of flax's default initialisation."""

from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp

from mup_features.init_laws import Measured
from mup_features.roles import Layout

from ._layouts import value_of

__all__ = ["measured", "root_mean_square"]

# What truncation of a normal law and bfloat16 may do to a root mean square.
_ROUNDING = 0.02


def measured(found: Mapping[str, Any], layouts: Mapping[str, Layout]) -> dict[str, Measured]:
    """What `init_laws` asks about each parameter.

    Args:
        found: name -> variable with its initial values.
        layouts: name -> axes.
    """
    return {name: _measured(variable, layouts[name]) for name, variable in found.items()}


def root_mean_square(variable: Any) -> float | None:
    """Root mean square entry; None for an abstract variable and one without entries.

    Args:
        variable: the variable.
    """
    value = value_of(variable)
    if not isinstance(value, jax.Array) or value.size == 0:
        return None
    return float(jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32)))))


def _measured(variable: Any, layout: Layout) -> Measured:
    """Flax's default for kernels and embeddings has variance 1/fan."""
    shape, size = tuple(variable.shape), root_mean_square(variable)
    if size is None:
        return Measured(0.0, 0, shape)
    fan = sum(prod(shape[axis] for axis in axes) for axes in layout.default_fan)
    default = 1.0 / sqrt(fan) if fan else None
    close = 5.0 * sqrt(0.5 / prod(shape)) + _ROUNDING
    is_default = default is not None and abs(size / default - 1.0) < close
    return Measured(size, prod(shape), shape, default, is_default)
