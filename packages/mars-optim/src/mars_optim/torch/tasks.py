"""The tasks of one step: what moves along which gradient, in lists that are stepped together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .correction import norm_of
from .gradients import corrected_gradient
from .rule import UpdateRule
from .state import is_dtensor


@dataclass(frozen=True)
class Task:
    """One tensor's part in the step: what moves, along which gradient, corrected against what."""

    param: Tensor
    grad: Tensor
    reference: Tensor | None  # None: the gradient needs no correction
    rule: UpdateRule
    group: dict[str, Any]
    corrected: bool  # whether the tensor follows MARS rather than plain AdamW

    @property
    def clipped(self) -> bool:
        """Whether the corrected gradient is clipped."""
        return self.corrected and self.rule.clip is not None


Effective = Callable[[Task], tuple[Tensor, Tensor | None]]
"""From a task to its g and h as the mathematics sees them; h is None where nothing is corrected."""


def buckets_of(tasks: Iterable[Task], way_of: Callable[[Tensor], object]) -> list[list[Task]]:
    """Tasks that one call of `mars` can do together; `way_of` says how a tensor is stepped."""
    buckets: dict[tuple[object, ...], list[Task]] = {}
    for task in tasks:
        param = task.param
        key = (task.rule, id(task.group), way_of(param), is_dtensor(param), param.dtype, param.device)
        buckets.setdefault(key, []).append(task)
    return list(buckets.values())


def gradient_lists(
    bucket: Sequence[Task], effective: Effective
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Parameters, gradients g and reference gradients h of a bucket; None where nothing is corrected."""
    pairs = [effective(task) for task in bucket]
    references = [h for _, h in pairs if h is not None]
    return [task.param for task in bucket], [g for g, _ in pairs], references or None


def squares_of_shards(buckets: Iterable[list[Task]], effective: Effective) -> dict[int, Tensor]:
    """Squared norms of the whole corrected gradients that are clipped and spread over several ranks."""
    spread = [bucket for bucket in buckets if bucket[0].clipped and is_dtensor(bucket[0].param)]
    if not spread:
        return {}
    from .distributed import squares_of_corrected

    return squares_of_corrected((*gradient_lists(bucket, effective), bucket[0].rule) for bucket in spread)


def global_norm(
    tasks: Sequence[Task], effective: Effective, shards: dict[int, Tensor]
) -> dict[torch.device, Tensor]:
    """The common norm of all corrected gradients whose groups clip globally, on every device."""
    squares = []
    for task in tasks:
        if not (task.clipped and task.group["clip_scope"] == "global"):
            continue
        if id(task.param) in shards:
            squares.append(shards[id(task.param)].sum())
            continue
        g, h = effective(task)
        squares.append(norm_of(corrected_gradient(task.param, g, h, task.rule)).double().square())
    if not squares:
        return {}
    total = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
    return {task.param.device: total.to(task.param.device) for task in tasks}
