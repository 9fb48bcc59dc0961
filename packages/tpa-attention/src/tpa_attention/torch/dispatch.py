"""Which implementation answers a call, and how the choices that are not plain torch are called."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.torch import flex, reference, sdpa
from tpa_attention.torch.factors import RecordLayout, logit_scale, rank_factor
from tpa_attention.torch.kernel_support import HAS_TRITON, KERNEL_TYPES, runs_kernels
from tpa_attention.torch.masks import both, ragged_mask, split_mask

TENSOR_CORE_TYPES = (torch.float16, torch.bfloat16)
MAX_KERNEL_WIDTH = 256  # D and E of whole sequences: tiles of wider heads fit no multiprocessor
Factors = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]


def chosen_attention(impl: str, factors: Factors, attn_mask: Tensor | None) -> str:
    """What "auto" attends to whole sequences with: the kernel on CUDA in 16 bits, else torch's attention.

    In float32 the kernel multiplies without tensor cores, as exactly as the reference; torch's does not.
    """
    if impl not in ("auto", "triton"):
        return impl
    reason = kernel_problem(factors[1].device) or attention_problem(factors, attn_mask)
    if impl == "triton" and reason:
        raise RuntimeError(f"impl='triton' cannot run: {reason}")
    if impl == "auto":
        fast = factors[1].device.type == "cuda" and compute_type(factors) in TENSOR_CORE_TYPES
        return "triton" if fast and reason is None else "sdpa"
    return impl


def attention_problem(factors: Factors, attn_mask: Tensor | None) -> str | None:
    """What of a call with whole sequences the kernel does not take; None if it takes it."""
    if attn_mask is not None:
        return "its kernel for whole sequences takes no attn_mask; use impl='auto' or 'sdpa'"
    if reason := type_problem([compute_type(factors)]):
        return reason
    if (width := max(factors[1].shape[3], factors[5].shape[3])) > MAX_KERNEL_WIDTH:
        return f"it takes heads up to {MAX_KERNEL_WIDTH} wide, got {width}; use impl='auto' or 'sdpa'"
    return None


def compute_type(factors: Factors) -> torch.dtype:
    """The type of the matrix products: that of autocast where it is on, else the widest of the factors."""
    device = factors[1].device.type
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in factors if x is not None])
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def attend_by_kernel(
    factors: Factors,
    *,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    scale: float | None,
    rank_scale: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `tpa::prefill`, whose factors have one type and whose scales hold everything."""
    from tpa_attention.torch.prefill_ops import prefill

    dtype = compute_type(factors)
    aq = None if factors[0] is None else factors[0].to(dtype)
    bq, ak, bk, av, bv = (factor.to(dtype) for factor in factors[1:])
    logits = (
        logit_scale(scale, factors[1].shape[-1]) * rank_factor(aq, rank_scale) * rank_factor(ak, rank_scale)
    )
    return prefill(
        *(aq, bq, ak, bk, av, bv, cu_seqlens_q, cu_seqlens_k, causal, window, logits),
        rank_factor(av, rank_scale),
    )


def chosen(impl: str, *tensors: Tensor | None) -> str:
    """What "auto" decodes with: the kernel where device, types and gradients allow it, else blocks."""
    if impl not in ("auto", "triton"):
        return impl
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    reason = kernel_problem(device) or type_problem([tensor.dtype for tensor in present])
    if impl == "triton":
        if reason:
            raise RuntimeError(f"impl='triton' cannot run: {reason}")
        return impl
    usable = (
        device.type == "cuda"
        and reason is None
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present))
    )
    return "triton" if usable else "blockwise"


def type_problem(dtypes: list[torch.dtype]) -> str | None:
    """Which of the types the kernels do not take; None if they take all."""
    for dtype in dtypes:
        if dtype not in KERNEL_TYPES:
            return f"it takes float32, float16 and bfloat16, got {dtype}; use impl='auto'"
    return None


def kernel_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device; None if they can."""
    if not HAS_TRITON:
        return 'triton is not installed: pip install "tpa-attention[triton]" (Linux with an NVIDIA GPU)'
    if not runs_kernels(device):
        return f"it needs CUDA tensors, got {device.type}; use impl='auto', or set TRITON_INTERPRET=1 to test"
    return None


def by_kernel(
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    num_splits: int | None,
    *,
    attn_bias: Tensor | None,
    window: int | None,
    scale: float | None,
    rank_scale: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `tpa::decode`, which takes whole factors of logits and outputs and an expanded bias."""
    from tpa_attention.torch.ops import decode

    factor = logit_scale(scale, bq.shape[-1]) * rank_factor(aq, rank_scale) * rank_factor(ak, rank_scale)
    M = ak.shape[1] * (1 if block_table is None else block_table.shape[1])
    mask, bias = split_mask(attn_bias)
    if mask is not None:
        bias = torch.where(mask, 0.0, -torch.inf)
    if bias is not None:
        bias = bias.expand(bq.shape[0], ak.shape[3], bq.shape[1], M)
    return decode(
        *(aq, bq, ak, bk, av, bv, seq_lens, block_table, bias, window),
        scale=factor,
        out_scale=rank_factor(av, rank_scale),
        num_splits=num_splits,
    )


def by_heads(
    impl: str,
    aq: Tensor | None,
    bq: Tensor,
    ak: Tensor,
    bk: Tensor,
    av: Tensor,
    bv: Tensor,
    *,
    seq_lens: Tensor | None,
    attn_bias: Tensor | None,
    window: int | None,
    scale: float | None,
    rank_scale: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Materialised heads: for comparison, and for a model that is to use one implementation throughout."""
    N, M = bq.shape[1], ak.shape[1]
    options = {"scale": scale, "rank_scale": rank_scale, "return_lse": return_lse}
    if seq_lens is not None:
        cached = torch.arange(M, device=bq.device) < seq_lens[:, None]
        ak, bk, av, bv = (reference.only_where(cached, factor) for factor in (ak, bk, av, bv))
    factors = (aq, bq, ak, bk, av, bv)
    if impl == "flex":
        return flex.tpa_attention(*factors, attn_mask=attn_bias, seq_lens=seq_lens, window=window, **options)
    if seq_lens is None:
        return sdpa.tpa_attention(*factors, attn_mask=attn_bias, window=window, **options)
    mask, bias = split_mask(attn_bias)
    allowed = both(ragged_mask(N, M, seq_lens, window), mask)
    merged = allowed if bias is None else sdpa.as_bias(allowed, bias)
    return sdpa.tpa_attention(*factors, causal=False, attn_mask=merged, **options)


def views(
    layouts: tuple[RecordLayout, RecordLayout], cache_k: Tensor, cache_v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ak, bk, av, bv inside the records."""
    ak, bk = layouts[0].views(cache_k)
    av, bv = layouts[1].views(cache_v)
    if ak is None or bk is None or av is None or bv is None:
        raise ValueError("records of tpa_decode hold both factors; pass others to tpa_decode_factors")
    return ak, bk, av, bv


def paged(cache: Float[Tensor, "blocks size W"], pages: Int[Tensor, "B n"]) -> Float[Tensor, "B M W"]:
    """The tokens on these pages, one after the other; unused entries point anywhere."""
    return cache[pages.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)
