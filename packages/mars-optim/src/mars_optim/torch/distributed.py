"""MARS on DTensor parameters: FSDP2, tensor parallelism and HSDP give what one process would.

Whatever is elementwise runs on the local shards as plain tensors, by lists, uneven and empty shards included.
Three things need the other ranks:

    norms      squares of all tensors of a mesh in one vector, one all-reduce over each mesh dimension that
               shards (never over one that only replicates)
    factors    orthogonal factors of whole momentum matrices: gathered by every rank ("gather"), or exchanged
               by one all-to-all so that each matrix is whole on one rank, and one back ("owner")
    fractions  share of entries that the cautious mask keeps, as a norm of the mask

A matrix of one row or column has a closed-form factor and needs its norm alone. "blockwise" takes each shard
for a matrix of its own: no communication, but another algorithm, which depends on the number of ranks.

This module imports torch.distributed.tensor, so import it only where there is a DTensor.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithms 1-4, for what is computed.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ._foreach import (
    average_,
    bias_corrections,
    corrected_gradients,
    count_step,
    denominators,
    descend_,
    directions_of,
    second_moments,
    working,
)
from .correction import clip_divisor, working_dtype
from .directions import (
    _SMALLEST_KEPT_FRACTION,
    orthogonal_directions,
    orthogonal_eps,
    orthogonal_scale,
)
from .rounding import write_rounded
from .rule import ORTHOGONALISED, UpdateRule
from .shards import Layout, local_part, own_norm, own_squares, squared_norms, stacked, summed_over_ranks


@torch.no_grad()
def mars_sharded(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    references: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rule: UpdateRule,
    *,
    norm: Tensor | None,
    squares: Mapping[int, Tensor],
    how: str = "auto",
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """One MARS step on the local parts of DTensors; see `functional.mars`, which it equals up to rounding.

    Args:
        params: DTensor parameters.
        grads: DTensors, and so all lists but `steps`.
        references: as in `functional.mars`.
        exp_avgs: as in `functional.mars`, placed like the parameters.
        exp_avg_sqs: likewise.
        max_exp_avg_sqs: likewise.
        steps: numbers of steps done.
        rule: what to do.
        norm: the norm to clip all by (clip_scope "global"); None: each tensor's own.
        squares: squared norms of the whole corrected gradients, from `squares_of_corrected`; not read where
            nothing is clipped.
        how: "auto", "gather", "owner" or "blockwise".
        generator: for stochastic rounding; in equal states on ranks that hold the same part.

    Returns:
        What every corrected gradient was divided by; empty when nothing is clipped.
    """
    spread = _dtensors(params)
    layouts = [Layout.of(param) for param in spread]

    def parts(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [local_part(tensor, param) for tensor, param in zip(tensors, spread, strict=bool(tensors))]

    dtype = working_dtype(params[0].dtype)
    stored, averages = parts(params), parts(exp_avgs)
    x, g, m = working(stored, dtype), working(parts(grads), dtype), working(averages, dtype)
    count_step(list(steps))
    corrected = _corrected(g, None if references is None else parts(references), rule)
    divisors: list[Tensor] = []
    if rule.clip is not None:
        norms = [
            own_norm(squares[id(param)], layout, rule.batched) if norm is None else norm
            for param, layout in zip(params, layouts, strict=True)
        ]
        divisors = _divisors(norms, rule.clip, dtype)
        corrected = list(torch._foreach_div(corrected, divisors))
    average_(m, corrected, rule)
    momentum = list(torch._foreach_lerp(m, g, rule.gamma)) if rule.quasi_hyperbolic else m
    if rule.has_second_moment:
        v = second_moments(parts(exp_avg_sqs), parts(max_exp_avg_sqs), g, corrected, rule, dtype)
        first, second = bias_corrections(list(steps), rule, dtype)
        directions = list(torch._foreach_div(momentum, denominators(v, second, None, rule)))
        torch._foreach_div_(directions, first)
    elif rule.kind in ORTHOGONALISED:
        directions = sharded_directions(momentum, layouts, rule, how)
    else:
        directions = directions_of(momentum, None, rule)
    if rule.cautious:
        _mask_cautiously(directions, g, layouts)
    descend_(x, g, directions, replace(rule, cautious=False))
    write_rounded(averages, m)
    write_rounded(stored, x, stochastic=rule.stochastic_rounding, generator=generator)
    return divisors


def squares_of_corrected(
    lists: Iterable[tuple[list[Tensor], list[Tensor], list[Tensor] | None, UpdateRule]],
) -> dict[int, Tensor]:
    """Squared norms of the whole corrected gradients of a step, with one all-reduce per mesh.

    Args:
        lists: DTensor parameters, gradients, reference gradients and rule of every list that is clipped.

    Returns:
        From the id of a parameter to its squared norm, in the form of `squared_norms`.
    """
    ids, squares, layouts = [], [], []
    for params, grads, references, rule in lists:
        spread = _dtensors(params)
        dtype = working_dtype(params[0].dtype)
        g = working([local_part(grad, p) for grad, p in zip(grads, spread, strict=True)], dtype)
        h = None
        if references is not None:
            h = [local_part(reference, p) for reference, p in zip(references, spread, strict=True)]
        own = [Layout.of(param) for param in spread]
        ids += [id(param) for param in spread]
        layouts += own
        squares += own_squares(_corrected(g, h, rule), own, rule.batched)
    return dict(zip(ids, summed_over_ranks(squares, layouts), strict=True))


def sharded_directions(
    momenta: Sequence[Tensor], layouts: Sequence[Layout], rule: UpdateRule, how: str = "auto"
) -> list[Tensor]:
    """This rank's part of the scaled orthogonal factor of every whole momentum.

    Args:
        momenta: local parts in the working dtype.
        layouts: how the whole momenta lie.
        rule: solver, scale and view.
        how: "gather", "owner", "blockwise", or "auto" for "owner". What "owner" does not serve (several
            sharding mesh dimensions, interleaved shards) is gathered.
    """
    plans: dict[object, list[int]] = defaultdict(list)
    for i, layout in enumerate(layouts):
        plans[_plan(layout, rule, how)].append(i)
    directions = list(momenta)
    for plan, members in plans.items():
        own, where = [momenta[i] for i in members], [layouts[i] for i in members]
        if plan == "local":
            done = _of_own_parts(own, rule)
        elif plan == "vector":
            done = _of_vectors(own, where, rule)
        elif plan == "gather":
            done = _by_gathering(own, where, rule)
        else:
            done = _by_owners(own, where, rule)
        for i, direction in zip(members, done, strict=True):
            directions[i] = direction
    return directions


def owners_of(shapes: Sequence[Sequence[int]], ranks: int, *, batched: bool = False) -> list[int]:
    """The rank that orthogonalises each matrix: the costliest first, each to the rank with least to do.

    The cost of a matrix with sides m <= n is m^2 n. The same on every rank, as it depends on shapes alone.
    """
    costs = [_cost(shape, batched) for shape in shapes]
    load, owners = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def _dtensors(params: Sequence[Tensor]) -> list[DTensor]:
    dtensors = [param for param in params if isinstance(param, DTensor)]
    if len(dtensors) < len(params):
        raise TypeError("params must be DTensors; plain tensors are stepped by functional.mars")
    return dtensors


def _corrected(grads: list[Tensor], references: list[Tensor] | None, rule: UpdateRule) -> list[Tensor]:
    """The unclipped c_t of local parts; without references the gradients themselves."""
    if references is None:
        return grads
    return corrected_gradients(grads, working(references, grads[0].dtype), rule)


def _divisors(norms: list[Tensor], clip: float, dtype: torch.dtype) -> list[Tensor]:
    if any(norm.ndim for norm in norms):
        return [clip_divisor(norm.to(dtype), clip) for norm in norms]
    return list(clip_divisor(torch.stack(norms).to(dtype), clip).unbind())


def _plan(layout: Layout, rule: UpdateRule, how: str) -> object:
    """How the factor is found; layouts of equal plan are served together."""
    stack = stacked(layout.shape, rule.batched)
    if how == "blockwise" or not layout.sharding or 0 in layout.shape:
        return "local"
    if stack and not layout.sharded_axes() & {len(layout.shape) - 2, len(layout.shape) - 1}:
        return "local"  # whole matrices on every rank
    if not stack and min(_sides(layout.shape)) == 1:
        return "vector"
    if how == "gather" or len(layout.sharding) > 1 or not layout.regular:
        return "gather"
    return (layout.mesh, layout.sharding)


def _of_own_parts(momenta: list[Tensor], rule: UpdateRule) -> list[Tensor]:
    full = [i for i, m in enumerate(momenta) if m.numel()]
    directions = list(momenta)
    for i, direction in zip(full, orthogonal_directions([momenta[i] for i in full], rule), strict=True):
        directions[i] = direction
    return directions


def _of_vectors(momenta: list[Tensor], layouts: list[Layout], rule: UpdateRule) -> list[Tensor]:
    """One row or column has one singular value, its norm: the polynomial is applied to that number."""
    p1, p2, p3 = rule.ns_coefficients
    eps = orthogonal_eps(rule)
    directions = []
    for m, layout, squared in zip(momenta, layouts, squared_norms(momenta, layouts), strict=True):
        norm = squared.sqrt().reshape(())
        nonzero = norm.masked_fill(norm == 0, 1.0)
        image = torch.ones_like(norm)
        if rule.orthogonalizer == "newton_schulz":
            image = norm / (nonzero + eps)
            for _ in range(rule.ns_steps):
                image = image * (p1 + image**2 * (p2 + p3 * image**2))
        scale = orthogonal_scale(_sides(layout.shape), rule.scale)
        directions.append(m * (scale * image / nonzero).to(m.dtype))
    return directions


def _by_gathering(momenta: list[Tensor], layouts: list[Layout], rule: UpdateRule) -> list[Tensor]:
    whole = [_as_dtensor(m, layout).full_tensor() for m, layout in zip(momenta, layouts, strict=True)]
    directions = []
    for direction, layout in zip(orthogonal_directions(whole, rule), layouts, strict=True):
        replicated = [Replicate()] * len(layout.placements)
        on_all = DTensor.from_local(direction.contiguous(), layout.mesh, replicated, run_check=False)
        directions.append(on_all.redistribute(placements=layout.placements).to_local())
    return directions


def _by_owners(momenta: list[Tensor], layouts: list[Layout], rule: UpdateRule) -> list[Tensor]:
    """Send the parts of every matrix to its owner, orthogonalise there, send the parts of the factor back."""
    mesh, (dim,) = layouts[0].mesh, layouts[0].sharding
    group, ranks, here = mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)
    owners = owners_of([layout.shape for layout in layouts], ranks, batched=rule.batched)
    axes = [min(layout.sharded_axes()) for layout in layouts]
    shapes = [_part_shapes(layout, dim) for layout in layouts]  # by matrix, then rank
    by_owner = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
    mine = by_owner[here]

    outgoing = [momenta[i].reshape(-1) for members in by_owner for i in members]
    sent = [sum(momenta[i].numel() for i in members) for members in by_owner]
    received = [sum(shapes[i][rank].numel() for i in mine) for rank in range(ranks)]
    parts = _exchange(outgoing, sent, received, group, momenta[0]).split(
        [shapes[i][rank].numel() for rank in range(ranks) for i in mine]
    )
    whole = [
        torch.cat([parts[rank * len(mine) + k].view(shapes[i][rank]) for rank in range(ranks)], dim=axes[i])
        for k, i in enumerate(mine)
    ]
    factors = [
        factor.split([shape[axes[i]] for shape in shapes[i]], dim=axes[i])
        for i, factor in zip(mine, orthogonal_directions(whole, rule), strict=True)
    ]
    outgoing = [factor[rank].reshape(-1) for rank in range(ranks) for factor in factors]
    back = _exchange(outgoing, received, sent, group, momenta[0])
    order = [i for members in by_owner for i in members]
    directions = list(momenta)
    for i, part in zip(order, back.split([momenta[i].numel() for i in order]), strict=True):
        directions[i] = part.view(momenta[i].shape)
    return directions


def _exchange(
    outgoing: list[Tensor], sent: list[int], received: list[int], group: dist.ProcessGroup, like: Tensor
) -> Tensor:
    """One all-to-all of flat pieces in the order of ranks; the flat result, again in the order of ranks."""
    buffer = torch.cat(outgoing) if outgoing else like.new_empty(0)
    arrived = buffer.new_empty(sum(received))
    dist.all_to_all_single(arrived, buffer, received, sent, group=group)
    return arrived


def _part_shapes(layout: Layout, dim: int) -> list[torch.Size]:
    """Shape of the part of every rank along the one mesh dimension that shards."""
    coordinate = [0] * layout.mesh.ndim
    shapes = []
    for rank in range(layout.mesh.size(dim)):
        coordinate[dim] = rank
        shapes.append(torch.Size(s.stop - s.start for s in layout.box(coordinate)))
    return shapes


def _as_dtensor(part: Tensor, layout: Layout) -> DTensor:
    stride = [math.prod(layout.shape[axis + 1 :]) for axis in range(len(layout.shape))]
    return DTensor.from_local(
        part.contiguous(),
        layout.mesh,
        layout.placements,
        run_check=False,
        shape=layout.shape,
        stride=tuple(stride),
    )


def _mask_cautiously(directions: list[Tensor], grads: list[Tensor], layouts: Sequence[Layout]) -> None:
    """`mask_cautiously_` by the share that the whole tensor keeps: the squared norm of a mask counts it."""
    masks = [(d * g > 0).to(d.dtype) for d, g in zip(directions, grads, strict=True)]
    counts = squared_norms(masks, layouts)
    for direction, mask, count, layout in zip(directions, masks, counts, layouts, strict=True):
        share = (count / max(layout.shape.numel(), 1)).to(direction.dtype)
        direction.mul_(mask).div_(share.clamp_min(_SMALLEST_KEPT_FRACTION))


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor is flattened to."""
    return shape[0], math.prod(shape[1:])


def _cost(shape: Sequence[int], batched: bool) -> int:
    count = math.prod(shape[:-2]) if stacked(shape, batched) else 1
    small, large = sorted(shape[-2:] if stacked(shape, batched) else _sides(shape))
    return count * small * small * large
