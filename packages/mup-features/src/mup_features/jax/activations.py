"""Activations by name or as functions: phi, its derivative, and what the limits need to know of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Elementwise = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]

__all__ = ["ACTIVATIONS", "Activation", "Elementwise", "resolve"]


def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.gelu(x, approximate=False)


def _identity(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x


def _leaky_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(x > 0, x, 0.01 * x)


ACTIVATIONS: dict[str, Elementwise] = {
    "abs": jnp.abs,
    "cos": jnp.cos,
    "elu": jax.nn.elu,
    "erf": jax.scipy.special.erf,
    "gelu": _gelu,
    "identity": _identity,
    "leaky_relu": _leaky_relu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}
TWICE_DIFFERENTIABLE = ACTIVATIONS.keys() - {"abs", "elu", "leaky_relu", "relu"}
HOMOGENEOUS = frozenset({"abs", "identity", "leaky_relu", "relu"})


@dataclass(frozen=True)
class Activation:
    """An activation and what is known of it.

    Attributes:
        name: its name; that of the function for one of the user's own.
        phi: the function, elementwise.
        dphi: its derivative, elementwise. At a kink it is what automatic differentiation says.
        twice_differentiable: whether phi is C^2, which the theory of the limit asks; taken on trust for a
            function of the user's own.
        homogeneous: whether phi(a x) = a phi(x) for a > 0.
        at_zero: phi(0).
        slope_at_zero: phi'(0).
    """

    name: str
    phi: Elementwise
    dphi: Elementwise
    twice_differentiable: bool
    homogeneous: bool
    at_zero: float
    slope_at_zero: float

    def linearised(self) -> "Activation":
        """The linear function with the same value and slope at 0."""
        at_zero, slope = self.at_zero, self.slope_at_zero
        return Activation(
            f"linearised {self.name}",
            lambda x: at_zero + slope * x,
            lambda x: jnp.full_like(x, slope),
            True,
            at_zero == 0,
            at_zero,
            slope,
        )


@lru_cache
def resolve(activation: str | Elementwise) -> Activation:
    """The activation of that name, or around that elementwise function.

    One function gives one object, so that what is compiled for an activation is compiled once.

    Raises:
        ValueError: for an unknown name, or a function that changes shapes.
        TypeError: for something that is neither a name nor a function.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(sorted(ACTIVATIONS))}, got {activation!r}"
            )
        name, phi = activation, ACTIVATIONS[activation]
    elif callable(activation):
        name, phi = getattr(activation, "__name__", type(activation).__name__), activation
        shape = jax.eval_shape(phi, jax.ShapeDtypeStruct((2, 3), jnp.float32)).shape
        if shape != (2, 3):
            raise ValueError(
                f"activation must be elementwise, got shape {shape} from an input of shape (2, 3)"
            )
    else:
        raise TypeError(f"activation must be a name or an elementwise function, got {activation!r}")

    def dphi(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jax.jvp(phi, (x,), (jnp.ones_like(x),))[1]

    named = isinstance(activation, str)
    return Activation(
        name,
        phi,
        dphi,
        name in TWICE_DIFFERENTIABLE if named else True,
        named and name in HOMOGENEOUS,
        float(phi(jnp.zeros(()))),
        float(dphi(jnp.zeros(()))),
    )
