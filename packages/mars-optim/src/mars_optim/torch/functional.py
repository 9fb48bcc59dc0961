"""The mathematics of MARS on lists of tensors, once for reading and once for speed.

One step t of one list, with h_t the gradient at the previous parameters (or the previous gradient):

    c_t = g_t + gamma beta1 / (1 - beta1) (g_t - h_t)         scaled correction      eqs 3.3-3.4
    c_t = c_t / max(1, ||c_t|| / clip)                        per tensor             eq 3.5
    m_t = beta1 m_{t-1} + (1 - beta1) c_t                                            eq 3.9
    x_{t+1} = x_t - eta u_t - decay x_t                       u_t: direction of m_t  eqs 3.12, 3.15, 3.20

`mars` takes every number it needs in an `UpdateRule` and chooses between `_loop.py`, which is the
readable truth, and `_foreach.py`, which does the same with one call per operation and list. Neither reads a
number back from the device; with `rule.capturable` not even the step counters are read.

Source: Yuan et al. 2025 (arXiv 2411.10438); Liu et al. 2025 (arXiv 2510.21800) for kind "m".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ._foreach import mars_foreach
from ._loop import mars_loop
from .clipping import clip_grad_norm_pair_
from .correction import clip_by_norm, gradient_correction, quasi_hyperbolic
from .rounding import stochastic_round_
from .rule import UpdateRule

__all__ = [
    "UpdateRule",
    "clip_by_norm",
    "clip_grad_norm_pair_",
    "gradient_correction",
    "mars",
    "quasi_hyperbolic",
    "stochastic_round_",
]


@torch.no_grad()
def mars(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    references: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rule: UpdateRule,
    *,
    foreach: bool = False,
    norm: Float[Tensor, ""] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """One MARS step in place on aligned lists; parameters, averages and `steps` change, gradients do not.

    Complex tensors are treated as pairs of reals, except that complex matrices are orthogonalised as such.
    Arithmetic is done in the dtype of the parameter, float32 for half precision, whatever the dtype of the
    state.

    Args:
        params: parameters x_t.
        grads: gradients g_t.
        references: h_t, the gradient at x_{t-1} on this batch (exact form) or the previous gradient
            (approximate form). None takes c_t = g_t: no correction, or `grads` is corrected already.
        exp_avgs: momenta m_{t-1}.
        exp_avg_sqs: second moments v_{t-1}; empty for kinds without.
        max_exp_avg_sqs: running maxima of v; empty without amsgrad.
        steps: number of steps done so far, float32 0-d tensors on the CPU, or with `rule.capturable` on the
            device of the parameters; incremented here.
        rule: what to do.
        foreach: one call per operation and list; the lists must be dense and of one dtype and device.
        norm: the norm to clip by, the same for every tensor (clip_scope "global"); None: each tensor's own.
        generator: for `rule.stochastic_rounding`, on the device of the parameters; None: torch's default one.

    Returns:
        What each corrected gradient was divided by, max(1, ||c_t|| / clip); empty when nothing is clipped.

    Raises:
        ValueError: if lists that belong together differ in length.

    Source: Yuan et al. 2025, Algorithms 1-4.
    """
    _require_aligned(params, grads, references, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, rule)
    step = mars_foreach if foreach else mars_loop
    return step(
        list(params),
        list(grads),
        None if references is None else list(references),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(steps),
        rule,
        norm,
        generator,
    )


def _require_aligned(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    references: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rule: UpdateRule,
) -> None:
    needed = {"grads": grads, "exp_avgs": exp_avgs, "steps": steps}
    if references is not None:
        needed["references"] = references
    if rule.has_second_moment:
        needed["exp_avg_sqs"] = exp_avg_sqs
        if rule.amsgrad:
            needed["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in needed.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must have one tensor per parameter ({len(params)}), got {len(tensors)}")
