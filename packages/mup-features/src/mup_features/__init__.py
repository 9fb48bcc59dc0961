"""muP for any model, feature-learning diagnostics, and the exact infinite-width limit of SGD.

Chen, Yang, Zhao, Gu, "Global Convergence and Rich Feature Learning in L-Layer Infinite-Width Neural Networks
under muP Parametrization", ICML 2025, arXiv 2503.09565. Importing this package is light and imports no
framework; the names below are loaded when first used, those for models from `mup_features.torch` (extra
`[torch]`). The same for flax is in `mup_features.flax`, the limit itself in `mup_features.jax`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .coordinates import CoordReport
    from .metrics import FeatureReport, FeatureSnapshot, StreamingGram, compare
    from .parametrization import Parametrization, Regime, classify
    from .roles import Role, load_shapes, save_shapes
    from .theory import (
        check_activation,
        check_data,
        check_independence,
        covariance_preservation_error,
        global_min_certificate,
    )
    from .torch.coordinates import coordinate_check
    from .torch.features import FeatureRecorder
    from .torch.optim import param_groups
    from .torch.scaling import apply_mup, attention_scale, infer_roles
    from .transfer import TransferReport, lr_sweep

__version__ = "0.1.0"

_HOME = {
    "CoordReport": "coordinates",
    "FeatureRecorder": "torch.features",
    "FeatureReport": "metrics",
    "FeatureSnapshot": "metrics",
    "Parametrization": "parametrization",
    "Regime": "parametrization",
    "Role": "roles",
    "StreamingGram": "metrics",
    "TransferReport": "transfer",
    "apply_mup": "torch.scaling",
    "attention_scale": "torch.scaling",
    "check_activation": "theory",
    "check_data": "theory",
    "check_independence": "theory",
    "classify": "parametrization",
    "compare": "metrics",
    "coordinate_check": "torch.coordinates",
    "covariance_preservation_error": "theory",
    "global_min_certificate": "theory",
    "infer_roles": "torch.scaling",
    "load_shapes": "roles",
    "lr_sweep": "transfer",
    "param_groups": "torch.optim",
    "save_shapes": "roles",
}

__all__ = [
    "CoordReport",
    "FeatureRecorder",
    "FeatureReport",
    "FeatureSnapshot",
    "Parametrization",
    "Regime",
    "Role",
    "StreamingGram",
    "TransferReport",
    "__version__",
    "apply_mup",
    "attention_scale",
    "check_activation",
    "check_data",
    "check_independence",
    "classify",
    "compare",
    "coordinate_check",
    "covariance_preservation_error",
    "global_min_certificate",
    "infer_roles",
    "load_shapes",
    "lr_sweep",
    "param_groups",
    "save_shapes",
]


def __getattr__(name: str) -> object:
    """Load an exported name from the submodule it lives in, once; without torch that says what to install."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
