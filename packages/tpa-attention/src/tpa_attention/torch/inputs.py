"""What `forward` of every attention layer is given: checks, positions, and which keys a query may see.

A query n of T new ones stands behind what was stored before and sees itself and what precedes it:

    key i is visible  iff  i <= length - T + n   and the caller's mask allows it

The caller's mask is (B, M) with 1 = valid key, or (B, 1 or H, T, M), boolean or an additive bias.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .arguments import check_boundaries
from .masks import packed_places


def check_input(
    x: Tensor,
    d_model: int,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past: int | Int[Tensor, " B"] | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Rules that all attention layers share for what `forward` is given, checked before a cache changes.

    Args:
        x: hidden states.
        d_model: their width.
        position_ids: the caller's positions.
        attention_mask: the caller's mask; against a cache of unequal lengths its size is known only later.
        past: tokens in the cache; None without a cache.
        cu_seqlens: boundaries of packed sequences.

    Raises:
        TypeError: if positions or boundaries are no integers, or a mask (B, M) is floating.
        ValueError: if a shape does not fit, or packed sequences come with a cache or in a larger batch.
    """
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x must have shape (B, T, {d_model}), got {tuple(x.shape)}")
    batch, new, _ = x.shape
    if position_ids is not None:
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")
        if tuple(position_ids.shape) not in ((new,), (1, new), (batch, new)):
            raise ValueError(
                f"position_ids must have shape ({new},) or ({batch}, {new}), got {tuple(position_ids.shape)}"
            )
    if cu_seqlens is not None and past is not None:
        raise ValueError("cu_seqlens must be None with a cache: cached sequences are rows of the batch")
    check_boundaries(cu_seqlens, cu_seqlens, batch, new, new)
    if past is None or isinstance(past, int):
        key_mask(attention_mask, batch, new, (past or 0) + new)


def key_mask(attention_mask: Tensor | None, batch: int, new: int, keys: int) -> Tensor | None:
    """The caller's mask as (B, 1, 1, M) boolean, or as it is if it has four axes.

    Raises:
        ValueError: if its shape fits neither (B, M) nor (B, 1 or H, T, M).
        TypeError: if a mask of two axes is floating: validity is 0 or 1.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if shape == (batch, keys):
        if attention_mask.is_floating_point():
            raise TypeError(f"attention_mask (B, M) must be bool or integer, got {attention_mask.dtype}")
        return attention_mask.to(torch.bool)[:, None, None, :]
    if len(shape) == 4 and shape[0] in (1, batch) and shape[2:] == (new, keys):
        is_bias = attention_mask.is_floating_point()
        return attention_mask if is_bias else attention_mask.to(torch.bool)
    raise ValueError(
        f"attention_mask must have shape (B, M) = {(batch, keys)} or (B, 1 or H, T, M) = "
        f"({batch}, .., {new}, {keys}), got {shape}"
    )


def combine(mask: Tensor | None, visible: Bool[Tensor, "B 1 T M"]) -> Tensor:
    """Both at once: boolean masks are intersected, a bias is -inf where nothing is visible."""
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def new_positions(
    past: int | Int[Tensor, " B"] | None,
    batch: int,
    new: int,
    device: torch.device,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> Int[Tensor, "B T"]:
    """Positions of the new tokens when the caller names none: they count on, and restart in each sequence."""
    steps = torch.arange(new, device=device)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.to(device)
        sequence, _ = packed_places(boundaries, new)
        return (steps - boundaries[sequence]).expand(batch, new)
    if past is None or isinstance(past, int):
        return ((past or 0) + steps).expand(batch, new)
    return past[:, None] + steps
