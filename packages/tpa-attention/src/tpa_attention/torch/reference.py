"""Attention of factorised heads in plain einsums: the truth inside the package, differentiable twice.

    head_i = softmax(Q_i K_i^T / sqrt(D)) V_i                                                     (3.2)

`tpa_attention` materialises Q, K and V. `tpa_decode_factors` never does: it scores factor rows, shared by all
heads, and mixes them per head,

    P[n,m,s,r]  = <B_Q[n,r], B_K[m,s]>                                                            (A.1)
    L[n,m,h]    = s_Q s_K / sqrt(D) sum_s A_K[m,s,h] sum_r A_Q[n,r,h] P[n,m,s,r]                  (A.2)
    O[n,h,e]    = s_V sum_{m,u} softmax_m(L)[n,m,h] A_V[m,u,h] B_V[m,u,e]                         (A.3)

which are three matrix products, R_Q R_K D + h R_Q R_K + h R_V E multiply-adds per cached token and query
(A.4); the products with A_K and A_V are elementwise and count as none.

Any floating type; the arithmetic is at least float32 and no autocast enters. Arguments are those of
`functional.py`, which checks them.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendix A, Algorithm 1.
"""

from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tpa_attention.torch.factors import logit_scale, materialize, rank_factor
from tpa_attention.torch.masks import attention_mask, both, ragged_mask, split_mask

Mask = Bool[Tensor, "..."]


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
) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T H"]]:
    """Outputs and log-sum-exps of (3.2), by materialising Q, K and V; the mask of the keywords, plainly."""
    with torch.autocast(bq.device.type, enabled=False):
        q = materialize(*widened(aq, bq), rank_scale)
        k = materialize(*widened(ak, bk), rank_scale)
        v = materialize(*widened(av, bv), rank_scale)
        allowed = attention_mask(
            q.shape[1],
            k.shape[1],
            causal=causal,
            window=window,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            device=q.device,
        )
        mask, bias = split_mask(attn_mask)
        logits = logit_scale(scale, q.shape[-1]) * torch.einsum("bthd,bmhd->bhtm", q, k)
        alpha, lse = softmax_and_lse(masked(logits, both(allowed, mask), bias), dim=-1)
        out = torch.einsum("bhtm,bmhe->bthe", alpha, v)
    return out.to(bq.dtype), lse.mT


def tpa_decode_factors(
    aq: Float[Tensor, "B N RQ H"] | None,
    bq: Float[Tensor, "B N RQ D"],
    ak: Float[Tensor, "B M RK H"],
    bk: Float[Tensor, "B M RK D"],
    av: Float[Tensor, "B M RV H"],
    bv: Float[Tensor, "B M RV E"],
    *,
    seq_lens: Int[Tensor, " B"] | None = None,
    attn_bias: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]:
    """Outputs and log-sum-exps of N new queries against M cached tokens, all in factor space (A.1-A.3).

    Query n stands at seq_len - N + n. What lies past seq_len is never used, NaN or not.
    """
    B, M = ak.shape[:2]
    N = bq.shape[1]
    with torch.autocast(bq.device.type, enabled=False):
        if seq_lens is None:
            seq_lens = torch.full((B,), M, device=bq.device)
        else:
            cached = torch.arange(M, device=bq.device) < seq_lens[:, None]
            ak, bk, av, bv = (only_where(cached, factor) for factor in (ak, bk, av, bv))
        mask, bias = split_mask(attn_bias)
        logits = factored_logits(*widened(aq, bq), *widened(ak, bk), scale=scale, rank_scale=rank_scale)
        logits = masked(logits, both(ragged_mask(N, M, seq_lens, window), mask), bias)
        alpha, lse = softmax_and_lse(logits, dim=-1)
        a, b = widened(av, bv)
        weights = torch.einsum("bhnm->bnmh", alpha).unsqueeze(-2) * a.unsqueeze(1)  # (B, N, M, RV, H)
        out = rank_factor(av, rank_scale) * torch.einsum("bnmuh,bmue->bnhe", weights, b)  # (A.3)
    return out.to(bq.dtype), lse.mT


def factored_logits(
    aq: Float[Tensor, "B N RQ H"] | None,
    bq: Float[Tensor, "B N RQ D"],
    ak: Float[Tensor, "B M RK H"],
    bk: Float[Tensor, "B M RK D"],
    *,
    scale: float | None = None,
    rank_scale: bool = True,
) -> Float[Tensor, "B H N M"]:
    """Scaled logits without K (A.1, A.2); without `aq`, bq is Q itself, and each head is scored."""
    factor = logit_scale(scale, bq.shape[-1]) * rank_factor(aq, rank_scale) * rank_factor(ak, rank_scale)
    if aq is None:
        mixed = torch.einsum("bnhd,bmsd->bnmsh", bq, bk)  # R_K h D per cached token
    else:
        scores = torch.einsum("bnrd,bmsd->bnmsr", bq, bk)  # R_Q R_K D
        mixed = torch.einsum("bnmsr,bnrh->bnmsh", scores, aq)  # h R_Q R_K
    return factor * torch.einsum("bnmh->bhnm", (mixed * ak.unsqueeze(1)).sum(-2))


def merge_partials(
    outs: Float[Tensor, "S *rows E"], lses: Float[Tensor, "S *rows"]
) -> tuple[Float[Tensor, "*rows E"], Float[Tensor, "*rows"]]:
    """Algorithm 3 with the maximum: w_j = exp(LSE_j - max LSE), O = sum w_j O_j / sum w_j."""
    weights, lse = softmax_and_lse(lses, dim=0)
    return (weights.unsqueeze(-1) * outs).sum(0).to(outs.dtype), lse


# ---------------------------------------------------------------------------------------------- the pieces


def softmax_and_lse(
    logits: Float[Tensor, "..."], dim: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Softmax and log-sum-exp over `dim`; -inf alone, or nothing at all, gives weights 0 and LSE -inf.

    The branch without a key divides by 1 and takes ln 1, so that its gradients are 0 and not NaN.
    """
    if logits.shape[dim] == 0:
        return logits, logits.sum(dim) - torch.inf
    top = logits.detach().amax(dim, keepdim=True)
    p = torch.exp(logits - torch.where(top == -torch.inf, 0, top))
    s = p.sum(dim, keepdim=True)
    empty = s == 0
    s = torch.where(empty, 1, s)
    lse = torch.where(empty, -torch.inf, top + torch.log(s))
    return p / s, lse.squeeze(dim)


def masked(
    logits: Float[Tensor, "B H T M"], mask: Mask | None, bias: Float[Tensor, "..."] | None
) -> Float[Tensor, "B H T M"]:
    """The additive bias enters once, whatever the rank of K; masked entries are -inf."""
    biased = logits if bias is None else logits + bias
    return biased if mask is None else biased.masked_fill(~mask, -torch.inf)


@overload
def widened(a: None, b: Tensor) -> tuple[None, Tensor]: ...
@overload
def widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]: ...
def widened(a: Tensor | None, b: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both factors in the type that is computed in: float32, or float64 if one of them is."""
    wide = torch.promote_types(b.dtype, torch.float32)
    if a is None:
        return None, b.to(wide)
    wide = torch.promote_types(wide, a.dtype)
    return a.to(wide), b.to(wide)


def only_where(cached: Bool[Tensor, "B M"], factor: Float[Tensor, "B M R n"]) -> Float[Tensor, "B M R n"]:
    """Zero past the length of each sequence: a masked weight of 0 times NaN would be NaN."""
    return torch.where(cached[:, :, None, None], factor, 0)
