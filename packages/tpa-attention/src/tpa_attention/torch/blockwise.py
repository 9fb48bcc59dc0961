"""FlashTPA decode in plain torch: blocks of cached tokens, an online softmax, three matrix products a block.

Algorithm 2, for all heads at once; a block of m tokens costs scratch of a few m * N * H numbers, whatever the
length of the cache:

    P_s = B_K[:, s] B_Q^T                  scores of factor rows, shared by all heads
    L   = sum_s (P_s A_Q) * A_K[:, s]      (m, N H); from a full q: P_s = B_K[:, s] q^T is mixed already
    m'  = max(m, max L),  p = exp(L - m'),  s = s e^(m - m') + sum p
    y   = y e^(m - m') + sum_u (p * A_V[:, u])^T B_V[:, u]

and at the end O = s_V y / s, LSE = m + ln s. K and V never exist. Ranks are a loop, so that factors are read
where they lie, in records or not; the truth is `reference.tpa_decode_factors`. Beside the products a block is
passed over six times; where no gradient is recorded it stays in one buffer, which costs a quarter less time.

Query form: from factors a cached token costs R_K R_Q (D + h), from q = s_Q A_Q^T B_Q formed once R_K h D. The
factored form is taken iff R_Q (D + h) < h D, in tiles of 16.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithm 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tpa_attention.torch.arguments import readable
from tpa_attention.torch.factors import logit_scale, materialize, rank_factor
from tpa_attention.torch.masks import both, split_mask, within
from tpa_attention.torch.reference import masked, only_where, widened

SCRATCH = 2**17  # numbers of one (m, N, H) block: 512 KiB in float32, about a second-level cache
TILE = 16  # the least side of a matrix product on tensor cores

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
Load = Callable[[int, int], Factors]


class Running(NamedTuple):
    """State of the online softmax: weighted values, sum of weights, maximum."""

    y: Float[Tensor, "B N H E"]
    s: Float[Tensor, "B N H"]
    m: Float[Tensor, "B N H"]


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
    block: int | None = None,
) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]:
    """Outputs and log-sum-exps; arguments of `functional.tpa_decode_factors`, checked there.

    `block` is how many cached tokens are taken at a time; None fills `SCRATCH`.
    """

    def load(first: int, last: int) -> Factors:
        tokens = slice(first, last)
        return ak[:, tokens], bk[:, tokens], av[:, tokens], bv[:, tokens]

    sizes = (ak.shape[1], ak.shape[2], av.shape[2], ak.shape[3], bv.shape[3])
    return decode_loaded(
        *(aq, bq, load, sizes),
        seq_lens=seq_lens,
        attn_bias=attn_bias,
        window=window,
        scale=scale,
        rank_scale=rank_scale,
        block=block,
    )


def decode_loaded(
    aq: Float[Tensor, "B N RQ H"] | None,
    bq: Float[Tensor, "B N RQ D"],
    load: Load,
    sizes: tuple[int, int, int, int, int],
    *,
    seq_lens: Int[Tensor, " B"] | None = None,
    attn_bias: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
    block: int | None = None,
) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]:
    """The same for factors that `load(first, last)` brings a block at a time, as from pages: ak, bk, av, bv.

    `sizes` are M, R_K, R_V, H, E.
    """
    M, k_rank, v_rank, H, E = sizes
    B, N, _, D = bq.shape
    s_k, s_v = (1 / k_rank, 1 / v_rank) if rank_scale else (1.0, 1.0)
    with torch.autocast(bq.device.type, enabled=False):
        a, b = prepared_query(aq, bq, logit_scale(scale, D) * s_k, rank_scale)
        mask, bias = (None if m is None else m.expand(B, H, N, M) for m in split_mask(attn_bias))
        state = Running(b.new_zeros(B, N, H, E), b.new_zeros(B, N, H), b.new_full((B, N, H), -torch.inf))
        start, complete, end = reach(M, N, seq_lens, window)
        step = max(SCRATCH // max(N * H, 1), TILE) if block is None else block
        for first in range(start, end, step):
            last = min(first + step, end)
            kv = load(first, last)
            if seq_lens is not None and last > complete:
                cached = torch.arange(first, last, device=bq.device) < seq_lens[:, None]
                kv = tuple(only_where(cached, factor) for factor in kv)
            ak, bk, av, bv = (factor.to(b.dtype) for factor in kv)
            recorded = torch.is_grad_enabled() and any(f.requires_grad for f in (a, b, *kv) if f is not None)
            logits = block_logits(a, b, ak, bk, recorded)
            allowed = None if mask is None else mask[..., first:last]
            if last > complete or (window is not None and first <= end - 1 - window):
                allowed = both(seen(first, last, M, N, seq_lens, window, bq.device), allowed)
            if allowed is not None or bias is not None:
                part = None if bias is None else bias[..., first:last]
                logits = masked(logits.permute(0, 3, 2, 1), allowed, part).permute(0, 3, 2, 1)
            state = absorbed(state, logits, av, bv, recorded)
    empty = state.s == 0
    s = torch.where(empty, 1, state.s)
    out = s_v * state.y / s.unsqueeze(-1)
    return out.to(bq.dtype), torch.where(empty, -torch.inf, state.m + torch.log(s))


def prefers_factored_query(q_rank: int, num_heads: int, head_dim: int) -> bool:
    """Whether scores from factors, R_Q (D + h) a token, cost less than from a full q, h D; in whole tiles."""
    rank, heads, width = (-(-size // TILE) * TILE for size in (q_rank, num_heads, head_dim))
    return rank * (width + heads) < heads * width


def prepared_query(
    aq: Float[Tensor, "B N RQ H"] | None, bq: Float[Tensor, "B N RQ D"], scale: float, rank_scale: bool
) -> tuple[Float[Tensor, "B N RQ H"] | None, Float[Tensor, "B N rows D"]]:
    """The query in its cheaper form with every factor of the logits in it, in the type computed in."""
    aq, bq = widened(aq, bq)
    if aq is not None and not prefers_factored_query(aq.shape[2], aq.shape[3], bq.shape[3]):
        return None, materialize(aq, bq, rank_scale) * scale
    return aq, bq * (scale * rank_factor(aq, rank_scale))


def block_logits(
    aq: Float[Tensor, "B N RQ H"] | None,
    bq: Float[Tensor, "B N RQ D"],
    ak: Float[Tensor, "B m RK H"],
    bk: Float[Tensor, "B m RK D"],
    recorded: bool,
) -> Float[Tensor, "B m N H"]:
    """Scaled logits of one block, a rank of K at a time; tokens first, as the factors lie in memory.

    `recorded` says whether autograd keeps what is computed, so that nothing may be overwritten.
    """
    B, N, rows, D = bq.shape
    columns = bq.reshape(B, N * rows, D).mT
    total = None
    for s in range(ak.shape[2]):
        mixed = (bk[:, :, s] @ columns).unflatten(
            -1, (N, rows)
        )  # (B, m, N, RQ), or (B, m, N, H) from a full q
        if aq is not None:
            mixed = (mixed.transpose(1, 2) @ aq).transpose(1, 2)  # (B, N, m, RQ) @ (B, N, RQ, H)
        heads = ak[:, :, s].unsqueeze(2)
        term = mixed * heads if recorded else mixed.mul_(heads)
        if total is not None:
            term = total + term if recorded else total.add_(term)
        total = term
    if total is None:
        raise ValueError("ak must have at least one rank, got none")
    return total


def absorbed(
    state: Running,
    logits: Float[Tensor, "B m N H"],
    av: Float[Tensor, "B m RV H"],
    bv: Float[Tensor, "B m RV E"],
    recorded: bool,
) -> Running:
    """One step of Algorithm 2; logits may be -inf, all of them too, and are overwritten unless `recorded`."""
    m = torch.maximum(state.m, logits.detach().amax(1))
    shift = torch.where(m == -torch.inf, 0, m)
    keep = torch.exp(state.m - shift)
    p = torch.exp(logits - shift.unsqueeze(1)) if recorded else logits.sub_(shift.unsqueeze(1)).exp_()
    s = state.s * keep + p.sum(1)
    y = state.y * keep.unsqueeze(-1)
    ranks = av.shape[2]
    for u in range(ranks):
        heads = av[:, :, u].unsqueeze(2)
        weights = p * heads if recorded or u < ranks - 1 else p.mul_(heads)
        y = y + (weights.flatten(2).mT @ bv[:, :, u]).view(y.shape)  # (B, N H, m) @ (B, m, E)
    return Running(y, s, m)


def reach(M: int, N: int, seq_lens: Tensor | None, window: int | None) -> tuple[int, int, int]:
    """The first token any query sees, up to where every query sees all (but for a window), and the last one.

    As far as the host may know: lengths on a device are not waited for.
    """
    shortest = longest = M
    if seq_lens is not None:
        known = readable(seq_lens) and seq_lens.shape[0] > 0
        shortest, longest = (int(seq_lens.min()), int(seq_lens.max())) if known else (0, M)
    start = 0 if window is None else max(shortest - N - window + 1, 0)
    return start, max(shortest - N + 1, 0), longest


def seen(
    first: int,
    last: int,
    M: int,
    N: int,
    seq_lens: Int[Tensor, " B"] | None,
    window: int | None,
    device: torch.device,
) -> Bool[Tensor, "#B 1 N m"]:
    """Which tokens of the block each query sees."""
    ends = torch.full((1,), M, device=device) if seq_lens is None else seq_lens.long()
    queries = ends[:, None] + torch.arange(-N, 0, device=device)
    return within(queries[:, :, None] - torch.arange(first, last, device=device), window).unsqueeze(1)
