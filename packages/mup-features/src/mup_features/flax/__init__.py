"""muP and feature diagnostics for flax nnx models with optax (extra `[flax]`)."""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"mup_features.flax needs jax, flax and optax, and {error.name} is not installed: "
        'pip install "mup-features[flax]"',
        name=error.name,
    ) from error

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .coordinates import coordinate_check
    from .features import empirical_ntk, record_features
    from .scaling import (
        attention_fn,
        base_shapes,
        infer_roles,
        init_rescale,
        readout_multiplier,
        residual_scale,
        role_table,
    )
    from .transform import mup_transform

_HOME = {
    "attention_fn": "scaling",
    "base_shapes": "scaling",
    "coordinate_check": "coordinates",
    "empirical_ntk": "features",
    "infer_roles": "scaling",
    "init_rescale": "scaling",
    "mup_transform": "transform",
    "readout_multiplier": "scaling",
    "record_features": "features",
    "residual_scale": "scaling",
    "role_table": "scaling",
}

__all__ = [
    "attention_fn",
    "base_shapes",
    "coordinate_check",
    "empirical_ntk",
    "infer_roles",
    "init_rescale",
    "mup_transform",
    "readout_multiplier",
    "record_features",
    "residual_scale",
    "role_table",
]


def __getattr__(name: str) -> object:
    """Load an exported name from its module when first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
