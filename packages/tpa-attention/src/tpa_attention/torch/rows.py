"""What happens to the rows of A and B between the factor maps and attention: activation, norm, rotation.

A row of B may be given by parts side by side, (b_r, c_r, ..) of widths (d_b, d_c, ..), whose Kronecker
product it is (order p has p - 1 parts). Norms and RoPE act on the parts, so the product is formed last:

    RMS(b (x) c) = RMS(b) RMS(c),    RoPE(b (x) c) = RoPE(b) (x) c                            (Theorem C.1)

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and G; `rms_norm` of rows is ours.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tpa_attention.config import RopeConfig

from .factors import kronecker_rows
from .rope import rope

NORM_EPS = 1e-5


def activate(a: Float[Tensor, "#B #T R H"], kind: str) -> Float[Tensor, "#B #T R H"]:
    """The nonlinearity of head factors: "none", "sigmoid", or "softmax" over the heads of one rank."""
    if kind == "sigmoid":
        return a.sigmoid()
    return a.softmax(dim=-1).to(a.dtype) if kind == "softmax" else a


def rms_norm(x: Float[Tensor, "*rows n"], weight: Float[Tensor, " n"] | None = None) -> Tensor:
    """RMSNorm, x / sqrt(mean x^2 + 1e-5), times a weight, computed in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = functional.rms_norm(x.to(wide), (x.shape[-1],), eps=NORM_EPS)
    return (normed if weight is None else normed * weight).to(x.dtype)


def norm_parts(b: Float[Tensor, "#B #T R n"], widths: Sequence[int]) -> Float[Tensor, "#B #T R n"]:
    """RMSNorm of every part, hence of the row."""
    if len(widths) == 1:
        return rms_norm(b)
    return torch.cat([rms_norm(part) for part in b.split(list(widths), dim=-1)], dim=-1)


def rotate_first(
    b: Float[Tensor, "#B #T R n"], positions: Int[Tensor, "B T"], config: RopeConfig, first: int
) -> Float[Tensor, "#B #T R n"]:
    """RoPE on the first part, of width `first`; the others pass through.

    Rows that serve several tokens come back for every token, unless nothing is rotated at all.
    """
    if first == b.shape[-1]:
        return rope(b, positions, config)
    turned = rope(b[..., :first], positions, config)
    return torch.cat([turned, b[..., first:].expand(*turned.shape[:-1], -1)], dim=-1)


def rotate_blocks(
    q: Float[Tensor, "B T H D"], positions: Int[Tensor, "B T"], config: RopeConfig, first: int
) -> Float[Tensor, "B T H D"]:
    """RoPE on a row that is given as a whole: I (x) T_t turns each of its D / first blocks alike."""
    if first == q.shape[-1]:
        return rope(q, positions, config)
    blocks = q.unflatten(-1, (-1, first)).flatten(2, 3)
    return rope(blocks, positions, config).reshape(q.shape)


def expand(b: Float[Tensor, "#B #T R n"], widths: Sequence[int]) -> Float[Tensor, "#B #T R D"]:
    """The rows themselves: Kronecker products of their parts."""
    return b if len(widths) == 1 else kronecker_rows(b.split(list(widths), dim=-1))
