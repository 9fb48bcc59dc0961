"""The step of `functional.mars` by list operations, for dense lists of one dtype and device.

The truth is `_loop.py`; the order of operations on the AdamW path is that of
torch.optim.AdamW, which makes gamma = 0 with clip=None agree with it bit for bit. Besides the arguments
there is one list of temporaries: the corrected gradients, whose memory the directions take over.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

from typing import Any

import torch
from torch import Tensor

from .correction import clip_divisor, norm_of, working_dtype
from .directions import decay_, mask_cautiously_, orthogonal_directions
from .rounding import write_rounded
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
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """See `functional.mars`."""
    if not params:
        return []
    dtype = working_dtype(params[0].dtype)
    x, g, m = working(params, dtype), working(grads, dtype), working(exp_avgs, dtype)
    count_step(steps)

    corrected, owned = g, False
    if references is not None:
        corrected, owned = corrected_gradients(g, working(references, dtype), rule), True
    divisors: list[Tensor] = []
    if rule.clip is not None:
        divisors = _divisors(corrected, rule.clip, rule.batched, norm)
        if owned:
            torch._foreach_div_(corrected, divisors)
        else:
            corrected, owned = list(torch._foreach_div(corrected, divisors)), True

    average_(m, corrected, rule)
    momentum = list(torch._foreach_lerp(m, g, rule.gamma)) if rule.quasi_hyperbolic else m
    if rule.has_second_moment:
        v = second_moments(exp_avg_sqs, max_exp_avg_sqs, g, corrected, rule, dtype)
        scratch = corrected if owned else None
        del corrected  # its memory is taken over
        first, second = bias_corrections(steps, rule, dtype)
        denominators_ = denominators(v, second, scratch, rule)
        if not (rule.cautious or rule.cautious_decay):
            _shrink_(x, rule)
            _step_by_quotients_(x, momentum, denominators_, first, rule)
        else:
            directions = list(torch._foreach_div(momentum, denominators_))
            torch._foreach_div_(directions, first)
            descend_(x, g, directions, rule)
    else:
        descend_(x, g, directions_of(momentum, corrected if owned else None, rule), rule)

    write_rounded(exp_avgs, m)
    write_rounded(params, x, stochastic=rule.stochastic_rounding, generator=generator)
    return divisors


def count_step(steps: list[Tensor]) -> None:
    """Count one step."""
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        # a Python number would be wrapped into a tensor once per counter
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def corrected_gradients(grads: list[Tensor], references: list[Tensor], rule: UpdateRule) -> list[Tensor]:
    """The unclipped c = g + a (g - h): the interpolation from g that goes -a of the way to h, in one pass."""
    a = rule.correction_factor
    if isinstance(a, Tensor):
        return list(torch._foreach_lerp(grads, references, [-a.to(grads[0].dtype)] * len(grads)))
    return list(torch._foreach_lerp(grads, references, -a))


def average_(averages: list[Tensor], values: list[Tensor], rule: UpdateRule) -> None:
    """The momentum m <- beta1 m + (1 - beta1) c."""
    weight = 1 - rule.beta1
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, values, [weight.to(averages[0].dtype)] * len(averages))
    else:
        torch._foreach_lerp_(averages, values, weight)


Corrections = list[Any]
"""Numbers or 0-d tensors, one per tensor: list operations take either, but their types do not say so."""


def bias_corrections(
    steps: list[Tensor], rule: UpdateRule, dtype: torch.dtype
) -> tuple[Corrections, Corrections]:
    """1 - beta1^t and sqrt(1 - beta2^t) of every tensor, as numbers, or as tensors that no host reads."""
    if rule.capturable or torch.compiler.is_compiling():
        t = torch.stack(steps).double()
        first, second = 1 - rule.beta1**t, (1 - rule.beta2**t).sqrt()
        return list(first.to(dtype).unbind()), list(second.to(dtype).unbind())
    numbers = [step.item() for step in steps]
    beta1, known = float(rule.beta1), set(numbers)
    first = {t: 1 - beta1**t for t in known}
    second = {t: (1 - rule.beta2**t) ** 0.5 for t in known}
    return [first[t] for t in numbers], [second[t] for t in numbers]


def _divisors(corrected: list[Tensor], clip: float, batched: bool, norm: Tensor | None) -> list[Tensor]:
    if norm is not None:
        return [clip_divisor(norm, clip)] * len(corrected)
    if batched and any(c.ndim >= 3 for c in corrected):
        return [clip_divisor(norm_of(c, batched), clip) for c in corrected]
    return list(clip_divisor(torch.stack(torch._foreach_norm(corrected)), clip).unbind())


def second_moments(
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    corrected: list[Tensor],
    rule: UpdateRule,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Average the squares, and return what the root is taken of: v, or its running maximum."""
    v = working(exp_avg_sqs, dtype)
    squared = grads if rule.second_moment == "grad" else corrected
    torch._foreach_mul_(v, rule.beta2)
    torch._foreach_addcmul_(v, squared, squared, 1 - rule.beta2)
    write_rounded(exp_avg_sqs, v)
    if rule.amsgrad:
        largest = working(max_exp_avg_sqs, dtype)
        torch._foreach_maximum_(largest, v)
        write_rounded(max_exp_avg_sqs, largest)
        return largest
    return v


def denominators(
    v: list[Tensor], corrections: Corrections, scratch: list[Tensor] | None, rule: UpdateRule
) -> list[Tensor]:
    """sqrt(v / (1 - beta2^t)) + eps, written over `scratch` when there is one."""
    if scratch is None:
        roots = list(torch._foreach_sqrt(v))
    else:
        roots = scratch
        torch._foreach_copy_(roots, v)
        torch._foreach_sqrt_(roots)
    if rule.eps_before_correction:
        torch._foreach_add_(roots, rule.eps)
        torch._foreach_div_(roots, corrections)
    else:
        torch._foreach_div_(roots, corrections)
        torch._foreach_add_(roots, rule.eps)
    return roots


def directions_of(momentum: list[Tensor], scratch: list[Tensor] | None, rule: UpdateRule) -> list[Tensor]:
    """The direction of every momentum; a list that may be changed in place unless it is the momentum."""
    if rule.kind in ORTHOGONALISED:
        return orthogonal_directions(momentum, rule)
    if rule.kind == "sgd" and not (rule.cautious or isinstance(rule.lr, Tensor)):
        return momentum
    if scratch is None:
        scratch = [torch.empty_like(m) for m in momentum]
    torch._foreach_copy_(scratch, momentum)
    if rule.kind == "lion":
        torch._foreach_sign_(scratch)
        torch._foreach_add_(scratch, momentum, alpha=0)  # NaN stays NaN, as in `sign`
    return scratch


def descend_(x: list[Tensor], g: list[Tensor], directions: list[Tensor], rule: UpdateRule) -> None:
    """Mask, decay and move along the directions, which may be changed."""
    if rule.cautious:
        for direction, grad in zip(directions, g, strict=True):
            mask_cautiously_(direction, grad)
    if rule.cautious_decay:
        for param, direction in zip(x, directions, strict=True):
            decay_(param, direction, rule.decay, only_towards_zero=True)
    else:
        _shrink_(x, rule)
    if isinstance(rule.lr, Tensor):
        torch._foreach_mul_(directions, rule.lr)
        torch._foreach_sub_(x, directions)
    else:
        torch._foreach_add_(x, directions, alpha=-rule.lr)


def working(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in the dtype of the arithmetic, themselves where they have it."""
    return [tensor.to(dtype) for tensor in tensors]


def _shrink_(x: list[Tensor], rule: UpdateRule) -> None:
    if rule.decays:
        torch._foreach_mul_(x, 1 - rule.decay)


def _step_by_quotients_(
    x: list[Tensor],
    momentum: list[Tensor],
    divisors: list[Tensor],
    corrections: Corrections,
    rule: UpdateRule,
) -> None:
    """Move by -lr / (1 - beta1^t) m / divisor in one pass; the divisors may be changed."""
    if isinstance(corrections[0], Tensor):
        factors = torch.stack(corrections) / -rule.lr
        torch._foreach_mul_(divisors, factors.unbind())
        torch._foreach_addcdiv_(x, momentum, divisors)
    else:
        torch._foreach_addcdiv_(x, momentum, divisors, [-(rule.lr / c) for c in corrections])
