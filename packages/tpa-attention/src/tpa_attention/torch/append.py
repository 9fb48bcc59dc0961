"""Records of new tokens into pages, in place: the operator `tpa::append_paged`.

    place = seq_lens[b] + t,    pool[block_table[b, place // block_size], place % block_size] = record[b, t]

Lengths and table are read on the device, so a CUDA graph that holds the call writes wherever they point when
it is replayed. On CUDA this is one Triton kernel for K, V and positions; elsewhere plain indexing, and on the
CPU with TRITON_INTERPRET=1 the kernel again, interpreted.

`pool_positions` has no default because torch up to 2.11 cannot call an operator that leaves out what it
writes to (https://github.com/pytorch/pytorch/issues/176078).

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3 (what is cached); Kwon et al. 2023 (arXiv 2309.06180),
Section 4 (pages).
"""

import torch
from torch import Tensor

from tpa_attention.torch.arguments import check_integers, readable
from tpa_attention.torch.kernel_support import HAS_TRITON, KERNEL_TYPES, runs_kernels


@torch.library.custom_op("tpa::append_paged", mutates_args=("pool_k", "pool_v", "pool_positions"))
def append_paged(
    pool_k: Tensor,
    pool_v: Tensor,
    pool_positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> None:
    """Write T records behind the `seq_lens` tokens of each sequence; lengths and table stay as they are.

    Args:
        pool_k: K records in pages, (num_blocks, block_size, W_K); written to.
        pool_v: V records, alike.
        pool_positions: (num_blocks, block_size) integers, written to, or None.
        k: new K records (B, T, w), w <= W_K, cast to the pool's type; what lies behind w is left alone.
        v: new V records, alike.
        block_table: (B, pages) integers, the blocks of each sequence in order. Blocks that are written to
            belong to one sequence alone.
        seq_lens: (B,) integers, tokens before these.
        positions: (B, T) integers kept in `pool_positions`; the place in the sequence if None.

    Raises:
        TypeError: if lengths, table or positions hold no integers.
        ValueError: if shapes or devices do not fit, or, on the CPU, the tokens lie outside of the table or
            the table names blocks that are not there; nothing has been written then. On an accelerator,
            where looking would wait, the kernel leaves such tokens out.
    """
    _check(pool_k, pool_v, pool_positions, k, v, block_table, seq_lens, positions)
    arguments = (pool_k, pool_v, pool_positions, k, v, block_table, seq_lens, positions)
    known = all(tensor.dtype in KERNEL_TYPES for tensor in (pool_k, pool_v, k, v))
    if not (known and HAS_TRITON and runs_kernels(pool_k.device)):
        _append_plainly(*arguments)
        return
    from tpa_attention.torch.kernels.append import append_paged_triton

    append_paged_triton(*arguments)


@append_paged.register_fake
def _append_nothing(
    pool_k: Tensor,
    pool_v: Tensor,
    pool_positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> None:
    _check_shapes(pool_k, pool_v, pool_positions, k, v, block_table, seq_lens, positions)


def _append_plainly(
    pool_k: Tensor,
    pool_v: Tensor,
    pool_positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None,
) -> None:
    place = seq_lens[:, None].long() + torch.arange(k.shape[1], device=k.device)
    page = place // pool_k.shape[1]
    block = block_table.gather(1, page).long()
    at = (block, place % pool_k.shape[1])
    pool_k[(*at, slice(0, k.shape[2]))] = k.to(pool_k.dtype)
    pool_v[(*at, slice(0, v.shape[2]))] = v.to(pool_v.dtype)
    if pool_positions is not None:
        pool_positions[at] = (place if positions is None else positions).to(pool_positions.dtype)


def _check(
    pool_k: Tensor,
    pool_v: Tensor,
    pool_positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None,
) -> None:
    """Raise before anything is written."""
    _check_shapes(pool_k, pool_v, pool_positions, k, v, block_table, seq_lens, positions)
    if not readable(seq_lens) or k.shape[0] == 0 or k.shape[1] == 0:
        return
    blocks, size = pool_k.shape[:2]
    new, room = k.shape[1], block_table.shape[1] * size
    if int(seq_lens.min()) < 0 or int(seq_lens.max()) + new > room:
        raise ValueError(
            f"seq_lens must leave room for {new} new tokens in the {room} places of block_table, "
            f"got {seq_lens.tolist()}"
        )
    place = seq_lens[:, None].long() + torch.arange(new)
    used = block_table.gather(1, place // size)
    if int(used.min()) < 0 or int(used.max()) >= blocks:
        raise ValueError(
            f"block_table must name blocks in [0, {blocks}) where tokens go, got {used.tolist()}"
        )


def _check_shapes(
    pool_k: Tensor,
    pool_v: Tensor,
    pool_positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None,
) -> None:
    """Everything but values."""
    for name, tensor in (("pool_k", pool_k), ("pool_v", pool_v), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 axes, got shape {tuple(tensor.shape)}")
    batch, new = k.shape[:2]
    wanted = (
        ("pool_v", pool_v, (*pool_k.shape[:2], pool_v.shape[2])),
        ("v", v, (batch, new, v.shape[2])),
        ("block_table", block_table, (batch, block_table.shape[-1])),
        ("seq_lens", seq_lens, (batch,)),
        ("pool_positions", pool_positions, tuple(pool_k.shape[:2])),
        ("positions", positions, (batch, new)),
    )
    for name, tensor, shape in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != pool_k.device:
            raise ValueError(f"{name} must be on {pool_k.device} like pool_k, got {tensor.device}")
        if name not in ("pool_v", "v"):
            check_integers(name, tensor)
    for name, records, pool in (("k", k, pool_k), ("v", v, pool_v)):
        if records.shape[2] > pool.shape[2]:
            raise ValueError(
                f"{name} must be at most as wide as its pool, {pool.shape[2]}, got {records.shape[2]}"
            )
    if k.device != pool_k.device:
        raise ValueError(f"k must be on {pool_k.device} like pool_k, got {k.device}")
    if positions is not None and pool_positions is None:
        raise ValueError("positions must be None where pool_positions is: there is no place to keep them")
