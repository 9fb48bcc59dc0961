"""MARS for PyTorch: the optimiser, its functional core, and what belongs to it."""

try:
    import jaxtyping  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"mars_optim.torch needs torch and jaxtyping, and {error.name} is not installed: "
        'pip install "mars-optim[torch]"',
        name=error.name,
    ) from error

from .clipping import clip_grad_norm_pair_
from .diagnostics import estimator_error
from .functional import (
    UpdateRule,
    clip_by_norm,
    gradient_correction,
    mars,
    quasi_hyperbolic,
    stochastic_round_,
)
from .optimizer import MARS
from .orthogonalize import newton_schulz, orthogonalize, polar
from .param_groups import GammaScheduler, build_param_groups
from .wrapper import VarianceReduced

__all__ = [
    "MARS",
    "GammaScheduler",
    "UpdateRule",
    "VarianceReduced",
    "build_param_groups",
    "clip_by_norm",
    "clip_grad_norm_pair_",
    "estimator_error",
    "gradient_correction",
    "mars",
    "newton_schulz",
    "orthogonalize",
    "polar",
    "quasi_hyperbolic",
    "stochastic_round_",
]
