"""What `forward` of every attention layer is given: checks, positions, and which keys a query may see.

A query n of T new ones stands behind what was stored before and sees itself and what precedes it:

    key i is visible  iff  i <= length - T + n   and the caller's mask allows it

The caller's mask is (B, M) with 1 = valid key, or (B, 1 or H, T, M), boolean or an additive bias.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .cache import LayerCache


def check_input(
    x: Tensor, d_model: int, position_ids: Tensor | None, cache: LayerCache | None, cu_seqlens: Tensor | None
) -> None:
    """Rules that all attention layers share for what `forward` is given.

    Raises:
        TypeError: if the positions are no integers.
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
    if cu_seqlens is not None and cache is not None:
        raise ValueError("cu_seqlens must be None with a cache: cached sequences are rows of the batch")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens needs the sequences packed in a batch of 1, got a batch of {batch}")


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


def length_mask(seq_lens: Int[Tensor, " B"], new: int, keys: int) -> Bool[Tensor, "B 1 T M"]:
    """Causal visibility when sequences are unequally long or the buffer is longer than all of them."""
    last = seq_lens[:, None] - new + torch.arange(new, device=seq_lens.device)  # (B, T)
    return (torch.arange(keys, device=seq_lens.device) <= last[..., None])[:, None]


def combine(mask: Tensor | None, visible: Bool[Tensor, "B 1 T M"]) -> Tensor:
    """Both at once: boolean masks are intersected, a bias is -inf where nothing is visible."""
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "..."] | None:
    """A boolean mask as 0 and -inf; a bias as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def new_positions(
    past: int | Int[Tensor, " B"],
    batch: int,
    new: int,
    device: torch.device,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> Int[Tensor, "B T"]:
    """Positions of the new tokens when the caller names none: they count on, and restart in each sequence."""
    steps = torch.arange(new, device=device)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.to(device)
        sequence = torch.searchsorted(boundaries[1:].contiguous(), steps, right=True)
        sequence = sequence.clamp(max=boundaries.shape[0] - 2)
        return (steps - boundaries[sequence]).expand(batch, new)
    if isinstance(past, int):
        return (past + steps).expand(batch, new)
    return past[:, None] + steps
