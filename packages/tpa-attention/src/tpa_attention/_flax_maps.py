"""Factor maps as nnx modules: from a token's hidden state x in R^d to the rows of A or B, and how they start.

    contextual        F(x) = W x                      A_X in R^{R x h}, B_X in R^{R x D}              (3.1)
    non-contextual    F(x) = F, free parameters       not cached                                 (App. G)
    with bias         F(x) = F + W x                  how a converted layer becomes contextual     (ours)

Kernels keep their axes, (d, R, n), so that an array can be sharded by heads. Parameters say in their metadata
which axis counts heads (`head_axis`, for `shard_heads`) and how many axes are inputs (`input_axes`, for
`from_torch`). Initial bounds of the uniform weights,
for R rows of width n (n = h for A, D for B, d_i for a part of higher order):

    "t6", as trained: Xavier on the views        A sqrt(6 / ((h + d) R)),   B sqrt(6 / ((R + d) n))
    "xavier", the paper's text: on the matrices  sqrt(6 / (d + R n))
    "normal": standard deviation 0.02

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendices C and G, and the released training code.
"""

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._flax_versions import assign

NORMAL_STD = 0.02


class FactorMap(nnx.Module):
    """One map to R rows of sum(widths) numbers.

    Args:
        d_model: d, width of the hidden state.
        rank: R, number of rows.
        widths: widths of the parts of a row: (h,) for A, (D,) for B, (d_b, d_c, ..) for higher orders.
        contextual: whether there is a kernel, (d, R, sum(widths)). Without one the map is its bias.
        bias: whether a contextual map has a bias, (R, sum(widths)).
        head_axis: which axis of a row block (R, n) counts heads, 0 or 1; None if neither does.
        param_dtype: type of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        rank: int,
        widths: Sequence[int],
        *,
        contextual: bool = True,
        bias: bool = False,
        head_axis: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.rank, self.widths = rank, tuple(widths)
        rows = (rank, sum(widths))
        self.kernel = (
            nnx.Param(
                jnp.zeros((d_model, *rows), param_dtype),
                head_axis=None if head_axis is None else head_axis + 1,
                input_axes=1,
            )
            if contextual
            else None
        )
        self.bias = (
            nnx.Param(jnp.zeros(rows, param_dtype), head_axis=head_axis) if bias or not contextual else None
        )

    @property
    def contextual(self) -> bool:
        """Whether the rows depend on the token."""
        return self.kernel is not None

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "#B #T R n"]:
        """Rows of every token; a non-contextual map returns its (1, 1, R, n) parameters."""
        if self.kernel is None:
            return self.constant(x.dtype)
        rows = jnp.einsum("btd,drn->btrn", x, self.kernel[...].astype(x.dtype))
        return rows if self.bias is None else rows + self.bias[...].astype(x.dtype)

    def constant(self, dtype: DTypeLike) -> Float[Array, "1 1 R n"]:
        """What does not depend on the token."""
        if self.bias is None:
            raise ValueError("the map must have a bias to be used without x; it has a kernel alone")
        return self.bias[...].astype(dtype)[None, None]


class HeadLinear(nnx.Module):
    """A linear map to or from concatenated heads, with its axes kept: (d, h, E) or (h, E, d).

    Args:
        shape: of the kernel.
        head_axis: which of its axes counts heads.
        param_dtype: type of the kernel.
    """

    def __init__(self, shape: tuple[int, int, int], head_axis: int, param_dtype: DTypeLike) -> None:
        self.reads_heads = head_axis == 0
        inputs = 2 if self.reads_heads else 1
        self.kernel = nnx.Param(jnp.zeros(shape, param_dtype), head_axis=head_axis, input_axes=inputs)

    def __call__(self, x: Float[Array, "B T *features"]) -> Float[Array, "B T *others"]:
        """W x over all features of a token."""
        kernel = self.kernel[...].astype(x.dtype)
        return jnp.einsum("bthe,hed->btd" if self.reads_heads else "btd,dhe->bthe", x, kernel)

    @property
    def fans(self) -> tuple[int, int]:
        """Features in and out."""
        shape = self.kernel.shape
        return (prod(shape[:2]), shape[2]) if self.reads_heads else (shape[0], prod(shape[1:]))


# ----------------------------------------------------------------------------------------- initial values


def init_a(factor_map: FactorMap, scheme: str, key: Array) -> None:
    """Initial values of a head map: kernel, bias 0; free rows 1 + N(0, 0.02^2) of mean square 1."""
    if factor_map.kernel is not None:
        d, rank, h = factor_map.kernel.shape
        bound = {"t6": sqrt(6 / ((h + d) * rank)), "xavier": sqrt(6 / (d + rank * h)), "normal": None}[scheme]
        assign(factor_map.kernel, drawn(key, factor_map.kernel, bound))
    elif factor_map.bias is not None:
        rows = 1 + NORMAL_STD * jax.random.normal(key, factor_map.bias.shape, factor_map.bias.dtype)
        assign(factor_map.bias, rows / jnp.sqrt(jnp.square(rows).mean(axis=-1, keepdims=True)))


def init_b(factor_map: FactorMap, scheme: str, key: Array) -> None:
    """Initial values of a feature map: the scheme's kernel per part; free parts N(0, 1/d_i)."""
    variable = factor_map.bias if factor_map.kernel is None else factor_map.kernel
    if variable is None:
        raise ValueError("factor_map must have a kernel or a bias")
    parts = []
    for part_key, n in zip(jax.random.split(key, len(factor_map.widths)), factor_map.widths, strict=True):
        like = jax.ShapeDtypeStruct((*variable.shape[:-1], n), variable.dtype)
        if factor_map.kernel is None:
            parts.append(jax.random.normal(part_key, like.shape, like.dtype) * n**-0.5)
            continue
        d, rank = like.shape[:2]
        bound = {"t6": sqrt(6 / ((rank + d) * n)), "xavier": sqrt(6 / (d + rank * n)), "normal": None}[scheme]
        parts.append(drawn(part_key, like, bound))
    assign(variable, jnp.concatenate(parts, axis=-1))


def xavier_bound(scheme: str, fan_in: int, fan_out: int) -> float | None:
    """Of W^Q under KV-only, gate and W^O: Xavier, or None for N(0, 0.02^2) under "normal"."""
    return None if scheme == "normal" else sqrt(6 / (fan_in + fan_out))


def drawn(key: Array, like: Any, bound: float | None) -> Array:
    """Uniform in (-bound, bound), or N(0, 0.02^2) without a bound, of the shape and type of `like`."""
    if bound is None:
        return NORMAL_STD * jax.random.normal(key, like.shape, like.dtype)
    return jax.random.uniform(key, like.shape, like.dtype, -bound, bound)
