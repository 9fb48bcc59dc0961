"""Attention of whole sequences on CUDA, forward: a FlashAttention that builds Q, K and V from their factors.

    Q_i = sum_r A_Q[r, i] B_Q[r],   K_j = sum_s A_K[s, j] B_K[s],   V_j = sum_u A_V[u, j] B_V[u]    per head
    S = scale Q K^T,   m' = max(m, max S),   P = exp2(S - m'),   O = O exp2(m - m') + P V

A program owns a block of queries of one head. It builds their Q once and every tile of K and V on the way;
they live in registers and shared memory. A caller may expand K and V first (`prefill_config` says when): an
operand of rank 0 is read as it is. Only O and LSE are written, and nothing else is kept for the gradients.

Which keys a query sees is an interval, whatever the reasons, and both its ends rise with the query:

    causal      [0, t + M - T + 1)
    window      [t + M - T + 1 - window, t + M - T + 1)
    packed      the same inside the sequence of the query, read from two arrays

so tiles outside of all intervals of a block are skipped, those inside of all are not masked.

The truth is `..reference`. With TRITON_INTERPRET=1 kernels run on the CPU, with `while` in place of the
pipelined loop, which not every interpreter can run.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3; Dao 2023 (arXiv 2307.08691).
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import padded
from .prefill_config import BUILT_RANKS, Plan, choose_plan

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LOG2E, _LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
_UNROLLED = tl.constexpr(BUILT_RANKS)
# numbers that change from call to call: a kernel is not compiled again because one of them is 1 or even
LENGTHS = ["T", "M", "window"]


class Intervals(NamedTuple):
    """First and last + 1 of the keys that each query sees, and of the queries that see each key; int32."""

    key_from: Tensor
    key_to: Tensor
    query_from: Tensor
    query_to: Tensor


def prefill_triton(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    intervals: Intervals | None,
    causal: bool,
    window: int | None,
    scale: float,
    out_scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, E) and log-sum-exps (B, T, H) as `..prefill_ops` promises them.

    Args:
        aq: as there, like all factors.
        bq: see there.
        ak: see there.
        bk: see there.
        av: see there.
        bv: see there.
        intervals: of packed sequences, which then hold the causal order and the window too.
        causal: see there.
        window: see there.
        scale: see there.
        out_scale: see there.
        plan: overrules `prefill_config`.
    """
    B, T, _, D = bq.shape
    M, H, E = ak.shape[1], ak.shape[3], bv.shape[3]
    out = bq.new_empty(B, T, H, E)
    lse = bq.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0 or M == 0:
        return out.zero_(), lse.fill_(-math.inf).transpose(1, 2)
    if scale < 0:  # the largest logit is found before it is scaled
        bq, scale = -bq, -scale
    plan = planned(plan, aq, bq, ak, bk, av, bv)
    tile = plan.forward
    with on_device(bq.device):
        k, v = streamed(ak, bk, plan.expand_kv), streamed(av, bv, plan.expand_kv)
        grid = (triton.cdiv(T, tile.queries) * B * H,)
        _attend[grid](
            *addressed(aq, bq), *k, *v, out, lse,
            *((None, None) if intervals is None else (intervals.key_from, intervals.key_to)),
            scale * math.log2(math.e), out_scale, T, M, window or 0, B * H,
            H=H, D=D, E=E, RQ=rank(aq), RK=rank(ak, plan.expand_kv), RV=rank(av, plan.expand_kv),
            CAUSAL=causal, WINDOWED=window is not None, COMPUTE=compute_type(bq), D_PAD=padded(D),
            E_PAD=padded(E), BLOCK_T=tile.queries, BLOCK_M=tile.keys, PIPELINED=not INTERPRETED,
            STAGES=tile.num_stages, **tile.launch,
        )  # fmt: skip
    return out, lse.transpose(1, 2)


def planned(
    plan: Plan | None, aq: Tensor | None, bq: Tensor, ak: Tensor, bk: Tensor, av: Tensor, bv: Tensor
) -> Plan:
    """The plan of a call, as given or from the table."""
    if plan is not None:
        return plan
    ranks = (None if aq is None else aq.shape[2], ak.shape[2], av.shape[2])
    return choose_plan(bq.element_size(), bq.shape[3], bv.shape[3], ranks, (bq.shape[1], bk.shape[1]))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the device of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compute_type(b: Tensor) -> tl.dtype:
    """The type that matrix products take; the interpreter multiplies in float32 alone."""
    return tl.float32 if INTERPRETED else _TYPES[b.dtype]


def rank(a: Tensor | None, expand: bool = False) -> int:
    """Ranks that a kernel sums; 0: the operand is read as it is, or as `streamed` expanded it."""
    return 0 if a is None or expand else a.shape[2]


def addressed(a: Tensor | None, b: Tensor) -> tuple[Tensor | int, ...]:
    """A and B and their strides as kernels take them; rows of B in one piece and, if they can be, aligned."""
    per_read = 16 // b.element_size()
    unaligned = b.data_ptr() % 16 or any(stride % per_read for stride in b.stride()[:3])
    if b.stride(3) != 1 or (unaligned and b.shape[3] % per_read == 0):
        b = b.clone(memory_format=torch.contiguous_format)
    if a is None:  # a kernel passes an address on that it never reads
        return b, 0, 0, 0, 0, b, *b.stride()[:3]
    return a, *a.stride(), b, *b.stride()[:3]


def streamed(a: Tensor | None, b: Tensor, expand: bool) -> tuple[Tensor | int, ...]:
    """An operand as a loop over its tokens reads it: expanded, or with tokens of A side by side."""
    if a is None:
        return addressed(None, b)
    if expand:
        return addressed(None, expanded(a, b))
    side_by_side = a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return addressed(side_by_side, b)


def expanded(a: Tensor, b: Tensor) -> Tensor:
    """The sum over the ranks for all heads and tokens, (B, M, H, D), in memory (B, H, M, D)."""
    B, M, R, H = a.shape
    width = b.shape[3]
    x = b.new_empty(B, H, M, width)
    block = 16 if INTERPRETED else 64
    _expand[(triton.cdiv(M, block) * B * H,)](
        *addressed(a, b), x, M, B * H,
        H=H, RANK=R, WIDTH=width, PAD=padded(width), BLOCK=block, COMPUTE=compute_type(b), num_warps=4,
    )  # fmt: skip
    return x.transpose(1, 2)


@triton.jit
def _product(a, a_r, b, b_r, r, inside, seen):
    """Rows of one rank."""
    r = tl.cast(r, tl.int64)
    weight = tl.load(a + r * a_r, mask=inside, other=0.0).to(tl.float32)
    return weight[:, None] * tl.load(b + r * b_r, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def tile_of(
    a, a_t, a_r, b, b_t, b_r, t, inside, d,
    RANK: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows (tokens, features) of one head: the sum over the ranks of a b, or b where there are none.

    `a` and `b` point to the head and to the first token; `t` counts from there.
    """
    at = b + t[:, None] * b_t + d[None, :]
    seen = inside[:, None]
    if WIDTH != PAD:
        seen = seen & (d < WIDTH)[None, :]
    if RANK == 0:
        rows = tl.load(at, mask=seen, other=0.0).to(COMPUTE)
    else:
        total = tl.zeros((t.shape[0], PAD), dtype=tl.float32)
        if RANK <= _UNROLLED:
            for r in tl.static_range(RANK):
                total += _product(a + t * a_t, a_r, at, b_r, r, inside, seen)
        else:
            for r in range(RANK):
                total += _product(a + t * a_t, a_r, at, b_r, r, inside, seen)
        rows = total.to(COMPUTE)
    return rows


@triton.jit
def head_of(a, a_b, a_h, b, b_b, b_r, batch, h, RANK: tl.constexpr):
    """Where a head of a sequence begins in A and B; without ranks B has an axis of heads in their place."""
    b = b + batch * b_b
    if RANK == 0:
        b = b + h.to(tl.int64) * b_r
    else:
        a = a + batch * a_b + h.to(tl.int64) * a_h
    return a, b


@triton.jit
def keys_of(t, key_from, key_to, T, M, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The interval of keys that queries t see; queries past the last see what it sees."""
    t = tl.minimum(t, T - 1)
    if key_from is not None:
        start = tl.load(key_from + t)
        stop = tl.load(key_to + t)
    else:
        start = t * 0
        stop = start + M
        if CAUSAL:
            stop = tl.maximum(t + (M - T) + 1, 0)
        if WINDOWED:
            start = tl.maximum(t + (M - T) + 1 - window, 0)
    return start, stop


@triton.jit
def _take_in(
    acc, total, top, q, first, start, stop, M, scale, d, e,
    ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
    D: tl.constexpr, E: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The running softmax (acc, total, top) after the keys [first, first + BLOCK_M)."""
    n = tl.arange(0, BLOCK_M)
    inside = first + n < M
    place = tl.cast(first, tl.int64)
    k = tile_of(
        ak + place * ak_t, ak_t, ak_r, bk + place * bk_t, bk_t, bk_r, n, inside, d, RK, D, D_PAD, COMPUTE
    )
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        key = (first + n)[None, :]
        seen = (key >= start[:, None]) & (key < stop[:, None])
        logits = tl.where(seen, logits * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logits - shift[:, None])
    else:
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        shift = new_top
        p = tl.exp2(logits * scale - shift[:, None])
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(p, 1)
    acc = acc * keep[:, None]
    v = tile_of(
        av + place * av_t, av_t, av_r, bv + place * bv_t, bv_t, bv_r, n, inside, e, RV, E, E_PAD, COMPUTE
    )
    acc = tl.dot(p.to(COMPUTE), v, acc=acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _take_in_all(
    acc, total, top, q, begin, end, start, stop, M, scale, d, e,
    ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
    D: tl.constexpr, E: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The running softmax after the tiles of keys from `begin` to `end`."""
    if PIPELINED:
        for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            acc, total, top = _take_in(
                acc, total, top, q, first, start, stop, M, scale, d, e,
                ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
                D, E, RK, RV, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
    else:
        first = begin
        while first < end:
            acc, total, top = _take_in(
                acc, total, top, q, first, start, stop, M, scale, d, e,
                ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
                D, E, RK, RV, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
            first += BLOCK_M
    return acc, total, top


@triton.jit
def tiles_between(
    t0, t1, key_from, key_to, T, M, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For queries t0 to t1: first key of the first tile, the key from which tiles are masked, the last + 1.

    Under a window, and in packed sequences, all tiles are masked.
    """
    begin, full = keys_of(t0, key_from, key_to, T, M, window, CAUSAL, WINDOWED)
    _, end = keys_of(t1, key_from, key_to, T, M, window, CAUSAL, WINDOWED)
    begin = begin // BLOCK_M * BLOCK_M
    masked = full // BLOCK_M * BLOCK_M
    if WINDOWED or key_from is not None:
        masked = begin
    return begin, masked, end


@triton.jit(do_not_specialize=[*LENGTHS, "rows"])
def _attend(
    aq, aq_b, aq_t, aq_r, aq_h, bq, bq_b, bq_t, bq_r,
    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r,
    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r,
    out, lse, key_from, key_to, scale, out_scale, T, M, window, rows,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, PIPELINED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_T queries of one head; heads of the same tokens stand side by side in the grid.

    Truth: `reference.tpa_attention`. Floor: 2 T M (D + E) flop per head, half of it under the causal order,
    on tensor cores. Blocks with most keys come first, so that the last programs to run are short.
    """
    program = tl.program_id(0)
    first_query = (tl.cdiv(T, BLOCK_T) - 1 - program // rows) * BLOCK_T
    h = program % rows % H
    batch = (program % rows // H).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    own = first_query + t < T

    place = first_query.to(tl.int64)
    aq, bq = head_of(aq, aq_b, aq_h, bq, bq_b, bq_r, batch, h, RQ)
    ak, bk = head_of(ak, ak_b, ak_h, bk, bk_b, bk_r, batch, h, RK)
    av, bv = head_of(av, av_b, av_h, bv, bv_b, bv_r, batch, h, RV)
    if RQ > 0:
        aq = aq + place * aq_t
    q = tile_of(aq, aq_t, aq_r, bq + place * bq_t, bq_t, bq_r, t, own, d, RQ, D, D_PAD, COMPUTE)
    start, stop = keys_of(first_query + t, key_from, key_to, T, M, window, CAUSAL, WINDOWED)
    begin, masked, end = tiles_between(
        first_query, first_query + BLOCK_T - 1, key_from, key_to, T, M, window, CAUSAL, WINDOWED, BLOCK_M
    )
    acc = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    acc, total, top = _take_in_all(
        acc, total, top, q, begin, masked, start, stop, M, scale, d, e,
        ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
        D, E, RK, RV, False, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
    )  # fmt: skip
    acc, total, top = _take_in_all(
        acc, total, top, q, masked, end, start, stop, M, scale, d, e,
        ak, ak_t, ak_r, bk, bk_t, bk_r, av, av_t, av_r, bv, bv_t, bv_r,
        D, E, RK, RV, True, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    acc = acc * (out_scale / total)[:, None]
    row = (batch * T + place) * H + h
    tl.store(
        out + row * E + t[:, None] * (H * E) + e[None, :],
        acc.to(out.dtype.element_ty),
        mask=own[:, None] & (e < E)[None, :],
    )
    tl.store(lse + (batch * H + h) * T + place + t, (top + tl.log2(total)) * _LN2, mask=own)


@triton.jit(do_not_specialize=["M", "rows"])
def _expand(
    a, a_b, a_t, a_r, a_h, b, b_b, b_t, b_r, x, M, rows,
    H: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """All ranks of one head summed for a block of tokens. Truth: `factors.materialize`; floor: writing it."""
    program = tl.program_id(0)
    first = program // rows * BLOCK
    h = program % rows % H
    batch = (program % rows // H).to(tl.int64)
    t = tl.arange(0, BLOCK)
    d = tl.arange(0, PAD)
    own = first + t < M
    place = first.to(tl.int64)
    a, b = head_of(a, a_b, a_h, b, b_b, b_r, batch, h, RANK)
    a, b = a + place * a_t, b + place * b_t
    rows_of_x = tile_of(a, a_t, a_r, b, b_t, b_r, t, own, d, RANK, WIDTH, PAD, COMPUTE)
    at = x + ((batch * H + h) * M + place) * WIDTH + t[:, None] * WIDTH + d[None, :]
    tl.store(at, rows_of_x.to(x.dtype.element_ty), mask=own[:, None] & (d < WIDTH)[None, :])


INTERPRETED = not isinstance(_attend, triton.JITFunction)
