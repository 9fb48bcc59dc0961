"""One coordinate of one layer in the limit, as a function of its Gaussian fields, and its expectations.

With the order parameters of the other layers fixed, a coordinate of layer l obeys (section c3)

    h_t(i)  = u_t(i) + sum_{s<t,j} A[t,i;s,j] b_s(j),       x_t(i) = phi(h_t(i))
    dx_t(i) = v_t(i) + sum_{s<=t,j} B[t,i;s,j] x_s(j),      b_t(i) = dx_t(i) phi'(h_t(i))

where u = Zhat of W x and v = Zhat of W^T b; at the last layer dx_t = V_t chi_t, where V_t is V_0 minus the
sum over s < t of eta_s x_s chi_s. A and B hold response functions, E[dx/dv] and E[db/du], which are
derivatives of means in shifts of the fields, and learned overlaps. Expectations are product trapezoids over
whitened fields.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .activations import Activation
from .dual_activations import REACH, trapezoid

Matrix = Array | np.ndarray

CHUNK = 2**15
"""Points of the grid that are evaluated at once."""

RELATIVE_RANK = 1e-14
"""Directions of the fields with less than this share of the largest variance change nothing in float64."""

__all__ = ["Grid", "Site", "backward_means", "fields_of", "forward_means", "grid"]


class Grid(NamedTuple):
    """Nodes of the leading axes in chunks, [chunks, size, D - 1], their weights, and the last axis."""

    leading: Float[Array, "chunks size axes"]
    leading_weights: Float[Array, "chunks size"]
    last: Float[Array, " points"]
    last_weights: Float[Array, " points"]


class Site(NamedTuple):
    """What defines the recursion on one layer up to time t.

    Attributes:
        u_root: [t + 1, rows, rank]; fields u are this times standard normal numbers.
        v_root: [times, samples, rank], the same of v; None at the last layer.
        forward: A, per time one matrix [rows, samples] for each earlier time.
        backward: B, per time one matrix [samples, samples] for each time so far; empty at the last layer.
        chi: at the last layer, per time the derivative of the loss, [samples, C].
        rates: of the steps made, there.
        readout_std: standard deviation of V_0, there.
    """

    u_root: Matrix
    v_root: Matrix | None
    forward: tuple[tuple[Matrix, ...], ...]
    backward: tuple[tuple[Matrix, ...], ...] = ()
    chi: tuple[Matrix, ...] = ()
    rates: tuple[float, ...] = ()
    readout_std: float = 1.0


def fields_of(covariance: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n rank"]:
    """A root of the covariance, with as many columns as it has directions."""
    values, vectors = np.linalg.eigh(covariance)
    keep = values > RELATIVE_RANK * max(values[-1], np.finfo(float).tiny)
    return vectors[:, keep] * np.sqrt(values[keep])


def grid(dimensions: int, points: int) -> Grid:
    """The product rule within the ball of radius REACH in the leading axes."""
    nodes, weights = trapezoid(points)
    leading = np.zeros((1, 0))
    leading_weights = np.ones(1)
    for _ in range(dimensions - 1):
        leading = np.concatenate(
            [np.repeat(leading, points, axis=0), np.tile(nodes, len(leading))[:, None]], axis=1
        )
        leading_weights = np.outer(leading_weights, weights).ravel()
        inside = np.sum(leading**2, axis=1) <= REACH**2 * (1 + 1e-12)
        leading, leading_weights = leading[inside], leading_weights[inside]
    size = max(1, min(len(leading), CHUNK // points))
    missing = -len(leading) % size
    chunks = (len(leading) + missing) // size
    leading = np.pad(leading, ((0, missing), (0, 0))).reshape(chunks, size, dimensions - 1)
    leading_weights = np.pad(leading_weights, (0, missing)).reshape(chunks, size)
    return Grid(*map(jnp.asarray, (leading, leading_weights, nodes, weights)))


@partial(jax.jit, static_argnames=("activation", "outputs"))
def forward_means(activation: Activation, site: Site, where: Grid, outputs: int) -> dict[str, Array]:
    """Means at the last time t, after its forward pass.

    Args:
        activation: of the layer.
        site: the recursion; v and B up to t - 1.
        where: nodes over the fields, those of u first.
        outputs: C.

    Returns:
        "x": [t + 1, rows, rows], E[x_t(i) x_s(j)]; "h": [rows, rows], E[h_t h_t]; "h_start": E[h_t h_0];
        "moved": [rows], E[(h_t - h_0)^2]; and "f": [rows, C], E[V_t x_t(i)], at the last layer, or
        "response": [rows, t, samples], E[dx_t(i) / dv_s(j)], at another.
    """

    def means(z: Array, weights: Array) -> dict[str, Array]:
        def features(shift: Array) -> tuple[Array, dict[str, Array]]:
            h, x, _, V = _run(activation, site, z, outputs, v_shift=shift)
            made = {
                "x": jnp.stack([(x[-1] * weights) @ earlier.T for earlier in x]),
                "h": (h[-1] * weights) @ h[-1].T,
                "h_start": (h[-1] * weights) @ h[0].T,
                "moved": (h[-1] - h[0]) ** 2 @ weights,
            }
            if site.v_root is None:
                made["f"] = (x[-1] * weights) @ V.T
            return x[-1] @ weights, made

        if site.v_root is None:
            return features(jnp.zeros(()))[1]
        response, made = jax.jacrev(features, has_aux=True)(jnp.zeros(site.v_root.shape[:2]))
        return made | {"response": response}

    return _integral(means, where)


@partial(jax.jit, static_argnames=("activation", "outputs"))
def backward_means(activation: Activation, site: Site, where: Grid, outputs: int) -> dict[str, Array]:
    """Means at the last time t, after its backward pass.

    Args:
        activation: of the layer.
        site: the recursion; v and B, or chi, up to t.
        where: nodes over the fields, those of u first.
        outputs: C.

    Returns:
        "b": [t + 1, samples, samples], E[b_t(i) b_s(j)]; "response": [samples, t + 1, rows],
        E[db_t(i) / du_s(j)].
    """

    def means(z: Array, weights: Array) -> dict[str, Array]:
        def signals(shift: Array) -> tuple[Array, Array]:
            _, _, b, _ = _run(activation, site, z, outputs, u_shift=shift)
            return b[-1] @ weights, jnp.stack([(b[-1] * weights) @ earlier.T for earlier in b])

        response, products = jax.jacrev(signals, has_aux=True)(jnp.zeros(site.u_root.shape[:2]))
        return {"b": products, "response": response}

    return _integral(means, where)


def _run(
    activation: Activation,
    site: Site,
    z: Float[Array, "fields nodes"],
    outputs: int,
    *,
    u_shift: Array | None = None,
    v_shift: Array | None = None,
) -> tuple[list[Array], list[Array], list[Array], Array]:
    """Per time h, x [rows, nodes] and b [samples, nodes], as far as v or chi are known, and V_t [C, nodes].

    Shifts are added to u [times, rows] and v [times, samples]; a derivative in them is one in the field.
    """
    rank = site.u_root.shape[-1]
    u = site.u_root @ z[:rank]
    if u_shift is not None:
        u = u + u_shift[..., None]
    V = v = site.readout_std * z[rank : rank + outputs]
    if site.v_root is not None:
        v = site.v_root @ z[rank:]
        if v_shift is not None:
            v = v + v_shift[..., None]
    known = len(site.chi) if site.v_root is None else len(v)
    h, x, b = [], [], []
    for t in range(len(u)):
        h.append(u[t] + sum(A @ earlier for A, earlier in zip(site.forward[t], b, strict=True)))
        x.append(activation.phi(h[-1]))
        if t == known:
            break
        if site.v_root is None:
            dx = site.chi[t] @ V
        else:
            dx = v[t] + sum(B @ past[: len(v[t])] for B, past in zip(site.backward[t], x, strict=True))
        b.append(dx * activation.dphi(h[-1][: len(dx)]))
        if site.v_root is None and t < len(u) - 1:
            V = V - site.rates[t] * site.chi[t].T @ x[-1][: len(dx)]
    return h, x, b, V


def _integral(means: Callable[[Array, Array], dict[str, Array]], where: Grid) -> dict[str, Array]:
    """Sum over the chunks of the grid of what `means` makes of nodes [fields, nodes] and weights."""

    def chunk(part: tuple[Array, Array]) -> dict[str, Array]:
        leading, weights = part
        repeated = jnp.repeat(leading, len(where.last), axis=0)
        z = jnp.concatenate([repeated, jnp.tile(where.last, len(leading))[:, None]], axis=1)
        return means(z.T, jnp.outer(weights, where.last_weights).ravel())

    parts = jax.lax.map(chunk, (where.leading, where.leading_weights))
    return jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)
