"""The operators of whole sequences in torch.library: attention from factors, and the gradients of factors.

    prefill(aq, bq, ak, bk, av, bv, cu_seqlens_q=None, cu_seqlens_k=None, causal=True, window=None,
            scale=1.0, out_scale=1.0) -> (out, lse)
    prefill_backward(dout, dlse, <factors>, out, lse, <the same options>) -> (daq, dbq, dak, dbk, dav, dbv)

The contract between `functional.py`, which explains what users got wrong, and kernels, which read memory:

- aq (B, T, R_Q, H) and bq (B, T, R_Q, D), rotated; aq None: bq is Q, (B, T, H, D). ak (B, M, R_K, H),
  bk (B, M, R_K, D), av (B, M, R_V, H), bv (B, M, R_V, E). All of one type and any strides.
- causal counts from the end: query t stands at M - T + t; `window` keys at most. Not causal: no window.
- cu_seqlens_q and cu_seqlens_k, both or none: boundaries of sequences in a batch of 1, integers.
- scale: the whole factor of the logits, s_Q s_K / sqrt(D). out_scale: s_V. Nothing is scaled a second time.
- out (B, T, H, E) has the type of the factors; lse (B, T, H), natural logarithm of the scaled logits, is
  float32, float64 for float64, and lies in memory as (B, H, T). A row without any valid key: 0 and -inf.
- Kept for the backward pass are the factors, out and lse. Gradients are the same bits in every run; daq is
  empty without aq. dlse None: nobody used lse.

On CUDA these are the Triton kernels, but for float64; elsewhere plain einsums of materialised heads, and on
the CPU with TRITON_INTERPRET=1 the kernels again, interpreted.

Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3.
"""

from typing import Any

import torch
from torch import Tensor

from tpa_attention.torch.factors import materialize
from tpa_attention.torch.kernel_support import KERNEL_TYPES, runs_kernels
from tpa_attention.torch.masks import attention_mask, packed_places
from tpa_attention.torch.reference import masked, tpa_attention, widened

NO_TRITON = 'tpa::prefill on CUDA needs triton, which is not installed: pip install "tpa-attention[triton]"'
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("tpa::prefill", mutates_args=())
def prefill(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float = 1.0,
    out_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries to M keys from their factors; arguments and results: see the module.

    Raises:
        ValueError: if shapes do not fit or the window has no order.
        TypeError: if types differ or boundaries are no integers.

    Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3.
    """
    factors = (aq, bq, ak, bk, av, bv)
    _check(*factors, cu_seqlens_q, cu_seqlens_k, causal, window)
    if not _uses_kernel(bq):
        return _plainly(*factors, cu_seqlens_q, cu_seqlens_k, causal, window, scale, out_scale)
    try:
        from tpa_attention.torch.kernels.prefill import prefill_triton
    except ModuleNotFoundError as error:
        raise RuntimeError(NO_TRITON) from error
    seen = intervals(cu_seqlens_q, cu_seqlens_k, bq.shape[1], bk.shape[1], causal, window)
    return prefill_triton(*factors, seen, causal, window, scale, out_scale)


@torch.library.custom_op("tpa::prefill_backward", mutates_args=())
def prefill_backward(
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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float = 1.0,
    out_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the factors from those of `prefill`'s results; arguments and results: see the module.

    Source: Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3, differentiated.
    """
    factors = (aq, bq, ak, bk, av, bv)
    options = (causal, window, scale, out_scale)
    if not _uses_kernel(bq):
        return _gradients_plainly(dout, dlse, *factors, out, lse, cu_seqlens_q, cu_seqlens_k, *options)
    from tpa_attention.torch.kernels.prefill_backward import prefill_backward_triton

    seen = intervals(cu_seqlens_q, cu_seqlens_k, bq.shape[1], bk.shape[1], causal, window)
    return prefill_backward_triton(dout, dlse, *factors, out, lse, seen, *options)


@prefill.register_fake
def _prefill_shapes(
    _aq: Tensor | None, bq: Tensor, ak: Tensor, _bk: Tensor, _av: Tensor, bv: Tensor, *_options: Any
) -> tuple[Tensor, Tensor]:
    B, T, H = bq.shape[0], bq.shape[1], ak.shape[3]
    lse = bq.new_empty((B, H, T), dtype=torch.promote_types(bq.dtype, torch.float32))
    return bq.new_empty((B, T, H, bv.shape[3])), lse.transpose(1, 2)


@prefill_backward.register_fake
def _prefill_backward_shapes(_dout: Tensor, _dlse: Tensor | None, aq: Tensor | None, *rest: Any) -> Gradients:
    daq = rest[0].new_empty(0) if aq is None else aq.new_empty(aq.shape)
    dbq, dak, dbk, dav, dbv = (factor.new_empty(factor.shape) for factor in rest[:5])
    return daq, dbq, dak, dbk, dav, dbv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *factors, cu_seqlens_q, cu_seqlens_k = inputs[:8]
    ctx.save_for_backward(*factors, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    aq, bq, ak, bk, av, bv, out, *rest = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    daq, *others = prefill_backward(dout, dlse, aq, bq, ak, bk, av, bv, out, *rest, *ctx.options)
    return (None if aq is None else daq, *others, *(None,) * 6)


prefill.register_autograd(_gradients, setup_context=_keep)


def _no_second_gradient(_ctx: Any, *_grads: Tensor) -> None:
    raise RuntimeError(
        'tpa::prefill can be differentiated once; impl="reference" and, on the CPU, "sdpa" can be twice'
    )


prefill_backward.register_autograd(_no_second_gradient)


def _uses_kernel(bq: Tensor) -> bool:
    return bq.dtype in KERNEL_TYPES and runs_kernels(bq.device)


def intervals(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    T: int,
    M: int,
    causal: bool,
    window: int | None,
) -> Any:
    """`kernels.prefill.Intervals` of packed sequences, made on the device; None where there is one sequence.

    Both ends of the interval of keys rise with the query, hence so do those of the queries that see a key:
    the first whose interval ends behind it, up to the first whose interval begins behind it.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return None
    from tpa_attention.torch.kernels.prefill import Intervals

    sequence, from_end = packed_places(cu_seqlens_q, T)
    bounds = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]]).long()  # tokens of no sequence see no key
    key_from, key_to = bounds[sequence], bounds[sequence + 1]
    if causal:
        first, key_to = key_from, key_to + from_end + 1
        if window is not None:
            key_from = torch.maximum(key_from, key_to - window)
        key_to = torch.maximum(key_to, first)
    keys = torch.arange(M, device=key_to.device)
    query_from = torch.searchsorted(key_to, keys, right=True, out_int32=True)
    query_to = torch.searchsorted(key_from, keys, right=True, out_int32=True)
    return Intervals(key_from.int(), key_to.int(), query_from, query_to)


def _plainly(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    out_scale: float,
) -> tuple[Tensor, Tensor]:
    """The same by einsums of materialised heads."""
    wide = bq.to(torch.promote_types(bq.dtype, torch.float32))
    out, lse = tpa_attention(
        aq, wide, ak, bk, av, bv, causal=causal, window=window, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, scale=scale, rank_scale=False,
    )  # fmt: skip
    out = (out * out_scale).to(bq.dtype).clone(memory_format=torch.contiguous_format)
    # as `_prefill_shapes` promises, at sizes of 1 too
    return out, lse.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _gradients_plainly(
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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    out_scale: float,
) -> Gradients:
    """Gradients by einsums, in the order in which the kernels form them."""
    q, k, v = (materialize(*widened(a, b), rank_scale=False) for a, b in ((aq, bq), (ak, bk), (av, bv)))
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    allowed = attention_mask(
        q.shape[1], k.shape[1], causal=causal, window=window, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, device=q.device,
    )  # fmt: skip
    dead = lse == -torch.inf
    logits = masked(scale * torch.einsum("bthd,bmhd->bhtm", q, k), allowed, None)
    p = torch.exp(logits - lse.masked_fill(dead, 0).mT.unsqueeze(-1))
    delta = (out * dout).sum(-1)
    delta = (delta if dlse is None else delta - dlse).masked_fill(dead, 0).mT.unsqueeze(-1)
    dv = out_scale * torch.einsum("bhtm,bthe->bmhe", p, dout)
    ds = p * (out_scale * torch.einsum("bthe,bmhe->bhtm", dout, v) - delta)
    dq = scale * torch.einsum("bhtm,bmhd->bthd", ds, k)
    dk = scale * torch.einsum("bhtm,bthd->bmhd", ds, q)
    daq, dbq = _to_factors(dq, aq, bq)
    return daq, dbq, *_to_factors(dk, ak, bk), *_to_factors(dv, av, bv)


def _to_factors(dx: Tensor, a: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of the product those of A and B."""
    if a is None:
        return b.new_empty(0), dx.to(b.dtype).clone(memory_format=torch.contiguous_format)
    da = torch.einsum("bthd,btrd->btrh", dx, b.to(dx.dtype)).to(a.dtype)
    db = torch.einsum("bthd,btrh->btrd", dx, a.to(dx.dtype)).to(b.dtype)
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (da, db))  # type: ignore[return-value]


def _check(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
) -> None:
    """Raise before a kernel reads memory that is not there."""
    factors = {"aq": aq, "bq": bq, "ak": ak, "bk": bk, "av": av, "bv": bv}
    present = {name: factor for name, factor in factors.items() if factor is not None}
    for name, factor in present.items():
        if factor.dim() != 4:
            raise ValueError(f"{name} must have 4 axes, got shape {tuple(factor.shape)}")
    (B, T), (M, H) = bq.shape[:2], (bk.shape[1], ak.shape[3])
    wanted = {
        "aq": (B, T, bq.shape[2], H),
        "bq": (B, T, H if aq is None else bq.shape[2], bk.shape[3]),
        "ak": (B, M, bk.shape[2], H),
        "bk": (B, M, *bk.shape[2:]),
        "av": (B, M, bv.shape[2], H),
        "bv": (B, M, *bv.shape[2:]),
    }
    for name, factor in present.items():
        if tuple(factor.shape) != wanted[name]:
            got = {key: tuple(value.shape) for key, value in present.items()}
            raise ValueError(f"{name} must have shape {wanted[name]}, got {got}")
        if factor.dtype != bq.dtype:
            raise TypeError(f"all factors must have one type, got {name} {factor.dtype} and bq {bq.dtype}")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if (bounds is None) != (cu_seqlens_q is None) or (bounds is not None and B != 1):
            raise ValueError(f"{name} must be given like the other, for a batch of 1, got a batch of {B}")
        if bounds is not None and (bounds.is_floating_point() or bounds.dtype == torch.bool):
            raise TypeError(f"{name} must hold integers, got {bounds.dtype}")
    for name, tensor in (*present.items(), ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor is not None and tensor.device != bq.device:
            raise ValueError(f"{name} must be on {bq.device} like bq, got {tensor.device}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be >= 1 and needs causal=True, got {window!r}, causal={causal}")
