"""Attention from factors as functions: what is checked, and which implementation answers.

    tpa_attention        any number of queries: training, prefill, chunks of it
    tpa_decode           1 to 16 queries against a cache of records, contiguous or paged
    tpa_decode_factors   the same with the six factors as separate tensors
    merge_partials       attention to parts of a cache, put together by their log-sum-exps

b-factors of queries and keys come rotated (`rope`). A query without head factors is given as aq = None and
bq = Q itself, (B, T, H, D). Rows without a single valid key return 0, and -inf as log-sum-exp.

Implementations, by the name `impl` takes:

    reference   plain einsums, at least float32, differentiable twice; any device
    sdpa        Q, K, V materialised, torch's scaled_dot_product_attention
    flex        Q, K, V materialised, torch's FlexAttention, compiled: skips what windows and packing mask out
    blockwise   (decoding) plain torch in factor space, an online softmax over blocks of the cache
    triton      kernels that read the factors: CUDA, or the CPU under TRITON_INTERPRET=1
    auto        triton where the device and the types allow, else sdpa, or for decoding blockwise

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3, Appendix A, Algorithms 1-3.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.torch import arguments, blockwise, dispatch, flex, reference, sdpa
from tpa_attention.torch.factors import RecordLayout

ATTENTION_IMPLS = ("auto", "reference", "sdpa", "flex", "triton")
DECODE_IMPLS = ("auto", "reference", "sdpa", "flex", "blockwise", "triton")

Result = Float[Tensor, "B T H E"] | tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T H"]]


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
    impl: str = "auto",
    return_lse: bool = False,
    deterministic: bool = False,
) -> Result:
    """softmax(Q K^T scale) V of all heads, from the factors of Q, K and V.

    Causal order counts from the end: of T queries against M keys, query j stands at M - T + j, so chunks of a
    prefill against a growing cache see what one pass would show them.

    Args:
        aq: head factors of the queries, or None for a full Q in `bq`.
        bq: feature factors of the queries, rotated; with aq = None Q itself, (B, T, H, D).
        ak: head factors of the keys.
        bk: feature factors of the keys, rotated.
        av: head factors of the values.
        bv: feature factors of the values, never rotated.
        causal: whether a query sees nothing after itself.
        attn_mask: bool (True = attend) or a floating bias on the scaled logits; broadcasts to (B, H, T, M).
        cu_seqlens_q: boundaries 0 .. T of sequences laid end to end in a batch of 1, (sequences + 1,).
        cu_seqlens_k: the same of the keys, 0 .. M.
        window: keys i with 0 <= t - i < window are seen; needs `causal`.
        scale: factor of the logits, D^-0.5 if None.
        rank_scale: whether Q, K and V carry 1/R, as the paper defines them.
        impl: "auto", "reference", "sdpa", "flex" or "triton", which keeps factors, output and log-sum-exps
            for the backward pass and no head's Q, K or V; it takes no `attn_mask`.
        return_lse: also return the log-sum-exp of the scaled logits (B, T, H), float32 (float64 of float64).
        deterministic: gradients do not change from run to run, at a price in speed unless the kernels answer,
            whose gradients never do.

    Raises:
        TypeError: if a factor is not floating, a mask neither bool nor floating, boundaries are no integers.
        ValueError: if shapes disagree, an argument is outside of what is listed here or combined wrongly.
        RuntimeError: if the implementation asked for cannot run here; it says what to install or to do.

    Source: Zhang et al. 2025, eq. 3.1-3.3.
    """
    arguments.check_factors("T", aq, bq, ak, bk, av, bv)
    B, T, M, H = bq.shape[0], bq.shape[1], ak.shape[1], ak.shape[3]
    arguments.check_window(window, causal)
    arguments.check_scale(scale)
    arguments.check_mask("attn_mask", attn_mask, (B, H, T, M), "B, H, T, M")
    arguments.check_boundaries(cu_seqlens_q, cu_seqlens_k, B, T, M)
    check_impl(impl, ATTENTION_IMPLS)
    factors = (aq, bq, ak, bk, av, bv)
    impl = dispatch.chosen_attention(impl, factors, attn_mask)
    keywords: dict[str, Any] = {
        "causal": causal,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "window": window,
        "scale": scale,
        "rank_scale": rank_scale,
    }
    if impl == "triton":
        out, lse = dispatch.attend_by_kernel(factors, **keywords)
        return result(out, lse, return_lse)
    keywords["attn_mask"] = attn_mask
    if impl == "reference":
        out, lse = reference.tpa_attention(*factors, **keywords)
    elif impl == "flex":
        out, lse = flex.tpa_attention(*factors, **keywords, return_lse=return_lse)
    else:
        keywords |= {"return_lse": return_lse, "deterministic": deterministic}
        out, lse = sdpa.tpa_attention(*factors, **keywords)
    return result(out, lse, return_lse)


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
    num_splits: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Result:
    """Attention of the N newest tokens to the cache that ends with them: FlashTPA, from separate factors.

    Query n stands at seq_len - N + n and sees what is cached up to itself. What lies past it is never used.

    Args:
        aq: head factors of the queries, or None for a full Q in `bq`.
        bq: feature factors of the queries, rotated, N = 1 .. 16; with aq = None Q itself, (B, N, H, D).
        ak: head factors of the cached keys; factors free of the token come as views by `expand`.
        bk: feature factors of the cached keys, rotated.
        av: head factors of the cached values.
        bv: feature factors of the cached values.
        seq_lens: cached tokens per sequence, new ones included, integers on the same device; None: all M.
        attn_bias: floating bias on the scaled logits, or bool (True = attend), broadcastable to (B, H, N, M).
        window: keys i with 0 <= t - i < window are seen.
        scale: factor of the logits, D^-0.5 if None.
        rank_scale: whether Q, K and V carry 1/R.
        num_splits: parts of the cache that the kernel reads in parallel, chosen by shape if None. It changes
            the speed of impl "triton" and no result.
        return_lse: also return the log-sum-exp of the scaled logits (B, N, H), float32 (float64 of float64).
        impl: "auto", "reference", "sdpa", "flex", "blockwise" or "triton".

    Raises:
        TypeError: if a factor is not floating or the lengths are no integers.
        ValueError: if shapes disagree, N > 16, or an argument is outside of what is listed here.
        RuntimeError: if the implementation asked for cannot run here; it says what to install or to do.

    Source: Zhang et al. 2025, Algorithms 2-3.
    """
    arguments.check_factors("N", aq, bq, ak, bk, av, bv)
    (B, N), M, H = bq.shape[:2], ak.shape[1], ak.shape[3]
    check_decode(B, N, M, H, seq_lens, attn_bias, window, scale, num_splits, impl)
    factors = (aq, bq, ak, bk, av, bv)
    keywords: dict[str, Any] = {
        "attn_bias": attn_bias,
        "window": window,
        "scale": scale,
        "rank_scale": rank_scale,
    }
    impl = dispatch.chosen(impl, *factors)
    if impl == "triton":
        out, lse = dispatch.by_kernel(*factors, seq_lens, None, num_splits, **keywords)
    elif impl == "blockwise":
        out, lse = blockwise.tpa_decode_factors(*factors, seq_lens=seq_lens, **keywords)
    elif impl == "reference":
        out, lse = reference.tpa_decode_factors(*factors, seq_lens=seq_lens, **keywords)
    else:
        out, lse = dispatch.by_heads(impl, *factors, seq_lens=seq_lens, return_lse=return_lse, **keywords)
    return result(out, lse, return_lse)


def tpa_decode(
    aq: Float[Tensor, "B N RQ H"] | None,
    bq: Float[Tensor, "B N RQ D"],
    cache_k: Float[Tensor, "blocks tokens WK"],
    cache_v: Float[Tensor, "blocks tokens WV"],
    *,
    ranks: tuple[int, int],
    num_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    seq_lens: Int[Tensor, " B"] | None = None,
    block_table: Int[Tensor, "B pages"] | None = None,
    attn_bias: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
    num_splits: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Result:
    """`tpa_decode_factors` from caches of records, [B: R * D | A: R * H | pad] per token (`RecordLayout`).

    Args:
        aq: head factors of the queries, or None for a full Q in `bq`.
        bq: feature factors of the queries, rotated, N = 1 .. 16; with aq = None Q itself, (B, N, H, D).
        cache_k: records of the keys, (B, M, width) or, with `block_table`, (num_blocks, block_size, width).
        cache_v: records of the values, alike.
        ranks: (R_K, R_V).
        num_heads: H.
        head_dim: D.
        v_head_dim: E, D if None.
        seq_lens: cached tokens per sequence, new ones included; None: all M.
        block_table: (B, blocks) integers, the page that holds tokens j * block_size .. of each sequence;
            M = blocks * block_size. Entries past the length may be anything.
        attn_bias: as in `tpa_decode_factors`, like all that follow.
        window: see there.
        scale: see there.
        rank_scale: see there.
        num_splits: see there.
        return_lse: see there.
        impl: see there.

    Raises:
        TypeError: if a tensor is not floating, or sizes, lengths or the table are no integers.
        ValueError: if shapes disagree, N > 16, or an argument is outside of what is listed here.
        RuntimeError: if the implementation asked for cannot run here; it says what to install or to do.

    Source: Zhang et al. 2025, Algorithms 2-3.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    arguments.check_records(
        *(aq, bq, cache_k, cache_v),
        ranks=ranks,
        num_heads=num_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        paged=block_table is not None,
    )
    B, N = bq.shape[:2]
    arguments.check_block_table(block_table, B)
    M = cache_k.shape[1] * (1 if block_table is None else block_table.shape[1])
    check_decode(B, N, M, num_heads, seq_lens, attn_bias, window, scale, num_splits, impl)
    layouts = RecordLayout(ranks[0], num_heads, head_dim), RecordLayout(ranks[1], num_heads, v_head_dim)
    keywords: dict[str, Any] = {
        "attn_bias": attn_bias,
        "window": window,
        "scale": scale,
        "rank_scale": rank_scale,
    }
    impl = dispatch.chosen(impl, aq, bq, cache_k, cache_v)
    if impl == "triton":
        kv = dispatch.views(layouts, cache_k, cache_v)
        out, lse = dispatch.by_kernel(aq, bq, *kv, seq_lens, block_table, num_splits, **keywords)
        return result(out, lse, return_lse)
    if block_table is not None and impl == "blockwise":
        size = cache_k.shape[1]
        sizes = (M, *ranks, num_heads, v_head_dim)

        def load(first: int, last: int) -> blockwise.Factors:
            """The pages these tokens are on, and of those the tokens."""
            pages = block_table[:, first // size : -(-last // size)]
            tokens = slice(first % size, first % size + last - first)
            return dispatch.views(
                layouts, *(dispatch.paged(cache, pages)[:, tokens] for cache in (cache_k, cache_v))
            )

        out, lse = blockwise.decode_loaded(aq, bq, load, sizes, seq_lens=seq_lens, **keywords)
        return result(out, lse, return_lse)
    if block_table is not None:
        cache_k, cache_v = dispatch.paged(cache_k, block_table), dispatch.paged(cache_v, block_table)
    return tpa_decode_factors(
        *(aq, bq, *dispatch.views(layouts, cache_k, cache_v)),
        seq_lens=seq_lens,
        num_splits=num_splits,
        return_lse=return_lse,
        impl=impl,
        **keywords,
    )


def merge_partials(
    outs: Float[Tensor, "S *rows E"], lses: Float[Tensor, "S *rows"]
) -> tuple[Float[Tensor, "*rows E"], Float[Tensor, "*rows"]]:
    """Attention to disjoint parts of the keys, merged: O = sum w_j O_j / sum w_j, w_j = exp(LSE_j - max LSE).

    The maximum keeps it finite when parts differ by more than exp can hold. A part without a valid key has
    LSE = -inf and weight 0; where all parts are empty the result is 0 and -inf.

    Args:
        outs: outputs of the parts.
        lses: their log-sum-exps; keep them in float32, 16 bits do not hold them.

    Raises:
        TypeError: if one is not floating.
        ValueError: if the shapes disagree.

    Source: Zhang et al. 2025, Algorithm 3, with the maximum in place of its sum.
    """
    arguments.check_floating((("outs", outs, ""), ("lses", lses, "")))
    if outs.ndim != lses.ndim + 1 or outs.shape[:-1] != lses.shape or lses.ndim == 0:
        raise ValueError(
            f"outs must be (S, .., E) and lses (S, ..), got {tuple(outs.shape)} and {tuple(lses.shape)}"
        )
    return reference.merge_partials(outs, lses)


def check_decode(
    B: int,
    N: int,
    M: int,
    H: int,
    seq_lens: Tensor | None,
    attn_bias: Tensor | None,
    window: int | None,
    scale: float | None,
    num_splits: int | None,
    impl: str,
) -> None:
    """What both decoding functions accept beside their factors."""
    arguments.check_queries(N)
    arguments.check_lengths(seq_lens, B, M)
    arguments.check_mask("attn_bias", attn_bias, (B, H, N, M), "B, H, N, M")
    arguments.check_window(window)
    arguments.check_scale(scale)
    if num_splits is not None:
        arguments.check_positive("num_splits", num_splits)
    check_impl(impl, DECODE_IMPLS)


def check_impl(impl: str, accepted: tuple[str, ...]) -> None:
    """One of the names."""
    if impl not in accepted:
        raise ValueError(f"impl must be one of {', '.join(map(repr, accepted))}, got {impl!r}")


def result(out: Tensor, lse: Tensor | None, return_lse: bool) -> Result:
    """The output alone, or with its log-sum-exp."""
    return (out, lse) if return_lse and lse is not None else out
