"""c_t and its clip for many tensors at once: what `VarianceReduced` shows its base, by list operations.

    c_t = lerp(h_t, g_t, 1 + a) = g_t + a (g_t - h_t),   a = gamma beta1 / (1 - beta1)
    c~_t = c_t / max(1, ||c_t|| / clip)

The interpolation reads g and h and writes c once, where subtracting, scaling and adding would pass over
memory eight times. DTensors are listed by their local parts; only other subclasses go one by one, through
the plain functions of `correction.py`, which are the truth. Nothing waits for the device.

Source: Yuan et al. 2025 (arXiv 2411.10438), eqs 3.3-3.5.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .correction import clip_divisor, norm_of, working_dtype
from .state import gradient_buffer, is_dtensor, own_part, remember_gradient


class Options(NamedTuple):
    """What decides how a tensor is corrected; tensors of groups that agree share a list.

    Args:
        factor: a, the strength of the correction.
        clip: largest norm, or None.
        by_common_norm: whether the norm is that of all tensors together.
        remembers: whether g_t is kept as the next h_t.
        prev_grad_dtype: dtype in which it is kept, None for its own.
    """

    factor: float
    clip: float | None
    by_common_norm: bool
    remembers: bool
    prev_grad_dtype: torch.dtype | None


@dataclass
class CorrectedList:
    """Tensors of one dtype and device under the same options.

    Args:
        options: the common options.
        group: a param group that has them.
        listed: whether list operations take them; a tensor of an unknown subclass is alone in its list.
        params: the parameters.
        grads: what is to be corrected: their gradients, or c_t itself after `fold()`.
        references: h_t; empty where c_t = g_t.
        layouts: how the tensors lie on their meshes; empty for plain tensors.
        parts: c_t of what this process holds, in the working dtype and memory of its own; empty before
            `correct()` and after `take_shown()`.
    """

    options: Options
    group: dict[str, Any]
    listed: bool
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)
    layouts: list[Any] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    def correct(self) -> None:
        """Fill `parts` with c_t."""
        grads = [own_part(grad) for grad in self.grads] if self.layouts else self.grads
        dtype = _working_dtype(grads[0])
        g = converted(grads, dtype)
        if not self.references:
            self.parts = g if g is not grads else [grad.clone() for grad in grads]
            return
        a = self.options.factor
        references = [own_part(h) for h in self.references] if self.layouts else self.references
        h = converted(references, dtype)
        if self.listed and h is not references:
            torch._foreach_lerp_(h, g, 1 + a)
            self.parts = h
        elif self.listed:
            self.parts = list(torch._foreach_lerp(h, g, 1 + a))
        else:
            self.parts = [(x - y).mul_(a).add_(x) for x, y in zip(g, h, strict=True)]

    def norms(self) -> Tensor:
        """The norm of each part."""
        if self.listed:
            return torch.stack(torch._foreach_norm(self.parts))
        return torch.stack([norm_of(part) for part in self.parts])

    def divide(self, norms: Tensor) -> None:
        """Clip by one norm for all (0-d) or one for each (a vector)."""
        clip, first = self.options.clip, self.parts[0]
        if clip is None:
            return
        divisors = clip_divisor(norms.to(first.device, working_dtype(first.dtype)), clip)
        if not self.listed or type(divisors) is not Tensor:  # a subclass's norm may be one too
            for part, divisor in zip(self.parts, divisors.expand(len(self.parts)), strict=True):
                part.div_(divisor)
        elif divisors.ndim:
            torch._foreach_div_(self.parts, divisors.unbind())
        else:
            torch._foreach_div_(self.parts, divisors)

    def take_shown(self) -> list[Tensor]:
        """c~_t as .grad takes it: in the gradient's dtype, which rounds once, and laid out as it is.

        The parts are given away, so that they do not occupy memory during the base's step.
        """
        param = self.params[0]
        dtype = param.dtype if param.grad is None else param.grad.dtype
        shown = converted(self.parts, dtype)
        self.parts = []
        if not self.layouts:
            return shown
        return [_spread(part, grad) for part, grad in zip(shown, self.grads, strict=True)]

    def remember(self, states: Sequence[dict[str, Any]]) -> None:
        """Copy the gradients into the states as the next h_t."""
        items = zip(states, self.grads, self.params, strict=True)
        if not self.listed or self.layouts:
            for state, grad, param in items:
                remember_gradient(state, "last_grad", grad, param, self.group)
            return
        kept = [gradient_buffer(state, "last_grad", grad, param, self.group) for state, grad, param in items]
        torch._foreach_copy_(kept, self.grads)


def add(
    lists: dict[object, CorrectedList],
    options: Options,
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    reference: Tensor | None,
) -> None:
    """Put a tensor into the list of its kind; DTensors are laid out as their parameter."""
    layout = None
    if type(grad) is Tensor:
        listed = reference is None or type(reference) is Tensor
    elif is_dtensor(grad):
        from .shards import Layout

        layout = Layout.of(param)  # pyright: ignore[reportArgumentType]
        grad = _laid_out(grad, layout)
        reference = None if reference is None else _laid_out(reference, layout)
        listed = all(type(own_part(x)) is Tensor for x in (grad, reference) if x is not None)
    else:
        listed = False
    shown = param.dtype if param.grad is None else param.grad.dtype
    plain = (options, grad.dtype, grad.device, shown, reference is None, layout is None)
    kind = plain if listed else id(param)
    each = lists.get(kind)
    if each is None:
        each = lists[kind] = CorrectedList(options, group, listed)
    each.params.append(param)
    each.grads.append(grad)
    if reference is not None:
        each.references.append(reference)
    if layout is not None:
        each.layouts.append(layout)


def clip_all(lists: Sequence[CorrectedList]) -> None:
    """Clip each tensor by its own norm or by the common one; one all-reduce for all that are on a mesh."""
    limited = [each for each in lists if each.options.clip is not None]
    spread = [each for each in limited if each.layouts]
    norms = {id(each): each.norms() for each in limited if not each.layouts}
    if spread:
        from .shards import squared_norms

        parts = [part for each in spread for part in each.parts]
        squares = squared_norms(parts, [layout for each in spread for layout in each.layouts])
        whole = torch.cat(list(squares)).sqrt().split([len(each.parts) for each in spread])
        norms |= {id(each): norm for each, norm in zip(spread, whole, strict=True)}
    common = [norms[id(each)] for each in limited if each.options.by_common_norm]
    if common:
        squares = [norm.double().square().sum().to(common[0].device) for norm in common]
        total = torch.stack(squares).sum().sqrt()
        norms |= {id(each): total for each in limited if each.options.by_common_norm}
    for each in limited:
        each.divide(norms[id(each)])


def converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a dtype: the same list if they have it, else new memory."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    return [tensor.to(dtype) for tensor in tensors]


def _working_dtype(grad: Tensor) -> torch.dtype:
    return grad.dtype if grad.is_complex() else working_dtype(grad.dtype)


def _laid_out(tensor: Any, layout: Any) -> Tensor:
    """A DTensor as the layout wants it: a sum that is still partial has no norm."""
    if tuple(tensor.placements) == layout.placements:
        return tensor
    return tensor.redistribute(placements=layout.placements)


def _spread(part: Tensor, like: Any) -> Tensor:
    """A DTensor of this process's part, laid out as another."""
    return type(like).from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
