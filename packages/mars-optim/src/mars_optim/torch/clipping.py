"""Clip g_t and h_t of the exact form by one factor, that of g_t.

    s = min(1, max_norm / (||g_t|| + 1e-6)),   g_t <- s g_t,   h_t <- s h_t

Then c_t = g_t + a (g_t - h_t) is scaled by s as a whole. The released script clips each by its own norm,
which leaves g_t - h_t the difference of two gradients in different units whenever only one is clipped.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .exact import ExactForm, require_like
from .state import is_dtensor, own_part


@torch.no_grad()
def clip_grad_norm_pair_(
    parameters: Tensor | Iterable[Tensor],
    prev_grads: Sequence[Tensor | None] | ExactForm,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip g_t as `torch.nn.utils.clip_grad_norm_` does, and h_t by the same factor.

    Call it just before `step()`, in the place of `clip_grad_norm_`. Where h_t is depends on how the exact
    form gets it:

    1. `with opt.at_previous_params()`: pass `opt`, after the batch's own backward.
    2. `opt.step(closure)`: not served. Both gradients come into being inside `step`, so use way 1.
    3. `opt.record_next_batch_grad()`: pass `opt`, after the current batch's backward; never clip what is
       recorded, its turn comes a step later. With `opt.fold()`: pass `opt`, before `fold()`.
    4. `opt.step(prev_grads=h)`: pass h, a sequence here too.

    In a first step, or after `reset_correction()`, there is no h_t and the gradients alone are clipped.
    Under GradScaler, call `scaler.unscale_(opt)` first.

    Args:
        parameters: one tensor or several, plain or DTensors, also of several meshes; those without gradient
            are passed over. They may be more or fewer than the optimizer's.
        prev_grads: h_t, aligned with the parameters and None where there is none, or the `MARS` or
            `VarianceReduced` that holds it. Scaled in place.
        max_norm: largest norm of all gradients together, > 0; inf only measures.
        norm_type: p of the p-norm, > 0; may be inf.
        error_if_nonfinite: raise when the norm is infinite or NaN. Otherwise it makes both gradients zero or
            NaN, as in torch.

    Returns:
        The norm of all g_t before clipping, 0-d and whole also for DTensors.

    Raises:
        ValueError: for a norm outside its range; if `prev_grads` does not match the parameters, or shares
            the memory of a gradient, which would be scaled twice.
        TypeError: if `prev_grads` is neither a sequence of tensors nor an optimizer in the exact form.
        RuntimeError: if the optimizer is not in the exact form, or is past its first step and holds no h_t;
            for a non-finite norm if asked. Nothing has been scaled then.

    Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 1, whose clip of c_t follows in the step.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be > 0, got {norm_type!r}")
    if isinstance(prev_grads, ExactForm):
        references = prev_grads._held_references(params)
    else:
        references = _given_references(params, prev_grads)
    grads = [param.grad for param in params if param.grad is not None]
    norm = _total_norm(grads, float(norm_type))
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"the gradients have the norm {norm.item()} of order {norm_type}, so they were not clipped; "
            "error_if_nonfinite=False scales them all the same"
        )
    _scale((max_norm / (norm + 1e-6)).clamp(max=1.0), [*grads, *references])
    return norm


def _given_references(params: Sequence[Tensor], prev_grads: object) -> list[Tensor]:
    if isinstance(prev_grads, Tensor) or not isinstance(prev_grads, Sequence):
        raise TypeError(
            "prev_grads must be a sequence of tensors aligned with parameters, or the MARS or "
            f"VarianceReduced that holds them, got {type(prev_grads).__name__}"
        )
    if len(prev_grads) != len(params):
        raise ValueError(
            f"prev_grads must have one entry per parameter ({len(params)}), got {len(prev_grads)}"
        )
    references = []
    for i, (param, reference) in enumerate(zip(params, prev_grads, strict=True)):
        if reference is None:
            continue
        if not isinstance(reference, Tensor):
            raise TypeError(f"prev_grads must hold tensors or None, got {type(reference).__name__}")
        require_like(param, reference, f"#{i}")
        if param.grad is not None and _same_memory(param.grad, reference):
            raise ValueError(f"prev_grads for parameter #{i} must not be its own .grad: pass a copy")
        references.append(reference)
    return references


def _same_memory(first: Tensor, second: Tensor) -> bool:
    first, second = own_part(first), own_part(second)
    return first.numel() > 0 and first.data_ptr() == second.data_ptr()


def _total_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of all tensors, from those of families that torch can take together."""
    families: dict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        layout: Any = grad
        families[(layout.device_mesh, layout.placements) if is_dtensor(grad) else None].append(grad)
    if not families:
        return torch.tensor(0.0)
    norms = [_whole(torch.nn.utils.get_total_norm(family, norm_type)) for family in families.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)


def _whole(norm: Any) -> Tensor:
    return norm.full_tensor() if is_dtensor(norm) else norm


def _scale(factor: Tensor, tensors: Sequence[Tensor]) -> None:
    alike: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        part = own_part(tensor)
        alike[part.dtype, part.device].append(part)
    for parts in alike.values():
        own = factor.to(parts[0].device)
        if all(type(part) is Tensor for part in parts):
            torch._foreach_mul_(parts, own)
        else:
            for part in parts:
                part.mul_(own)
