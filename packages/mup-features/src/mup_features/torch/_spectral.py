"""The spectral view of muP: weights and updates of size sqrt(fan_out / fan_in) in the spectral norm.

Source: Yang, Simon, Bernstein 2023 (arXiv 2310.17813), condition 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod, sqrt

import torch
from torch import Tensor, nn

from mup_features.roles import Role

from ._layouts import ParameterInfo, clean_name, parameter_infos, unwrapped
from ._multipliers import multiplier_of

__all__ = ["SpectralReport", "spectral_check", "spectral_ratios", "spectral_targets"]


@dataclass(frozen=True)
class SpectralReport:
    """Spectral ratios of a wide model over those of the base model, per weight.

    Attributes:
        growth: name -> ratio of the wide model over ratio of the base model; muP keeps it near 1.
        worst: the name whose growth is farthest from 1.
        ok: whether all lie within the factor.
    """

    growth: dict[str, float]
    worst: str
    ok: bool


def spectral_targets(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, float]:
    """sqrt(fan_out / fan_in) of every linear and convolution weight (kernel size in the fan-in).

    Raises:
        ValueError: if a weight has no role.
    """
    targets = {}
    for name, (weight, info) in _weights(model, roles).items():
        rows, columns = _matrix(weight, info).shape
        targets[name] = sqrt(rows / columns)
    return targets


@torch.no_grad()
def spectral_ratios(
    model: nn.Module, roles: Mapping[str, Role], previous: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Spectral norm of every weight as the forward pass sees it, over its target.

    Args:
        model: the model, with its multipliers.
        roles: from `infer_roles`.
        previous: an earlier `state_dict()` (cloned); then the norm is that of the change since.

    Raises:
        ValueError: if a weight has no role or `previous` lacks it.
    """
    targets = spectral_targets(model, roles)
    ratios = {}
    for name, (weight, info) in _weights(model, roles).items():
        if previous is not None and name not in previous:
            raise ValueError(f"previous must hold every weight, {name!r} is missing")
        change = weight if previous is None else weight - previous[name]
        norm = torch.linalg.matrix_norm(_matrix(change, info).double(), ord=2)
        ratios[name] = abs(multiplier_of(info.module)) * float(norm) / targets[name]
    return ratios


def spectral_check(
    ratios: Mapping[str, float], base_ratios: Mapping[str, float], factor: float = 3.0
) -> SpectralReport:
    """Whether spectral norms stay at the same multiple of their targets as the width grows.

    The multiple itself depends on the base model's initialisation and rates, which muP takes as given.

    Args:
        ratios: `spectral_ratios` of the wide model.
        base_ratios: those of the base model, after as many steps at the same base rate.
        factor: largest tolerated growth or decline, > 1.

    Raises:
        ValueError: if the two name different weights or a number is not finite and positive.
    """
    if set(ratios) != set(base_ratios) or not ratios:
        differing = sorted(set(ratios) ^ set(base_ratios))
        raise ValueError(f"ratios and base_ratios must name the same weights, got {differing}")
    if not factor > 1.0:
        raise ValueError(f"factor must be > 1, got {factor!r}")
    for name in ratios:
        if not all(isfinite(values[name]) and values[name] > 0 for values in (ratios, base_ratios)):
            both = f"{ratios[name]!r} and {base_ratios[name]!r}"
            raise ValueError(f"ratios must be finite and > 0, got {both} for {name!r}")
    growth = {name: ratios[name] / base_ratios[name] for name in ratios}
    worst = max(growth, key=lambda name: max(growth[name], 1.0 / growth[name]))
    return SpectralReport(growth, worst, 1.0 / factor <= growth[worst] <= factor)


def _weights(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, tuple[Tensor, ParameterInfo]]:
    root = unwrapped(model)
    infos = parameter_infos(root)
    weights = {}
    for full_name, parameter in root.named_parameters():
        name = clean_name(full_name)
        if name not in roles:
            raise ValueError(f"roles has no role for {name!r}: infer them again from this model")
        if infos[name].layout.owner in ("linear", "conv"):
            full_tensor = getattr(parameter.detach(), "full_tensor", None)
            weights[name] = (parameter.detach() if full_tensor is None else full_tensor(), infos[name])
    return weights


def _matrix(weight: Tensor, info: ParameterInfo) -> Tensor:
    """Outputs as rows; everything summed over, the kernel too, as columns."""
    axes = info.layout.fan_out
    rest = [axis for axis in range(weight.ndim) if axis not in axes]
    rows = prod(weight.shape[axis] for axis in axes)
    return weight.permute(*axes, *rest).reshape(rows, -1)
