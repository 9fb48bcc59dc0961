"""What the fused backends share: which tensors they can take, and the tables their kernels read.

A fused backend is one function, `launch(table, steps, rule, given, generator)`, which does the whole
elementwise part of a step for all tensors of one dtype combination: correction, clip, momentum, second
moment, update, and the copy of the gradient that the next step corrects against. `_cpu.py` and `_triton.py`
provide one each. What remains is done here by lists: orthogonal factors, and tensors whose memory the kernels
cannot walk through.

The truth is `_loop.py`.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from ._foreach import count_step, descend_, mars_foreach, working
from .correction import clip_divisor, working_dtype
from .directions import orthogonal_directions
from .rounding import write_rounded
from .rule import ORTHOGONALISED, UpdateRule

# the order in which kernels number the streams
STREAMS = ("param", "grad", "reference", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "store")
_TAKEN = {torch.float32, torch.float64, torch.bfloat16, torch.float16}

Lists = tuple[list[Tensor] | None, ...]
Dtypes = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Table:
    """Where the tensors of one dtype combination are. An entry is a tensor or, batched, one of its matrices.

    Args:
        addresses: one row per stream, one column per entry; a stream that is not there is a row of zeros.
        sizes: elements of every entry.
        owners: position in the call's lists of the tensor that every entry belongs to.
        dtypes: dtype of every stream, None for one that is not there.
        working: dtype of the arithmetic.
        device: where all of it is.
    """

    addresses: NDArray[np.int64]
    sizes: NDArray[np.int64]
    owners: NDArray[np.int64]
    dtypes: Dtypes
    working: torch.dtype
    device: torch.device


Launch = Callable[[Table, list[Tensor], UpdateRule, Tensor | None, torch.Generator | None], Tensor | None]


def mars_fused(
    launch: Launch,
    params: list[Tensor],
    grads: list[Tensor],
    references: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
    stores: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """See `functional.mars`; `launch` does the elementwise part.

    Args:
        launch: the backend. It counts the step and returns what every entry of the table was divided by.
        params: as in `functional.mars`, and so the other lists.
        grads: gradients g_t.
        references: h_t; may be the very tensors of `stores` or of `grads`.
        exp_avgs: momenta.
        exp_avg_sqs: second moments.
        max_exp_avg_sqs: their running maxima.
        steps: number of steps done so far.
        rule: what to do.
        norm: the norm to clip by; None: each tensor's own.
        stores: where the gradients are copied to in the same pass, in any dtype; None copies nothing.
        generator: for `rule.stochastic_rounding`.
    """
    rule = rule.for_device(params[0].device) if params else rule
    second = exp_avg_sqs if rule.has_second_moment else None
    largest = max_exp_avg_sqs if rule.has_second_moment and rule.amsgrad else None
    lists: Lists = (params, grads, references, exp_avgs, second, largest, stores)
    divisors: list[Tensor | None] = [None] * len(params)
    for dtypes, members in _groups(lists, rule).items():
        own: Lists = tuple(None if tensors is None else [tensors[i] for i in members] for tensors in lists)
        own_steps = [steps[i] for i in members]
        if dtypes is None:
            done = _by_lists(own, own_steps, rule, norm, generator)
        else:
            done = _by_kernel(launch, own, dtypes, own_steps, rule, norm, generator)
        for i, divisor in zip(members, done, strict=False):  # nothing was clipped: no divisors
            divisors[i] = divisor
    return [divisor for divisor in divisors if divisor is not None]


def step_numbers(steps: Iterable[float], rule: UpdateRule) -> NDArray[np.float64]:
    """Step size, factor of the root and epsilon of every tensor: one row each. The rule holds plain numbers.

    The update is x - size m / (sqrt(v) factor + epsilon); kinds without second moment read only the size.
    """
    known: dict[float, tuple[float, float, float]] = {}
    lr, beta1 = float(rule.lr), float(rule.beta1)
    for t in set(steps):
        if rule.has_second_moment:
            factor = 1 / math.sqrt(1 - rule.beta2**t)
            epsilon = rule.eps * factor if rule.eps_before_correction else rule.eps
            known[t] = (lr / (1 - beta1**t), factor, epsilon)
        else:
            known[t] = (lr, 1.0, 0.0)
    return np.array([known[t] for t in steps], dtype=np.float64).reshape(-1, 3).T


def _groups(lists: Lists, rule: UpdateRule) -> dict[Dtypes | None, list[int]]:
    """Positions by dtype combination; None collects what is left to the list backend."""
    params = lists[0] or []
    # the mean of the cautious mask must be known before anything moves, which would take one more pass
    if rule.cautious and rule.kind not in ORTHOGONALISED:
        return {None: list(range(len(params)))}
    alike = _alike(lists)
    if alike is not None:
        return {alike: list(range(len(params)))}
    groups: dict[Dtypes | None, list[int]] = {}
    for i, param in enumerate(params):
        tensors = [None if tensors is None else tensors[i] for tensors in lists]
        fits = param.numel() and _walkable([t for t in tensors if t is not None], rule.batched)
        key = tuple(None if t is None else t.dtype for t in tensors) if fits else None
        groups.setdefault(key, []).append(i)
    return groups


def _alike(lists: Lists) -> Dtypes | None:
    """The dtypes of all tensors if they are the usual case: contiguous, not empty and of one combination.

    Asked list by list, because for a thousand small tensors questions cost more than the step.
    """
    present = [tensors for tensors in lists if tensors is not None]
    dtypes = [None if tensors is None else {t.dtype for t in tensors} for tensors in lists]
    usual = (
        all(kinds is None or (len(kinds) == 1 and kinds <= _TAKEN) for kinds in dtypes)
        and len({t.device for tensors in present for t in tensors}) == 1
        and all(all(map(Tensor.is_contiguous, tensors)) for tensors in present)
        and all(map(Tensor.numel, present[0]))
    )
    return tuple(None if kinds is None else next(iter(kinds)) for kinds in dtypes) if usual else None


def _walkable(tensors: Sequence[Tensor], batched: bool) -> bool:
    """Whether one running index visits the same element in all tensors and skips no memory."""
    first = tensors[0]
    if any(t.dtype not in _TAKEN or t.device != first.device for t in tensors):
        return False
    if all(t.is_contiguous() for t in tensors):
        return True
    if (batched and first.ndim >= 3) or any(t.stride() != first.stride() for t in tensors):
        return False
    expected = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _by_lists(
    lists: Lists,
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    params, grads, references, exp_avgs, second, largest, stores = lists
    assert params is not None and grads is not None and exp_avgs is not None  # noqa: S101  for the type checker
    divisors = mars_foreach(
        params, grads, references, exp_avgs, second or [], largest or [], steps, rule, norm, generator
    )
    if stores is not None:
        torch._foreach_copy_(stores, grads)
    return divisors


def _by_kernel(
    launch: Launch,
    lists: Lists,
    dtypes: Dtypes,
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    params, grads, _, exp_avgs, *_ = lists
    assert params is not None and grads is not None and exp_avgs is not None  # noqa: S101  for the type checker
    dtype = working_dtype(params[0].dtype)
    table = _table(lists, dtypes, dtype, rule.batched)
    given = clip_divisor(norm.to(dtype), rule.clip) if norm is not None and rule.clip is not None else None
    divisors = launch(table, steps, rule, given, generator)
    if rule.kind in ORTHOGONALISED:
        x, g, m = working(params, dtype), working(grads, dtype), working(exp_avgs, dtype)
        momentum = list(torch._foreach_lerp(m, g, rule.gamma)) if rule.quasi_hyperbolic else m
        descend_(x, g, orthogonal_directions(momentum, rule), rule)
        write_rounded(params, x, stochastic=rule.stochastic_rounding, generator=generator)
    else:
        # kernels write past autograd: a graph that still needs the old values must notice
        increment_version(params)
    if given is not None:
        return [given] * len(params)
    return [] if divisors is None else _per_tensor(divisors, params, rule.batched)


def _table(lists: Lists, dtypes: Dtypes, working: torch.dtype, batched: bool) -> Table:
    params = lists[0] or []
    starts = np.array(
        [[0] * len(params) if tensors is None else list(map(Tensor.data_ptr, tensors)) for tensors in lists],
        dtype=np.int64,
    )
    sizes = np.array(list(map(Tensor.numel, params)), dtype=np.int64)
    owners = np.arange(len(params), dtype=np.int64)
    if batched and any(param.ndim >= 3 for param in params):
        slices = np.array([_slices(param) for param in params], dtype=np.int64)
        sizes, owners = np.repeat(sizes // slices, slices), np.repeat(owners, slices)
        position = np.concatenate([np.arange(count) for count in slices])
        itemsizes = np.array([0 if dtype is None else dtype.itemsize for dtype in dtypes], dtype=np.int64)
        starts = starts[:, owners] + itemsizes[:, None] * position * sizes
    return Table(np.ascontiguousarray(starts), sizes, owners, dtypes, working, params[0].device)


def _slices(param: Tensor) -> int:
    """Number of matrices in a tensor that is clipped matrix by matrix."""
    return math.prod(param.shape[:-2]) if param.ndim >= 3 else 1


def _per_tensor(divisors: Tensor, params: list[Tensor], batched: bool) -> list[Tensor]:
    if not batched or all(param.ndim < 3 for param in params):
        return list(divisors.unbind())
    shapes = [(*param.shape[:-2], 1, 1) if param.ndim >= 3 else () for param in params]
    pieces = divisors.split([_slices(param) for param in params])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def host_steps(steps: list[Tensor]) -> list[float]:
    """Count the step and read the counters, which are on the CPU."""
    count_step(steps)
    return [step.item() for step in steps]
