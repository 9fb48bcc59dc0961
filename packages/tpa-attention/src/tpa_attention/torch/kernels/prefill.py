"""Attention of whole sequences on CUDA, forward: FlashAttention for some heads at a time, made from factors.

    Q, K, V of some heads from their factors    `heads.expanded`, forgotten when the heads are done
    S = scale Q K^T,   m' = max(m, max S),   P = exp2(S - m'),   O = O exp2(m - m') + P V

A program owns a block of queries of one head. Only O and LSE are written, and nothing else is kept for the
gradients. Building K and V anew in every block of queries, in registers, was measured too: it nearly doubles
the instructions of a tile, and on an H100 the time of a forward pass.

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

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import padded
from .heads import INTERPRETED, aligned, expanded
from .prefill_config import FORWARD_SHARE, Plan, choose_heads, choose_plan

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LN2 = tl.constexpr(math.log(2))
# numbers that change from call to call: a kernel is not compiled again because one of them is 1 or even
LENGTHS = ["T", "M", "window", "first_head", "heads", "H", "batches"]


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
    plan = choose_plan(bq.element_size(), D, E) if plan is None else plan
    tile = plan.forward
    pairs = ((aq, aligned(bq)), (ak, aligned(bk)), (av, aligned(bv)))
    with on_device(bq.device):
        for first, heads in parts(plan, FORWARD_SHARE, B, T, H, bq.device):
            q, k, v = (expanded(a, b, first, heads) for a, b in pairs)
            _attend[(triton.cdiv(T, tile.queries) * B * heads,)](
                q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out, lse,
                *((None, None) if intervals is None else (intervals.key_from, intervals.key_to)),
                scale * math.log2(math.e), out_scale, T, M, window or 0, first, heads, H, B,
                D=D, E=E, CAUSAL=causal, WINDOWED=window is not None, COMPUTE=compute_type(bq),
                D_PAD=padded(D), E_PAD=padded(E), BLOCK_T=tile.queries, BLOCK_M=tile.keys,
                PIPELINED=not INTERPRETED, STAGES=tile.num_stages, **tile.launch,
            )  # fmt: skip
    return out, lse.transpose(1, 2)


def parts(
    plan: Plan, share: int, batch: int, tokens: int, heads: int, device: torch.device
) -> list[tuple[int, int]]:
    """The first head and the number of heads of each part that is expanded at a time."""
    size = plan.heads or choose_heads(share, batch, tokens, heads, processors(device))
    return [(first, min(size, heads - first)) for first in range(0, heads, size)]


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the device of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compute_type(b: Tensor) -> tl.dtype:
    """The type that matrix products take; the interpreter multiplies in float32 alone."""
    return tl.float32 if INTERPRETED else _TYPES[b.dtype]


@triton.jit
def tile_of(
    x, x_t, t, inside, d, WIDTH: tl.constexpr, PAD: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Rows (tokens, features) of one head; `x` points to the first token, `t` counts from there."""
    seen = inside[:, None]
    if WIDTH != PAD:
        seen = seen & (d < WIDTH)[None, :]
    return tl.load(x + t[:, None] * x_t + d[None, :], mask=seen, other=0.0).to(COMPUTE)


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


@triton.jit
def _take_in(
    acc, total, top, q, first, start, stop, M, scale, d, e, k, k_t, v, v_t,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The running softmax (acc, total, top) after the keys [first, first + BLOCK_M)."""
    n = tl.arange(0, BLOCK_M)
    inside = first + n < M
    place = tl.cast(first, tl.int64)
    keys = tile_of(k + place * k_t, k_t, n, inside, d, D, D_PAD, COMPUTE)
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
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
    values = tile_of(v + place * v_t, v_t, n, inside, e, E, E_PAD, COMPUTE)
    acc = tl.dot(p.to(COMPUTE), values, acc=acc, input_precision="ieee")
    return acc, total, new_top


@triton.jit
def _take_in_all(
    acc, total, top, q, begin, end, start, stop, M, scale, d, e, k, k_t, v, v_t,
    D: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The running softmax after the tiles of keys from `begin` to `end`."""
    if PIPELINED:
        for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
            acc, total, top = _take_in(
                acc, total, top, q, first, start, stop, M, scale, d, e, k, k_t, v, v_t,
                D, E, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
    else:
        first = begin
        while first < end:
            acc, total, top = _take_in(
                acc, total, top, q, first, start, stop, M, scale, d, e, k, k_t, v, v_t,
                D, E, MASKED, COMPUTE, D_PAD, E_PAD, BLOCK_M,
            )  # fmt: skip
            first += BLOCK_M
    return acc, total, top


@triton.jit(do_not_specialize=LENGTHS)
def _attend(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, out, lse, key_from, key_to,
    scale, out_scale, T, M, window, first_head, heads, H, batches,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, COMPUTE: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    PIPELINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_T queries of one of the heads that were expanded.

    Truth: `reference.tpa_attention`. Floor: 2 T M (D + E) flop per head, half of it under the causal order,
    on tensor cores. Blocks with most keys come first, so that the last programs to run are short.
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
    queries = tile_of(q + batch * q_b + h * q_h + place * q_t, q_t, t, own, d, D, D_PAD, COMPUTE)
    k += batch * k_b + h * k_h
    v += batch * v_b + h * v_h
    start, stop = keys_of(first_query + t, key_from, key_to, T, M, window, CAUSAL, WINDOWED)
    begin, masked, end = tiles_between(
        first_query, first_query + BLOCK_T - 1, key_from, key_to, T, M, window, CAUSAL, WINDOWED, BLOCK_M
    )
    acc = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    acc, total, top = _take_in_all(
        acc, total, top, queries, begin, masked, start, stop, M, scale, d, e, k, k_t, v, v_t,
        D, E, False, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
    )  # fmt: skip
    acc, total, top = _take_in_all(
        acc, total, top, queries, masked, end, start, stop, M, scale, d, e, k, k_t, v, v_t,
        D, E, True, COMPUTE, D_PAD, E_PAD, BLOCK_M, PIPELINED, STAGES,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    acc = acc * (out_scale / total)[:, None]
    head = first_head + h
    at = out + ((batch * T + place) * H + head) * E
    written = own[:, None] & (e < E)[None, :]
    tl.store(at + t[:, None] * (H * E) + e[None, :], acc.to(out.dtype.element_ty), mask=written)
    tl.store(lse + (batch * H + head) * T + place + t, (top + tl.log2(total)) * _LN2, mask=own)
