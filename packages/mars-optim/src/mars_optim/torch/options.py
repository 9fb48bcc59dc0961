"""Options of a MARS param group: which values are allowed, and what they make a step do.

`check_options` is the one place that says no. `path_of` decides what a tensor gets, `rule_of` turns a group
into the numbers of this step; both read the group anew each time, so schedulers may change any option.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from .orthogonalize import SOLVERS
from .rule import ORTHOGONALISED, Kind, UpdateRule

KINDS: dict[str, Kind] = {
    "mars-adamw": "adamw",
    "mars-lion": "lion",
    "mars-shampoo": "shampoo",
    "mars-m": "m",
    "mars-sgd": "sgd",
    "adamw": "adamw",
    "lion": "lion",
    "shampoo": "shampoo",
    "m": "m",
    "sgd": "sgd",
}

_CHOICES: dict[str, tuple[object, ...]] = {
    "algorithm": (None, "mars", "adamw"),
    "clip_scope": ("tensor", "global"),
    "prev_grad_init": ("current", "zero"),
    "matrix_ndim": (">=2", "==2"),
    "matrix_view": ("flatten", "batch"),
    "second_moment": ("corrected", "grad"),
    "decay_mode": ("decoupled", "independent", "cautious", "l2"),
    "orthogonalize": SOLVERS,
}
_SWITCHES = (
    "amsgrad",
    "is_approx",
    "optimize_1d",
    "cautious",
    "memory_efficient",
    "stochastic_rounding",
    "steal_grad",
    "capturable",
    "maximize",
)
_NON_NEGATIVE = ("eps", "weight_decay", "weight_decay_1d", "gamma", "lr_1d_ratio")
_SCALES = ("none", "sqrt_ratio", "rms")


def path_of(param: Tensor, group: Mapping[str, Any]) -> str:
    """The kind of MARS that a tensor gets, or "plain" for AdamW.

    Vectors and scalars get plain AdamW unless `optimize_1d` or `algorithm="mars"` says otherwise;
    orthogonalised types treat those as "adamw", since they are no matrices.
    """
    return paths_of(group)[is_matrix(param, group)]


def paths_of(group: Mapping[str, Any]) -> dict[bool, str]:
    """The path of the group's matrices (True) and of its other tensors (False); see `path_of`."""
    kind, algorithm = KINDS[group["mars_type"]], group["algorithm"]
    if algorithm == "adamw":
        return {True: "plain", False: "plain"}
    if not (group["optimize_1d"] or algorithm == "mars"):
        return {True: kind, False: "plain"}
    return {True: kind, False: "adamw" if kind in ORTHOGONALISED else kind}


def is_matrix(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a tensor counts as a matrix under the group's `matrix_ndim`."""
    return param.ndim == 2 if group["matrix_ndim"] == "==2" else param.ndim >= 2


def has_second_moment(path: str) -> bool:
    """Whether tensors on the path keep `exp_avg_sq`."""
    return path in ("plain", "adamw")


def keeps_plain_average(path: str, group: Mapping[str, Any]) -> bool:
    """Whether `exp_avg` keeps the average of the gradients, from which the momentum is made at each step."""
    return group["memory_efficient"] and not has_second_moment(path)


def check_scheduled(group: Mapping[str, Any]) -> None:
    """Raise unless what schedulers change is still in range: betas and gamma.

    Not the learning rate, which may be a cosine rounded below zero.
    """
    for name in ("betas", "betas_1d"):
        _check_betas(name, group[name])
    check_non_negative("gamma", group["gamma"])


def rule_of(group: Mapping[str, Any], path: str, *, official: bool) -> UpdateRule:
    """The update rule of the group's tensors on one path, from its present values.

    Tensors stay tensors where no host may read them: in a capturable step and while torch.compile traces.
    """
    number = _itself if group["capturable"] or torch.compiler.is_compiling() else float
    kind = KINDS[group["mars_type"]]
    plain = path == "plain"
    lr = group["lr"] * group["lr_1d_ratio"] if plain else group["lr"]
    beta1, beta2 = group["betas_1d"] if plain else group["betas"]
    weight_decay = group["weight_decay_1d"] if plain else group["weight_decay"]
    mode = group["decay_mode"]
    decay = 0.0 if mode == "l2" else lr * weight_decay
    if mode == "independent":
        decay = weight_decay * group["lr"] / group["construction_lr"]
    rule = UpdateRule(
        kind="adamw" if plain else cast(Kind, path),
        lr=number(lr),
        beta1=number(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        decay=number(decay),
        cautious_decay=mode == "cautious",
        cautious=group["cautious"],
        amsgrad=group["amsgrad"],
        capturable=group["capturable"],
        stochastic_rounding=group["stochastic_rounding"],
    )
    if plain:
        return replace(rule, eps_before_correction=official and kind == "m")
    scale = group["scale"]
    return replace(
        rule,
        gamma=float(group["gamma"]),
        clip=group["clip"],
        second_moment=group["second_moment"],
        batched=group["matrix_view"] == "batch",
        quasi_hyperbolic=keeps_plain_average(path, group),
        orthogonalizer=group["orthogonalize"],
        ns_steps=group["ns_steps"],
        ns_coefficients=tuple(group["ns_coefficients"]),
        ns_dtype=group["ns_dtype"],
        scale=("rms" if kind == "m" else "sqrt_ratio") if scale is None else scale,
    )


def resolved_decay(weight_decay: float | None, mars_type: str) -> float:
    """The weight decay that was passed, or the default of the type."""
    if weight_decay is not None:
        return weight_decay
    return 0.1 if KINDS.get(mars_type) == "m" else 0.0


def resolved_ratio(lr: float | Tensor, lr_1d: float, lr_1d_ratio: float | None) -> float:
    """The learning rate of plain AdamW over lr, which a schedule keeps."""
    if lr_1d_ratio is not None:
        return lr_1d_ratio
    lr = check_rate("lr", lr)
    check_non_negative("lr_1d", lr_1d)
    if lr == 0:
        raise ValueError(
            "lr must be > 0 unless lr_1d_ratio is given (lr_1d / lr sets the rate of plain AdamW), got 0"
        )
    return lr_1d / lr


def check_options(group: Mapping[str, Any]) -> None:
    """Raise unless every option of the group is one that a step can use.

    Raises:
        ValueError: for a value outside its range, or for options that exclude each other.
        TypeError: for a value of the wrong type.
    """
    check_rate("lr", group["lr"])
    for name in _NON_NEGATIVE:
        check_non_negative(name, group[name])
    for name in ("betas", "betas_1d"):
        _check_betas(name, group[name], read=True)
    if group["mars_type"] not in KINDS:
        valid = ", ".join(repr(name) for name in KINDS)
        raise ValueError(f"mars_type must be one of {valid}, got {group['mars_type']!r}")
    if group["clip"] is not None:
        _check_number("clip", group["clip"])
        if not 0 < group["clip"] < math.inf:
            raise ValueError(f"clip must be finite and > 0 (None turns clipping off), got {group['clip']!r}")
    for name, choices in _CHOICES.items():
        check_choice(name, group[name], choices)
    for name in _SWITCHES:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    _check_orthogonalisation(group)
    for name in ("ns_dtype", "state_dtype", "prev_grad_dtype"):
        _check_dtype(name, group[name])
    _check_combinations(group)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_non_negative(name: str, value: object) -> None:
    """Raise unless the value is a finite number >= 0."""
    number = _check_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def check_rate(name: str, value: object) -> float:
    """The value of a rate, which may be a 0-d tensor; raise unless it is finite and >= 0."""
    if isinstance(value, Tensor):
        value = _scalar(name, value)
    check_non_negative(name, value)
    return cast(float, value)


def _scalar(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not tensor.is_floating_point():
        kind = f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        raise ValueError(f"{name} must be a number or a floating point tensor of one element, got {kind}")
    return tensor.item()


def _itself(value: float | Tensor) -> float | Tensor:
    return value


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    return value


def _check_betas(name: str, betas: object, *, read: bool = False) -> None:
    """Raise unless the betas are in range; a beta1 that is a tensor is looked at only if it may be read."""
    # tuples of types here and below, because torch.compile of torch 2.8 cannot trace their unions
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name} must be a pair (beta1, beta2), got {betas!r}")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and index == 0 and name == "betas":
            if not read:
                continue
            beta = _scalar("betas[0]", beta)
        _check_number(f"{name}[{index}]", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"{name}[{index}] must be in [0, 1), got {beta!r}")


def _check_orthogonalisation(group: Mapping[str, Any]) -> None:
    steps, coefficients, scale = group["ns_steps"], group["ns_coefficients"], group["scale"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"ns_steps must be an integer >= 1, got {steps!r}")
    if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
        raise ValueError(f"ns_coefficients must be three numbers, got {coefficients!r}")
    for index, coefficient in enumerate(coefficients):
        if not math.isfinite(_check_number(f"ns_coefficients[{index}]", coefficient)):
            raise ValueError(f"ns_coefficients[{index}] must be finite, got {coefficient!r}")
    if isinstance(scale, str):
        if scale not in _SCALES:
            valid = ", ".join(repr(choice) for choice in _SCALES)
            raise ValueError(f"scale must be None, a number or one of {valid}, got {scale!r}")
    elif scale is not None:
        check_non_negative("scale", scale)


def _check_dtype(name: str, dtype: object) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be None or a torch.dtype, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be a real floating point dtype, got {dtype!r}")


def _check_combinations(group: Mapping[str, Any]) -> None:
    if group["decay_mode"] == "independent" and group["construction_lr"] == 0:
        raise ValueError(
            'decay_mode="independent" measures decay against the initial lr and needs lr > 0, got lr=0'
        )
    _check_capturable(group)
    if group["steal_grad"] and not group["is_approx"]:
        raise ValueError("steal_grad=True needs the approximate form, got is_approx=False")
    if group["steal_grad"] and group["prev_grad_dtype"] is not None:
        raise ValueError(
            "steal_grad=True keeps the gradient itself and needs prev_grad_dtype=None, "
            f"got prev_grad_dtype={group['prev_grad_dtype']!r}"
        )
    if not group["memory_efficient"]:
        return
    if KINDS[group["mars_type"]] == "adamw":
        raise ValueError(
            "memory_efficient=True needs a mars_type without second moment "
            f"('mars-lion', 'mars-shampoo', 'mars-m', 'mars-sgd'), got {group['mars_type']!r}"
        )
    if group["clip"] is not None:
        raise ValueError(f"memory_efficient=True needs clip=None, got clip={group['clip']!r}")
    if not group["is_approx"]:
        raise ValueError("memory_efficient=True needs the approximate form, got is_approx=False")
    if group["gamma"] == 1 and group["prev_grad_init"] == "current":
        raise ValueError(
            'memory_efficient=True with prev_grad_init="current" needs gamma != 1 '
            f'(or prev_grad_init="zero"), got gamma={group["gamma"]!r}'
        )


def _check_capturable(group: Mapping[str, Any]) -> None:
    if not group["capturable"]:
        return
    if group["steal_grad"]:
        raise ValueError(
            "capturable=True must not be combined with steal_grad=True: a captured graph replays with the "
            "addresses it has seen, and stealing exchanges them"
        )
    orthogonalised = KINDS[group["mars_type"]] in ORTHOGONALISED
    if orthogonalised and group["orthogonalize"] != "newton_schulz":
        raise ValueError(
            'capturable=True needs orthogonalize="newton_schulz", since the other solvers ask the device '
            f"for their progress, got {group['orthogonalize']!r}"
        )
