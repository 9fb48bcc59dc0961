"""The mathematics of MARS on lists of tensors, once for reading and once for speed.

One step t of one list, with h_t the gradient at the previous parameters (or the previous gradient):

    c_t = g_t + gamma beta1 / (1 - beta1) (g_t - h_t)         scaled correction      eqs 3.3-3.4
    c_t = c_t / max(1, ||c_t|| / clip)                        per tensor             eq 3.5
    m_t = beta1 m_{t-1} + (1 - beta1) c_t                                            eq 3.9
    x_{t+1} = x_t - eta u_t - decay x_t                       u_t: direction of m_t  eqs 3.12, 3.15, 3.20

`mars` takes every number it needs in an `UpdateRule` and chooses between the loop below, which is the
readable truth, and `_foreach.py`, which does the same with one call per operation and list. Neither reads a
number back from the device.

Source: Yuan et al. 2025 (arXiv 2411.10438); Liu et al. 2025 (arXiv 2510.21800) for kind "m".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from .orthogonalize import QUINTIC, orthogonalize

Kind = Literal["adamw", "lion", "shampoo", "m", "sgd"]
ORTHOGONALISED = ("shampoo", "m")
MARS_M_NS_EPS = 1e-7
_SMALLEST_KEPT_FRACTION = 1e-3


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """The numbers and choices of one step for one list of tensors; `MARS` builds it anew each step.

    Args:
        kind: direction taken from the momentum: "adamw", "lion", "shampoo", "m" or "sgd".
        lr: step length eta of this list.
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the second moment, in [0, 1); kind "adamw".
        eps: added to the root of the second moment, or to the Frobenius norm for kind "shampoo".
        gamma: strength of the correction; it is not used where no reference gradient is given.
        clip: largest norm of the corrected gradient; None does not clip.
        decay: fraction of the parameter removed by the step, eta * lambda for decoupled decay.
        cautious_decay: decay only the entries that the step moves towards zero.
        cautious: drop entries whose step disagrees in sign with the gradient, and rescale the others.
        amsgrad: divide by the running maximum of the second moment.
        second_moment: "corrected" averages the squares of the clipped corrected gradient, "grad" of the
            gradient.
        eps_before_correction: add eps before the bias correction of the second moment (MARS-M release,
            AdamW part).
        batched: the leading dimensions of tensors of three or more count matrices, each with its own norm.
        quasi_hyperbolic: `exp_avg` keeps the plain average of the gradients and the momentum is
            gamma g_t + (1 - gamma) exp_avg: the approximate form without a buffer for the last gradient.
        orthogonalizer: "newton_schulz", "svd", "newton" or "cubic"; kinds "shampoo" and "m".
        ns_steps: number of Newton-Schulz steps.
        ns_coefficients: coefficients of the Newton-Schulz polynomial.
        ns_dtype: dtype of the Newton-Schulz products, None for the rule of `newton_schulz`.
        scale: factor of the orthogonal factor, "none", "sqrt_ratio", "rms" or a number.
    """

    kind: Kind
    lr: float
    beta1: float
    beta2: float = 0.0
    eps: float = 1e-8
    gamma: float = 0.0
    clip: float | None = None
    decay: float = 0.0
    cautious_decay: bool = False
    cautious: bool = False
    amsgrad: bool = False
    second_moment: Literal["corrected", "grad"] = "corrected"
    eps_before_correction: bool = False
    batched: bool = False
    quasi_hyperbolic: bool = False
    orthogonalizer: str = "newton_schulz"
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = QUINTIC
    ns_dtype: torch.dtype | None = None
    scale: str | float = "sqrt_ratio"

    @property
    def correction_factor(self) -> float:
        """Gamma beta1 / (1 - beta1), from the values of this step."""
        return self.gamma * self.beta1 / (1 - self.beta1)

    @property
    def has_second_moment(self) -> bool:
        """Whether the rule reads and writes `exp_avg_sqs`."""
        return self.kind == "adamw"


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
        steps: number of steps done so far, 0-d tensors on the CPU, incremented here.
        rule: what to do.
        foreach: one call per operation and list; the lists must be dense and of one dtype and device.
        norm: the norm to clip by, the same for every tensor (clip_scope "global"); None: each tensor's own.

    Returns:
        What each corrected gradient was divided by, max(1, ||c_t|| / clip); empty when nothing is clipped.

    Raises:
        ValueError: if lists that belong together differ in length.

    Source: Yuan et al. 2025, Algorithms 1-4.
    """
    _require_aligned(params, grads, references, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, rule)
    if foreach:
        from ._foreach import mars_foreach

        return mars_foreach(
            list(params),
            list(grads),
            None if references is None else list(references),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(max_exp_avg_sqs),
            list(steps),
            rule,
            norm,
        )
    divisors = []
    for i, param in enumerate(params):
        divisor = _mars_single(
            param,
            grads[i],
            None if references is None else references[i],
            exp_avgs[i],
            exp_avg_sqs[i] if rule.has_second_moment else None,
            max_exp_avg_sqs[i] if rule.has_second_moment and rule.amsgrad else None,
            steps[i],
            rule,
            norm,
        )
        divisors += [] if divisor is None else [divisor]
    return divisors


def gradient_correction(
    grad: Inexact[Tensor, "*shape"],
    reference: Inexact[Tensor, "*shape"],
    *,
    beta1: float,
    gamma: float,
) -> Inexact[Tensor, "*shape"]:
    """Scaled stochastic recursive gradient c = g + gamma beta1 / (1 - beta1) (g - h).

    With gamma = 1 this is the STORM estimator, with gamma = 0 the plain gradient. The factor makes the
    correction survive the averaging that follows: the momentum keeps (1 - beta1) of what enters it.

    Args:
        grad: gradient g at the current parameters on the current batch.
        reference: gradient h at the previous parameters on the current batch (exact form), or the previous
            gradient (approximate form).
        beta1: momentum decay in [0, 1).
        gamma: strength of the correction, >= 0.

    Raises:
        ValueError: if beta1 is outside [0, 1) or gamma is negative.

    Source: Yuan et al. 2025, eqs 3.3-3.4.
    """
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1 must be in [0, 1), got {beta1!r}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma!r}")
    return (grad - reference).mul_(gamma * beta1 / (1 - beta1)).add_(grad)


def clip_by_norm(
    tensor: Inexact[Tensor, "*shape"], max_norm: float, *, batched: bool = False
) -> Inexact[Tensor, "*shape"]:
    """Tensor scaled to norm `max_norm` where its norm is larger; at equality it stays as it is.

    An infinite norm gives NaN rather than a silent zero step.

    Args:
        tensor: the tensor to clip.
        max_norm: largest Euclidean norm, > 0.
        batched: clip each slice over the last two dimensions of a tensor with three or more on its own.

    Raises:
        ValueError: if max_norm is not positive.

    Source: Yuan et al. 2025, eq 3.5.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    return tensor / clip_divisor(norm_of(tensor, batched), max_norm)


def quasi_hyperbolic(
    grad: Inexact[Tensor, "*shape"], average: Inexact[Tensor, "*shape"], gamma: float
) -> Inexact[Tensor, "*shape"]:
    """Quasi-hyperbolic momentum gamma g_t + (1 - gamma) e_t, e_t the exponential average of the gradients.

    This is exactly the momentum of the approximate form without clipping, started from h_1 = 0, so that form
    needs no buffer for the last gradient. With h_1 = g_1, start the average at -gamma / (1 - gamma) g_1.
    """
    return torch.lerp(average, grad, gamma)


def norm_of(tensor: Tensor, batched: bool = False, *, paired: bool = False) -> Tensor:
    """Euclidean norm of a tensor; if batched and of three dimensions, of each slice over the last two.

    `paired` says that a complex tensor has been viewed as reals: the last dimension holds the pairs.
    """
    if batched and tensor.ndim >= 3 + paired:
        axes = (-3, -2, -1) if paired else (-2, -1)
        return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
    return torch.linalg.vector_norm(tensor)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """max(1, norm / max_norm), and NaN where the norm is infinite or NaN."""
    return (norm / max_norm).clamp_min(1.0) + norm * 0


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype an update is computed in: float32 for half precision, else that of the parts."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype.to_real()


def step_number(step: Tensor) -> float:
    """The value of a step counter; it lives on the CPU, so nothing waits for a device."""
    return float(step)


def orthogonal_scale(shape: Sequence[int], scale: str | float) -> float:
    """Factor of the orthogonal update of a rows x columns matrix.

    Args:
        shape: (rows, columns).
        scale: "none" is 1, "sqrt_ratio" is sqrt(max(1, rows / columns)) (mars-shampoo),
            "rms" is 0.2 sqrt(max(rows, columns)) (mars-m), a number is itself.
    """
    if not isinstance(scale, str):
        return float(scale)
    rows, columns = shape
    if scale == "sqrt_ratio":
        return max(1.0, rows / max(columns, 1)) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5 if scale == "rms" else 1.0


def orthogonal_directions(momenta: Sequence[Tensor], rule: UpdateRule) -> list[Tensor]:
    """Scaled orthogonal factor of every momentum, in the shape of the momentum."""
    views = [m if rule.batched and m.ndim >= 3 else m.reshape(m.shape[0], -1) for m in momenta]
    # the release feeds m / (1 - beta1), which only rescales its eps
    eps = MARS_M_NS_EPS if rule.kind == "m" else rule.eps * (1 - rule.beta1)
    factors = orthogonalize(
        views,
        rule.orthogonalizer,
        steps=rule.ns_steps,
        coefficients=rule.ns_coefficients,
        eps=eps,
        dtype=rule.ns_dtype,
    )
    return [
        factor.mul(orthogonal_scale(view.shape[-2:], rule.scale)).reshape(m.shape)
        for factor, view, m in zip(factors, views, momenta, strict=True)
    ]


def mask_cautiously_(direction: Tensor, grad: Tensor) -> None:
    """Zero the entries that disagree in sign with the gradient and rescale the rest (arXiv 2411.16085)."""
    mask = (direction * grad > 0).to(direction.dtype)
    direction.mul_(mask).div_(mask.mean().clamp_min(_SMALLEST_KEPT_FRACTION))


def decay_(param: Tensor, direction: Tensor, decay: float, only_towards_zero: bool) -> None:
    """Shrink the parameter by `decay`; cautiously where the step moves it towards zero (arXiv 2510.12402)."""
    if only_towards_zero:
        param.mul_(1 - decay * (direction * param >= 0).to(param.dtype))
    else:
        param.mul_(1 - decay)


def _mars_single(
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
        u = momentum.sign()
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
