"""Attention by materialised heads through torch's `scaled_dot_product_attention`: the training path.

Q, K and V are formed from their factors for all tokens, which suits long blocks of queries; decoding has
better ways. Three things that torch leaves to its callers are done here: its causal flag aligns top-left when
there are more keys than queries, rows without a key may come out as NaN, and no log-sum-exp is returned.
"""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpa_attention.torch.arguments import readable
from tpa_attention.torch.factors import logit_scale, materialize
from tpa_attention.torch.masks import attention_mask, both, split_mask
from tpa_attention.torch.reference import masked, softmax_and_lse

LSE_BLOCK = 128  # queries whose logits exist at a time


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
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
    return_lse: bool = False,
    deterministic: bool = False,
) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T H"] | None]:
    """Outputs, and log-sum-exps if asked for; arguments of `functional.tpa_attention`, checked there."""
    q, k, v = heads_first(aq, bq, ak, bk, av, bv, rank_scale)
    factor = logit_scale(scale, q.shape[-1])
    if (
        cu_seqlens_q is not None
        and cu_seqlens_k is not None
        and attn_mask is None
        and readable(cu_seqlens_q)
        and readable(cu_seqlens_k)
    ):
        pieces = [
            attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal, window, None, factor, return_lse)
            for rows, keys in zip(sequences(cu_seqlens_q), sequences(cu_seqlens_k), strict=True)
        ]
        out = torch.cat([out for out, _ in pieces], dim=2)
        lse = torch.cat([lse for _, lse in pieces if lse is not None], dim=2) if return_lse else None
    else:
        packed = None
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            packed = attention_mask(
                q.shape[2],
                k.shape[2],
                causal=causal,
                window=window,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                device=q.device,
            )
            causal, window = False, None
        mask, bias = split_mask(attn_mask)
        mask = both(packed, mask)
        merged = mask if bias is None else as_bias(mask, bias)
        out, lse = attend(q, k, v, causal, window, merged, factor, return_lse, deterministic)
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


def heads_first(
    aq: Tensor | None, bq: Tensor, ak: Tensor, bk: Tensor, av: Tensor, bv: Tensor, rank_scale: bool
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H M D"], Float[Tensor, "B H M E"]]:
    """Q, K and V as torch's attention takes them, in the widest of their types."""
    q, k, v = (materialize(a, b, rank_scale).transpose(1, 2) for a, b in ((aq, bq), (ak, bk), (av, bv)))
    if not q.dtype == k.dtype == v.dtype:
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    return q, k, v


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M E"],
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    scale: float,
    return_lse: bool,
    deterministic: bool = False,
) -> tuple[Float[Tensor, "B H T E"], Float[Tensor, "B H T"] | None]:
    """One call of torch's attention under the mask and the causal order, and its log-sum-exp beside."""
    T, M = q.shape[2], k.shape[2]
    if T == 0 or M == 0:
        dead = q.sum(-1) * 0  # of zeros, in the graph
        out = (dead.unsqueeze(-1) * v.new_ones(v.shape[-1])).to(v.dtype)
        return out, (dead.float() - torch.inf) if return_lse else None
    order = None
    flag = causal and window is None and T == M and mask is None
    if causal and not flag:
        order = attention_mask(
            T, M, causal=True, window=window, cu_seqlens_q=None, cu_seqlens_k=None, device=q.device
        )
    merged = both(order, mask) if mask is None or mask.dtype == torch.bool else as_bias(order, mask)
    if merged is not None and merged.ndim < 2:
        merged = merged.expand(T, M)  # torch's attention takes no mask of fewer axes
    dead, safe = without_dead_rows(merged, q.dtype)
    backends = [SDPBackend.MATH] if deterministic and q.device.type == "cuda" else None

    def call() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=safe, is_causal=flag, scale=scale)

    if backends is None:
        out = call()
    else:
        with sdpa_kernel(backends):
            out = call()
    if dead is not None:
        out = out.masked_fill(dead, 0)
    lse = log_sum_exp(q, k, merged, flag, scale) if return_lse else None
    return out, lse


def without_dead_rows(
    mask: Tensor | None, dtype: torch.dtype
) -> tuple[Bool[Tensor, "..."] | None, Tensor | None]:
    """Which rows have no key, and a mask under which those rows see all keys: finite, to be replaced by 0."""
    if mask is None:
        return None, None
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    dead = ~allowed.any(-1, keepdim=True)
    if mask.dtype == torch.bool:
        return dead, mask | dead
    return dead, torch.where(dead, 0, mask).to(dtype)


def as_bias(mask: Bool[Tensor, "..."] | None, bias: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The bias where the mask allows, -inf elsewhere."""
    return bias if mask is None else torch.where(mask, bias, -torch.inf)


def log_sum_exp(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H M D"], mask: Tensor | None, flag: bool, scale: float
) -> Float[Tensor, "B H T"]:
    """Log-sum-exp of the scaled logits in float32 or better, for a block of queries at a time."""
    T, M = q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    full = None if mask is None else mask.expand(*mask.shape[:-2], T, M)
    rows = []
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, T, LSE_BLOCK):
            last = min(first + LSE_BLOCK, T)
            logits = scale * (q[:, :, first:last].to(wide) @ k.mT.to(wide))
            part = None if full is None else full[..., first:last, :]
            if flag:
                part = torch.arange(first, last, device=q.device)[:, None] >= torch.arange(M, device=q.device)
            rows.append(softmax_and_lse(masked(logits, *split_mask(part)), dim=-1)[1])
    return torch.cat(rows, dim=2)


def sequences(cu_seqlens: Int[Tensor, " boundaries"]) -> list[slice]:
    """The tokens of each packed sequence."""
    bounds = cu_seqlens.tolist()
    return [slice(first, last) for first, last in pairwise(bounds)]
