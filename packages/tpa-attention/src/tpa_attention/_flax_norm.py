"""RMSNorm: x / sqrt(mean x^2 + eps), computed in float32 (float64 for float64)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*rows n"], eps: float | None) -> Float[Array, "*rows n"]:
    """Rows of mean square 1, in the type of `x`; eps None is the epsilon of the type computed in."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    eps = float(jnp.finfo(wide.dtype).eps) if eps is None else eps
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm of the last axis.

    Args:
        width: its size.
        affine: multiply by a learned weight per feature, which starts at 1.
        eps: None for the epsilon of the type the norm is computed in.
        param_dtype: type of the weight.
    """

    def __init__(
        self,
        width: int,
        affine: bool = False,
        eps: float | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(width, param_dtype)) if affine else None

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """The normed rows, in the type of `x`."""
        normed = rms_norm(x, self.eps)
        return normed if self.weight is None else normed * self.weight[...].astype(x.dtype)
