"""Gradients as the mathematics sees them, from what backward left in .grad."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .correction import gradient_correction, working_dtype
from .options import path_of
from .rule import UpdateRule


def objective_gradient(param: Tensor, grad: Tensor, at: Tensor | None, group: Mapping[str, Any]) -> Tensor:
    """Gradient of what is minimised: negated for `maximize`, with lambda x for decay_mode "l2".

    Args:
        param: the parameter, which decides between weight_decay and weight_decay_1d.
        grad: the gradient that backward left.
        at: the point x it was taken at; None leaves the L2 term out.
        group: the parameter's group.
    """
    if group["maximize"]:
        grad = -grad
    if group["decay_mode"] != "l2" or at is None:
        return grad
    plain = path_of(param, group) == "plain"
    decay = group["weight_decay_1d"] if plain else group["weight_decay"]
    return grad.to(_dtype_of(param)).add(at, alpha=decay)


def corrected_gradient(param: Tensor, g: Tensor, h: Tensor | None, rule: UpdateRule) -> Tensor:
    """The unclipped c_t in the working dtype of the parameter; h=None needs no correction."""
    g = g.to(_dtype_of(param))
    return g if h is None else gradient_correction(g, h.to(g.dtype), beta1=rule.beta1, gamma=rule.gamma)


def _dtype_of(param: Tensor) -> torch.dtype:
    return param.dtype if param.is_complex() else working_dtype(param.dtype)
