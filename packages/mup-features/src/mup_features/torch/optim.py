"""Parameter groups with muP's rates for any torch optimiser, and a wrapper for schedulers.

A group holds what differs with width: `lr`, `weight_decay` (and `eps`), and for the reader `mup_role` and
`lr_scale`, the factor of the base rate. Groups are built once from names; a step then runs the optimiser's
own code (foreach, fused, capturable) on ordinary parameters.

Source: Yang et al. 2022 (arXiv 2203.03466), tables 3 and 8; depth: Yang et al. 2023 (arXiv 2310.02244), Dey
et al. 2025 (arXiv 2505.01618).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mup_features.depth_rules import (
    WITH_EPSILON,
    Depth,
    blocks_and_ratio,
    is_orthogonalised,
    scales_with_depth,
)
from mup_features.roles import Role
from mup_features.width_rules import Alignment, DecayMode, Form, Optimizer

from ._layouts import unwrapped
from ._schedules import ScaledLRScheduler
from .scaling import named_parameters

__all__ = ["MuAdam", "MuAdamW", "MuSGD", "ScaledLRScheduler", "param_groups"]


def param_groups(
    model: nn.Module,
    roles: Mapping[str, Role],
    lr: float | Tensor,
    weight_decay: float = 0.0,
    optimizer: Optimizer = "adam",
    weight_decay_mode: DecayMode = "constant_product",
    form: Form = "mult",
    eps_scaling: bool = False,
    eps: float = 1e-8,
    alignment: Alignment | tuple[Alignment, Alignment] = "full",
    *,
    groups: Iterable[Mapping[str, Any]] | None = None,
    depth: Depth | None = None,
    layers: int | None = None,
    base_layers: int | None = None,
    blocks: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, one for each distinct set of numbers.

    Build them after `fully_shard` or DDP, so that they hold the parameters that are trained.

    Args:
        model: the model.
        roles: from `infer_roles`.
        lr: base rate eta, >= 0, the one tuned at base width. A tensor (capturable optimisers) gives every
            group a tensor of its own.
        weight_decay: base decay, >= 0.
        optimizer: the family of the updates: "sgd", "adam", "adamw", "adafactor", "sign" or "muon" (hidden
            matrices orthogonalised, marked by "use_muon" in their groups; everything else as Adam).
        weight_decay_mode: "constant_product" keeps lr times weight_decay the same in all groups; "raw" leaves
            weight_decay alone.
        form: the form that `apply_mup` was given.
        eps_scaling: whether to scale Adam's epsilon like each parameter's gradient.
        eps: base epsilon, used with eps_scaling or depth="linear".
        alignment: "full", "none" or an exponent in [1/2, 1], or a pair for (hidden, output).
        groups: the user's own groups, dictionaries with "params" (parameters, (name, parameter) pairs or
            names) and options; each is split and keeps its options, with base values of "lr" and
            "weight_decay".
        depth: "sqrt" lowers the rate of blocks by sqrt(L0/L), except SGD's, for branches scaled by
            sqrt(L0/L); "linear" leaves rates and decay, multiplies epsilon by L0/L and SGD's rate by L/L0,
            for branches scaled by L0/L. See `residual_scale`.
        layers: number L of residual blocks, with depth.
        base_layers: number L0 in the base model, with depth.
        blocks: name patterns of the parameters inside the blocks; default: the hidden weights.

    Returns:
        Groups with "params", "lr", "weight_decay", "mup_role", "lr_scale", the user's options, and "eps"
        where epsilon is scaled. Roles with equal numbers share a group; "mup_role" joins them by "+".

    Raises:
        ValueError: if a number is out of range, a parameter has no role or is in no or two groups.
    """
    _validate(lr, weight_decay, eps, eps_scaling, optimizer)
    block_names, ratio = blocks_and_ratio(roles, depth, layers, base_layers, blocks)
    scaled_eps = eps_scaling or (depth == "linear" and optimizer in WITH_EPSILON)
    parameters = named_parameters(unwrapped(model))
    names = {id(parameter): name for name, parameter in reversed(parameters.items())}
    built: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[int] = set()
    for index, group in enumerate([{"params": parameters.values()}] if groups is None else groups):
        base_lr, base_decay = group.get("lr", lr), group.get("weight_decay", weight_decay)
        base_eps = group.get("eps", eps)
        _validate(base_lr, base_decay, base_eps, eps_scaling, optimizer)
        for parameter in _members(group, parameters):
            name = _name(parameter, names, roles)
            if id(parameter) in seen:
                if groups is None:
                    continue
                raise ValueError(f"groups must hold each parameter once, {name!r} appears again")
            seen.add(id(parameter))
            scales = scales_with_depth(
                roles[name],
                depth,
                ratio if name in block_names else 1.0,
                optimizer=optimizer,
                form=form,
                alignment=alignment,
                weight_decay_mode=weight_decay_mode,
                eps_scaling=eps_scaling,
            )
            orthogonalised = is_orthogonalised(roles[name], optimizer)
            numbers = {
                "lr_scale": scales.lr,
                "decay": scales.weight_decay,
                "eps": scales.eps if scaled_eps and not orthogonalised else None,
            }
            key = (index, *numbers.values(), orthogonalised)
            if key not in built:
                built[key] = _new_group(group, numbers, base_lr, base_decay, base_eps)
                if optimizer == "muon":
                    built[key]["use_muon"] = orthogonalised
            built[key]["params"].append(parameter)
            kinds = built[key]["mup_role"]
            if roles[name].kind not in kinds:
                kinds.append(roles[name].kind)
    if groups is not None and (missing := [name for key, name in names.items() if key not in seen]):
        raise ValueError(
            f"groups must hold every parameter, {missing[0]!r} is in none ({len(missing)} in all)"
        )
    return [{**group, "mup_role": "+".join(group["mup_role"])} for group in built.values()]


def MuSGD(  # noqa: N802 (the name microsoft/mup users know)
    model: nn.Module,
    roles: Mapping[str, Role],
    *,
    lr: float,
    weight_decay: float = 0.0,
    impl: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> torch.optim.Optimizer:
    """`impl` with the rates and decays that microsoft/mup's MuSGD gives; `options` go to `impl`."""
    return impl(param_groups(model, roles, lr, weight_decay, "sgd"), lr=lr, **options)


def MuAdam(  # noqa: N802
    model: nn.Module,
    roles: Mapping[str, Role],
    *,
    lr: float,
    weight_decay: float = 0.0,
    impl: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    **options: Any,
) -> torch.optim.Optimizer:
    """`impl` with the rates and decays that microsoft/mup's MuAdam gives; `options` go to `impl`."""
    return impl(param_groups(model, roles, lr, weight_decay, "adam"), lr=lr, **options)


def MuAdamW(  # noqa: N802
    model: nn.Module, roles: Mapping[str, Role], *, lr: float, weight_decay: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    """AdamW with the rates and decays that microsoft/mup's MuAdamW gives; `options` go to AdamW."""
    return MuAdam(model, roles, lr=lr, weight_decay=weight_decay, impl=torch.optim.AdamW, **options)


def _validate(lr: Any, weight_decay: Any, eps: Any, eps_scaling: bool, optimizer: str) -> None:
    if not isinstance(lr, Tensor) and not (isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and >= 0, got {lr!r}")
    if isinstance(lr, Tensor) and not (lr.numel() == 1 and lr.is_floating_point()):
        raise ValueError(f"lr must be one floating point number, got {lr.dtype} of shape {tuple(lr.shape)}")
    for name, value in (("weight_decay", weight_decay), ("eps", eps)):
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    if eps_scaling and optimizer not in WITH_EPSILON:
        raise ValueError(f"eps_scaling needs an Adam optimizer, got {optimizer!r}")


def _members(group: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters of a user's group, given themselves, as pairs with names, or by name."""
    if "params" not in group:
        raise ValueError(f"groups must be dictionaries with 'params', got keys {sorted(group)}")
    params = group["params"]
    members = []
    for item in [params] if isinstance(params, (Tensor, str)) else params:
        if isinstance(item, str):
            if item not in parameters:
                raise ValueError(f"groups names {item!r}, which is no parameter of the model")
            members.append(parameters[item])
        else:
            members.append(item[1] if isinstance(item, tuple) else item)
    return members


def _name(parameter: nn.Parameter, names: Mapping[int, str], roles: Mapping[str, Role]) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise ValueError(
            f"groups holds a parameter of shape {tuple(parameter.shape)} that is not the model's"
        )
    if name not in roles:
        raise ValueError(f"roles has no role for {name!r}: infer them again from this model")
    return name


def _new_group(
    group: Mapping[str, Any],
    numbers: Mapping[str, Any],
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
) -> dict[str, Any]:
    scale = numbers["lr_scale"]
    built = {key: value for key, value in group.items() if key != "params"}
    built |= {
        "params": [],
        "lr": lr.detach() * scale if isinstance(lr, Tensor) else lr * scale,
        "weight_decay": weight_decay * numbers["decay"],
        "mup_role": [],
        "lr_scale": scale,
    }
    if "initial_lr" in group:
        built["initial_lr"] = group["initial_lr"] * scale
    if numbers["eps"] is not None:
        built["eps"] = eps * numbers["eps"]
    return built
