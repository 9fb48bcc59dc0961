"""Attention of whole sequences on CUDA, backward: gradients of the factors, from the factors.

From the factors, O, LSE and dO, with P = exp(S - LSE) computed anew:

    Delta = <O, dO>,   dS = P (<dO, V> - Delta + dLSE),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
    dA[t, r, i] = <dX[t, i], B[t, r]>,      dB[t, r] = sum_i A[t, r, i] dX[t, i]       X in {Q, K, V}, heads i

`_grad_queries` owns a block of queries and streams keys, `_grad_keys` owns a block of keys and streams
queries. dX is a tile in registers; per head it becomes a row of dA, which is final, and a share of dB. A
program goes through the heads of its group one after the other and adds their shares where no other program
writes; the groups are summed at the end. There are no atomics, so gradients are the same in every run.

The truth is autograd through `..reference`.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3, differentiated; Dao 2023 (arXiv 2307.08691).
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import padded
from .prefill import (
    INTERPRETED,
    LENGTHS,
    Intervals,
    addressed,
    compute_type,
    head_of,
    keys_of,
    on_device,
    planned,
    rank,
    streamed,
    tile_of,
    tiles_between,
)
from .prefill_config import Plan, choose_groups

_LOG2E = tl.constexpr(math.log2(math.e))

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def prefill_backward_triton(
    dout: Tensor,
    dlse: Tensor | None,
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Intervals | None,
    causal: bool,
    window: int | None,
    scale: float,
    out_scale: float,
    plan: Plan | None = None,
) -> Gradients:
    """Gradients of the six factors, contiguous; that of an aq that is None is empty. See `..prefill_ops`."""
    B, T, _, D = bq.shape
    M, H, E = ak.shape[1], ak.shape[3], bv.shape[3]
    if B * T * M == 0:
        nothing = [bq.new_zeros(0 if factor is None else factor.shape) for factor in (aq, bq, ak, bk, av, bv)]
        return nothing[0], nothing[1], nothing[2], nothing[3], nothing[4], nothing[5]
    plan = planned(plan, aq, bq, ak, bk, av, bv)
    lse = lse.transpose(1, 2).contiguous()
    dlse = None if dlse is None else dlse.transpose(1, 2).contiguous()
    delta = torch.empty_like(lse)
    dout_at, out_at = addressed(None, dout)[5:], addressed(None, out)[5:]
    scales = (scale, out_scale, T, M, window or 0)
    sizes = {
        "H": H, "D": D, "E": E, "CAUSAL": causal, "WINDOWED": window is not None, "COMPUTE": compute_type(bq),
        "D_PAD": padded(D), "E_PAD": padded(E), "PIPELINED": not INTERPRETED,
    }  # fmt: skip

    def cut(tokens: int, block: int) -> tuple[int, int]:
        """Groups, and heads in each."""
        blocks = triton.cdiv(tokens, block)
        groups = plan.groups or choose_groups(B, blocks, H, _processors(bq.device))
        return groups, triton.cdiv(H, groups)

    with on_device(bq.device):
        tile = plan.grad_q
        groups, heads = cut(T, tile.queries)
        daq, dbq, shares = _space(aq, bq, groups)
        _grad_queries[(triton.cdiv(T, tile.queries) * B * groups,)](
            *addressed(aq, bq), *streamed(ak, bk, plan.expand_kv), *streamed(av, bv, plan.expand_kv),
            *dout_at, *out_at, lse, dlse, delta, daq, shares,
            *((None, None) if intervals is None else (intervals.key_from, intervals.key_to)), *scales,
            groups, heads, B, 0,
            RQ=rank(aq), RK=rank(ak, plan.expand_kv), RV=rank(av, plan.expand_kv),
            BLOCK_T=tile.queries, BLOCK_M=tile.keys, STAGES=tile.num_stages, **tile.launch, **sizes,
        )  # fmt: skip
        if aq is not None:
            dbq.copy_(shares.sum(0))
        del shares

        tile = plan.grad_kv
        groups, heads = cut(M, tile.keys)
        dak, dbk, k_shares = _space(ak, bk, groups)
        dav, dbv, v_shares = _space(av, bv, groups)
        _grad_keys[(triton.cdiv(M, tile.keys) * B * groups,)](
            *streamed(aq, bq, plan.expand_q), *addressed(ak, bk), *addressed(av, bv),
            *dout_at, lse, delta, dak, k_shares, dav, v_shares,
            *((None, None) if intervals is None else (intervals.query_from, intervals.query_to)), *scales,
            groups, heads, B, 0,
            RQ=rank(aq, plan.expand_q), RK=rank(ak), RV=rank(av),
            BLOCK_T=tile.queries, BLOCK_M=tile.keys, STAGES=tile.num_stages, **tile.launch, **sizes,
        )  # fmt: skip
        for db, shares in ((dbk, k_shares), (dbv, v_shares)):
            db.copy_(shares.sum(0))
    return daq, dbq, dak, dbk, dav, dbv


def _space(a: Tensor | None, b: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dA, dB and the groups' shares of dB; without A, for dX in place of all of them."""
    db = b.new_empty(b.shape)
    if a is None:
        return b.new_empty(0), db, db
    return a.new_empty(a.shape), db, b.new_empty(groups, *b.shape, dtype=torch.float32)


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _to_factors(
    grad, a, a_t, a_r, b, b_t, b_r, da, shares, t, inside, d, added,
    H: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """From the gradient of a head's rows its dA, and its share of dB on top of what is there if `added`.

    `da` and `shares` point to the first token, `da` to the head too.
    """
    seen = inside[:, None]
    if WIDTH != PAD:
        seen = seen & (d < WIDTH)[None, :]
    for r in range(RANK):
        far = tl.cast(r, tl.int64)
        rows = tl.load(b + far * b_r + t[:, None] * b_t + d[None, :], mask=seen, other=0.0).to(tl.float32)
        weight = tl.load(a + far * a_r + t * a_t, mask=inside, other=0.0).to(tl.float32)
        tl.store(da + (t * RANK + r) * H, tl.sum(grad * rows, 1).to(da.dtype.element_ty), mask=inside)
        at = shares + (t * RANK + r)[:, None] * WIDTH + d[None, :]
        before = tl.load(at, mask=seen & added[:, None], other=0.0)
        tl.store(at, before + weight[:, None] * grad, mask=seen)


@triton.jit
def _queries_of(n, query_from, query_to, T, M, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The interval of queries that see keys n; keys past the last are seen as it is."""
    n = tl.minimum(n, M - 1)
    if query_from is not None:
        start = tl.load(query_from + n)
        stop = tl.load(query_to + n)
    else:
        start = n * 0
        stop = start + T
        if CAUSAL:
            start = tl.maximum(n - (M - T), 0)
        if WINDOWED:
            stop = tl.minimum(tl.maximum(n - (M - T) + window, 0), T)
    return start, stop


@triton.jit
def _add_keys(
    acc, q, grad, lse, delta, first, start, stop, M, scale, out_scale, d, e,
    ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
    D: tl.constexpr, E: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum dQ / scale after the keys [first, first + BLOCK_M)."""
    n = tl.arange(0, BLOCK_M)
    inside = first + n < M
    place = tl.cast(first, tl.int64)
    k = tile_of(
        ak + place * ak_t, ak_t, ak_r, bk + place * bk_t, bk_t, bk_r, n, inside, d, RK, D, D_PAD, COMPUTE
    )
    v = tile_of(
        av + place * av_t, av_t, av_r, bv + place * bv_t, bv_t, bv_r, n, inside, e, RV, E, E_PAD, COMPUTE
    )
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(logits * (scale * _LOG2E) - lse[:, None])
    if MASKED:
        key = (first + n)[None, :]
        p = tl.where((key >= start[:, None]) & (key < stop[:, None]), p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    ds = p * (dp * out_scale - delta[:, None])
    return tl.dot(ds.to(COMPUTE), k, acc=acc, input_precision="ieee")


@triton.jit
def _add_all_keys(
    acc, q, grad, lse, delta, begin, end, start, stop, M, scale, out_scale, d, e,
    ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
    D: tl.constexpr, E: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum dQ / scale after the tiles of keys from `begin` to `end`."""
    if PIPELINED:
        for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            acc = _add_keys(
                acc, q, grad, lse, delta, first, start, stop, M, scale, out_scale, d, e,
                ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
                D, E, RK, RV, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
    else:
        first = begin
        while first < end:
            acc = _add_keys(
                acc, q, grad, lse, delta, first, start, stop, M, scale, out_scale, d, e,
                ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
                D, E, RK, RV, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
            first += BLOCK_M
    return acc


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "heads", "batches", "zero"])
def _grad_queries(
    aq, aq_b, aq_t, aq_r, aq_h, bq, bq_b, bq_t, bq_r,
    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r,
    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r,
    dout, dout_b, dout_t, dout_h, out, out_b, out_t, out_h, lse, dlse, delta, daq, shares,
    key_from, key_to, scale, out_scale, T, M, window, groups, heads, batches, zero,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, PIPELINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of Q's factors for BLOCK_T queries and a group of heads; Delta - dLSE of all its rows.

    Truth: autograd through `reference.tpa_attention`. Floor: 2 T M (2 D + E) flop per head on tensor cores.
    """
    program = tl.program_id(0)
    first_query = (tl.cdiv(T, BLOCK_T) - 1 - program // (batches * groups)) * BLOCK_T
    group = program % groups
    batch = (program // groups % batches).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    own = first_query + t < T
    own_e = own[:, None] & (e < E)[None, :]
    place = first_query.to(tl.int64)
    start, stop = keys_of(first_query + t, key_from, key_to, T, M, window, CAUSAL, WINDOWED)
    begin, masked, end = tiles_between(
        first_query, first_query + BLOCK_T - 1, key_from, key_to, T, M, window, CAUSAL, WINDOWED, BLOCK_M
    )
    dout += batch * dout_b + place * dout_t
    out += batch * out_b + place * out_t

    first_head = group * heads
    h = first_head
    while h < tl.minimum(first_head + heads, H):
        aq_0, bq_0 = head_of(aq, aq_b, aq_h, bq, bq_b, bq_r, batch, h, RQ)
        ak_0, bk_0 = head_of(ak, ak_b, ak_h, bk, bk_b, bk_r, batch, h, RK)
        av_0, bv_0 = head_of(av, av_b, av_h, bv, bv_b, bv_r, batch, h, RV)
        aq_0 = aq_0 + place * aq_t
        bq_0 = bq_0 + place * bq_t
        q = tile_of(aq_0, aq_t, aq_r, bq_0, bq_t, bq_r, t, own, d, RQ, D, D_PAD, COMPUTE)
        grad = tl.load(dout + h * dout_h + t[:, None] * dout_t + e[None, :], mask=own_e, other=0.0)
        result = tl.load(out + h * out_h + t[:, None] * out_t + e[None, :], mask=own_e, other=0.0)
        d_row = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
        row = (batch * H + h) * T + place + t
        lse_row = tl.load(lse + row, mask=own, other=float("-inf"))
        if dlse is not None:
            d_row -= tl.load(dlse + row, mask=own, other=0.0).to(tl.float32)
        d_row = tl.where(lse_row == float("-inf"), 0.0, d_row)  # a row without keys has no gradients
        tl.store(delta + row, d_row, mask=own)
        lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * _LOG2E)
        grad = grad.to(COMPUTE)

        acc = tl.zeros((BLOCK_T, D_PAD), dtype=tl.float32)
        acc = _add_all_keys(
            acc, q, grad, lse_row, d_row, begin, masked, start, stop, M, scale, out_scale, d, e,
            ak_0, ak_t, ak_r, bk_0, bk_t, bk_r, av_0, av_t, av_r, bv_0, bv_t, bv_r,
            D, E, RK, RV, False, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
        )  # fmt: skip
        acc = _add_all_keys(
            acc, q, grad, lse_row, d_row, masked, end, start, stop, M, scale, out_scale, d, e,
            ak_0, ak_t, ak_r, bk_0, bk_t, bk_r, av_0, av_t, av_r, bv_0, bv_t, bv_r,
            D, E, RK, RV, True, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
        )  # fmt: skip
        acc = acc * scale
        # addresses that are the same for all heads would be kept through the loop, whose tiles need the room
        t = t + h * zero
        if RQ == 0:
            at = ((batch * T + place) * H + h) * D + t[:, None] * (H * D) + d[None, :]
            tl.store(shares + at, acc.to(shares.dtype.element_ty), mask=own[:, None] & (d < D)[None, :])
        else:
            _to_factors(
                acc, aq_0, aq_t, aq_r, bq_0, bq_t, bq_r, daq + (batch * T + place) * RQ * H + h,
                shares + ((group * batches + batch) * T + place) * RQ * D, t, own, d, t * 0 + h > first_head,
                H, RQ, D, D_PAD,
            )  # fmt: skip
            tl.debug_barrier()  # the next head adds to what other threads may have written
        h += 1


@triton.jit
def _add_queries(
    dk, dv, k, v, first, start, stop, T, scale, out_scale, d, e,
    aq, aq_t, aq_r, bq, bq_t, bq_r, dout, dout_t, lse, delta,
    D: tl.constexpr, E: tl.constexpr, RQ: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sums dK / scale and dV / out_scale after the queries [first, first + BLOCK_T)."""
    t = tl.arange(0, BLOCK_T)
    inside = first + t < T
    place = tl.cast(first, tl.int64)
    q = tile_of(
        aq + place * aq_t, aq_t, aq_r, bq + place * bq_t, bq_t, bq_r, t, inside, d, RQ, D, D_PAD, COMPUTE
    )
    grad = tile_of(dout, 0, 0, dout + place * dout_t, dout_t, 0, t, inside, e, 0, E, E_PAD, COMPUTE)
    lse_row = tl.load(lse + place + t, mask=inside, other=float("inf"))
    lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * _LOG2E)  # no keys: P is 0
    d_row = tl.load(delta + place + t, mask=inside, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(logits * (scale * _LOG2E) - lse_row[:, None])
    if MASKED:
        query = (first + t)[:, None]
        p = tl.where((query >= start[None, :]) & (query < stop[None, :]), p, 0.0)
    dv = tl.dot(tl.trans(p.to(COMPUTE)), grad, acc=dv, input_precision="ieee")
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    ds = p * (dp * out_scale - d_row[:, None])
    dk = tl.dot(tl.trans(ds.to(COMPUTE)), q, acc=dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _add_all_queries(
    dk, dv, k, v, begin, end, start, stop, T, scale, out_scale, d, e,
    aq, aq_t, aq_r, bq, bq_t, bq_r, dout, dout_t, lse, delta,
    D: tl.constexpr, E: tl.constexpr, RQ: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, PIPELINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sums dK / scale and dV / out_scale after the tiles of queries from `begin` to `end`."""
    if PIPELINED:
        for first in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
            dk, dv = _add_queries(
                dk, dv, k, v, first, start, stop, T, scale, out_scale, d, e,
                aq, aq_t, aq_r, bq, bq_t, bq_r, dout, dout_t, lse, delta,
                D, E, RQ, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_T,
            )  # fmt: skip
    else:
        first = begin
        while first < end:
            dk, dv = _add_queries(
                dk, dv, k, v, first, start, stop, T, scale, out_scale, d, e,
                aq, aq_t, aq_r, bq, bq_t, bq_r, dout, dout_t, lse, delta,
                D, E, RQ, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_T,
            )  # fmt: skip
            first += BLOCK_T
    return dk, dv


@triton.jit(do_not_specialize=[*LENGTHS, "groups", "heads", "batches", "zero"])
def _grad_keys(
    aq, aq_b, aq_t, aq_r, aq_h, bq, bq_b, bq_t, bq_r,
    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r,
    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r,
    dout, dout_b, dout_t, dout_h, lse, delta, dak, k_shares, dav, v_shares,
    query_from, query_to, scale, out_scale, T, M, window, groups, heads, batches, zero,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, PIPELINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the factors of K and V for BLOCK_M keys and a group of heads.

    Truth: autograd through `reference.tpa_attention`. Floor: 4 T M (D + E) flop per head on tensor cores.
    The first keys, which most queries see, come first.
    """
    program = tl.program_id(0)
    first_key = program // (batches * groups) * BLOCK_M
    group = program % groups
    batch = (program // groups % batches).to(tl.int64)
    n = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    own = first_key + n < M
    place = first_key.to(tl.int64)
    start, stop = _queries_of(first_key + n, query_from, query_to, T, M, window, CAUSAL, WINDOWED)
    begin, _ = _queries_of(first_key, query_from, query_to, T, M, window, CAUSAL, WINDOWED)
    full, end = _queries_of(first_key + BLOCK_M - 1, query_from, query_to, T, M, window, CAUSAL, WINDOWED)
    begin = begin // BLOCK_T * BLOCK_T
    full = tl.minimum(tl.cdiv(full, BLOCK_T) * BLOCK_T, end)
    if WINDOWED or query_from is not None:
        full = end

    first_head = group * heads
    h = first_head
    while h < tl.minimum(first_head + heads, H):
        aq_0, bq_0 = head_of(aq, aq_b, aq_h, bq, bq_b, bq_r, batch, h, RQ)
        ak_0, bk_0 = head_of(ak, ak_b, ak_h, bk, bk_b, bk_r, batch, h, RK)
        av_0, bv_0 = head_of(av, av_b, av_h, bv, bv_b, bv_r, batch, h, RV)
        ak_0, bk_0 = ak_0 + place * ak_t, bk_0 + place * bk_t
        av_0, bv_0 = av_0 + place * av_t, bv_0 + place * bv_t
        k = tile_of(ak_0, ak_t, ak_r, bk_0, bk_t, bk_r, n, own, d, RK, D, D_PAD, COMPUTE)
        v = tile_of(av_0, av_t, av_r, bv_0, bv_t, bv_r, n, own, e, RV, E, E_PAD, COMPUTE)
        dout_0 = dout + batch * dout_b + h.to(tl.int64) * dout_h
        row = (batch * H + h) * T
        dk = tl.zeros((BLOCK_M, D_PAD), dtype=tl.float32)
        dv = tl.zeros((BLOCK_M, E_PAD), dtype=tl.float32)
        dk, dv = _add_all_queries(
            dk, dv, k, v, begin, full, start, stop, T, scale, out_scale, d, e,
            aq_0, aq_t, aq_r, bq_0, bq_t, bq_r, dout_0, dout_t, lse + row, delta + row,
            D, E, RQ, True, COMPUTE, D_PAD, E_PAD, BLOCK_T, PIPELINED, STAGES,
        )  # fmt: skip
        dk, dv = _add_all_queries(
            dk, dv, k, v, full, end, start, stop, T, scale, out_scale, d, e,
            aq_0, aq_t, aq_r, bq_0, bq_t, bq_r, dout_0, dout_t, lse + row, delta + row,
            D, E, RQ, False, COMPUTE, D_PAD, E_PAD, BLOCK_T, PIPELINED, STAGES,
        )  # fmt: skip
        n = n + h * zero  # as in `_grad_queries`
        token = batch * M + place
        parts = (group * batches + batch) * M + place
        _to_factors(
            dk * scale, ak_0, ak_t, ak_r, bk_0, bk_t, bk_r, dak + token * RK * H + h,
            k_shares + parts * RK * D, n, own, d, n * 0 + h > first_head, H, RK, D, D_PAD,
        )  # fmt: skip
        _to_factors(
            dv * out_scale, av_0, av_t, av_r, bv_0, bv_t, bv_r, dav + token * RV * H + h,
            v_shares + parts * RV * E, n, own, e, n * 0 + h > first_head, H, RV, E, E_PAD,
        )  # fmt: skip
        tl.debug_barrier()  # the next head adds to what other threads may have written
        h += 1
