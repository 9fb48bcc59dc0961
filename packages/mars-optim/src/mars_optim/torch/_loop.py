"""The readable truth: the step of one tensor, one formula per line (Yuan et al. 2025, Algorithms 1-4)."""

import torch
from torch import Tensor

from .correction import clip_divisor, gradient_correction, norm_of, quasi_hyperbolic, working_dtype
from .directions import decay_, mask_cautiously_, orthogonal_directions, sign, step_number
from .rule import UpdateRule


def mars_single(
    param: Tensor,
    grad: Tensor,
    reference: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    rule: UpdateRule,
    norm: Tensor | None,
) -> Tensor | None:
    """The step of one tensor, one formula per line."""
    dtype = working_dtype(param.dtype)
    x, g, m = _working(param, dtype), _working(grad, dtype), _working(exp_avg, dtype)
    t = step_number(step.add_(1))
    c, divisor = g, None
    if reference is not None:
        c = gradient_correction(g, _working(reference, dtype), beta1=rule.beta1, gamma=rule.gamma)
    if rule.clip is not None:
        own = norm_of(c, rule.batched, paired=param.is_complex()) if norm is None else norm
        divisor = clip_divisor(own, rule.clip)
        c = c / divisor
    m.lerp_(c, 1 - rule.beta1)
    momentum = quasi_hyperbolic(g, m, rule.gamma) if rule.quasi_hyperbolic else m
    if exp_avg_sq is not None:
        v = _working(exp_avg_sq, dtype)
        squared = g if rule.second_moment == "grad" else c
        v.mul_(rule.beta2).addcmul_(squared, squared, value=1 - rule.beta2)
        _write(exp_avg_sq, v)
        if max_exp_avg_sq is not None:
            largest = _working(max_exp_avg_sq, dtype)
            v = torch.maximum(largest, v, out=largest)
            _write(max_exp_avg_sq, v)
        u = _adam_direction(momentum, v, t, rule)
    elif rule.kind == "lion":
        u = sign(momentum)
    elif rule.kind == "sgd":
        u = momentum.clone() if rule.cautious else momentum
    else:
        matrix = torch.view_as_complex(momentum) if param.is_complex() else momentum
        (u,) = orthogonal_directions([matrix], rule)
        u = torch.view_as_real(u) if param.is_complex() else u
    if rule.cautious:
        mask_cautiously_(u, g)
    decay_(x, u, rule.decay, rule.cautious_decay)
    x.add_(u, alpha=-rule.lr)
    _write(exp_avg, m)
    _write(param, x)
    return divisor


def _adam_direction(m: Tensor, v: Tensor, t: float, rule: UpdateRule) -> Tensor:
    correction1 = 1 - rule.beta1**t
    correction2 = 1 - rule.beta2**t
    if rule.eps_before_correction:
        return (m / correction1) / ((v.sqrt() + rule.eps) / correction2**0.5)
    return (m / correction1) / ((v / correction2).sqrt() + rule.eps)


def _working(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as reals of the given dtype: itself, or a view of it, when it has this dtype already."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(dtype)


def _write(stored: Tensor, value: Tensor) -> None:
    """Round a working copy into its storage; of equal dtype it is the storage, and nothing is left to do."""
    target = torch.view_as_real(stored) if stored.is_complex() else stored
    if target.dtype != value.dtype:
        target.copy_(value)
