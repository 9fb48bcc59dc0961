"""How the user's own initialisation depends on width, so that rescaling ends at the size muP asks for.

Two laws cover what models do: `fan_in`, torch's default (1/sqrt(fan) for weights of linear and convolution
layers and for their biases, whatever the module's own default divides by elsewhere), and `constant`, the same
size at every width (GPT-2's 0.02). Which one holds shows by comparing the entries' size with the base
model's: a law fits a tensor whose growth is within a quarter of the gap between the two laws, on a log scale,
or within four standard errors, as long as these stay within half of the gap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import log, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from mup_features.roles import Role

from ._layouts import ParameterInfo

Law = Literal["fan_in", "constant"]
Init = Literal["auto"] | Law

__all__ = ["Init", "Law", "init_growth", "laws_of", "root_mean_square"]


def init_growth(role: Role, law: Law) -> float:
    """Standard deviation under the user's law over that at base width."""
    if law == "constant":
        return 1.0
    fan = role.fan_in_mult if role.default_fan_mult is None else role.default_fan_mult
    return 1.0 / sqrt(fan)


def root_mean_square(parameter: Tensor) -> float:
    """Size of the entries about zero, over all shards of a distributed tensor."""
    if parameter.numel() == 0:
        return 0.0
    exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(parameter.detach(), dtype=exact)
    return float(_whole(norm)) / sqrt(parameter.numel())


def laws_of(
    parameters: Mapping[str, Tensor],
    roles: Mapping[str, Role],
    infos: Mapping[str, ParameterInfo],
    init: Init | Mapping[str, Law],
) -> dict[str, Law]:
    """The law of every parameter.

    Args:
        parameters: name -> tensor as the user's model was initialised.
        roles: name -> role, with base_std where the base model had real entries.
        infos: name -> what torch's default would be.
        init: a law for all, or name patterns with laws (the first match counts, all must be covered), or
            "auto", which measures. Tensors of zeros obey both laws; those too small to tell follow the rest.

    Raises:
        ValueError: if a parameter fits neither law, or nothing tells which law holds.
    """
    if isinstance(init, Mapping):
        return {name: _matching(name, init) for name in parameters}
    if init not in ("auto", *get_args(Law)):
        raise ValueError(f"init must be 'auto', 'fan_in', 'constant' or patterns, got {init!r}")
    if init != "auto":
        return dict.fromkeys(parameters, init)
    votes: dict[str, _Vote] = {}
    undecided: list[str] = []
    for name, parameter in parameters.items():
        vote = _vote(name, parameter, roles[name], infos[name])
        if vote is not None:
            votes[name] = vote
        elif init_growth(roles[name], "fan_in") != 1.0 and root_mean_square(parameter) > 0.0:
            undecided.append(name)
    weight = {law: sum(vote.entries for vote in votes.values() if vote.law == law) for law in get_args(Law)}
    if undecided and not votes:
        raise ValueError(
            f"init must be given: no parameter is large enough to tell the laws apart, e.g. {undecided[0]!r} "
            f"of shape {tuple(parameters[undecided[0]].shape)}: 'fan_in' (torch's default) or 'constant'"
        )
    majority: Law = "constant" if weight["constant"] > weight["fan_in"] else "fan_in"
    return {name: votes[name].law if name in votes else majority for name in parameters}


@dataclass(frozen=True)
class _Vote:
    law: Law
    entries: int


def _vote(name: str, parameter: Tensor, role: Role, info: ParameterInfo) -> _Vote | None:
    """What one parameter says; None if nothing.

    The relative error of a measured standard deviation is at most sqrt(1/(2 N)), that of normal entries.
    """
    if parameter.numel() == 0 or init_growth(role, "fan_in") == 1.0:
        return None
    if role.base_std is None:
        return _vote_by_default(name, parameter, info)
    measured, entries = root_mean_square(parameter), parameter.numel()
    if (measured == 0.0) != (role.base_std == 0.0):
        raise ValueError(
            f"parameter {name!r} has root mean square {measured:g}, the base model's {role.base_std:g}: one "
            f"is zero; initialise both alike or pass init='fan_in' or 'constant'"
        )
    if measured == 0.0:
        return None
    fan_in = log(init_growth(role, "fan_in"))
    gap, growth = abs(fan_in), log(measured / role.base_std)
    base_entries = entries / (role.fan_in_mult * role.fan_out_mult)
    tolerance = max(gap / 4.0, 4.0 * sqrt(0.5 / entries + 0.5 / base_entries))
    if tolerance > gap / 2.0:
        return None
    if abs(growth - fan_in) <= tolerance:
        return _Vote("fan_in", entries)
    if abs(growth) <= tolerance:
        return _Vote("constant", entries)
    raise ValueError(
        f"parameter {name!r} has root mean square {measured:g}, the base model's {role.base_std:g}: it fits "
        f"neither init='fan_in' (expected {role.base_std * init_growth(role, 'fan_in'):g}) nor 'constant'; "
        f"pass the law of this model, also by name pattern: init={{{name!r}: 'constant', '*': 'fan_in'}}"
    )


def _vote_by_default(name: str, parameter: Tensor, info: ParameterInfo) -> _Vote | None:
    """Without the base model's entries only torch's own default can be recognised, by size and range.

    A uniform sample's root mean square has relative error sqrt(0.2/N); the range gives away a normal
    initialisation that happens to have the same size at this width, as 0.02 does at 833.
    """
    measured, entries = root_mean_square(parameter), parameter.numel()
    if measured == 0.0:
        return None
    expected = info.default_rms
    if expected is not None:
        fits = abs(measured / expected - 1.0) <= 5.0 * sqrt(0.5 / entries) + _ROUNDING
        if info.uniform:
            largest = float(_whole(parameter.detach().abs().max()))
            fits = fits and largest <= sqrt(3.0) * expected * (1.0 + _ROUNDING)
        if fits:
            return _Vote("fan_in", entries)
    raise ValueError(
        f"parameter {name!r} has root mean square {measured:g}, which is not torch's default"
        f"{'' if expected is None else f' ({expected:g})'}, and the base model's entries are not "
        f"known (meta device or a file of shapes): pass init='constant' (same size at every width), "
        f"init='fan_in', or a base model with real entries"
    )


def _matching(name: str, init: Mapping[str, Law]) -> Law:
    for pattern, law in init.items():
        if law not in get_args(Law):
            raise ValueError(f"init must map patterns to 'fan_in' or 'constant', got {law!r} for {pattern!r}")
        if fnmatchcase(name, pattern):
            return law
    raise ValueError(f"init has no pattern for parameter {name!r}; end with '*'")


def _whole(value: Tensor) -> Tensor:
    """A reduction of a distributed tensor over all of its shards."""
    full_tensor = getattr(value, "full_tensor", None)
    return value if full_tensor is None else full_tensor()


_ROUNDING = 2.0**-7  # of bfloat16
