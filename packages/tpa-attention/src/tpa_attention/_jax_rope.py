"""Rotary position embedding on JAX arrays: the rows of a b-factor (or of a full Q) turned by their position.

    RoPE(q_t) = q_t T_t,    T_t T_s^T = T_{t-s}                                                   (3.4)
    RoPE(Q_t) = (1/R) (A^T B) T_t = (1/R) A^T (B T_t)                                 (3.5, Theorem 3.1)

Frequencies are float64 constants made while tracing. The angles t theta_i are float64 where JAX has that type
switched on. Where it has not, a float32 product t theta_i would be off by 0.006 at t = 10^5; there turns are
counted in integers instead: with u_i = theta_i / (2 pi) in units of 2^-32, t u_i modulo one turn is what
uint32 arithmetic leaves over, exact to a few 10^-7 at any position.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and F.4. Scalings are not in the paper:
linear (Chen et al. 2023, arXiv 2306.15595), ntk (a change of base), yarn (Peng et al., arXiv 2309.00071),
llama3 (Llama 3.1's released code).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from .config import RopeConfig

TURN = 2.0**32  # units per full turn: what an uint32 counts before it wraps


def rope(
    b: Float[Array, "#B #T R D"], position_ids: Int[ArrayLike, "..."], config: RopeConfig
) -> Float[Array, "B T R D"]:
    """B T_t for every token: each row turned by its token's position; partial RoPE passes the rest through.

    Cosines, sines and products are float32 (float64 for float64 input), rounded once to the type of `b`.

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
    positions = jnp.asarray(position_ids)
    n = _validated_rotary_dim(b, positions, config)
    if n == 0:
        return b
    cos, sin = _rotation_table(positions, n, config, jnp.promote_types(b.dtype, jnp.float32))
    cos, sin = cos[..., None, :], config.sign * sin[..., None, :]  # (.., T, 1, n/2): all rows alike
    x1, x2 = _split_pairs(b[..., :n].astype(cos.dtype), config.layout)
    turned = _join_pairs(x1 * cos - x2 * sin, x1 * sin + x2 * cos, config.layout).astype(b.dtype)
    if n == b.shape[-1]:
        return turned
    rest = jnp.broadcast_to(b[..., n:], (*turned.shape[:-1], b.shape[-1] - n))
    return jnp.concatenate([turned, rest], axis=-1)


def frequencies(n: int, config: RopeConfig) -> tuple[Float[np.ndarray, " {n}//2"], float]:
    """The n/2 angles per position, theta_i = base^(-2i/n) with i from 0, and the factor on cos and sin.

    linear divides every frequency by the factor; ntk raises the base so that the slowest one is divided by
    it; yarn and llama3 divide the slow ones, and yarn scales cos and sin.
    """
    exponent = np.arange(n // 2) * (-2 / n)
    scaling = config.scaling
    if scaling is None:
        return config.base**exponent, 1.0
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return config.base**exponent / factor, 1.0
    if scaling["rope_type"] == "ntk":
        return (config.base * factor ** (n / (n - 2))) ** exponent, 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(config.base**exponent, scaling), 1.0
    return _yarn(config.base**exponent, n, config.base, scaling), 0.1 * float(np.log(factor)) + 1


# ---------------------------------------------------------------------------------------------- the pieces


def _rotation_table(
    positions: Int[Array, "..."], n: int, config: RopeConfig, dtype: Any
) -> tuple[Float[Array, "*positions {n}//2"], Float[Array, "*positions {n}//2"]]:
    """Cosines and sines of all angles, rounded to `config.dtype` and kept in `dtype`."""
    theta, factor = frequencies(n, config)
    angle = _angles(positions, theta)
    rounded = dtype if config.dtype is None else jax.dtypes.canonicalize_dtype(config.dtype)
    cos = (factor * jnp.cos(angle)).astype(rounded).astype(dtype)
    sin = (factor * jnp.sin(angle)).astype(rounded).astype(dtype)
    return cos, sin


def _angles(
    positions: Int[Array, "..."], theta: Float[np.ndarray, " pairs"]
) -> Float[Array, "*positions pairs"]:
    """T theta_i modulo 2 pi: in float64 if there is such a type, else by counting units of a turn."""
    if jax.dtypes.canonicalize_dtype(jnp.float64) == jnp.float64:
        return positions[..., None].astype(jnp.float64) * theta
    units = theta / (2 * np.pi) * TURN
    whole = np.floor(units)
    t = positions[..., None].astype(jnp.int32)
    coarse = t.astype(jnp.uint32) * jnp.asarray(whole, jnp.uint32)  # wraps at a full turn
    fine = jnp.round(t.astype(jnp.float32) * jnp.asarray(units - whole, jnp.float32))
    left_over = coarse + fine.astype(jnp.int32).astype(jnp.uint32)
    half_turns = jax.lax.bitcast_convert_type(left_over, jnp.int32)  # in [-1/2, 1/2) of a turn
    return half_turns.astype(jnp.float32) * np.float32(2 * np.pi / TURN)


def _split_pairs(x: Array, layout: str) -> tuple[Array, Array]:
    """`half` pairs (i, i + n/2), `interleaved` pairs (2i, 2i + 1)."""
    if layout == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def _join_pairs(x1: Array, x2: Array, layout: str) -> Array:
    if layout == "half":
        return jnp.concatenate([x1, x2], axis=-1)
    return jnp.stack([x1, x2], axis=-1).reshape(*x1.shape[:-1], -1)


def _yarn(
    theta: Float[np.ndarray, " pairs"], n: int, base: float, scaling: dict[str, Any]
) -> Float[np.ndarray, " pairs"]:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a ramp over the pairs between."""
    trained_length = scaling["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        """The (real) pair index whose feature turns that often within the trained length."""
        return n * np.log(trained_length / (turns * 2 * np.pi)) / (2 * np.log(base))

    low = max(np.floor(pair_with(scaling.get("beta_fast", 32.0))), 0.0)
    high = min(np.ceil(pair_with(scaling.get("beta_slow", 1.0))), n - 1.0)
    ramp = np.clip((np.arange(n // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return theta * (1 - ramp) + theta / scaling["factor"] * ramp


def _llama3(theta: Float[np.ndarray, " pairs"], scaling: dict[str, Any]) -> Float[np.ndarray, " pairs"]:
    """Like yarn, with a ramp over the turns within the trained length instead of over the pairs."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * theta / (2 * np.pi)  # L / wavelength
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return theta * kept + theta / scaling["factor"] * (1 - kept)


def _validated_rotary_dim(b: Array, positions: Array, config: RopeConfig) -> int:
    """Check the arguments of `rope`; what comes out is how many features turn."""
    if not jnp.issubdtype(b.dtype, jnp.floating):
        raise TypeError(f"b must be a floating array, got {b.dtype}")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"position_ids must be integers, got {positions.dtype}")
    if b.ndim != 4:
        raise ValueError(f"b must have shape (B, T, R, D), got {b.shape}")
    shape = positions.shape
    fits = len(shape) in (1, 2) and all(
        1 in (mine, theirs) or mine == theirs
        for mine, theirs in zip(reversed(shape), reversed(b.shape[:2]), strict=False)
    )
    if not fits:
        raise ValueError(
            f"position_ids must have shape (T,) or (B, T) to fit b of shape {b.shape}, got {shape}"
        )
    return config.rotary_dim(b.shape[-1])
