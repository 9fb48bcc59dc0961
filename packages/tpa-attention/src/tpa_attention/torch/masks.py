"""Which key a query may attend to: causal, windowed, ragged, packed. True = attend, everywhere.

A query at position t sees the keys i with 0 <= t - i < window. Positions are counted from the end of the keys
(bottom-right): of T queries against M keys, query j stands at M - T + j, so that a chunk of a prefill and a
decode step see what one pass over the whole sequence would show them. All masks are made on the device from
shapes and device tensors; nothing waits for the host.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_mask(
    T: int, M: int, window: int | None = None, device: torch.device | None = None
) -> Bool[Tensor, "{T} {M}"]:
    """Query j at M - T + j sees itself and what precedes it, `window` keys at most."""
    queries = torch.arange(M - T, M, device=device)
    return within(queries[:, None] - torch.arange(M, device=device), window)


def ragged_mask(
    N: int, M: int, seq_lens: Int[Tensor, " B"], window: int | None = None
) -> Bool[Tensor, "B 1 {N} {M}"]:
    """Query n of a sequence stands at seq_len - N + n; what lies past seq_len is invisible."""
    queries = seq_lens[:, None].long() + torch.arange(-N, 0, device=seq_lens.device)
    return within(queries[:, :, None] - torch.arange(M, device=seq_lens.device), window).unsqueeze(1)


def packed_mask(
    cu_seqlens_q: Int[Tensor, " boundaries"],
    cu_seqlens_k: Int[Tensor, " boundaries"],
    T: int,
    M: int,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Tensor, "{T} {M}"]:
    """Sequences laid end to end: each attends to itself alone, bottom-right causal inside."""
    sequence_q, from_end_q = packed_places(cu_seqlens_q, T)
    sequence_k, from_end_k = packed_places(cu_seqlens_k, M)
    last = cu_seqlens_q.shape[0] - 1
    same = (sequence_q[:, None] == sequence_k) & (sequence_q[:, None] < last)
    return same & within(from_end_q[:, None] - from_end_k, window) if causal else same


def packed_places(
    cu_seqlens: Int[Tensor, " boundaries"], T: int
) -> tuple[Int[Tensor, " {T}"], Int[Tensor, " {T}"]]:
    """Per token, the number of its sequence and its place counted from that sequence's end (-1 is the last).

    Tokens past the last boundary belong to no sequence: their number is that of sequences.
    """
    cu_seqlens = cu_seqlens.long()
    tokens = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    ends = cu_seqlens[(sequence + 1).clamp(max=cu_seqlens.shape[0] - 1)]
    return sequence, tokens - ends


def within(distance: Int[Tensor, "*shape"], window: int | None) -> Bool[Tensor, "*shape"]:
    """0 <= distance < window, elementwise."""
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def split_mask(
    attn_mask: Bool[Tensor, "*shape"] | Float[Tensor, "*shape"] | None,
) -> tuple[Bool[Tensor, "*shape"] | None, Float[Tensor, "*shape"] | None]:
    """A user's mask as (mask, bias), one of them None: booleans allow, floats are added to the logits."""
    if attn_mask is None:
        return None, None
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def both(first: Bool[Tensor, "..."] | None, second: Bool[Tensor, "..."] | None) -> Bool[Tensor, "..."] | None:
    """Attend where both allow; None allows all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def attention_mask(
    T: int,
    M: int,
    *,
    causal: bool,
    window: int | None,
    cu_seqlens_q: Int[Tensor, " boundaries"] | None,
    cu_seqlens_k: Int[Tensor, " boundaries"] | None,
    device: torch.device,
) -> Bool[Tensor, "{T} {M}"] | None:
    """The mask that the keyword arguments of `tpa_attention` describe; None where all is allowed."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        return packed_mask(cu_seqlens_q, cu_seqlens_k, T, M, causal=causal, window=window)
    if not causal or (T == 1 and window is None and M > 0):
        return None
    return causal_mask(T, M, window, device)
