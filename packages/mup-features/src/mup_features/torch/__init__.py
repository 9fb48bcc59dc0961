"""muP and feature diagnostics for PyTorch models (extra `[torch]`); names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'mup_features.torch needs torch, which is not installed: pip install "mup-features[torch]"',
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from .coordinates import coordinate_check
    from .features import FeatureRecorder
    from .optim import MuAdam, MuAdamW, MuSGD, ScaledLRScheduler, param_groups
    from .scaling import (
        apply_mup,
        attention_scale,
        base_shapes,
        infer_roles,
        readout_multiplier,
        residual_scale,
        role_table,
        spectral_check,
        spectral_ratios,
        spectral_targets,
    )
    from .tangent_kernels import empirical_ntk, ntk_change

_HOME = {
    "FeatureRecorder": "features",
    "MuAdam": "optim",
    "MuAdamW": "optim",
    "MuSGD": "optim",
    "ScaledLRScheduler": "optim",
    "apply_mup": "scaling",
    "attention_scale": "scaling",
    "base_shapes": "scaling",
    "coordinate_check": "coordinates",
    "empirical_ntk": "tangent_kernels",
    "infer_roles": "scaling",
    "ntk_change": "tangent_kernels",
    "param_groups": "optim",
    "readout_multiplier": "scaling",
    "residual_scale": "scaling",
    "role_table": "scaling",
    "spectral_check": "scaling",
    "spectral_ratios": "scaling",
    "spectral_targets": "scaling",
}

__all__ = [
    "FeatureRecorder",
    "MuAdam",
    "MuAdamW",
    "MuSGD",
    "ScaledLRScheduler",
    "apply_mup",
    "attention_scale",
    "base_shapes",
    "coordinate_check",
    "empirical_ntk",
    "infer_roles",
    "ntk_change",
    "param_groups",
    "readout_multiplier",
    "residual_scale",
    "role_table",
    "spectral_check",
    "spectral_ratios",
    "spectral_targets",
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
