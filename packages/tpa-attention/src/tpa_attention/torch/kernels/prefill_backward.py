"""Attention of whole sequences on CUDA, backward: gradients of the factors, for some heads at a time.

Q, K and V of some heads are made from their factors again, and with P = exp(S - LSE)

    Delta = <O, dO>,   dS = P (<dO, V> - Delta + dLSE),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

`_grad_queries` owns a block of queries and streams keys, `_grad_keys` owns a block of keys and streams
queries; `heads.collect` turns what they leave into gradients of A and adds it to those of B. Nothing is added
by two programs at once, so gradients are the same bits in every run.

The truth is autograd through `..reference`.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3, differentiated; Dao 2023 (arXiv 2307.08691).
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import padded
from .heads import INTERPRETED, aligned, collect, expanded
from .prefill import LENGTHS, Intervals, compute_type, keys_of, on_device, parts, tile_of, tiles_between
from .prefill_config import BACKWARD_SHARE, Plan, choose_plan

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
    pairs = ((aq, aligned(bq)), (ak, aligned(bk)), (av, aligned(bv)))
    if B * T * M == 0:
        nothing = [bq.new_zeros(0 if x is None else x.shape) for pair in pairs for x in pair]
        return nothing[0], nothing[1], nothing[2], nothing[3], nothing[4], nothing[5]
    plan = choose_plan(bq.element_size(), D, E) if plan is None else plan
    lse = lse.transpose(1, 2).contiguous()
    dlse = None if dlse is None else dlse.transpose(1, 2).contiguous()
    delta = torch.empty_like(lse)
    dout, out = aligned(dout), aligned(out)
    das = [bq.new_empty(0 if a is None else a.shape) for a, _ in pairs]
    dbs = [b.new_empty(b.shape, dtype=b.dtype if a is None else torch.float32) for a, b in pairs]
    sizes = {
        "D": D, "E": E, "CAUSAL": causal, "WINDOWED": window is not None, "COMPUTE": compute_type(bq),
        "D_PAD": padded(D), "E_PAD": padded(E), "PIPELINED": not INTERPRETED,
    }  # fmt: skip
    by_query = (None, None) if intervals is None else (intervals.key_from, intervals.key_to)
    by_key = (None, None) if intervals is None else (intervals.query_from, intervals.query_to)
    with on_device(bq.device):
        for first, heads in parts(plan, BACKWARD_SHARE, B, max(T, M), H, bq.device):
            q, k, v = (expanded(a, b, first, heads) for a, b in pairs)
            dq = (
                bq.new_empty(q.shape)
                if aq is not None
                else dbs[0][:, :, first : first + heads].transpose(1, 2)
            )
            dk, dv = bk.new_empty(k.shape), bv.new_empty(v.shape)
            operands = (
                q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], dout, *dout.stride()[:3],
            )  # fmt: skip
            numbers = (scale, out_scale, T, M, window or 0, first, heads, H, B)
            tile = plan.grad_q
            _grad_queries[(triton.cdiv(T, tile.queries) * B * heads,)](
                *operands, out, *out.stride()[:3], lse, dlse, delta, dq, *dq.stride()[:3],
                *by_query, *numbers,
                BLOCK_T=tile.queries, BLOCK_M=tile.keys, STAGES=tile.num_stages, **tile.launch, **sizes,
            )  # fmt: skip
            tile = plan.grad_kv
            _grad_keys[(triton.cdiv(M, tile.keys) * B * heads,)](
                *operands, lse, delta, dk, dv, *by_key, *numbers,
                BLOCK_T=tile.queries, BLOCK_M=tile.keys, STAGES=tile.num_stages, **tile.launch, **sizes,
            )  # fmt: skip
            for dx, (a, b), da, db in zip((dq, dk, dv), pairs, das, dbs, strict=True):
                if a is not None:
                    collect(dx, a, b, da, db, first)
    return das[0], dbs[0].to(bq.dtype), das[1], dbs[1].to(bk.dtype), das[2], dbs[2].to(bv.dtype)


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
    acc, q, grad, lse, delta, first, start, stop, M, scale, out_scale, d, e, k, k_t, v, v_t,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum dQ / scale after the keys [first, first + BLOCK_M)."""
    n = tl.arange(0, BLOCK_M)
    inside = first + n < M
    place = tl.cast(first, tl.int64)
    keys = tile_of(k + place * k_t, k_t, n, inside, d, D, D_PAD, COMPUTE)
    values = tile_of(v + place * v_t, v_t, n, inside, e, E, E_PAD, COMPUTE)
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
    p = tl.exp2(logits * (scale * _LOG2E) - lse[:, None])
    if MASKED:
        key = (first + n)[None, :]
        p = tl.where((key >= start[:, None]) & (key < stop[:, None]), p, 0.0)
    dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
    ds = p * (dp * out_scale - delta[:, None])
    return tl.dot(ds.to(COMPUTE), keys, acc=acc, input_precision="ieee")


@triton.jit
def _add_all_keys(
    acc, q, grad, lse, delta, begin, end, start, stop, M, scale, out_scale, d, e, k, k_t, v, v_t,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum dQ / scale after the tiles of keys from `begin` to `end`."""
    if PIPELINED:
        for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            acc = _add_keys(
                acc, q, grad, lse, delta, first, start, stop, M, scale, out_scale, d, e, k, k_t, v, v_t,
                D, E, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
    else:
        first = begin
        while first < end:
            acc = _add_keys(
                acc, q, grad, lse, delta, first, start, stop, M, scale, out_scale, d, e, k, k_t, v, v_t,
                D, E, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
            first += BLOCK_M
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def _grad_queries(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, dout, dout_b, dout_t, dout_h,
    out, out_b, out_t, out_h, lse, dlse, delta, dq, dq_b, dq_h, dq_t, key_from, key_to,
    scale, out_scale, T, M, window, first_head, heads, H, batches,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, COMPUTE: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DQ of BLOCK_T queries of one of the heads that were expanded, and Delta - dLSE of these rows.

    Truth: autograd through `reference.tpa_attention`. Floor: 2 T M (2 D + E) flop per head on tensor cores.
    """
    program = tl.program_id(0)
    h = (program % heads).to(tl.int64)
    batch = (program // heads % batches).to(tl.int64)
    first_query = (tl.cdiv(T, BLOCK_T) - 1 - program // heads // batches) * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    own = first_query + t < T
    place = first_query.to(tl.int64)
    head = first_head + h
    queries = tile_of(q + batch * q_b + h * q_h + place * q_t, q_t, t, own, d, D, D_PAD, COMPUTE)
    dout += batch * dout_b + head * dout_h + place * dout_t
    out += batch * out_b + head * out_h + place * out_t
    grad = tile_of(dout, dout_t, t, own, e, E, E_PAD, COMPUTE)
    result = tile_of(out, out_t, t, own, e, E, E_PAD, COMPUTE)
    k += batch * k_b + h * k_h
    v += batch * v_b + h * v_h

    row = (batch * H + head) * T + place + t
    d_row = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    lse_row = tl.load(lse + row, mask=own, other=float("-inf"))
    if dlse is not None:
        d_row -= tl.load(dlse + row, mask=own, other=0.0).to(tl.float32)
    d_row = tl.where(lse_row == float("-inf"), 0.0, d_row)  # a row without keys has no gradients
    tl.store(delta + row, d_row, mask=own)
    lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * _LOG2E)

    start, stop = keys_of(first_query + t, key_from, key_to, T, M, window, CAUSAL, WINDOWED)
    begin, masked, end = tiles_between(
        first_query, first_query + BLOCK_T - 1, key_from, key_to, T, M, window, CAUSAL, WINDOWED, BLOCK_M
    )
    acc = tl.zeros((BLOCK_T, D_PAD), dtype=tl.float32)
    acc = _add_all_keys(
        acc, queries, grad, lse_row, d_row, begin, masked, start, stop, M, scale, out_scale, d, e,
        k, k_t, v, v_t, D, E, False, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
    )  # fmt: skip
    acc = _add_all_keys(
        acc, queries, grad, lse_row, d_row, masked, end, start, stop, M, scale, out_scale, d, e,
        k, k_t, v, v_t, D, E, True, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
    )  # fmt: skip
    at = dq + batch * dq_b + h * dq_h + place * dq_t
    written = own[:, None] & (d < D)[None, :]
    tl.store(at + t[:, None] * dq_t + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=written)


@triton.jit
def _add_queries(
    dk, dv, k, v, first, start, stop, T, scale, out_scale, d, e, q, q_t, dout, dout_t, lse, delta,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sums dK / scale and dV / out_scale after the queries [first, first + BLOCK_T).

    Queries are rows here too: log-sum-exps by columns would be loaded by every thread, over and over.
    """
    t = tl.arange(0, BLOCK_T)
    inside = first + t < T
    place = tl.cast(first, tl.int64)
    queries = tile_of(q + place * q_t, q_t, t, inside, d, D, D_PAD, COMPUTE)
    grad = tile_of(dout + place * dout_t, dout_t, t, inside, e, E, E_PAD, COMPUTE)
    lse_row = tl.load(lse + place + t, mask=inside, other=float("inf"))
    lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * _LOG2E)  # no keys: P is 0
    d_row = tl.load(delta + place + t, mask=inside, other=0.0)
    logits = tl.dot(queries, tl.trans(k), input_precision="ieee")
    p = tl.exp2(logits * (scale * _LOG2E) - lse_row[:, None])
    if MASKED:
        query = (first + t)[:, None]
        p = tl.where((query >= start[None, :]) & (query < stop[None, :]), p, 0.0)
    dv = tl.dot(tl.trans(p.to(COMPUTE)), grad, acc=dv, input_precision="ieee")
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    ds = p * (dp * out_scale - d_row[:, None])
    dk = tl.dot(tl.trans(ds.to(COMPUTE)), queries, acc=dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _add_all_queries(
    dk, dv, k, v, begin, end, start, stop, T, scale, out_scale, d, e, q, q_t, dout, dout_t, lse, delta,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums dK / scale and dV / out_scale after the tiles of queries from `begin` to `end`."""
    if PIPELINED:
        for first in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
            dk, dv = _add_queries(
                dk, dv, k, v, first, start, stop, T, scale, out_scale, d, e, q, q_t, dout, dout_t, lse, delta,
                D, E, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_T,
            )  # fmt: skip
    else:
        first = begin
        while first < end:
            dk, dv = _add_queries(
                dk, dv, k, v, first, start, stop, T, scale, out_scale, d, e, q, q_t, dout, dout_t, lse, delta,
                D, E, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_T,
            )  # fmt: skip
            first += BLOCK_T
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _grad_keys(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, dout, dout_b, dout_t, dout_h,
    lse, delta, dk, dv, query_from, query_to, scale, out_scale, T, M, window, first_head, heads, H, batches,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, COMPUTE: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DK and dV, (B, heads, M, width), of BLOCK_M keys of one of the heads that were expanded.

    Truth: autograd through `reference.tpa_attention`. Floor: 4 T M (D + E) flop per head on tensor cores.
    The first keys, which most queries see, come first.
    """
    program = tl.program_id(0)
    h = (program % heads).to(tl.int64)
    batch = (program // heads % batches).to(tl.int64)
    first_key = program // heads // batches * BLOCK_M
    n = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    own = first_key + n < M
    place = first_key.to(tl.int64)
    keys = tile_of(k + batch * k_b + h * k_h + place * k_t, k_t, n, own, d, D, D_PAD, COMPUTE)
    values = tile_of(v + batch * v_b + h * v_h + place * v_t, v_t, n, own, e, E, E_PAD, COMPUTE)
    q += batch * q_b + h * q_h
    dout += batch * dout_b + (first_head + h) * dout_h
    lse += (batch * H + first_head + h) * T
    delta += (batch * H + first_head + h) * T

    start, stop = _queries_of(first_key + n, query_from, query_to, T, M, window, CAUSAL, WINDOWED)
    begin, _ = _queries_of(first_key, query_from, query_to, T, M, window, CAUSAL, WINDOWED)
    full, end = _queries_of(first_key + BLOCK_M - 1, query_from, query_to, T, M, window, CAUSAL, WINDOWED)
    begin = begin // BLOCK_T * BLOCK_T
    full = tl.minimum(tl.cdiv(full, BLOCK_T) * BLOCK_T, end)
    if WINDOWED or query_from is not None:
        full = end
    sum_k = tl.zeros((BLOCK_M, D_PAD), dtype=tl.float32)
    sum_v = tl.zeros((BLOCK_M, E_PAD), dtype=tl.float32)
    sum_k, sum_v = _add_all_queries(
        sum_k, sum_v, keys, values, begin, full, start, stop, T, scale, out_scale, d, e,
        q, q_t, dout, dout_t, lse, delta,
        D, E, True, COMPUTE, D_PAD, E_PAD, BLOCK_T, PIPELINED, STAGES,
    )  # fmt: skip
    sum_k, sum_v = _add_all_queries(
        sum_k, sum_v, keys, values, full, end, start, stop, T, scale, out_scale, d, e,
        q, q_t, dout, dout_t, lse, delta,
        D, E, False, COMPUTE, D_PAD, E_PAD, BLOCK_T, PIPELINED, STAGES,
    )  # fmt: skip
    row = (batch * heads + h) * M + place
    dk += row * D + n[:, None] * D + d[None, :]
    dv += row * E + n[:, None] * E + e[None, :]
    tl.store(dk, (sum_k * scale).to(dk.dtype.element_ty), mask=own[:, None] & (d < D)[None, :])
    tl.store(dv, (sum_v * out_scale).to(dv.dtype.element_ty), mask=own[:, None] & (e < E)[None, :])
