"""Split decode kernels for what TPA is compared with: grouped-query attention and absorbed MLA, in Triton.

Plain flash-decoding: a program takes the tokens of one split for all query heads that share them, keeps a
running softmax, and the partial results are merged by the kernel that TPA uses. They are the peers to beat,
so what helps TPA is here as well: exp2, masks in the last tile only, pipelined tiles, splits that fill whole
waves, and a short list of tile sizes of which the caller takes the fastest.

    grouped   K, V (B, G, M, D): scores of the h / G heads of a group, rows padded to 16
    latent    one cache (B, M, d_c + d_R): its first d_c numbers are key and value, read once

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; DeepSeek-AI 2024 (arXiv 2405.04434).
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# Triton's own language is Python only in form

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpa_attention.torch.kernels.decode import merge_parts
from tpa_attention.torch.kernels.decode_config import choose_splits, padded

_LENGTHS = ("tokens", "length", "num_splits")


@dataclass(frozen=True)
class Tiles:
    """Tokens per tile, warps, pipeline stages, programs per multiprocessor, heads per program (MLA)."""

    tokens: int
    warps: int
    stages: int
    programs: int
    rows: int = 32


GROUPED = [Tiles(64, 4, 3, 4), Tiles(128, 4, 3, 2), Tiles(64, 2, 3, 6), Tiles(128, 8, 3, 2)]
LATENT = [Tiles(32, 4, 3, 2), Tiles(32, 8, 3, 2), Tiles(64, 8, 2, 1), Tiles(32, 8, 3, 1, 64)]


def grouped_decode(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
    """Attention of q (B, h, D) to k, v (B, G, M, D), which are contiguous; (B, h, D).

    Args:
        q: head i belongs to group i // (h / G).
        k: keys.
        v: values.
        tiles: how to cut.
    """
    B, h, D = q.shape
    G, M = k.shape[1:3]
    splits, length = _splits(q, B * G, M, tiles)
    parts, lses = _scratch(q, splits, D)
    _grouped_split[(splits * G * B,)](
        q, k, v, parts, lses, D**-0.5 * math.log2(math.e), M, length, splits,
        G=G, SHARE=h // G, D=D, D_PAD=padded(D), ROWS=padded(h // G), BLOCK_M=tiles.tokens,
        STAGES=tiles.stages, PIPELINED=_COMPILED, COMPUTE=_compute(q), num_warps=tiles.warps,
    )  # fmt: skip
    return _merged(q, parts, lses)


def latent_decode(q: Tensor, cache: Tensor, latent: int, scale: float, tiles: Tiles) -> Tensor:
    """Attention of q (B, h, d_c + d_R) to cache (B, M, d_c + d_R), contiguous; (B, h, d_c).

    Args:
        q: with W^UK absorbed.
        cache: latents and rotary keys.
        latent: d_c.
        scale: of the logits.
        tiles: how to cut.
    """
    B, h, width = q.shape
    M = cache.shape[1]
    rows = min(tiles.rows, padded(h))
    blocks = -(-h // rows)
    splits, length = _splits(q, B * blocks, M, tiles)
    parts, lses = _scratch(q, splits, latent)
    _latent_split[(blocks * splits * B,)](
        q, cache, parts, lses, scale * math.log2(math.e), M, length, splits,
        H=h, C=latent, R=width - latent, C_PAD=padded(latent), R_PAD=padded(width - latent), ROWS=rows,
        BLOCKS=blocks, BLOCK_M=tiles.tokens, STAGES=tiles.stages, PIPELINED=_COMPILED, COMPUTE=_compute(q),
        num_warps=tiles.warps,
    )  # fmt: skip
    return _merged(q, parts, lses)


def _splits(q: Tensor, groups: int, tokens: int, tiles: Tiles) -> tuple[int, int]:
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    splits = choose_splits(groups, tokens, tiles.tokens, processors * tiles.programs)
    length = triton.cdiv(triton.cdiv(tokens, tiles.tokens), splits) * tiles.tokens
    return -(-tokens // length), length


def _scratch(q: Tensor, splits: int, width: int) -> tuple[Tensor, Tensor]:
    rows = (q.shape[0], splits, 1, q.shape[1])
    return q.new_empty(*rows, width, dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)


def _merged(q: Tensor, parts: Tensor, lses: Tensor) -> Tensor:
    out = q.new_empty(q.shape[0], 1, q.shape[1], parts.shape[-1])
    merge_parts(parts, lses, out, q.new_empty(out.shape[:-1], dtype=torch.float32))
    return out[:, 0]


def _compute(q: Tensor) -> Any:
    if not _COMPILED:  # the interpreter cannot multiply bfloat16
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[q.dtype]


@triton.jit
def _softmax_step(scores, top, total, y):
    """The running softmax: weights of a tile, and what was summed before, rescaled."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    keep = tl.exp2(top - new_top)
    p = tl.exp2(scores - new_top[:, None])
    return p, new_top, total * keep + tl.sum(p, 1), y * keep[:, None]


@triton.jit
def _grouped_tile(
    y, total, top, q, k_at, v_at, first, stop, d,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    at = first.to(tl.int64) * D
    inside = (first + tl.arange(0, BLOCK_M) < stop)[:, None] & (d < D)[None, :]
    if MASKED or D != D_PAD:
        k = tl.load(k_at + at, mask=inside, other=0.0).to(COMPUTE)
        v = tl.load(v_at + at, mask=inside, other=0.0).to(COMPUTE)
    else:
        k = tl.load(k_at + at).to(COMPUTE)
        v = tl.load(v_at + at).to(COMPUTE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where((first + tl.arange(0, BLOCK_M) < stop)[None, :], scores, float("-inf"))
    p, top, total, y = _softmax_step(scores, top, total, y)
    return tl.dot(p.to(COMPUTE), v, acc=y, input_precision="ieee"), total, top


@triton.jit(do_not_specialize=[*_LENGTHS])
def _grouped_split(
    q, k, v, parts, lses, scale, tokens, length, num_splits,
    G: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PIPELINED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One group's heads and one split. Truth: `contenders.attention`; floor: reading K and V once."""
    program = tl.program_id(0)
    split = program % num_splits
    group = (program // num_splits % G).to(tl.int64)
    b = (program // num_splits // G).to(tl.int64)
    begin = split * length
    stop = tl.minimum(begin + length, tokens)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    t = tl.arange(0, BLOCK_M)
    known = (row < SHARE)[:, None] & (d < D)[None, :]
    heads = (b * G + group) * SHARE + row
    x = tl.load(q + heads[:, None] * D + d[None, :], mask=known, other=0.0).to(tl.float32)
    x = (x * scale).to(COMPUTE)
    tile = (t * D)[:, None] + d[None, :]
    k_at = k + (b * G + group) * tokens * D + tile
    v_at = v + (b * G + group) * tokens * D + tile
    y = tl.zeros((ROWS, D_PAD), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    full = begin + (stop - begin) // BLOCK_M * BLOCK_M
    if PIPELINED:
        for first in tl.range(begin, full, BLOCK_M, num_stages=STAGES):
            y, total, top = _grouped_tile(
                y, total, top, x, k_at, v_at, first, stop, d, D, D_PAD, BLOCK_M, False, COMPUTE
            )
    else:
        first = begin
        while first < full:
            y, total, top = _grouped_tile(
                y, total, top, x, k_at, v_at, first, stop, d, D, D_PAD, BLOCK_M, False, COMPUTE
            )
            first += BLOCK_M
    if full < stop:
        y, total, top = _grouped_tile(
            y, total, top, x, k_at, v_at, full, stop, d, D, D_PAD, BLOCK_M, True, COMPUTE
        )
    out = ((b * num_splits + split) * G + group) * SHARE + row
    tl.store(parts + out[:, None] * D + d[None, :], y / total[:, None], mask=known)
    tl.store(lses + out, top + tl.log2(total), mask=row < SHARE)


@triton.jit
def _latent_tile(
    y, total, top, q, q_rotary, c_at, r_at, first, stop, c, r,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    at = first.to(tl.int64) * (C + R)
    inside = first + tl.arange(0, BLOCK_M) < stop
    if MASKED or C != C_PAD or R != R_PAD:
        latents = tl.load(c_at + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(COMPUTE)
        rotary = tl.load(r_at + at, mask=inside[:, None] & (r < R)[None, :], other=0.0).to(COMPUTE)
    else:
        latents = tl.load(c_at + at).to(COMPUTE)
        rotary = tl.load(r_at + at).to(COMPUTE)
    scores = tl.dot(q, tl.trans(latents), input_precision="ieee")
    scores = tl.dot(q_rotary, tl.trans(rotary), acc=scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    p, top, total, y = _softmax_step(scores, top, total, y)
    return tl.dot(p.to(COMPUTE), latents, acc=y, input_precision="ieee"), total, top


@triton.jit(do_not_specialize=[*_LENGTHS])
def _latent_split(
    q, cache, parts, lses, scale, tokens, length, num_splits,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    PIPELINED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """ROWS heads and one split. Truth: `contenders.attention`; floor: reading the cache once."""
    program = tl.program_id(0)
    block = program % BLOCKS
    split = program // BLOCKS % num_splits
    b = (program // BLOCKS // num_splits).to(tl.int64)
    begin = split * length
    stop = tl.minimum(begin + length, tokens)
    row = block * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C_PAD)
    r = tl.arange(0, R_PAD)
    t = tl.arange(0, BLOCK_M)
    of_head = (row < H)[:, None]
    q_at = q + ((b * H + row) * (C + R))[:, None]
    x = tl.load(q_at + c[None, :], mask=of_head & (c < C)[None, :], other=0.0).to(tl.float32)
    x_rotary = tl.load(q_at + C + r[None, :], mask=of_head & (r < R)[None, :], other=0.0).to(tl.float32)
    x = (x * scale).to(COMPUTE)
    x_rotary = (x_rotary * scale).to(COMPUTE)
    c_at = cache + b * tokens * (C + R) + (t * (C + R))[:, None] + c[None, :]
    r_at = cache + b * tokens * (C + R) + (t * (C + R))[:, None] + (C + r)[None, :]
    y = tl.zeros((ROWS, C_PAD), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    full = begin + (stop - begin) // BLOCK_M * BLOCK_M
    if PIPELINED:
        for first in tl.range(begin, full, BLOCK_M, num_stages=STAGES):
            y, total, top = _latent_tile(
                y, total, top, x, x_rotary, c_at, r_at, first, stop, c, r,
                C, R, C_PAD, R_PAD, BLOCK_M, False, COMPUTE,
            )  # fmt: skip
    else:
        first = begin
        while first < full:
            y, total, top = _latent_tile(
                y, total, top, x, x_rotary, c_at, r_at, first, stop, c, r,
                C, R, C_PAD, R_PAD, BLOCK_M, False, COMPUTE,
            )  # fmt: skip
            first += BLOCK_M
    if full < stop:
        y, total, top = _latent_tile(
            y, total, top, x, x_rotary, c_at, r_at, full, stop, c, r,
            C, R, C_PAD, R_PAD, BLOCK_M, True, COMPUTE,
        )  # fmt: skip
    out = (b * num_splits + split) * H + row
    tl.store(parts + out[:, None] * C + c[None, :], y / total[:, None], mask=of_head & (c < C)[None, :])
    tl.store(lses + out, top + tl.log2(total), mask=row < H)


_COMPILED = isinstance(_grouped_split, triton.JITFunction)
