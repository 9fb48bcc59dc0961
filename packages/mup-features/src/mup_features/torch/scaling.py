"""muP for any torch module: roles from shapes, initial sizes and forward multipliers, all outside the model.

Five lines turn a model into one whose learning rate, tuned at base width, holds at every width:

    roles = infer_roles(model, base=build(width=128))
    apply_mup(model, roles)
    optimizer = torch.optim.AdamW(param_groups(model, roles, lr=3e-3, weight_decay=0.1))

with attention logits scaled by `attention_scale(d_head, base_d_head)`. Nothing is stored on parameters: roles
are a dictionary by name, multipliers are hooks with a Python float.

Source: Yang et al. 2022 (arXiv 2203.03466), tables 3, 8 and 9; residual branches: Yang et al. 2023 (arXiv
2310.02244), Dey et al. 2025 (arXiv 2505.01618).
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import TypeVar, get_args

import torch
from torch import nn

from mup_features.depth_rules import residual_scale
from mup_features.init_laws import Init, Law, init_growth, laws_of
from mup_features.role_table import format_roles
from mup_features.roles import Override, Role, at_base_width, roles_from_shapes
from mup_features.shapes import BaseShape, base_shape_of, compare_widths, load_shapes
from mup_features.width_rules import (
    Form,
    Optimizer,
    readout_multiplier,
    tied_readout_multiplier,
    width_scales,
)

from ._init_laws import measured, root_mean_square
from ._layouts import ParameterInfo, clean_name, parameter_infos, unwrapped
from ._multipliers import set_multiplier
from ._spectral import SpectralReport, spectral_check, spectral_ratios, spectral_targets

Base = nn.Module | str | os.PathLike[str] | Mapping[str, BaseShape | tuple[int, ...]]
Model = TypeVar("Model", bound=nn.Module)

__all__ = [
    "MARK",
    "SpectralReport",
    "apply_mup",
    "attention_scale",
    "base_shapes",
    "infer_roles",
    "named_parameters",
    "readout_multiplier",
    "residual_scale",
    "role_table",
    "spectral_check",
    "spectral_ratios",
    "spectral_targets",
]

MARK = "mup_form"  # buffer of a scaled model: 1 + index of its form


def infer_roles(
    model: nn.Module,
    base: Base,
    other: Base | None = None,
    overrides: Mapping[str, Override] | None = None,
) -> dict[str, Role]:
    """Role of every parameter, by comparing shapes with the model at base width.

    Args:
        model: the model to be trained, on any device, `meta` too; wrapped by DDP, compiled or sharded or not.
        base: the same model at base width (where its hyperparameters were tuned), or its shapes: a
            dictionary, or the path of a file written by `save_shapes` or by microsoft/mup (`.bsh`). On the
            meta device it costs nothing; with real entries `apply_mup` can see how the initialisation depends
            on width.
        other: the base model at any other width. Then the widths are known even where the model's own size
            equals the base's, so that a readout is recognised at base width too.
        overrides: name pattern -> "input", "hidden", "output", `Layout` or `Role`, for parameters whose role
            shapes cannot tell.

    Raises:
        ValueError: if names or shapes do not match, or a role is ambiguous.

    Warns:
        UserWarning: if no dimension differs from the base's, so that muP changes nothing.
    """
    model = unwrapped(model)
    infos = parameter_infos(model, unwrapped(base) if isinstance(base, nn.Module) else None)
    parameters = named_parameters(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    groups = _shared(parameters)
    known = _with_aliases(_shapes_of(base), groups)
    if other is not None:
        others = _with_aliases(_shapes_of(other), groups)
        known = compare_widths(known, {name: _sizes(shape) for name, shape in others.items()})
    layouts = {name: info.layout for name, info in infos.items()}
    roles = {
        name: replace(role, scalable=role.scalable and infos[name].scalable)
        for name, role in roles_from_shapes(shapes, known, layouts, overrides=overrides).items()
    }
    for names in groups:
        shared = _shared_role(names, roles, infos, shapes, known)
        roles.update(dict.fromkeys(names, shared))
    if at_base_width(roles.values()) and all(base_shape_of(shape).width is None for shape in known.values()):
        warnings.warn(
            "every width multiplier is 1: the model has the shapes of its base, so muP changes nothing. Pass "
            "the model at base width as base; at base width itself, pass `other` as well",
            UserWarning,
            stacklevel=2,
        )
    return roles


def apply_mup(
    model: Model,
    roles: Mapping[str, Role],
    form: Form = "mult",
    rescale: bool = True,
    zero_readout: bool = False,
    init: Init = "auto",
) -> Model:
    """Give a freshly initialised model muP's initial sizes and forward multipliers, in place and once.

    At base width nothing changes. A buffer `mup_form` in the state dict remembers what was done: calling
    again, also after loading a checkpoint, changes no parameter. Call it before `load_state_dict`; for
    parameters that already are muP's, pass rescale=False.

    Multipliers are hooks of layers: a readout that is written as `F.linear(x, embedding.weight)` calls no
    layer and gets none. Make it an `nn.Linear` that shares the embedding's weight, or multiply x by
    `readout_multiplier(role)`.

    Args:
        model: the model, before or after `fully_shard`; before its first compiled call.
        roles: from `infer_roles`.
        form: "mult" puts 1/m in front of readouts; "pure" all into the weights; "symmetric" splits the
            factors of input and readout. `param_groups` must be given the same. Parameters in front of
            which no multiplier can stand take the pure form; a tied readout keeps its multiplier.
        rescale: whether to rescale parameters; False only adds the multipliers.
        zero_readout: start readouts, with their biases, at zero.
        init: how the model's own initialisation depends on width: "fan_in" (torch's default), "fan_out"
            (1/sqrt(d) for an embedding, orthogonal or Glorot weights of a first layer), "constant" (one
            standard deviation at every width, as GPT-2), name patterns with these, or "auto" to find out by
            comparison with the base model; where its entries are not known, embeddings and first layers are
            taken to be constant.

    Returns:
        The model.

    Raises:
        ValueError: if parameters have no role or lie on the meta device, the model was scaled in another
            form or with other roles, a tied readout should start at zero, or the law of the initialisation
            cannot be told.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    root = unwrapped(model)
    parameters = named_parameters(root)
    _same_parameters(parameters, roles)
    infos = parameter_infos(root)
    marked = _mark_of(root, form)
    for name, role in roles.items():
        if not infos[name].scalable and width_scales(role, form=form).multiplier != 1.0:
            raise ValueError(
                f"roles must have scalable=False for {name!r}: no multiplier can stand before it"
            )
    readouts = _readouts(parameters, roles) if zero_readout else []
    if at_base_width(roles.values()) and not zero_readout:
        return model
    unique = {names[0]: parameters[names[0]] for names in _by_tensor(parameters)}
    if not marked:
        if meta := [name for name, parameter in unique.items() if parameter.is_meta]:
            raise ValueError(f"parameter {meta[0]!r} is on the meta device: initialise it before apply_mup")
        if rescale:
            laws = laws_of(measured(unique, infos), roles, init)
            _rescale(unique, roles, laws, form)
        with torch.no_grad():
            for parameter in readouts:
                parameter.zero_()
        device = next(iter(parameters.values())).device
        mark = torch.tensor(1 + get_args(Form).index(form), dtype=torch.uint8, device=device)
        root.register_buffer(MARK, mark)
    _set_multipliers(roles, infos, form)
    return model


def role_table(
    model: nn.Module,
    roles: Mapping[str, Role],
    optimizer: Optimizer = "adam",
    form: Form = "mult",
) -> str:
    """Markdown table of every parameter: shape, role, and the factors of size, multiplier, rate and decay."""
    parameters = named_parameters(unwrapped(model))
    _same_parameters(parameters, roles)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return format_roles(roles, shapes, optimizer=optimizer, form=form)


def attention_scale(d_head: int, base_d_head: int) -> float:
    """Factor of the logits q.k: sqrt(d0)/d, muP's 1/d that agrees with 1/sqrt(d) at base width.

    Args:
        d_head: dimension of a head, >= 1.
        base_d_head: that at base width, >= 1.

    Raises:
        ValueError: if one is < 1.
    """
    for name, value in (("d_head", d_head), ("base_d_head", base_d_head)):
        if not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value!r}")
    return sqrt(base_d_head) / d_head


def base_shapes(model: nn.Module) -> dict[str, BaseShape]:
    """Shapes of a model at base width, with the size of its entries where it is not on the meta device."""
    return {
        name: BaseShape(
            tuple(parameter.shape), std=None if parameter.is_meta else root_mean_square(parameter)
        )
        for name, parameter in named_parameters(unwrapped(model)).items()
    }


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names without wrappers' prefixes; a shared one appears under each of its names."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}


def _shapes_of(base: Base) -> Mapping[str, BaseShape | tuple[int, ...]]:
    if isinstance(base, nn.Module):
        return base_shapes(base)
    if isinstance(base, Mapping):
        return base
    if isinstance(base, (str, os.PathLike)):
        return load_shapes(base)
    raise TypeError(f"base must be a module, a dictionary of shapes or a path, got {type(base).__name__}")


def _sizes(shape: BaseShape | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-1 if size is None else size for size in base_shape_of(shape).sizes)


def _by_tensor(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names of each distinct parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _shared(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    return [names for names in _by_tensor(parameters) if len(names) > 1]


def _with_aliases(
    base: Mapping[str, BaseShape | tuple[int, ...]], groups: list[list[str]]
) -> dict[str, BaseShape | tuple[int, ...]]:
    """Files list a shared parameter once, often with the prefix `module.` of DataParallel: undo both."""
    known = dict(base)
    if known and all(name.startswith("module.") for name in known):
        known = {name.removeprefix("module."): shape for name, shape in known.items()}
    for names in groups:
        present = [name for name in names if name in known]
        for name in names:
            if present and name not in known:
                known[name] = known[present[0]]
    return known


def _shared_role(
    names: list[str],
    roles: Mapping[str, Role],
    infos: Mapping[str, ParameterInfo],
    shapes: Mapping[str, tuple[int, ...]],
    base: Mapping[str, BaseShape | tuple[int, ...]],
) -> Role:
    """One role for a parameter with several names; embedding and readout together make a tied one."""
    distinct = {roles[name] for name in names}
    owners = {infos[name].layout.owner for name in names}
    if owners == {"embedding", "linear"} and not any(role.kind == "hidden" for role in distinct):
        embedding = next(name for name in names if infos[name].layout.owner == "embedding")
        return replace(roles[embedding], tied=True)
    if len({(role.kind, role.fan_in_mult, role.fan_out_mult) for role in distinct}) == 1:
        # a bias kept twice, as in BERT's head: one place may know the default initialisation, the other not
        return max(distinct, key=lambda role: (role.default_fan_mult not in (None, 1.0), role.scalable))
    kinds = ", ".join(f"{name!r} ({roles[name].kind})" for name in names)
    raise ValueError(
        f"parameter {names[0]!r} has shape {shapes[names[0]]}, at base width "
        f"{base_shape_of(base[names[0]]).sizes}, and is shared by places of different roles: {kinds}; give "
        f"one role to all of them by overrides={{{names[0]!r}: Role(...), ...}}"
    )


def _same_parameters(parameters: Mapping[str, object], roles: Mapping[str, Role]) -> None:
    missing, extra = sorted(set(parameters) - set(roles)), sorted(set(roles) - set(parameters))
    if missing or extra:
        which = f"has no role for {missing[0]!r}" if missing else f"names {extra[0]!r}, which the model lacks"
        raise ValueError(
            f"roles {which} ({len(missing)} missing and {len(extra)} unknown in all): infer them again from "
            f"this model"
        )


def _mark_of(root: nn.Module, form: Form) -> bool:
    mark = root._buffers.get(MARK)
    if mark is None:
        return False
    known = get_args(Form)
    index = int(mark) - 1
    if not 0 <= index < len(known):
        raise ValueError(f"buffer {MARK!r} must lie in 1..{len(known)}, got {int(mark)}")
    if known[index] != form:
        raise ValueError(
            f"form must be {known[index]!r}, in which the model was scaled already, got {form!r}"
        )
    return True


@torch.no_grad()
def _rescale(
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    laws: Mapping[str, Law],
    form: Form,
) -> None:
    """From the size that the user's law gives at this width to muP's."""
    for name, parameter in parameters.items():
        factor = width_scales(roles[name], form=form).init / init_growth(roles[name], laws[name])
        if factor != 1.0:
            parameter.mul_(factor)


def _readouts(parameters: Mapping[str, nn.Parameter], roles: Mapping[str, Role]) -> list[nn.Parameter]:
    """Weights of readouts and their biases."""
    if tied := [name for name, role in roles.items() if role.tied]:
        raise ValueError(f"zero_readout must be False where the readout shares its weight with {tied[0]!r}")
    names = [name for name, role in roles.items() if role.kind == "output"]
    if not names:
        raise ValueError("zero_readout needs a parameter of role 'output'; at base width pass `other`")
    biases = [f"{name.removesuffix('weight')}bias" for name in names if name.endswith("weight")]
    return [parameters[name] for name in (*names, *biases) if name in parameters]


def _set_multipliers(roles: Mapping[str, Role], infos: Mapping[str, ParameterInfo], form: Form) -> None:
    for name, role in roles.items():
        info = infos[name]
        if not info.scalable:
            continue
        if role.tied and info.layout.owner != "embedding":
            set_multiplier(info.module, tied_readout_multiplier(role, form))
        else:
            set_multiplier(info.module, width_scales(role, form=form).multiplier)
