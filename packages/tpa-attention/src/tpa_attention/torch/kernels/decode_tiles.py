"""The inner part of FlashTPA decoding: what one program does with the tokens of its split, in Triton.

A program owns rows n * heads + h, heads padded to a power of two, so that one read of B serves all heads:

    P_s = q B_K[m, s]^T    or, factored,    P_s = A_Q^T (B_Q B_K[m, s]^T)
    L = sum_s P_s * A_K[m, s, h],   m' = max(m, max L),   p = exp2(L - m')
    y = y exp2(m - m') + sum_u (p * A_V[m, u, h]) B_V[m, u]

A and B are read as they lie, a row per token, 16 bytes at a time straight into shared memory. A must then
lie like the scores, a row per head: a product with a matrix of ones and zeros turns it over, exactly, on the
tensor cores, where a transposition would be one through registers and shared memory. Tiles whose tokens every
query sees are read without masks; a last one or two are masked. Weights exist for one tile at a time, K and V
never. Ranks are loops over separate products, none is padded.

A number that is not finite in a row of A reaches all heads of that token, as one in B does anyway.

The truth is `..reference`. Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithm 2.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import math

import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def columns_of_query(
    aq, aq_b, aq_n, aq_r, aq_h, bq, bq_b, bq_n, bq_r, bq_d, b, first_query, n, h, c, d,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, RQ: tl.constexpr, COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Columns c = (query, rank): A_Q^T as (rows, columns), zero between queries, and B_Q as (columns, D)."""
    query = first_query + c // RQ
    rank = c % RQ
    valid = (c < COLUMNS) & (query < N)
    own = (n[:, None] == query[None, :]) & (h[:, None] < H) & valid[None, :]
    a_at = b * aq_b + query[None, :] * aq_n + rank[None, :] * aq_r + h[:, None] * aq_h
    b_at = b * bq_b + query[:, None] * bq_n + rank[:, None] * bq_r + d[None, :] * bq_d
    mix = tl.load(aq + a_at, mask=own, other=0.0).to(COMPUTE)
    rows = tl.load(bq + b_at, mask=valid[:, None] & (d[None, :] < D), other=0.0).to(COMPUTE)
    return mix, rows


@triton.jit
def _tile_at(
    x, x_b, x_t, x_f, page, slot, j, f, UNIT: tl.constexpr, ONE_PAGE: tl.constexpr, OFFSET: tl.constexpr
):
    """Addresses of a tile (tokens, features); in one page, all but one sum stays the same in a loop."""
    columns = (f.to(OFFSET) * x_f)[None, :]
    if ONE_PAGE:
        within = (j.to(OFFSET) * (x_t * UNIT))[:, None] + columns
        at = x + (page * (x_b * UNIT) + slot * (x_t * UNIT)) + within
    else:
        at = x + (page * (x_b * UNIT) + slot * (x_t * UNIT))[:, None] + columns
    return at


@triton.jit
def _tile(at, inside, features_inside, MASKED: tl.constexpr, FULL: tl.constexpr):
    """A tile (tokens, features), zero outside; FULL: no feature is padding."""
    if MASKED:
        x = tl.load(at, mask=inside[:, None] & features_inside[None, :], other=0.0)
    elif FULL:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=features_inside[None, :], other=0.0)
    return x


@triton.jit
def _head_factors(
    select, at, scale_at, inside, heads_inside,
    MASKED: tl.constexpr, FULL: tl.constexpr, SCALED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A of one rank as (rows, tokens)."""
    a = _tile(at, inside, heads_inside, MASKED, FULL).to(COMPUTE)
    a = tl.dot(select, tl.trans(a), input_precision="ieee")
    if SCALED:
        if MASKED:
            a = a * tl.load(scale_at, mask=inside, other=0.0)[None, :]
        else:
            a = a * tl.load(scale_at)[None, :]
    return a


@triton.jit
def _score_rank(
    logits, q, mix, scale, select, a_at, b_at, scale_at, inside, heads_inside, features_inside,
    MASKED: tl.constexpr, A_FULL: tl.constexpr, B_FULL: tl.constexpr, SCALED: tl.constexpr,
    FACTORED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Logits (rows, tokens) and the scores of one rank of K."""
    b = _tile(b_at, inside, features_inside, MASKED, B_FULL).to(COMPUTE)
    scores = tl.dot(q, tl.trans(b), input_precision="ieee")
    if FACTORED:
        scores = tl.dot(mix, (scores * scale).to(COMPUTE), input_precision="ieee")
    a = _head_factors(select, a_at, scale_at, inside, heads_inside, MASKED, A_FULL, SCALED, COMPUTE)
    return logits + scores * a


@triton.jit
def _add_rank(
    y, p, select, a_at, b_at, scale_at, inside, heads_inside, features_inside,
    MASKED: tl.constexpr, A_FULL: tl.constexpr, B_FULL: tl.constexpr, SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Weighted values (rows, E) and those of one rank of V."""
    a = _head_factors(select, a_at, scale_at, inside, heads_inside, MASKED, A_FULL, SCALED, COMPUTE)
    b = _tile(b_at, inside, features_inside, MASKED, B_FULL).to(COMPUTE)
    return tl.dot((p * a).to(COMPUTE), b, acc=y, input_precision="ieee")


@triton.jit
def take_in(
    y, total, top, first, stop, length, q, mix, select, n, h, columns, d, e, b, scale,
    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r, bk_d,
    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r, bv_e,
    k_scale, ks_b, ks_t, ks_r, v_scale, vs_b, vs_t, vs_r,
    bias, bias_b, bias_h, bias_n, bias_m, block_table, table_b, window,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    AK: tl.constexpr, BK: tl.constexpr, AV: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr,
    ONE_PAGE: tl.constexpr, WINDOWED: tl.constexpr, FACTORED: tl.constexpr, COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr, UNROLLED: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, A_COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax (y, total, top) after the tokens [first, first + BLOCK_M) below `stop`."""
    j = tl.arange(0, BLOCK_M)
    t = first + j
    inside = t < stop
    if ONE_PAGE:
        page, slot = b, tl.cast(first, tl.int64)
        if PAGE:
            page = tl.load(block_table + b * table_b + first // PAGE).to(tl.int64)
            slot = slot % PAGE
        scale_slot = slot + j
    else:
        page = tl.load(block_table + b * table_b + t // PAGE, mask=inside, other=0).to(tl.int64)
        slot = t.to(tl.int64) % PAGE
        scale_slot = slot
    of_head, of_d, of_e = columns < H, d < D, e < E
    k_a = _tile_at(ak, ak_b, ak_t, ak_h, page, slot, j, columns, AK, ONE_PAGE, OFFSET)
    k_b = _tile_at(bk, bk_b, bk_t, bk_d, page, slot, j, d, BK, ONE_PAGE, OFFSET)
    v_a = _tile_at(av, av_b, av_t, av_h, page, slot, j, columns, AV, ONE_PAGE, OFFSET)
    v_b = _tile_at(bv, bv_b, bv_t, bv_e, page, slot, j, e, BV, ONE_PAGE, OFFSET)
    SCALED: tl.constexpr = k_scale is not None
    k_s, v_s = scale_slot, scale_slot
    if SCALED:
        k_s = k_scale + page * ks_b + scale_slot * ks_t
        v_s = v_scale + page * vs_b + scale_slot * vs_t
    # heads of a program are all there unless the last ones are padding
    A_FULL: tl.constexpr = (HEADS == H) and (A_COLUMNS <= HEADS)
    D_FULL: tl.constexpr = D_PAD == D
    E_FULL: tl.constexpr = E_PAD == E

    logits = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    if UNROLLED:
        for s in tl.static_range(RK):
            logits = _score_rank(
                logits, q, mix, scale, select, k_a + s * ak_r, k_b + s * bk_r, k_s + s * ks_r,
                inside, of_head, of_d, MASKED, A_FULL, D_FULL, SCALED, FACTORED, COMPUTE,
            )  # fmt: skip
    else:
        for s in range(RK):
            logits = _score_rank(
                logits, q, mix, scale, select, k_a + s * ak_r, k_b + s * bk_r, k_s + s * ks_r,
                inside, of_head, of_d, MASKED, A_FULL, D_FULL, SCALED, FACTORED, COMPUTE,
            )  # fmt: skip

    if bias is not None:
        at = b * bias_b + (h * bias_h + n * bias_n)[:, None] + (t.to(tl.int64) * bias_m)[None, :]
        known = (h < H)[:, None] & (n < N)[:, None] & inside[None, :]
        logits += tl.load(bias + at, mask=known, other=0.0).to(tl.float32) * _LOG2E
    if MASKED:
        distance = (length - N + n)[:, None] - t[None, :]
        visible = (distance >= 0) & inside[None, :]
        if WINDOWED:
            visible = visible & (distance < window)
        logits = tl.where(visible, logits, float("-inf"))

    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep = tl.exp2(top - shift)
    p = tl.exp2(logits - shift[:, None])
    total = total * keep + tl.sum(p, 1)
    y = y * keep[:, None]
    if UNROLLED:
        for u in tl.static_range(RV):
            y = _add_rank(
                y, p, select, v_a + u * av_r, v_b + u * bv_r, v_s + u * vs_r, inside, of_head, of_e,
                MASKED, A_FULL, E_FULL, SCALED, COMPUTE,
            )  # fmt: skip
    else:
        for u in range(RV):
            y = _add_rank(
                y, p, select, v_a + u * av_r, v_b + u * bv_r, v_s + u * vs_r, inside, of_head, of_e,
                MASKED, A_FULL, E_FULL, SCALED, COMPUTE,
            )  # fmt: skip
    return y, total, new_top
