"""Gaussian expectations of products by Mehler's series, for functions of which it leaves nothing out.

    E[f(u) f(v)] = sum_k rho^k c_k(a) c_k(b),   c_k(a) = E[f(sqrt(a) z) He_k(z)] / sqrt(k!),   z ~ N(0, 1)

with Var(u) = a, Var(v) = b, Cov(u, v) = rho sqrt(a b). A pair of inputs costs one number for each term, not
a two-dimensional integral. By Parseval the squares of all c_k(a) sum to E[f(sqrt(a) z)^2]; what K terms miss
of it bounds what they miss of any product: |rest| <= sqrt(missed(a) missed(b)), whatever rho. Terms fall off
like exp(-p sqrt(2 k / a)) with p the distance of the pole of f nearest to the real axis, and only like a
power of k at a kink, where the integral stays the better way.

Source: Mehler 1866; Daniely, Frostig, Singer 2016 (arXiv 1602.05897), dual activations.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .activations import Activation, Elementwise

TERMS = (64, 256, 1024)
"""Numbers of terms to choose from: few, as each is compiled. 256 suffice for tanh and variances up to 1."""

NODES, REACH = 801, 16.0
"""The rule of the coefficients, which are integrals over one axis: fine enough for the last term."""

__all__ = ["Expansion", "enough_terms", "expansion", "product_means", "square_mean"]


class Expansion(NamedTuple):
    """Coefficients of phi and phi' for variances [...], both [terms, ...], and the variances."""

    variance: Float[Array, "*shape"]
    value: Float[Array, "terms *shape"]
    slope: Float[Array, "terms *shape"]


def enough_terms(activation: Activation, variances: Float[Array, "*shape"]) -> int:
    """The smallest of TERMS that leaves out only rounding of phi and phi' at these variances, or 0."""
    missed, apart = (np.asarray(part) for part in _missed(activation, variances))
    eps = np.finfo(missed.dtype).eps
    small = (missed <= 32 * eps) & (apart <= 1024 * eps)
    return next((terms for terms, fits in zip(TERMS, small, strict=True) if fits), 0)


def expansion(activation: Activation, variances: Float[Array, "*shape"], terms: int) -> Expansion:
    """The first coefficients of phi and phi' at these variances."""
    value, slope = (_coefficients(f, variances, terms) for f in (activation.phi, activation.dphi))
    return Expansion(variances, value, slope)


def square_mean(f: Elementwise, variances: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """E[f(sqrt(a) z)^2] for each variance a."""
    nodes, weights, _ = _rule(1)
    return f(_points(variances, nodes)) ** 2 @ jnp.asarray(weights, variances.dtype)


def product_means(
    u: Expansion, v: Expansion, c: Float[Array, "m n"]
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for each of m variables u with each of n variables v.

    Args:
        u: expansion at the variances [m].
        v: expansion at the variances [n].
        c: covariances.
    """
    root = jnp.sqrt(u.variance)[:, None] * jnp.sqrt(v.variance)
    cosine = jnp.where(root > 0, c / jnp.where(root > 0, root, 1), 0)

    def horner(sums: tuple[Array, Array], term: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        value_u, value_v, slope_u, slope_v = term
        value = sums[0] * cosine + value_u[:, None] * value_v
        return (value, sums[1] * cosine + slope_u[:, None] * slope_v), None

    zero = jnp.zeros_like(cosine)
    return jax.lax.scan(horner, (zero, zero), (u.value, v.value, u.slope, v.slope), reverse=True)[0]


@partial(jax.jit, static_argnames="activation")
def _missed(
    activation: Activation, variances: Float[Array, "*shape"]
) -> tuple[Float[Array, " choices"], Float[Array, ""]]:
    """Largest share of the mean square of phi or phi' that each of TERMS leaves out, and the rule's error.

    The error is the distance of the coefficients from those by nodes halfway between, relative to all of
    them: a function that wiggles between nodes looks like a smooth one to either rule, but not like the same.
    """

    def worst(f: Elementwise) -> tuple[Array, Array]:
        made = _coefficients(f, variances.ravel(), TERMS[-1])
        halfway = _coefficients(f, variances.ravel(), TERMS[-1], shift=0.5)
        kept = jnp.cumsum(made**2, axis=0)[np.array(TERMS) - 1]
        whole = square_mean(f, variances.ravel())
        # A function that vanishes has nothing to miss.
        some = jnp.where(whole == 0, 1, whole)
        missed = jnp.where(whole == 0, 0, 1 - kept / some)
        apart = jnp.sqrt(jnp.sum((made - halfway) ** 2, axis=0) / some)
        return jnp.max(jnp.abs(missed), axis=1), jnp.max(apart)

    phi, dphi = worst(activation.phi), worst(activation.dphi)
    return jnp.maximum(phi[0], dphi[0]), jnp.maximum(phi[1], dphi[1])


def _coefficients(
    f: Elementwise, variances: Float[Array, "*shape"], terms: int, shift: float = 0.0
) -> Float[Array, "terms *shape"]:
    nodes, _, polynomials = _rule(terms, shift)
    made = f(_points(variances, nodes)) @ jnp.asarray(polynomials.T, variances.dtype)
    return jnp.moveaxis(made, -1, 0)


def _points(variances: Float[Array, "*shape"], nodes: np.ndarray) -> Float[Array, "*shape nodes"]:
    return jnp.sqrt(variances)[..., None] * jnp.asarray(nodes, variances.dtype)


@lru_cache
def _rule(terms: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights of the normal density, and these times He_k / sqrt(k!), [terms, nodes].

    Nodes are shifted by a share of the distance between them.

    The recursion runs on He_k times the root of the density, which neither overflows nor cancels.
    """
    nodes = np.linspace(-REACH, REACH, NODES) + shift * 2 * REACH / (NODES - 1)
    root = (2 * np.pi) ** -0.25 * np.exp(-(nodes**2) / 4)
    functions, before = [root], np.zeros(NODES)
    for k in range(1, terms):
        functions.append((nodes * functions[-1] - np.sqrt(k - 1) * before) / np.sqrt(k))
        before = functions[-2]
    weights = root * 2 * REACH / (NODES - 1)
    return nodes, root * weights, np.stack(functions) * weights
