"""Rows to eight bits on CUDA in one kernel, where plain torch needs eight small ones per appended token.

    scale = max |x| / largest,    q = x / scale,    per row

The truth is `..quantization.quantize_rows`. Floor: reading x and writing one byte per number, once. With
TRITON_INTERPRET=1 the kernel runs on the CPU.

Source: Dettmers et al. 2022 (arXiv 2208.07339), Section 2.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048  # per program


def quantize_rows_triton(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Rows of (.., n) in `dtype` (int8 or float8_e4m3fn), and their float32 scales (..).

    Args:
        x: float32, float16 or bfloat16, n >= 1.
        dtype: type of the result.
        largest: the largest number of the type.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = torch.empty(flat.shape, dtype=dtype, device=x.device)
    scales = torch.empty(flat.shape[0], device=x.device)
    width = triton.next_power_of_2(flat.shape[1])
    block = max(1, _NUMBERS // width)
    if flat.numel():
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
            _quantize_rows[(triton.cdiv(flat.shape[0], block),)](
                flat, rows, scales, flat.shape[0], *flat.stride(), largest,
                N=flat.shape[1], WIDTH=width, BLOCK=block, ROUND=dtype == torch.int8,
            )  # fmt: skip
    return rows.view(x.shape), scales.view(x.shape[:-1])


@triton.jit(do_not_specialize=["count"])
def _quantize_rows(
    x, rows, scales, count, stride_row, stride_n, largest,
    N: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """BLOCK rows. Truth: `quantization.quantize_rows`. Floor: one read of x, one byte written per number."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (n < N)[None, :]
    values = tl.load(x + row[:, None] * stride_row + n[None, :] * stride_n, mask=inside, other=0.0)
    values = values.to(tl.float32)
    absolute = tl.max(tl.abs(values), 1)
    # the maximum of a row drops NaN; its sum does not
    # divided as torch does: on a GPU "/" is off in the last place
    scale = tl.where(absolute == 0, 1.0, tl.div_rn(absolute, largest + absolute * 0)) + tl.sum(values * 0, 1)
    scaled = tl.div_rn(values, scale[:, None] + values * 0)
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    if ROUND:  # to even, as torch does: 1.5 * 2^23 pushes the fraction out of a float32
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(rows + row[:, None] * N + n[None, :], scaled.to(rows.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < count)
