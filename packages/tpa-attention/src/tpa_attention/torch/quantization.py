"""Factors in eight bits: one number per row of a factor brings it back.

    x  ~  scale * q,    scale = max |x| / 127 (int8) or / 448 (float8 e4m3),    per token, rank and factor

A head's key is sum_r a_r (x) b_r, so of the scales of a_r and b_r only their product enters attention: it is
what a cache keeps, one float32 per token and rank, and what `tpa::decode` multiplies with.
An int8 number is off by at most scale / 2, a float8 number by at most 2^-4 of itself (or 2^-10 scale).

Source: symmetric absmax rows as in Dettmers et al. 2022 (arXiv 2208.07339), Section 2; formats as in
Micikevicius et al. 2022 (arXiv 2209.05433), Table 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tpa_attention.torch.kernel_support import HAS_TRITON, KERNEL_TYPES

TYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0}


@torch.library.custom_op("tpa::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows (.., n) in eight bits and the float32 scale (..) of each; a row of zeros has scale 1.

    On CUDA this is one Triton kernel where Triton is installed.

    Args:
        x: finite floating numbers; NaN or inf makes NaN of its row.
        kind: "int8" or "fp8_e4m3".

    Raises:
        ValueError: if `kind` is another word.

    Source: Dettmers et al. 2022, Section 2.
    """
    check_kind(kind)
    if x.device.type != "cuda" or not HAS_TRITON or x.dtype not in KERNEL_TYPES or x.shape[-1] == 0:
        return _quantize_plainly(x, kind)
    from tpa_attention.torch.kernels.quant import quantize_rows_triton

    return quantize_rows_triton(x, TYPES[kind], _LARGEST[kind])


@quantize_rows.register_fake
def _quantized_shapes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    check_kind(kind)
    return x.new_empty(x.shape, dtype=TYPES[kind]), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _quantize_plainly(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.float32).contiguous()
    largest = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    scale = torch.where(largest == 0, 1.0, largest / _LARGEST[kind])
    rows = wide / scale.unsqueeze(-1)
    if kind == "int8":
        rows = rows.round()
    return rows.clamp(-_LARGEST[kind], _LARGEST[kind]).to(TYPES[kind]), scale


def quantize_factors(
    a: Float[Tensor, "B T R H"] | None, b: Float[Tensor, "B T R D"] | None, kind: str
) -> tuple[Tensor | None, Tensor | None, Float[Tensor, "B T R"]]:
    """A and B in eight bits and the product of their scales; None stays None and counts as scale 1.

    Raises:
        ValueError: if `kind` is another word or both factors are None.
    """
    parts = [None if factor is None else quantize_rows(factor, kind) for factor in (a, b)]
    given = [part for part in parts if part is not None]
    if not given:
        raise ValueError("a or b must be given, got None for both")
    scale = given[0][1] if len(given) == 1 else given[0][1] * given[1][1]
    return parts[0] and parts[0][0], parts[1] and parts[1][0], scale


def check_kind(kind: str) -> None:
    """Raise unless it is one of the kinds."""
    if kind not in TYPES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, TYPES))}, got {kind!r}")
