"""Sizes of a torch model's entries, and whether they are those of torch's default initialisation."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from mup_features.init_laws import Measured

from ._layouts import ParameterInfo

__all__ = ["measured", "root_mean_square"]

_ROUNDING = 2.0**-7  # of bfloat16


def measured(parameters: Mapping[str, Tensor], infos: Mapping[str, ParameterInfo]) -> dict[str, Measured]:
    """What `init_laws` asks about each parameter."""
    return {
        name: Measured(
            size := root_mean_square(parameter),
            parameter.numel(),
            tuple(parameter.shape),
            infos[name].default_rms,
            _is_default(parameter, size, infos[name]),
        )
        for name, parameter in parameters.items()
    }


def root_mean_square(parameter: Tensor) -> float:
    """Size of the entries about zero, over all shards of a distributed tensor."""
    if parameter.numel() == 0:
        return 0.0
    exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(parameter.detach(), dtype=exact)
    return float(_whole(norm)) / sqrt(parameter.numel())


def _is_default(parameter: Tensor, size: float, info: ParameterInfo) -> bool:
    """By size and range.

    A uniform sample's root mean square has relative error sqrt(0.2/N); the range gives away a normal
    initialisation that happens to have the same size at this width, as 0.02 does at 833.
    """
    expected = info.default_rms
    if expected is None or parameter.numel() == 0:
        return False
    if abs(size / expected - 1.0) > 5.0 * sqrt(0.5 / parameter.numel()) + _ROUNDING:
        return False
    if not info.uniform:
        return True
    largest = float(_whole(parameter.detach().abs().max()))
    return largest <= sqrt(3.0) * expected * (1.0 + _ROUNDING)


def _whole(value: Tensor) -> Tensor:
    """A reduction of a distributed tensor over all of its shards."""
    full_tensor = getattr(value, "full_tensor", None)
    return value if full_tensor is None else full_tensor()
