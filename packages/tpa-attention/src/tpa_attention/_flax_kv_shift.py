"""KV shift: keys and values read a blend of a token and the one before it.

    x'_t = mu * x_t + (1 - mu) * x_{t-1},   mu in R^d learned, initially 1,   x_{-1} = 0

The shift acts before the factor maps, so cached factors keep their rank and the cache only adds the last
hidden state of each sequence. The paper names the idea in its introduction without a formula; this is ours.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class KVShift(nnx.Module):
    """The learned blend; at its initial value the identity.

    Args:
        d_model: width of the hidden states.
        param_dtype: type of the parameter.
    """

    def __init__(self, d_model: int, param_dtype: DTypeLike) -> None:
        self.mu = nnx.Param(jnp.ones(d_model, param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T d"],
        hidden: Float[Array, "B T d"],
        before: Float[Array, "B d"] | None = None,
    ) -> Float[Array, "B T d"]:
        """The blend of every token with the one before it.

        Args:
            x: hidden states.
            hidden: the same with padding at 0, which is what the next token sees.
            before: hidden state before the first token; 0 if None.
        """
        first = jnp.zeros_like(x[:, 0]) if before is None else before.astype(x.dtype)
        previous = jnp.concatenate([first[:, None], hidden[:, :-1]], axis=1)
        mu = self.mu[...].astype(x.dtype)
        return mu * x + (1 - mu) * previous
