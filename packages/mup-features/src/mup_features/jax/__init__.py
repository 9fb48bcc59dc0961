"""The infinite-width limit of SGD, networks of any width, and kernels, in JAX (extra `[jax]`).

Names are loaded when first used. All of it needs float64: `jax.enable_x64(True)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

try:
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f'mup_features.jax needs jax, and {error.name} is not installed: pip install "mup-features[jax]"',
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from .kernels import KernelGD, limiting_kernel, nngp, ntk
    from .limit import InfiniteWidthMLP
    from .trajectory import DivergedError, Trajectory
    from .width import WidthSimulator

_HOME = {
    "DivergedError": "trajectory",
    "InfiniteWidthMLP": "limit",
    "KernelGD": "kernels",
    "Trajectory": "trajectory",
    "WidthSimulator": "width",
    "limiting_kernel": "kernels",
    "nngp": "kernels",
    "ntk": "kernels",
}

__all__ = [
    "DivergedError",
    "InfiniteWidthMLP",
    "KernelGD",
    "Trajectory",
    "WidthSimulator",
    "limiting_kernel",
    "nngp",
    "ntk",
]


def __getattr__(name: str) -> object:
    """Load an exported name from the submodule it lives in, once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
