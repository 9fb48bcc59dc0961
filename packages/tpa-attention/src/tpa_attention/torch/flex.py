"""Attention by materialised heads through torch's FlexAttention: masks as functions, blocks of them skipped.

Worth it for windows and packed sequences, whose masks are mostly empty. On the CPU FlexAttention has a
forward pass only, without log-sum-exps and for tensors that need no gradient.

FlexAttention is meant to be compiled; the first call for new shapes takes the compiler's seconds.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from tpa_attention.torch.masks import packed_places, split_mask
from tpa_attention.torch.sdpa import heads_first

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tpa_attention(
    aq: Float[Tensor, "B T RQ H"] | None,
    bq: Float[Tensor, "B T RQ D"],
    ak: Float[Tensor, "B M RK H"],
    bk: Float[Tensor, "B M RK D"],
    av: Float[Tensor, "B M RV H"],
    bv: Float[Tensor, "B M RV E"],
    *,
    causal: bool = True,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Int[Tensor, " boundaries"] | None = None,
    cu_seqlens_k: Int[Tensor, " boundaries"] | None = None,
    seq_lens: Int[Tensor, " B"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
    return_lse: bool = False,
) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T H"] | None]:
    """Outputs, and log-sum-exps if asked for; arguments of `functional`, and the lengths of a decode.

    Raises:
        RuntimeError: on the CPU when a gradient is needed or the log-sum-exp is asked for.
    """
    q, k, v = (x.contiguous() for x in heads_first(aq, bq, ak, bk, av, bv, rank_scale))
    if q.device.type == "cpu" and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            "impl='flex' has no backward pass on the CPU and takes no tensor that requires a gradient there: "
            "use impl='sdpa', or .detach() the factors"
        )
    if q.device.type == "cpu" and return_lse:
        raise RuntimeError("impl='flex' returns no log-sum-exp on the CPU: use impl='sdpa' there")
    B, H, T, _ = q.shape
    M = k.shape[2]
    mask, bias = (None if x is None else x.expand(B, H, T, M) for x in split_mask(attn_mask))
    allows = mask_function(T, M, causal, window, cu_seqlens_q, cu_seqlens_k, seq_lens, mask)
    block_mask = None
    if allows is not None:
        per_head = (B, H) if mask is not None else (B if seq_lens is not None else None, None)
        block_mask = flex.create_block_mask(allows, *per_head, T, M, device=q.device.type)
    out, lse = run(q, k, v, bias_function(bias), block_mask, scale, return_lse)
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


def mask_function(
    T: int,
    M: int,
    causal: bool,
    window: int | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_lens: Tensor | None,
    mask: Tensor | None,
) -> MaskFunction | None:
    """Whether query t of head h may see key i, as FlexAttention asks for it; None where all is allowed."""
    rules: list[MaskFunction] = []
    distance = distance_function(T, M, cu_seqlens_q, cu_seqlens_k, seq_lens)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        sequence_q, sequence_k = packed_places(cu_seqlens_q, T)[0], packed_places(cu_seqlens_k, M)[0]
        sequences = cu_seqlens_q.shape[0] - 1
        rules.append(lambda _b, _h, t, i: (sequence_q[t] == sequence_k[i]) & (sequence_q[t] < sequences))
    if causal:
        rules.append(lambda b, _h, t, i: distance(b, t, i) >= 0)
    if window is not None:
        rules.append(lambda b, _h, t, i: distance(b, t, i) < window)
    if mask is not None:
        rules.append(lambda b, h, t, i: mask[b, h, t, i])
    return flex.and_masks(*rules) if rules else None


def distance_function(
    T: int, M: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seq_lens: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How far key i precedes query t of batch b, both counted from the end of their sequence."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        place_q, place_k = packed_places(cu_seqlens_q, T)[1], packed_places(cu_seqlens_k, M)[1]
        return lambda _b, t, i: place_q[t] - place_k[i]
    if seq_lens is not None:
        first_query = seq_lens.long() - T
        return lambda b, t, i: first_query[b] + t - i
    return lambda _b, t, i: M - T + t - i


def bias_function(bias: Float[Tensor, "B H T M"] | None) -> Callable[..., Tensor] | None:
    """The additive bias as FlexAttention's score modification."""
    if bias is None:
        return None
    return lambda score, b, h, t, i: score + bias[b, h, t, i]


def run(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention, compiled; how it hands out log-sum-exps changed with torch 2.9."""
    attend = flex.flex_attention if torch.compiler.is_compiling() else compiled()
    keywords: dict[str, Any] = {"score_mod": score_mod, "block_mask": block_mask, "scale": scale}
    if not return_lse:
        return attend(q, k, v, **keywords), None
    if takes_aux_request():
        out, aux = attend(q, k, v, return_aux=flex.AuxRequest(lse=True), **keywords)
        return out, aux.lse
    return attend(q, k, v, return_lse=True, **keywords)


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention under torch.compile, once per process."""
    return torch.compile(flex.flex_attention, dynamic=False)


@functools.cache
def takes_aux_request() -> bool:
    """Whether this torch has `AuxRequest`."""
    return "return_aux" in inspect.signature(flex.flex_attention).parameters
