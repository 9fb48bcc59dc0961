"""Gaussian expectations of products: E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for jointly normal u, v.

With Var(u) = a, Var(v) = b, Cov(u, v) = c, closed forms for ReLU, leaky ReLU, abs (Cho and Saul 2009), erf
(Williams 1997), GELU, sin, cos and identity; for every other function the trapezoidal rule on whitened
coordinates, which converges geometrically for analytic functions. Both can be differentiated, also at
c = sqrt(a b), where the angle between u and v has no derivative but the expectations do.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .activations import ACTIVATIONS, Activation, Elementwise, resolve

Scalars = Float[Array, "*shape"]
Dual = Callable[[Scalars, Scalars, Scalars], tuple[Scalars, Scalars]]

REACH = 9.2
"""The trapezoidal rule ends here: the normal density is then 1e-19 of its peak."""

POINTS = 151
"""Points per axis: enough for 1e-13 with activations like tanh and variances up to about one."""

__all__ = ["POINTS", "REACH", "dual", "expectation", "has_closed_form", "trapezoid"]


def trapezoid(points: int = POINTS) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Nodes on [-REACH, REACH] and weights of the trapezoidal rule for the standard normal density."""
    nodes = np.linspace(-REACH, REACH, points)
    weights = np.exp(-0.5 * nodes**2) / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])
    return nodes, weights


def has_closed_form(activation: str | Elementwise | Activation) -> bool:
    """Whether `dual` of this activation needs no quadrature."""
    known = activation if isinstance(activation, Activation) else resolve(activation)
    return known.name in _CLOSED and known.phi is ACTIVATIONS[known.name]


@lru_cache
def dual(activation: str | Elementwise | Activation, points: int = POINTS) -> Dual:
    """Function of (a, b, c), elementwise, that gives (E[phi(u) phi(v)], E[phi'(u) phi'(v)]).

    Args:
        activation: a name, or an elementwise function that jax can differentiate.
        points: points per axis of the trapezoidal rule; unused where there is a closed form. The error is
            about exp(-2 pi p / h) with h = 18.4 sqrt(a) / (points - 1) and p the distance of the pole nearest
            to the real axis (pi / 2 for tanh). Functions with a kink converge only like h^2.
    """
    known = activation if isinstance(activation, Activation) else resolve(activation)
    if has_closed_form(known):
        return _CLOSED[known.name]
    values = expectation(known.phi, known.phi, points)
    slopes = expectation(_derivative(known.phi), _derivative(known.phi), points)

    def by_quadrature(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
        return values(a, b, c), slopes(a, b, c)

    return by_quadrature


@lru_cache
def expectation(
    f: Elementwise, g: Elementwise, points: int = POINTS
) -> Callable[[Scalars, Scalars, Scalars], Scalars]:
    """Function of (a, b, c), elementwise, that gives E[f(u) g(v)] by trapezoids.

    Its derivatives are expectations again and are computed as such: that in c is E[f'(u) g'(v)] (Price 1958),
    that in a is E[f''(u) g(v)] / 2 = (E[u f'(u) g(v)] - c E[f'(u) g'(v)]) / (2 a), the latter form needing no
    second derivative. Hence nothing is lost at c = sqrt(a b).
    """

    @partial(jnp.vectorize, signature="(),(),()->()")
    def by_trapezoid(a: Scalars, b: Scalars, c: Scalars) -> Scalars:
        nodes, weights = (jnp.asarray(part, a.dtype) for part in trapezoid(points))
        root = jnp.sqrt(a)
        shared = jnp.where(root > 0, c / jnp.where(root > 0, root, 1), 0)
        own = jnp.sqrt(jnp.maximum(b - shared**2, 0))
        inner = g(shared * nodes[:, None] + own * nodes) @ weights
        return jnp.sum(weights * f(root * nodes) * inner)

    value = jax.custom_jvp(by_trapezoid)

    @value.defjvp
    def _(primals, tangents):
        a, b, c = primals
        mixed = expectation(_derivative(f), _derivative(g), points)(a, b, c)
        left = _in_variance(
            f, g, a, expectation(_euler(f), g, points)(a, b, c) - c * mixed, (a, b, c), points
        )
        right = _in_variance(
            g, f, b, expectation(_euler(g), f, points)(b, a, c) - c * mixed, (b, a, c), points
        )
        return value(a, b, c), left * tangents[0] + right * tangents[1] + mixed * tangents[2]

    return value


def _in_variance(
    f: Elementwise, g: Elementwise, a: Scalars, stein: Scalars, at: tuple[Scalars, ...], points: int
) -> Scalars:
    """dE[f(u) g(v)] / da from Stein's form, or from the second derivative where a = 0."""
    curved = 0.5 * expectation(_derivative(_derivative(f)), g, points)(*at)
    return jnp.where(a > 0, stein / jnp.where(a > 0, 2 * a, 1), curved)


@lru_cache
def _derivative(f: Elementwise) -> Elementwise:
    """The function f', the same object for the same f."""

    def slope(x: Scalars) -> Scalars:
        return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

    return slope


@lru_cache
def _euler(f: Elementwise) -> Elementwise:
    """The function x f'(x)."""

    def scaled(x: Scalars) -> Scalars:
        return x * _derivative(f)(x)

    return scaled


def _angle(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars, Scalars, Scalars]:
    """sqrt(a b), cosine, sine and angle between u and v.

    Where |cosine| = 1 the derivatives of sine and angle are infinite; set to zero they leave the derivative
    of sin t + (pi - t) cos t in cos t, in which they cancel, exact. The same for a variable that is zero.
    """
    product = a * b
    moving = product > 0
    root = jnp.where(moving, jnp.sqrt(jnp.where(moving, product, 1)), 0)
    ratio = jnp.where(moving, c / jnp.where(moving, root, 1), 0)
    cosine = ratio + jax.lax.stop_gradient(jnp.clip(ratio, -1, 1) - ratio)  # clip halves slopes at its ends
    apart = jnp.abs(cosine) < 1
    inner = jnp.where(apart, cosine, 0)
    sine = jnp.where(apart, jnp.sqrt((1 - inner) * (1 + inner)), 0)
    angle = jnp.where(apart, jnp.arccos(inner), jnp.where(cosine > 0, 0, math.pi))
    return root, cosine, sine, angle


def _leaky(slope: float) -> Dual:
    """Phi = x for x > 0, slope x below: ReLU (0), leaky ReLU (0.01), abs (-1)."""

    def closed(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
        root, cosine, sine, angle = _angle(a, b, c)
        same = sine + (math.pi - angle) * cosine  # 2 pi E[relu(u) relu(v)] / root
        opposite = sine - angle * cosine  # 2 pi E[relu(u) relu(-v)] / root
        even, odd = 1 + slope**2, 2 * slope
        value = root * (even * same - odd * opposite) / (2 * math.pi)
        return value, (even * (math.pi - angle) + odd * angle) / (2 * math.pi)

    return closed


def _identity(_a: Scalars, _b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
    return c, jnp.ones_like(c)


def _erf(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
    """The derivative of the arcsine is finite: 4 c^2 <= 4 a b < (1 + 2 a)(1 + 2 b)."""
    scale = (1 + 2 * a) * (1 + 2 * b)
    value = 2 / math.pi * jnp.arcsin(2 * c / jnp.sqrt(scale))
    return value, 4 / math.pi / jnp.sqrt(scale - 4 * c**2)


def _sin(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
    """(cos(u - v) -+ cos(u + v)) / 2, in exponentials that cannot overflow."""
    half = (a + b) / 2
    difference, total = jnp.exp(c - half), jnp.exp(-c - half)
    return (difference - total) / 2, (difference + total) / 2


def _cos(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
    value, slope = _sin(a, b, c)
    return slope, value


def _gelu(a: Scalars, b: Scalars, c: Scalars) -> tuple[Scalars, Scalars]:
    """phi(x) = x Phi(x), by Stein's lemma used twice; `both` is E[Phi(u) Phi(v)], `density` E[Phi' Phi']."""
    scale = (1 + a) * (1 + b)
    both = 0.25 + jnp.arcsin(c / jnp.sqrt(scale)) / (2 * math.pi)
    determinant = scale - c**2
    density = 1 / (2 * math.pi * jnp.sqrt(determinant))
    value = c * both + density * (a * (b - c**2 / (1 + a)) + c**2 / (1 + b))
    slope = both + density * c * (1 / (1 + a) + 1 / (1 + b) + 1 / determinant)
    return value, slope


_CLOSED: dict[str, Dual] = {
    "abs": _leaky(-1.0),
    "cos": _cos,
    "erf": _erf,
    "gelu": _gelu,
    "identity": _identity,
    "leaky_relu": _leaky(0.01),
    "relu": _leaky(0.0),
    "sin": _sin,
}
