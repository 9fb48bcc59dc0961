"""The operators of the package in torch.library, so that torch.compile and torch.export see one node each.

    decode(aq, bq, ak, bk, av, bv, seq_lens=None, block_table=None, bias=None, window=None,
           scale=1.0, out_scale=1.0, k_scale=None, v_scale=None, num_splits=None) -> (out, lse)

The contract between `functional.py`, which explains what users got wrong, and kernels, which read memory:

- N = 1..16 query tokens: aq (B, N, R_Q, H) and bq (B, N, R_Q, D), rotated; aq None: bq is Q, (B, N, H, D).
- Cached factors as views with any strides, nothing is copied: ak (B, M, R_K, H), bk (B, M, R_K, D),
  av (B, M, R_V, H), bv (B, M, R_V, E). `RecordLayout.views` gives them for records, `expand` for parts that
  no token carries.
- With block_table (B, blocks) int32 they are pages, (num_blocks, block_size, R, ..): M = blocks * block_size.
- seq_lens (B,) integers on the device, None: all M tokens are valid. Query n stands at seq_len - N + n and
  sees itself and what precedes it, `window` keys at most. What lies past seq_len is never read.
- bias: floating, (B, H, N, M) by `expand`; enters once, -inf forbids.
- scale: the whole factor of the logits, s_Q s_K / sqrt(D). out_scale: s_V. Nothing is scaled a second time.
- k_scale (B, M, R_K), v_scale (B, M, R_V) float32, paged alike: the product of the scales of a row of A and
  of B, for quantised factors (int8, float8_e4m3fn); None: factors are as they are.
- num_splits: parts of the cache that are read in parallel; None: chosen from the shapes alone, so a CUDA
  graph can hold the call.
- out (B, N, H, E) has the dtype of bq; lse (B, N, H), natural logarithm of the scaled logits, is float32,
  float64 for float64. A row without any valid key: 0 and -inf.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithms 2-3.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from tpa_attention.torch.kernel_support import KERNEL_TYPES, runs_kernels
from tpa_attention.torch.reference import tpa_decode_factors

QUANTISED_TYPES = (torch.int8, torch.float8_e4m3fn)


@torch.library.custom_op("tpa::decode", mutates_args=())
def decode(
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
) -> tuple[Tensor, Tensor]:
    """Attention of N new queries to cached factors; arguments and results: see the module.

    On CUDA this is the Triton kernel, but for float64; elsewhere `reference.tpa_decode_factors`, and on the
    CPU with TRITON_INTERPRET=1 the kernel again, interpreted.

    Raises:
        ValueError: if shapes do not fit, N is not in 1..16, or a number is out of range.
        TypeError: if a tensor has a type that its place does not take.

    Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithms 2-3.
    """
    _check(aq, bq, ak, bk, av, bv, seq_lens, block_table, bias, window, k_scale, v_scale, num_splits)
    arguments = (
        aq,
        bq,
        ak,
        bk,
        av,
        bv,
        seq_lens,
        block_table,
        bias,
        window,
        scale,
        out_scale,
        k_scale,
        v_scale,
    )
    if not _uses_kernel(bq, ak, bk, av, bv):
        return _decode_plainly(*arguments)
    try:
        from tpa_attention.torch.kernels.decode import decode_triton
    except ModuleNotFoundError as error:
        raise RuntimeError(
            'tpa::decode on CUDA needs triton, which is not installed: pip install "tpa-attention[triton]"'
        ) from error
    return decode_triton(*arguments, num_splits)


@decode.register_fake
def _decode_shapes(
    aq: Tensor | None,
    bq: Tensor,
    _ak: Tensor,
    _bk: Tensor,
    _av: Tensor,
    bv: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor]:
    heads = bq.shape[2] if aq is None else aq.shape[3]
    rows = (bq.shape[0], bq.shape[1], heads)
    wide = [torch.promote_types(factor.dtype, torch.float32) for factor in (aq, bq) if factor is not None]
    lse_type = torch.float64 if torch.float64 in wide else torch.float32
    return bq.new_empty(*rows, bv.shape[3]), bq.new_empty(rows, dtype=lse_type)


def _no_gradient(_ctx: Any, *_grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "tpa::decode is for inference and has no gradient: decode under torch.no_grad(), train with "
        'tpa_attention, or take impl="reference", which is differentiable'
    )


decode.register_autograd(_no_gradient)


def _uses_kernel(bq: Tensor, *cached: Tensor) -> bool:
    taken = bq.dtype in KERNEL_TYPES and all(x.dtype in KERNEL_TYPES + QUANTISED_TYPES for x in cached)
    return taken and runs_kernels(bq.device)


def _decode_plainly(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
    out_scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same by einsums, which read the cache in one piece."""
    ak, bk = _contiguous_floats(ak, bk, k_scale, block_table)
    av, bv = _contiguous_floats(av, bv, v_scale, block_table)
    wide = bq.to(torch.promote_types(bq.dtype, torch.float32))
    out, lse = tpa_decode_factors(
        aq, wide, ak, bk, av, bv,
        seq_lens=seq_lens, attn_bias=bias, window=window, scale=scale, rank_scale=False,
    )  # fmt: skip
    out = (out * out_scale).to(bq.dtype)
    # `contiguous` would leave odd strides at sizes of 1, where `_decode_shapes` promises none
    return out.clone(memory_format=torch.contiguous_format), lse.clone(memory_format=torch.contiguous_format)


def _contiguous_floats(
    a: Tensor, b: Tensor, scale: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A and B of every token in order: pages gathered, quantised rows multiplied by their scales."""
    if scale is not None:
        a, b = a.to(torch.float32) * scale.unsqueeze(-1), b.to(torch.float32)
    if block_table is None:
        return a, b
    used = block_table.long().clamp(0, a.shape[0] - 1)  # entries past the length may be anything
    return a[used].flatten(1, 2), b[used].flatten(1, 2)


def _check(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    num_splits: int | None,
) -> None:
    """Raise before a kernel reads memory that is not there."""
    for name, factor in (("ak", ak), ("bk", bk), ("av", av), ("bv", bv), ("bq", bq)):
        if factor.dim() != 4:
            raise ValueError(f"{name} must have 4 axes, got shape {tuple(factor.shape)}")
    batch, queries = bq.shape[:2]
    heads = ak.shape[3]
    tokens = tuple(ak.shape[:2])
    if not 1 <= queries <= 16:
        raise ValueError(f"bq must hold 1 to 16 query tokens, got {queries}")
    length = tokens[1] if block_table is None else tokens[1] * block_table.shape[-1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "aq": (aq, (batch, queries, bq.shape[2], heads)),
        "bq": (bq, (batch, queries, heads if aq is None else bq.shape[2], bk.shape[3])),
        "ak": (ak, (*(tokens if block_table is not None else (batch, tokens[1])), *ak.shape[2:])),
        "bk": (bk, (*tokens, ak.shape[2], bk.shape[3])),
        "av": (av, (*tokens, av.shape[2], heads)),
        "bv": (bv, (*tokens, av.shape[2], bv.shape[3])),
        "seq_lens": (seq_lens, (batch,)),
        "block_table": (block_table, (batch, block_table.shape[-1] if block_table is not None else 0)),
        "bias": (bias, (batch, heads, queries, length)),
        "k_scale": (k_scale, (*tokens, ak.shape[2])),
        "v_scale": (v_scale, (*tokens, av.shape[2])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            got = {key: tuple(value.shape) for key, (value, _) in wanted.items() if value is not None}
            raise ValueError(f"{name} must have shape {shape}, got {got}")
        if tensor.device != bq.device:
            raise ValueError(f"{name} must be on {bq.device} like bq, got {tensor.device}")
        if name in ("seq_lens", "block_table") and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    quantised = {factor.dtype in QUANTISED_TYPES for factor in (ak, bk, av, bv)}
    if quantised != {k_scale is not None} or quantised != {v_scale is not None}:
        raise TypeError(
            "k_scale and v_scale must be given for int8 and float8_e4m3fn factors, all four alike, and for "
            f"no others; got factors of {[factor.dtype for factor in (ak, bk, av, bv)]}"
        )
    for name, number in (("window", window), ("num_splits", num_splits)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be >= 1, got {number!r}")
