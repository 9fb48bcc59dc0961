"""FlashTPA decode on CUDA: attention of a few new queries straight from cached factors, in two kernels.

    _decode_split   Algorithm 2 over one part of the cache, for a block of (query, head) rows
    _merge_splits   Algorithm 3: parts weighted by exp(LSE_j - max LSE)           where there are several

What a program does with its tokens is in `decode_tiles`, how calls are cut into programs in `decode_config`.
Logits carry log2(e) scale from the start; LSE and partial results are float32. Masked numbers are never
loaded: NaN past the end of a sequence cannot reach a live row. Cached factors come with any strides, as pages
or not; no length is compiled in, and everything that decides the launch is known to the host.

The truth of both is `..reference`. Floor: reading the valid part of the cache once. With TRITON_INTERPRET=1
the kernels run on the CPU, with `while` in place of the pipelined loop, which not every interpreter can run.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithms 2-3.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import functools
import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_config import (
    UNROLLED_RANKS,
    Cut,
    Shape,
    choose_cut,
    choose_splits,
    is_long,
    padded,
    padded_heads,
    padded_rows,
    queries_per_program,
)
from .decode_tiles import columns_of_query, take_in

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_QUANTISED = (torch.int8, torch.float8_e4m3fn)
_LN2 = tl.constexpr(math.log(2))
# numbers that change from call to call: a kernel is not compiled again because one of them is 1 or even
_LENGTHS = ("capacity", "window", "num_splits", "row_blocks", "table_b")
_BATCH_STRIDES = ("ak_b", "bk_b", "av_b", "bv_b", "ks_b", "vs_b", "bias_b", "bias_h", "bias_n")
_MERGED_LSES, _MERGED_NUMBERS = 512, 1 << 14  # at a time, of one row: LSEs, and numbers of partial results
_COLUMNS = 64  # rows of B_Q at a time while q is formed


def decode_triton(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
    out_scale: float = 1.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """See `..ops`, whose arguments these are; `cut` overrules the table of `decode_config`."""
    batch, queries, _, head_dim = bq.shape
    heads, v_head_dim = ak.shape[3], bv.shape[3]
    page = ak.shape[1] if block_table is not None else 0
    capacity = page * block_table.shape[1] if block_table is not None else ak.shape[1]
    seq_lens = None if seq_lens is None else seq_lens.contiguous()
    block_table = None if block_table is None else block_table.contiguous()
    out = bq.new_empty(batch, queries, heads, v_head_dim)
    lse = bq.new_empty(batch, queries, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse

    compute = _compute_dtype(bq, bk)
    shape = Shape(
        heads, head_dim, v_head_dim, None if aq is None else aq.shape[2], ak.shape[2], av.shape[2],
        queries, bk.element_size(), is_long(capacity),
    )  # fmt: skip
    device, processors = _device(bq.device)
    cut = choose_cut(device, shape) if cut is None else cut
    row_blocks = triton.cdiv(padded_rows(shape), cut.block_rows)
    span = capacity if window is None else min(capacity, window + queries - 1)
    if num_splits is None:
        slots = processors * cut.programs
        num_splits = choose_splits(batch * row_blocks, span, cut.block_m, slots)
    num_splits = max(1, min(num_splits, triton.cdiv(span, cut.block_m)))  # of a tile at least

    parts, part_lses = out, lse
    if num_splits > 1:
        rows = (batch, num_splits, queries, heads)
        parts = bq.new_empty(*rows, v_head_dim, dtype=torch.float32)
        part_lses = bq.new_empty(*rows, dtype=torch.float32)
    own_queries = queries_per_program(heads, cut.block_rows, queries)
    columns = own_queries * shape.q_rank if shape.q_rank is not None else 1
    stages = cut.num_stages + (2 if page and cut.num_stages > 1 else 0)  # pages are looked up before
    units = {name: _unit(factor) for name, factor in (("AK", ak), ("BK", bk), ("AV", av), ("BV", bv))}
    with torch.cuda.device(bq.device) if bq.device.type == "cuda" else nullcontext():
        _decode_split[(row_blocks * num_splits * batch,)](
            aq, *(aq.stride() if aq is not None else (0, 0, 0, 0)), bq, *bq.stride(),
            *_addressed(ak, units["AK"]), *_addressed(bk, units["BK"]),
            *_addressed(av, units["AV"]), *_addressed(bv, units["BV"]),
            k_scale, *(k_scale.stride() if k_scale is not None else (0, 0, 0)),
            v_scale, *(v_scale.stride() if v_scale is not None else (0, 0, 0)),
            bias, *(bias.stride() if bias is not None else (0, 0, 0, 0)),
            seq_lens, block_table, block_table.stride(0) if block_table is not None else 0,
            parts, part_lses,
            scale * math.log2(math.e), out_scale, capacity, window or 0, num_splits, row_blocks,
            N=queries, H=heads, D=head_dim, E=v_head_dim, RQ=shape.q_rank or 0, RK=shape.k_rank,
            RV=shape.v_rank, PAGE=page, WINDOWED=window is not None, FACTORED=cut.factored,
            ONE_PAGE=page == 0 or (page % cut.block_m == 0 and window is None),
            COMPUTE=tl.float32 if _INTERPRETED else _TYPES[compute],
            OFFSET=tl.int32 if all(_spans_little(x, cut.block_m) for x in (ak, bk, av, bv)) else tl.int64,
            DIRECT=num_splits == 1, PIPELINED=not _INTERPRETED, STAGES=stages, **units,
            UNROLLED=max(shape.k_rank, shape.v_rank) <= UNROLLED_RANKS,
            HEADS=padded_heads(heads), D_PAD=padded(head_dim), E_PAD=padded(v_head_dim),
            A_COLUMNS=padded(min(cut.block_rows, padded_heads(heads))),
            COLUMNS=columns, BLOCK_C=padded(columns) if cut.factored else min(_COLUMNS, padded(columns)),
            BLOCK_R=cut.block_rows, BLOCK_M=cut.block_m, num_warps=cut.num_warps, maxnreg=cut.registers,
        )  # fmt: skip
        if num_splits > 1:
            merge_parts(parts, part_lses, out, lse)
    return out, lse


def merge_parts(parts: Tensor, part_lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Algorithm 3: one result from those of several parts of the cache.

    Args:
        parts: (B, splits, N, H, E) float32; of an empty part anything.
        part_lses: (B, splits, N, H) float32, base 2; -inf: the part is empty.
        out: (B, N, H, E), written.
        lse: (B, N, H) float32, written, natural.
    """
    batch, num_splits, queries, heads, width = parts.shape
    _merge_splits[(batch * queries * heads,)](
        parts, part_lses, out, lse, num_splits, queries * heads,
        E=width, E_PAD=padded(width), BLOCK_L=_MERGED_LSES,
        BLOCK_S=max(16, _MERGED_NUMBERS // padded(width)), num_warps=8,
    )  # fmt: skip


def _compute_dtype(bq: Tensor, bk: Tensor) -> torch.dtype:
    """The dtype of the matrix products: that of the queries for quantised factors, else the wider one."""
    return bq.dtype if bk.dtype in _QUANTISED else torch.promote_types(bq.dtype, bk.dtype)


def _unit(factor: Tensor) -> int:
    """Numbers, 16 bytes at most, by which the strides of pages and tokens are multiples.

    Kernels get strides in this unit, so the compiler knows how wide it may load, and is not asked again when
    a stride changes with the length.
    """
    return math.gcd(factor.stride(0), factor.stride(1), 16 // factor.element_size()) or 1


def _addressed(factor: Tensor, unit: int) -> tuple[Tensor, int, int, int, int]:
    """A factor and its strides as kernels take them."""
    of_page, of_token, of_rank, of_feature = factor.stride()
    return factor, of_page // unit, of_token // unit, of_rank, of_feature


def _spans_little(factor: Tensor, tokens: int) -> bool:
    """Whether offsets within a tile fit in 32 bits."""
    steps = (tokens, factor.shape[2], padded(factor.shape[3]))
    return sum(n * stride for n, stride in zip(steps, factor.stride()[1:], strict=True)) < 1 << 31


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors."""
    if device.type != "cuda":
        return device.type, 4
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@triton.jit(do_not_specialize=[*_LENGTHS, *_BATCH_STRIDES])
def _decode_split(
    aq, aq_b, aq_n, aq_r, aq_h, bq, bq_b, bq_n, bq_r, bq_d,
    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r, bk_d,
    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r, bv_e,
    k_scale, ks_b, ks_t, ks_r, v_scale, vs_b, vs_t, vs_r,
    bias, bias_b, bias_h, bias_n, bias_m, seq_lens, block_table, table_b, parts, part_lses,
    scale, out_scale, capacity, window, num_splits, row_blocks,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr,
    RV: tl.constexpr, AK: tl.constexpr, BK: tl.constexpr, AV: tl.constexpr, BV: tl.constexpr,
    PAGE: tl.constexpr, ONE_PAGE: tl.constexpr, WINDOWED: tl.constexpr, FACTORED: tl.constexpr,
    COMPUTE: tl.constexpr, OFFSET: tl.constexpr, DIRECT: tl.constexpr, PIPELINED: tl.constexpr,
    STAGES: tl.constexpr, UNROLLED: tl.constexpr, HEADS: tl.constexpr, D_PAD: tl.constexpr,
    E_PAD: tl.constexpr, A_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_R (query, head) rows to one split of one sequence; its LSE, base 2 unless DIRECT.

    Truth: `reference` with the tokens of the split. Floor: reading them once, R_K (D + h) + R_V (E + h)
    numbers each; programs of the same tokens stand next to one another in the grid and share the cache.
    """
    program = tl.program_id(0)
    row_block = program % row_blocks
    split = (program // row_blocks) % num_splits
    b = (program // row_blocks // num_splits).to(tl.int64)
    length = capacity
    if seq_lens is not None:
        length = tl.load(seq_lens + b).to(tl.int32)
    begin = 0
    if WINDOWED:  # what every query has left behind is not read
        begin = tl.maximum(length - N + 1 - window, 0)
    end = tl.minimum(length, capacity)
    # as many tiles for each split, of what this sequence has: a short one keeps all its programs busy
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    share = tl.cdiv(tiles, num_splits) * BLOCK_M
    begin += split * share
    stop = tl.minimum(begin + share, end)

    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    n = row // HEADS
    h = row % HEADS
    saved = (n < N) & (h < H)
    at = ((b * num_splits + split) * N + n) * H + h
    if (begin >= stop) & (not DIRECT):
        tl.store(part_lses + at, tl.full((BLOCK_R,), float("-inf"), tl.float32), mask=saved)
    else:
        d = tl.arange(0, D_PAD)
        e = tl.arange(0, E_PAD)
        first_query = row_block * BLOCK_R // HEADS
        c = tl.arange(0, BLOCK_C)
        columns = tl.arange(0, A_COLUMNS)  # heads of the program
        if BLOCK_R < HEADS:
            columns += row_block % (HEADS // BLOCK_R) * BLOCK_R
        select = ((h[:, None] == columns[None, :]) & (columns < H)[None, :]).to(COMPUTE)
        if RQ == 0:
            q_at = b * bq_b + (n * bq_n + h * bq_r)[:, None] + d[None, :] * bq_d
            q = tl.load(bq + q_at, mask=saved[:, None] & (d < D)[None, :], other=0.0).to(tl.float32) * scale
            q = q.to(COMPUTE)
            mix = q
        elif FACTORED:
            mix, q = columns_of_query(
                aq, aq_b, aq_n, aq_r, aq_h, bq, bq_b, bq_n, bq_r, bq_d, b, first_query, n, h, c, d,
                N, H, D, RQ, COLUMNS, COMPUTE,
            )  # fmt: skip
        else:
            formed = tl.zeros((BLOCK_R, D_PAD), dtype=tl.float32)
            for start in tl.static_range(0, COLUMNS, BLOCK_C):
                mix, rows = columns_of_query(
                    aq, aq_b, aq_n, aq_r, aq_h, bq, bq_b, bq_n, bq_r, bq_d, b, first_query, n, h,
                    start + c, d, N, H, D, RQ, COLUMNS, COMPUTE,
                )  # fmt: skip
                formed = tl.dot(mix, rows, acc=formed, input_precision="ieee")
            q = (formed * scale).to(COMPUTE)
            mix = q

        y = tl.zeros((BLOCK_R, E_PAD), dtype=tl.float32)
        total = tl.zeros((BLOCK_R,), dtype=tl.float32)
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        full = begin  # up to here no token needs a mask
        if not WINDOWED:
            seen_by_all = tl.minimum(stop, length - N + 1)
            full += tl.maximum(seen_by_all - begin, 0) // BLOCK_M * BLOCK_M
        if PIPELINED:
            if not WINDOWED:
                for first in tl.range(begin, full, BLOCK_M, num_stages=STAGES):
                    y, total, top = take_in(
                        y, total, top, first, stop, length, q, mix, select, n, h, columns, d, e, b, scale,
                        ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r, bk_d,
                        av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r, bv_e,
                        k_scale, ks_b, ks_t, ks_r, v_scale, vs_b, vs_t, vs_r,
                        bias, bias_b, bias_h, bias_n, bias_m, block_table, table_b, window,
                        N, H, D, E, RK, RV, AK, BK, AV, BV, PAGE, ONE_PAGE, WINDOWED, FACTORED, COMPUTE,
                        OFFSET, UNROLLED, HEADS, D_PAD, E_PAD, A_COLUMNS, BLOCK_R, BLOCK_M, False,
                    )  # fmt: skip
            for first in tl.range(full, stop, BLOCK_M, num_stages=STAGES if WINDOWED else 1):
                y, total, top = take_in(
                    y, total, top, first, stop, length, q, mix, select, n, h, columns, d, e, b, scale,
                    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r, bk_d,
                    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r, bv_e,
                    k_scale, ks_b, ks_t, ks_r, v_scale, vs_b, vs_t, vs_r,
                    bias, bias_b, bias_h, bias_n, bias_m, block_table, table_b, window,
                    N, H, D, E, RK, RV, AK, BK, AV, BV, PAGE, ONE_PAGE, WINDOWED, FACTORED, COMPUTE, OFFSET,
                    UNROLLED, HEADS, D_PAD, E_PAD, A_COLUMNS, BLOCK_R, BLOCK_M, True,
                )  # fmt: skip
        else:
            first = begin
            while first < full:
                y, total, top = take_in(
                    y, total, top, first, stop, length, q, mix, select, n, h, columns, d, e, b, scale,
                    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r, bk_d,
                    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r, bv_e,
                    k_scale, ks_b, ks_t, ks_r, v_scale, vs_b, vs_t, vs_r,
                    bias, bias_b, bias_h, bias_n, bias_m, block_table, table_b, window,
                    N, H, D, E, RK, RV, AK, BK, AV, BV, PAGE, ONE_PAGE, WINDOWED, FACTORED, COMPUTE, OFFSET,
                    UNROLLED, HEADS, D_PAD, E_PAD, A_COLUMNS, BLOCK_R, BLOCK_M, False,
                )  # fmt: skip
                first += BLOCK_M
            while first < stop:
                y, total, top = take_in(
                    y, total, top, first, stop, length, q, mix, select, n, h, columns, d, e, b, scale,
                    ak, ak_b, ak_t, ak_r, ak_h, bk, bk_b, bk_t, bk_r, bk_d,
                    av, av_b, av_t, av_r, av_h, bv, bv_b, bv_t, bv_r, bv_e,
                    k_scale, ks_b, ks_t, ks_r, v_scale, vs_b, vs_t, vs_r,
                    bias, bias_b, bias_h, bias_n, bias_m, block_table, table_b, window,
                    N, H, D, E, RK, RV, AK, BK, AV, BV, PAGE, ONE_PAGE, WINDOWED, FACTORED, COMPUTE, OFFSET,
                    UNROLLED, HEADS, D_PAD, E_PAD, A_COLUMNS, BLOCK_R, BLOCK_M, True,
                )  # fmt: skip
                first += BLOCK_M

        y = y * (out_scale / tl.where(total > 0, total, 1.0))[:, None]
        tl.store(
            parts + at[:, None] * E + e[None, :],
            y.to(parts.dtype.element_ty),
            mask=saved[:, None] & (e < E)[None, :],
        )
        lse = top + tl.log2(tl.where(total > 0, total, 1.0))
        if DIRECT:
            lse = lse * _LN2
        tl.store(part_lses + at, lse, mask=saved)


@triton.jit(do_not_specialize=["num_splits", "rows"])
def _merge_splits(
    parts, part_lses, out, lse, num_splits, rows,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row of the output from its splits. What an empty split left is not loaded.

    The largest LSE comes first, so that blocks of splits are added without waiting for one another.
    Truth: `reference.merge_partials`. Floor: reading the splits, below 2 % of a long cache.
    """
    program = tl.program_id(0).to(tl.int64)
    first_row = program // rows * num_splits * rows + program % rows
    of_all = tl.arange(0, BLOCK_L)
    largest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    first = 0
    while first < num_splits:
        at = first_row + (first + of_all).to(tl.int64) * rows
        found = tl.load(part_lses + at, mask=first + of_all < num_splits, other=float("-inf"))
        largest = tl.maximum(largest, found)
        first += BLOCK_L
    top = tl.max(largest, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)

    s = tl.arange(0, BLOCK_S)
    e = tl.arange(0, E_PAD)
    y = tl.zeros((BLOCK_S, E_PAD), dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    first = 0
    while first < num_splits:
        at = first_row + (first + s).to(tl.int64) * rows
        part_lse = tl.load(part_lses + at, mask=first + s < num_splits, other=float("-inf"))
        known = (part_lse > float("-inf"))[:, None] & (e < E)[None, :]
        part = tl.load(parts + at[:, None] * E + e[None, :], mask=known, other=0.0)
        weights = tl.exp2(part_lse - shift)
        y += weights[:, None] * part
        total += weights
        first += BLOCK_S
    weight = tl.sum(total, 0)
    weight = tl.where(weight > 0, weight, 1.0)
    tl.store(out + program * E + e, (tl.sum(y, 0) / weight).to(out.dtype.element_ty), mask=e < E)
    tl.store(lse + program, (top + tl.log2(weight)) * _LN2)


_INTERPRETED = not isinstance(_decode_split, triton.JITFunction)
