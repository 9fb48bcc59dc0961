"""MARS optimisers: variance-reduced gradients in front of AdamW, Lion, Shampoo, Muon and SGD.

Yuan, Liu, Wu, Zhou, Gu, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
ICML 2025, arXiv 2411.10438. Importing this package is light and imports no framework and no NumPy; the names
below are loaded when first used, the torch ones from `mars_optim.torch` (extra `[torch]`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .theory import gamma_star, noise_ratio, storm_schedule
    from .torch import MARS, GammaScheduler, VarianceReduced, build_param_groups

__version__ = "0.1.0"

__all__ = [
    "MARS",
    "GammaScheduler",
    "VarianceReduced",
    "build_param_groups",
    "gamma_star",
    "noise_ratio",
    "storm_schedule",
]

_HOME = {
    "MARS": "torch",
    "GammaScheduler": "torch",
    "VarianceReduced": "torch",
    "build_param_groups": "torch",
    "gamma_star": "theory",
    "noise_ratio": "theory",
    "storm_schedule": "theory",
}


def __getattr__(name: str) -> object:
    """Load an exported name from the submodule it lives in, once; without torch that says what to install."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
