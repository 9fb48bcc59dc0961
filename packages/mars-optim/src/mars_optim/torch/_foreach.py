"""The step of `functional.mars` by list operations, for dense lists of one dtype and device.

The truth is `_loop.py`; the order of operations on the AdamW path is that of
torch.optim.AdamW, which makes gamma = 0 with clip=None agree with it bit for bit. Besides the arguments
there is one list of temporaries: the corrected gradients, whose memory the directions take over.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

import torch
from torch import Tensor

from .correction import clip_divisor, norm_of, working_dtype
from .directions import decay_, mask_cautiously_, orthogonal_directions, step_number
from .rule import ORTHOGONALISED, UpdateRule


def mars_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    references: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
) -> list[Tensor]:
    """See `functional.mars`."""
    if not params:
        return []
    dtype = working_dtype(params[0].dtype)
    x, g, m = _working(params, dtype), _working(grads, dtype), _working(exp_avgs, dtype)
    torch._foreach_add_(steps, 1)

    corrected, owned = g, False
    if references is not None:
        corrected, owned = list(torch._foreach_sub(g, _working(references, dtype))), True
        torch._foreach_mul_(corrected, rule.correction_factor)
        torch._foreach_add_(corrected, g)
    divisors: list[Tensor] = []
    if rule.clip is not None:
        divisors = _divisors(corrected, rule.clip, rule.batched, norm)
        if owned:
            torch._foreach_div_(corrected, divisors)
        else:
            corrected, owned = list(torch._foreach_div(corrected, divisors)), True

    torch._foreach_lerp_(m, corrected, 1 - rule.beta1)
    momentum = list(torch._foreach_lerp(m, g, rule.gamma)) if rule.quasi_hyperbolic else m
    if rule.has_second_moment:
        v = _second_moments(exp_avg_sqs, max_exp_avg_sqs, g, corrected, rule, dtype)
        denominators = _denominators(v, steps, corrected if owned else None, rule)
        if not (rule.cautious or rule.cautious_decay):
            if rule.decay:
                torch._foreach_mul_(x, 1 - rule.decay)
            sizes = [-(rule.lr / (1 - rule.beta1 ** step_number(step))) for step in steps]
            torch._foreach_addcdiv_(x, momentum, denominators, sizes)
        else:
            directions = list(torch._foreach_div(momentum, denominators))
            torch._foreach_div_(directions, [1 - rule.beta1 ** step_number(step) for step in steps])
            _descend(x, g, directions, rule)
    else:
        _descend(x, g, _directions(momentum, corrected if owned else None, rule), rule)

    _write(exp_avgs, m)
    _write(params, x)
    return divisors


def _divisors(corrected: list[Tensor], clip: float, batched: bool, norm: Tensor | None) -> list[Tensor]:
    if norm is not None:
        return [clip_divisor(norm, clip)] * len(corrected)
    if batched and any(c.ndim >= 3 for c in corrected):
        return [clip_divisor(norm_of(c, batched), clip) for c in corrected]
    return list(clip_divisor(torch.stack(torch._foreach_norm(corrected)), clip).unbind())


def _second_moments(
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    corrected: list[Tensor],
    rule: UpdateRule,
    dtype: torch.dtype,
) -> list[Tensor]:
    v = _working(exp_avg_sqs, dtype)
    squared = grads if rule.second_moment == "grad" else corrected
    torch._foreach_mul_(v, rule.beta2)
    torch._foreach_addcmul_(v, squared, squared, 1 - rule.beta2)
    _write(exp_avg_sqs, v)
    if rule.amsgrad:
        largest = _working(max_exp_avg_sqs, dtype)
        torch._foreach_maximum_(largest, v)
        _write(max_exp_avg_sqs, largest)
        return largest
    return v


def _denominators(
    v: list[Tensor], steps: list[Tensor], scratch: list[Tensor] | None, rule: UpdateRule
) -> list[Tensor]:
    """sqrt(v / (1 - beta2^t)) + eps, written over `scratch` when there is one."""
    if scratch is None:
        roots = list(torch._foreach_sqrt(v))
    else:
        roots = scratch
        torch._foreach_copy_(roots, v)
        torch._foreach_sqrt_(roots)
    corrections = [(1 - rule.beta2 ** step_number(step)) ** 0.5 for step in steps]
    if rule.eps_before_correction:
        torch._foreach_add_(roots, rule.eps)
        torch._foreach_div_(roots, corrections)
    else:
        torch._foreach_div_(roots, corrections)
        torch._foreach_add_(roots, rule.eps)
    return roots


def _directions(momentum: list[Tensor], scratch: list[Tensor] | None, rule: UpdateRule) -> list[Tensor]:
    """The direction of every momentum; a list that may be changed in place if the rule is cautious."""
    if rule.kind in ORTHOGONALISED:
        return orthogonal_directions(momentum, rule)
    if rule.kind == "sgd" and not rule.cautious:
        return momentum
    if scratch is None:
        scratch = [torch.empty_like(m) for m in momentum]
    torch._foreach_copy_(scratch, momentum)
    if rule.kind == "lion":
        torch._foreach_sign_(scratch)
        torch._foreach_add_(scratch, momentum, alpha=0)  # NaN stays NaN, as in `sign`
    return scratch


def _descend(x: list[Tensor], g: list[Tensor], directions: list[Tensor], rule: UpdateRule) -> None:
    if rule.cautious:
        for direction, grad in zip(directions, g, strict=True):
            mask_cautiously_(direction, grad)
    if rule.cautious_decay:
        for param, direction in zip(x, directions, strict=True):
            decay_(param, direction, rule.decay, only_towards_zero=True)
    elif rule.decay:
        torch._foreach_mul_(x, 1 - rule.decay)
    torch._foreach_add_(x, directions, alpha=-rule.lr)


def _working(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


def _write(stored: list[Tensor], values: list[Tensor]) -> None:
    if any(s.dtype != value.dtype for s, value in zip(stored, values, strict=True)):
        torch._foreach_copy_(stored, values)
