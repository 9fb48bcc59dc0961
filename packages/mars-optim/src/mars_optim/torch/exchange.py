"""Two sets of tensors trade places: their contents by copying, or their memory by pointer.

Copying keeps every address, so whatever reads a parameter by its address sees the other contents: a captured
CUDA graph, a view that somebody holds, weights flattened for cuDNN. It passes over memory six times per
exchange and needs room for one tensor, the largest. Pointers cost nothing but hide the exchange from all of
these, and none of them can be detected, so pointers are for those who ask.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .state import own_part

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def swap(pairs: Sequence[Pair], *, by_pointer: bool = False) -> None:
    """Exchange what the tensors of each pair hold, bit for bit.

    Args:
        pairs: tensors of equal shape, dtype, device and placement.
        by_pointer: exchange memory instead of copying where both are plain tensors that own theirs alone.
    """
    copied: dict[object, list[Pair]] = defaultdict(list)
    for first, second in pairs:
        if by_pointer and _trades_memory(first, second):
            held = first.data
            first.data = second
            second.data = held
        else:
            copied[first.dtype, first.device].append((own_part(first), own_part(second)))
    for alike in copied.values():
        for chunk in _chunks(alike):
            firsts, seconds = [first for first, _ in chunk], [second for _, second in chunk]
            held = [torch.empty_like(first) for first in firsts]
            copy_all(held, firsts)
            copy_all(firsts, seconds)
            copy_all(seconds, held)


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensor by tensor; one call for plain tensors, local parts of DTensors."""
    targets, sources = [own_part(t) for t in targets], [own_part(s) for s in sources]
    if targets and all(_plain(tensor) for tensor in (*targets, *sources)):
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _chunks(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Runs of pairs that together hold no more than the largest alone."""
    room = max(first.numel() for first, _ in pairs)
    chunk: list[Pair] = []
    used = 0
    for pair in pairs:
        if chunk and used + pair[0].numel() > room:
            yield chunk
            chunk, used = [], 0
        chunk.append(pair)
        used += pair[0].numel()
    yield chunk


def _trades_memory(first: Tensor, second: Tensor) -> bool:
    alike = first.dtype == second.dtype and first.stride() == second.stride()
    return alike and _alone(first) and _alone(second)


def _alone(tensor: Tensor) -> bool:
    """Whether a plain tensor fills memory that is no other process's; views of a whole cannot be seen."""
    if not _plain(tensor) or tensor.layout != torch.strided or tensor.is_shared():
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)
