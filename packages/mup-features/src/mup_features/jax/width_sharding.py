"""How finite networks lie on devices: vectors of a layer are cut along the width, all else is copied.

Inner products over the width then are sums on each device and one sum over devices; XLA inserts it. Numbers
drawn do not depend on the layout, as jax's generators count their outputs (`jax_threefry_partitionable`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

__all__ = ["copied", "mesh_over", "spread"]

AXIS = "width"


def mesh_over(devices: Sequence[Any] | None) -> Mesh | None:
    """The mesh of these devices along the width; None for the default device."""
    return None if devices is None else Mesh(np.asarray(devices), (AXIS,))


def spread(array: Float[Array, "*shape"], mesh: Mesh | None, axis: int = -1) -> Float[Array, "*shape"]:
    """The array, inside a compiled function, cut along the axis that runs over the width."""
    if mesh is None:
        return array
    spec: list[str | None] = [None] * array.ndim
    spec[axis] = AXIS
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))


def copied(arrays: dict[str, Array], mesh: Mesh | None) -> dict[str, Array]:
    """The arrays, inside a compiled function, whole on every device."""
    if mesh is None:
        return arrays
    return jax.lax.with_sharding_constraint(arrays, NamedSharding(mesh, PartitionSpec()))
