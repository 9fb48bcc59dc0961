"""Rotary position embedding in float64 NumPy: the rows of a factor (or of Q) turned by their token's place.

T_t is orthogonal and block diagonal, one 2 x 2 rotation by the angle t theta_i per pair of features, and

    RoPE(q_t) = q_t T_t,    T_t T_s^T = T_{t-s}                                        (3.4)

T_t acts on the feature axis from the right, the head factor A mixes rows from the left, hence

    RoPE(Q_t) = (1/R) (A^T B) T_t = (1/R) A^T (B T_t)                                  (3.5, Theorem 3.1)

so rotating the R rows of B once rotates all h heads, and keys can be cached rotated.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and F.4. Scalings are not in the paper:
linear (Chen et al. 2023), ntk (a change of base), yarn (Peng et al. 2023, arXiv 2309.00071) and llama3 (the
released code of Llama 3.1).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray


@dataclass(frozen=True)
class Rope:
    """`sign=-1` is the paper's q T_t, `sign=+1` LLaMA's convention; `scaling` as Hugging Face writes it."""

    base: float = 10000.0
    fraction: float = 1.0
    layout: str = "half"
    sign: int = -1
    scaling: dict[str, str | float] | None = None


def rotary_dim(width: int, fraction: float) -> int:
    """How many leading features turn: an even number."""
    return 2 * (int(np.floor(width * fraction)) // 2)


def frequencies(n: int, rope: Rope) -> tuple[Float[Array, " {n}//2"], float]:
    """The n/2 frequencies base^(-2i/n), i from 0, and the factor on cos and sin (1 except for yarn)."""
    i = np.arange(n // 2, dtype=np.float64)
    theta = rope.base ** (-2 * i / n)  # F.4
    if rope.scaling is None:
        return theta, 1.0
    kind, factor = rope.scaling["rope_type"], float(rope.scaling["factor"])
    if kind == "linear":
        return theta / factor, 1.0
    if kind == "ntk":
        return (rope.base * factor ** (n / (n - 2))) ** (-2 * i / n), 1.0
    if kind == "llama3":
        return np.array([llama3(frequency, factor, rope) for frequency in theta]), 1.0
    return yarn(theta, factor, n, rope), 0.1 * np.log(factor) + 1


def yarn(theta: Float[Array, " {n}//2"], factor: float, n: int, rope: Rope) -> Float[Array, " {n}//2"]:
    """Fast pairs keep their frequency, slow ones are divided by `factor`, a ramp over the pairs between."""
    assert rope.scaling is not None
    trained_length = float(rope.scaling["original_max_position_embeddings"])

    def pair_with(turns: float) -> float:
        """The (real) pair index whose feature turns that often within the trained length."""
        return n * np.log(trained_length / (turns * 2 * np.pi)) / (2 * np.log(rope.base))

    low = max(np.floor(pair_with(float(rope.scaling.get("beta_fast", 32.0)))), 0.0)
    high = min(np.ceil(pair_with(float(rope.scaling.get("beta_slow", 1.0)))), n - 1.0)
    ramp = np.clip((np.arange(n // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return theta * (1 - ramp) + theta / factor * ramp


def llama3(theta: float, factor: float, rope: Rope) -> float:
    """Waves much shorter than the trained length are kept, longer ones stretched, those between mixed."""
    assert rope.scaling is not None
    wavelength = 2 * np.pi / theta
    trained_length = float(rope.scaling["original_max_position_embeddings"])
    low = float(rope.scaling.get("low_freq_factor", 1.0))
    high = float(rope.scaling.get("high_freq_factor", 4.0))
    if wavelength < trained_length / high:
        return theta
    if wavelength > trained_length / low:
        return theta / factor
    s = (trained_length / wavelength - low) / (high - low)
    return (1 - s) * theta / factor + s * theta


def rotate(
    b: Float[Array, "B T R D"], positions: Int[Array, "B T"], rope: Rope | None
) -> Float[Array, "B T R D"]:
    """B T_t for every row; features past the rotary dimension pass through; None leaves B as it is."""
    if rope is None:
        return b
    n = rotary_dim(b.shape[-1], rope.fraction)
    theta, factor = frequencies(n, rope)
    angle = positions[:, :, None, None] * theta  # (B, T, 1, n/2)
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    x1, x2 = split_pairs(b[..., :n], rope.layout)
    y1 = x1 * cos - rope.sign * x2 * sin
    y2 = rope.sign * x1 * sin + x2 * cos
    return np.concatenate([join_pairs(y1, y2, rope.layout), b[..., n:]], axis=-1)


def unrotate(
    b: Float[Array, "B T R D"], positions: Int[Array, "B T"], rope: Rope | None
) -> Float[Array, "B T R D"]:
    """B T_t^T, the inverse of `rotate` (yarn's factor divided out)."""
    if rope is None:
        return b
    n = rotary_dim(b.shape[-1], rope.fraction)
    factor = frequencies(n, rope)[1]
    back = rotate(b, -positions, rope)
    return np.concatenate([back[..., :n] / factor**2, back[..., n:]], axis=-1)


def split_pairs(x: Float[Array, "*batch n"], layout: str) -> tuple[Array, Array]:
    """`half` pairs (i, i + n/2), `interleaved` pairs (2i, 2i + 1)."""
    if layout == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def join_pairs(
    x1: Float[Array, "*batch m"], x2: Float[Array, "*batch m"], layout: str
) -> Float[Array, "*batch 2*m"]:
    if layout == "half":
        return np.concatenate([x1, x2], axis=-1)
    return np.stack([x1, x2], axis=-1).reshape(*x1.shape[:-1], -1)


def rotation_matrix(t: int, width: int, rope: Rope) -> Float[Array, "width width"]:
    """T_t entry by entry, for q T_t; equal to `rotate` but written from the definition."""
    n = rotary_dim(width, rope.fraction)
    theta, factor = frequencies(n, rope)
    matrix = np.eye(width)
    for i, frequency in enumerate(theta):
        first, second = (i, i + n // 2) if rope.layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = factor * np.cos(t * frequency), factor * np.sin(t * frequency)
        matrix[first, first] = cos
        matrix[second, first] = -rope.sign * sin
        matrix[first, second] = rope.sign * sin
        matrix[second, second] = cos
    return matrix
