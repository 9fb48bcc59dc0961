"""Rotary position embedding: the rows of a b-factor (or of a full Q) turned by their token's position.

T_t is orthogonal and block diagonal, one 2 x 2 rotation by the angle t theta_i per pair of features, and

    RoPE(q_t) = q_t T_t,    T_t T_s^T = T_{t-s}                                                   (3.4)
    RoPE(Q_t) = (1/R) (A^T B) T_t = (1/R) A^T (B T_t)                                 (3.5, Theorem 3.1)

T_t acts on the features from the right, A mixes rows from the left: turning the R rows of B once turns all
heads, and keys are cached turned. With sign = -1 (the paper's q T_t and the authors' training code)

    y1 = x1 cos + x2 sin,   y2 = -x1 sin + x2 cos,

with sign = +1 (LLaMA, Hugging Face) both sines change sign; both satisfy the theorem.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and F.4. Scalings are not in the paper:
linear (Chen et al. 2023, arXiv 2306.15595), ntk (a change of base), yarn (Peng et al., arXiv 2309.00071),
llama3 (Llama 3.1's released code).
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.config import RopeConfig


def rope(
    b: Float[Tensor, "#B #T R D"],
    position_ids: Int[Tensor, "..."],
    config: RopeConfig,
) -> Float[Tensor, "B T R D"]:
    """B T_t for every token: each row turned by its token's position; partial RoPE passes the rest through.

    Frequencies, angles, cosines and sines are float64 until the products, which are float32 (float64 for
    float64 input) and rounded once to the type of `b`: a float32 angle is off by 0.006 at position 10^5.

    Args:
        b: rows to turn; sizes of 1 in the batch and token axes are broadcast against the positions, so a
            b-factor free of the token turns with them.
        position_ids: integer positions (T,) or (B, T), any order, any sign.
        config: base, fraction, layout, sign, scaling and the type cos and sin are rounded to.

    Raises:
        TypeError: if `b` is not floating or the positions are not integers.
        ValueError: if their shapes do not fit or D is odd.

    Source: Zhang et al. 2025, eq. 3.4-3.6, Theorem 3.1, Appendix F.4.
    """
    n = _validated_rotary_dim(b, position_ids, config)
    if n == 0:
        return b
    cos, sin = rotation_table(position_ids, n, config, dtype=_compute_dtype(b))
    return rotate(b, cos, sin, config)


def unrope(
    b: Float[Tensor, "#B #T R D"],
    position_ids: Int[Tensor, "..."],
    config: RopeConfig,
) -> Float[Tensor, "B T R D"]:
    """The inverse of `rope` with the same arguments: B T_t^T, with the length of (cos, sin) divided out.

    That length is 1 but for yarn, which multiplies cos and sin by a factor, and for a rounded `config.dtype`.
    """
    n = _validated_rotary_dim(b, position_ids, config)
    if n == 0:
        return b
    cos, sin = rotation_table(position_ids, n, config, dtype=_compute_dtype(b))
    length = cos.square() + sin.square()
    return rotate(b, cos / length, -sin / length, config)


def frequencies(
    n: int, config: RopeConfig, device: torch.device | None = None
) -> tuple[Float[Tensor, " {n}//2"], float]:
    """The n/2 angles per position, theta_i = base^(-2i/n) with i from 0, and the factor on cos and sin.

    Computed by operations on `device`, in float64 where it has one: nothing is copied from the host, so a
    CUDA graph can capture it. The factor is 1 but for yarn.

    Args:
        n: rotary dimension, even and > 0.
        config: base and scaling. linear divides every frequency by the factor; ntk raises the base so that
            the slowest one is divided by it; yarn and llama3 divide the slow ones, yarn scales cos and sin.
        device: where the result lives, by default torch's.

    Raises:
        ValueError: if n is not even and positive, or ntk meets n = 2, whose only frequency is the fastest.

    Source: Zhang et al. 2025, Appendix F.4 (which counts from 1; the code and RoPE count from 0).
    """
    scaling = config.scaling
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and > 0, got {n!r}")
    if scaling is not None and scaling["rope_type"] == "ntk" and n == 2:
        raise ValueError("rope scaling 'ntk' needs more than 2 rotated features, got 2")
    wide = _widest_dtype(device)
    exponent = torch.arange(n // 2, dtype=wide, device=device) * (-2 / n)
    if scaling is None:
        return _power(config.base, exponent), 1.0
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return _power(config.base, exponent) / factor, 1.0
    if scaling["rope_type"] == "ntk":
        return _power(config.base * factor ** (n / (n - 2)), exponent), 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(_power(config.base, exponent), scaling), 1.0
    return _yarn(_power(config.base, exponent), n, config.base, scaling), 0.1 * math.log(factor) + 1


def rotation_table(
    position_ids: Int[Tensor, "..."], n: int, config: RopeConfig, *, dtype: torch.dtype
) -> tuple[Float[Tensor, "*positions {n}//2"], Float[Tensor, "*positions {n}//2"]]:
    """Cosines and sines of all angles, (*positions, n/2), rounded to `config.dtype` and kept in `dtype`.

    A model computes them once and hands them to `rotate` in every layer.
    """
    theta, factor = frequencies(n, config, position_ids.device)
    angle = position_ids[..., None].to(theta.dtype) * theta
    rounded = dtype if config.dtype is None else getattr(torch, config.dtype)
    cos = (factor * angle.cos()).to(rounded).to(dtype)
    sin = (factor * angle.sin()).to(rounded).to(dtype)
    return cos, sin


def rotate(
    b: Float[Tensor, "#B #T R D"],
    cos: Float[Tensor, "*positions half"],
    sin: Float[Tensor, "*positions half"],
    config: RopeConfig,
) -> Float[Tensor, "B T R D"]:
    """The leading 2 * half features of every row turned by the given cosines and sines, in their precision.

    Raises:
        ValueError: if that are more features than a row has.
    """
    n = 2 * cos.shape[-1]
    if n > b.shape[-1]:
        raise ValueError(f"the rotary dimension must not exceed D = {b.shape[-1]}, got {n}")
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2) * config.sign  # (.., T, 1, n/2): all rows alike
    x1, x2 = _split_pairs(b[..., :n].to(cos.dtype), config.layout)
    y1 = x1 * cos - x2 * sin
    y2 = x1 * sin + x2 * cos
    turned = _join_pairs(y1, y2, config.layout).to(b.dtype)
    if n == b.shape[-1]:
        return turned
    return torch.cat([turned, b[..., n:].expand(*turned.shape[:-1], -1)], dim=-1)


# ---------------------------------------------------------------------------------------------- the pieces


def _split_pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """`half` pairs (i, i + n/2), `interleaved` pairs (2i, 2i + 1)."""
    if layout == "half":
        return x.chunk(2, dim=-1)  # pyright: ignore[reportReturnType]
    return x[..., 0::2], x[..., 1::2]


def _join_pairs(x1: Tensor, x2: Tensor, layout: str) -> Tensor:
    if layout == "half":
        return torch.cat([x1, x2], dim=-1)
    return torch.stack([x1, x2], dim=-1).flatten(-2)


def _power(base: float, exponent: Tensor) -> Tensor:
    return torch.pow(torch.full_like(exponent, base), exponent)


def _yarn(theta: Tensor, n: int, base: float, scaling: dict[str, Any]) -> Tensor:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a ramp over the pairs between."""
    trained_length = scaling["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        """The (real) pair index whose feature turns that often within the trained length."""
        return n * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(scaling.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(pair_with(scaling.get("beta_slow", 1.0))), n - 1)
    pairs = torch.arange(n // 2, dtype=theta.dtype, device=theta.device)
    ramp = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return theta * (1 - ramp) + theta / scaling["factor"] * ramp


def _llama3(theta: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Like yarn, with a ramp over the turns within the trained length instead of over the pairs."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * theta / (2 * math.pi)  # L / wavelength
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return theta * kept + theta / scaling["factor"] * (1 - kept)


def _widest_dtype(device: torch.device | None) -> torch.dtype:
    """float64, but for Apple's GPUs, which have none."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def _compute_dtype(b: Tensor) -> torch.dtype:
    return torch.promote_types(b.dtype, torch.float32)


def _validated_rotary_dim(b: Tensor, position_ids: Tensor, config: RopeConfig) -> int:
    """Check the arguments of `rope`; what comes out is how many features turn."""
    if not b.is_floating_point():
        raise TypeError(f"b must be a floating tensor, got {b.dtype}")
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")
    if b.ndim != 4:
        raise ValueError(f"b must have shape (B, T, R, D), got {tuple(b.shape)}")
    shape = tuple(position_ids.shape)
    fits = len(shape) in (1, 2) and all(
        1 in (mine, theirs) or mine == theirs
        for mine, theirs in zip(reversed(shape), reversed(b.shape[:2]), strict=False)
    )
    if not fits:
        raise ValueError(
            f"position_ids must have shape (T,) or (B, T) to fit b of shape {tuple(b.shape)}, got {shape}"
        )
    return config.rotary_dim(b.shape[-1])
