"""Heads from factors and back on CUDA, for some heads at a time: what attention of whole sequences reads.

    _expand    X[t, h] = sum_r A[t, r, h] B[t, r]                                                  (3.1)
    _collect   dA[t, r, h] = <dX[t, h], B[t, r]>,   dB[t, r] = sum_h A[t, r, h] dX[t, h]

X and dX lie in memory as (B, heads, T, width), in the type of the factors, and live as long as a call. Sums
are float32, in the order of the heads: the same bits in every run, without atomics.

The truth is `..factors.materialize`, and autograd through it. Floor: writing X once, reading dX once.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import padded

_TOKENS, _HEADS = 64, 8  # of a program that expands: B is read once from far away and stays near
_NUMBERS = 4096  # in registers of a program that collects, for B and for dB
_RANKS = 8  # of a program that collects
_UNROLLED = tl.constexpr(8)


def expanded(a: Tensor | None, b: Tensor, first_head: int, heads: int) -> Tensor:
    """X of some heads, (B, heads, T, width); a view of B where there is no A.

    Args:
        a: head factors (B, T, R, H), any strides.
        b: feature factors (B, T, R, width), `aligned`, or X of all heads, (B, T, H, width).
        first_head: the first.
        heads: how many.
    """
    if a is None:
        return aligned(b[:, :, first_head : first_head + heads]).transpose(1, 2)
    B, T, R, _ = a.shape
    x = b.new_empty(B, heads, T, b.shape[3])
    block = 16 if INTERPRETED else _TOKENS
    _expand[(triton.cdiv(T, block) * B * triton.cdiv(heads, _HEADS),)](
        a, *a.stride(), b, *b.stride()[:3], x, T, first_head, heads, B,
        RANK=R, WIDTH=b.shape[3], PAD=padded(b.shape[3]), BLOCK=block, HEADS=_HEADS, num_warps=4,
    )  # fmt: skip
    return x


def collect(dx: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor, first_head: int) -> None:
    """Writes dA of some heads and adds their share of dB; the first heads begin the sum.

    Args:
        dx: (B, heads, T, width), contiguous.
        a: see `expanded`.
        b: see there.
        da: (B, T, R, H), contiguous.
        db: (B, T, R, width), contiguous, float32.
        first_head: the first of the heads.
    """
    B, heads, T, width = dx.shape
    rank = a.shape[2]
    ranks = min(_RANKS, 1 << (rank - 1).bit_length())
    block = max(1, _NUMBERS // (ranks * padded(width)))
    _collect[(triton.cdiv(T, block) * triton.cdiv(rank, ranks) * B,)](
        dx, a, *a.stride(), b, *b.stride(), da, db, T, first_head, heads, B, a.shape[3],
        ADD=first_head > 0, RANK=rank, RANKS=ranks, WIDTH=width, PAD=padded(width), BLOCK=block,
        PIPELINED=not INTERPRETED, num_warps=4,
    )  # fmt: skip


def aligned(b: Tensor) -> Tensor:
    """The same rows in one piece each and, if they can be, at multiples of 16 bytes, as tiles are loaded."""
    per_read = 16 // b.element_size()
    unaligned = b.data_ptr() % 16 or any(stride % per_read for stride in b.stride()[:3])
    if b.stride(3) != 1 or (unaligned and b.shape[3] % per_read == 0):
        return b.clone(memory_format=torch.contiguous_format)
    return b


@triton.jit
def _add_rank(total, r, a, a_r, b, b_r, inside, seen):
    """The sum over ranks with one more."""
    r = tl.cast(r, tl.int64)
    weight = tl.load(a + r * a_r, mask=inside, other=0.0).to(tl.float32)
    return total + weight[:, None] * tl.load(b + r * b_r, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "first_head", "heads", "batches"])
def _expand(
    a, a_b, a_t, a_r, a_h, b, b_b, b_t, b_r, x, T, first_head, heads, batches,
    RANK: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of up to HEADS heads, one after the other."""
    program = tl.program_id(0)
    groups = tl.cdiv(heads, HEADS)
    h = program % groups * HEADS
    batch = (program // groups % batches).to(tl.int64)
    first = (program // groups // batches * BLOCK).to(tl.int64)
    t = tl.arange(0, BLOCK)
    d = tl.arange(0, PAD)
    inside = first + t < T
    seen = inside[:, None] & (d < WIDTH)[None, :]
    a += batch * a_b + first * a_t + t * a_t
    b = b + batch * b_b + first * b_t + t[:, None] * b_t + d[None, :]
    x = x + (batch * heads * T + first) * WIDTH + t[:, None] * WIDTH + d[None, :]
    last = tl.minimum(h + HEADS, heads)
    while h < last:
        total = tl.zeros((BLOCK, PAD), dtype=tl.float32)
        of_head = a + (first_head + h).to(tl.int64) * a_h
        if RANK <= _UNROLLED:
            for r in tl.static_range(RANK):
                total = _add_rank(total, r, of_head, a_r, b, b_r, inside, seen)
        else:
            for r in range(RANK):
                total = _add_rank(total, r, of_head, a_r, b, b_r, inside, seen)
        tl.store(x + h.to(tl.int64) * T * WIDTH, total.to(x.dtype.element_ty), mask=seen)
        h += 1


@triton.jit
def _take_head(total, h, rows, dx, a, a_h, da, T, pair, seen, WIDTH: tl.constexpr):
    """The sum of dB with the share of head h, whose dA is written."""
    h = tl.cast(h, tl.int64)
    grad = tl.load(dx + h * T * WIDTH, mask=seen, other=0.0).to(tl.float32)[:, None, :]
    weight = tl.load(a + h * a_h, mask=pair, other=0.0).to(tl.float32)
    tl.store(da + h, tl.sum(rows * grad, 2).to(da.dtype.element_ty), mask=pair)
    return total + weight[:, :, None] * grad


@triton.jit(do_not_specialize=["T", "first_head", "heads", "batches", "H"])
def _collect(
    dx, a, a_b, a_t, a_r, a_h, b, b_b, b_t, b_r, b_d, da, db, T, first_head, heads, batches, H,
    ADD: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
    BLOCK: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens and RANKS ranks through all heads of dX, one after the other."""
    program = tl.program_id(0)
    batch = (program % batches).to(tl.int64)
    rank_blocks: tl.constexpr = (RANK + RANKS - 1) // RANKS
    first = (program // batches // rank_blocks * BLOCK).to(tl.int64)
    t = tl.arange(0, BLOCK)
    r = program // batches % rank_blocks * RANKS + tl.arange(0, RANKS)
    d = tl.arange(0, PAD)
    inside = first + t < T
    pair = inside[:, None] & (r < RANK)[None, :]
    triple = pair[:, :, None] & (d < WIDTH)[None, None, :]
    token = (first + t).to(tl.int64)
    rank = r.to(tl.int64)
    b += batch * b_b + (token[:, None] * b_t + rank[None, :] * b_r)[:, :, None] + d[None, None, :] * b_d
    rows = tl.load(b, mask=triple, other=0.0).to(tl.float32)
    place = (batch * T + token)[:, None] * RANK + r[None, :]
    db += place[:, :, None] * WIDTH + d[None, None, :]
    total = tl.zeros((BLOCK, RANKS, PAD), dtype=tl.float32)
    if ADD:
        total += tl.load(db, mask=triple, other=0.0)
    a += batch * a_b + token[:, None] * a_t + rank[None, :] * a_r + first_head.to(tl.int64) * a_h
    da += place * H + first_head
    dx += batch * heads * T * WIDTH + token[:, None] * WIDTH + d[None, :]
    seen = inside[:, None] & (d < WIDTH)[None, :]
    if PIPELINED:
        for h in tl.range(0, heads, num_stages=3):
            total = _take_head(total, h, rows, dx, a, a_h, da, T, pair, seen, WIDTH)
    else:
        h = first_head * 0
        while h < heads:
            total = _take_head(total, h, rows, dx, a, a_h, da, T, pair, seen, WIDTH)
            h += 1
    tl.store(db, total, mask=triple)


INTERPRETED = not isinstance(_expand, triton.JITFunction)
