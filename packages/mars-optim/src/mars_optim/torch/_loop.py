"""The readable truth: the step of one tensor, one formula per line (Yuan et al. 2025, Algorithms 1-4)."""

import torch
from torch import Tensor

from .correction import clip_divisor, gradient_correction, norm_of, quasi_hyperbolic, working_dtype
from .directions import decay_, mask_cautiously_, orthogonal_directions, sign
from .rounding import write_rounded
from .rule import UpdateRule


def mars_loop(
    params: list[Tensor],
    grads: list[Tensor],
    references: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """See `functional.mars`."""
    divisors = []
    for i, param in enumerate(params):
        divisor = mars_single(
            param,
            grads[i],
            None if references is None else references[i],
            exp_avgs[i],
            exp_avg_sqs[i] if rule.has_second_moment else None,
            max_exp_avg_sqs[i] if rule.has_second_moment and rule.amsgrad else None,
            steps[i],
            rule,
            norm,
            generator,
        )
        divisors += [] if divisor is None else [divisor]
    return divisors


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
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """The step of one tensor, one formula per line."""
    dtype = working_dtype(param.dtype)
    x, g, m = _working(param, dtype), _working(grad, dtype), _working(exp_avg, dtype)
    step.add_(1)
    t = step.double() if rule.capturable or torch.compiler.is_compiling() else step.item()
    c, divisor = g, None
    if reference is not None:
        c = gradient_correction(g, _working(reference, dtype), beta1=rule.beta1, gamma=rule.gamma)
    if rule.clip is not None:
        own = norm_of(c, rule.batched, paired=param.is_complex()) if norm is None else norm
        divisor = clip_divisor(own, rule.clip)
        c = c / divisor
    weight = 1 - rule.beta1
    m.lerp_(c, weight.to(dtype) if isinstance(weight, Tensor) else weight)
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
    if isinstance(rule.lr, Tensor):
        x.sub_(u * rule.lr)
    else:
        x.add_(u, alpha=-rule.lr)
    _write(exp_avg, m)
    if param.is_complex():
        return divisor  # x is a view of it
    write_rounded([param], [x], stochastic=rule.stochastic_rounding, generator=generator)
    return divisor


def _adam_direction(m: Tensor, v: Tensor, t: float | Tensor, rule: UpdateRule) -> Tensor:
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
