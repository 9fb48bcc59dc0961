"""Float64 in jax, in every supported version."""

from contextlib import AbstractContextManager
from importlib import import_module

import jax

__all__ = ["float64"]


def float64() -> AbstractContextManager:
    """Context of one thread in which jax computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return import_module("jax.experimental").enable_x64()  # jax < 0.8
