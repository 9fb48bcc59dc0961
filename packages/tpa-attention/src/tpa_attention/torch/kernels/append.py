"""Paged append on CUDA: K record, V record and position of every new token in one kernel.

    pool[block_table[b, place // PAGE], place % PAGE] = record[b, t],    place = seq_lens[b] + t

The truth is `..append`. Floor: reading and writing the new records once; at a token per step the launch is
what it costs, and plain torch needs a dozen of them. With TRITON_INTERPRET=1 the kernel runs on the CPU.

Source: Kwon et al. 2023 (arXiv 2309.06180), Section 4.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 1024  # of a record per program
# numbers that change from call to call: the kernel is not compiled again because one of them is 1 or even
_SIZES = ("new", "pages", "blocks", "table_b", "k_b", "v_b", "at_b")


def append_paged_triton(
    pool_k: Tensor,
    pool_v: Tensor,
    pool_positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> None:
    """See `..append`, whose arguments these are: float32, float16 or bfloat16, of any strides."""
    batch, new, width = k.shape[0], k.shape[1], max(k.shape[2], v.shape[2])
    if batch * new == 0:
        return
    block = min(_NUMBERS, triton.next_power_of_2(max(width, 16)))
    seq_lens = seq_lens.contiguous()
    with torch.cuda.device(k.device) if k.device.type == "cuda" else nullcontext():
        _append_records[(batch * new, triton.cdiv(width, block) or 1)](
            pool_k, *pool_k.stride(), pool_v, *pool_v.stride(), k, *k.stride(), v, *v.stride(),
            pool_positions, *(pool_positions.stride() if pool_positions is not None else (0, 0)),
            positions, *(positions.stride() if positions is not None else (0, 0)),
            block_table, *block_table.stride(), seq_lens, new, block_table.shape[1], pool_k.shape[0],
            WK=k.shape[2], WV=v.shape[2], PAGE=pool_k.shape[1], BLOCK=block, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES])
def _append_records(
    pool_k, pk_b, pk_t, pk_w, pool_v, pv_b, pv_t, pv_w, k, k_b, k_t, k_w, v, v_b, v_t, v_w,
    pool_positions, kept_b, kept_t, positions, at_b, at_t, block_table, table_b, table_p, seq_lens,
    new, pages, blocks,
    WK: tl.constexpr, WV: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of both records of one token. Truth: `append`. Floor: one read and one write of them."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    b, t = row // new, row % new
    place = tl.load(seq_lens + b).to(tl.int64) + t
    known = (place >= 0) & (place < pages.to(tl.int64) * PAGE)
    page = tl.load(block_table + b * table_b + (place // PAGE) * table_p, mask=known, other=-1).to(tl.int64)
    known = known & (page >= 0) & (page < blocks)
    slot = place % PAGE
    w = piece * BLOCK + tl.arange(0, BLOCK)
    # limits, since the interpreter makes integers of a scalar mask that meets a block
    of_k, of_v = w < tl.where(known, WK, 0), w < tl.where(known, WV, 0)
    numbers = tl.load(k + b * k_b + t * k_t + w * k_w, mask=of_k, other=0.0)
    tl.store(pool_k + page * pk_b + slot * pk_t + w * pk_w, numbers.to(pool_k.dtype.element_ty), mask=of_k)
    numbers = tl.load(v + b * v_b + t * v_t + w * v_w, mask=of_v, other=0.0)
    tl.store(pool_v + page * pv_b + slot * pv_t + w * pv_w, numbers.to(pool_v.dtype.element_ty), mask=of_v)
    if pool_positions is not None:
        at = place
        if positions is not None:
            at = tl.load(positions + b * at_b + t * at_t).to(tl.int64)
        first = known & (piece == 0)
        tl.store(
            pool_positions + page * kept_b + slot * kept_t, at.to(pool_positions.dtype.element_ty), mask=first
        )
