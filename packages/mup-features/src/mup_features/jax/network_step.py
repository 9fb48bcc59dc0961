"""One step of SGD of one finite network whose hidden matrices are random matrices of `conditioning`.

Backward signals are those of section c3 for every parametrization: b^l(i) = n dloss/dh^l(i), so that
W^l <- W^l - (rate_l / n) sum_i b^l(i) x^{l-1}(i)^T. The first layer acts on coordinates of the inputs in an
orthonormal basis of their span, which has the same distribution and the same training.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .activations import Elementwise
from .conditioning import DenseMatrix, Draw, RevealedMatrix, Rows, dense_matrix, grown, revealed_matrix
from .losses import Loss
from .width_sharding import copied, spread

__all__ = ["Network", "NetworkState", "Rates", "Start", "new_networks", "rates_of", "train_step", "with_room"]


class Network(NamedTuple):
    """What all steps share and what compiled functions are made for.

    Attributes:
        phi: activation of each hidden layer.
        dphi: their derivatives.
        loss: the loss.
        biased: whether hidden layers have biases.
        samples: N, the training inputs among the rows of a full pass; the others are test inputs.
        grams: whether to record Gram matrices of h and x and the change of h.
        signals: whether to record Gram matrices of b.
        mesh: devices over which the width is spread; None for the default device.
    """

    phi: tuple[Elementwise, ...]
    dphi: tuple[Elementwise, ...]
    loss: Loss
    biased: bool
    samples: int
    grams: bool
    signals: bool
    mesh: Mesh | None = None


class Rates(NamedTuple):
    """Numbers of one step.

    Attributes:
        layers: [L + 1], effective rates of W^1..W^{L+1}; zeros leave the network as it is.
        bias: effective rate of the biases.
        momentum: of all layers.
        shrink: 1 - rate * weight decay.
    """

    layers: Float[Array, " layers"]
    bias: Float[Array, ""]
    momentum: Float[Array, ""]
    shrink: Float[Array, ""]


def rates_of(
    layers: Sequence[float] | Float[np.ndarray, " layers"], bias: float, momentum: float, shrink: float
) -> Rates:
    """The numbers as arrays of one type: Python's and NumPy's differ to the compiler."""
    return Rates(*(jnp.asarray(number, jnp.float64) for number in (layers, bias, momentum, shrink)))


class NetworkState(NamedTuple):
    """Weights of one network.

    Attributes:
        first: [d', n], W^1 transposed over a basis of the inputs' span.
        first_velocity: its momentum.
        readout: [C, n], W^{L+1}.
        readout_velocity: its momentum.
        biases: [L, n], or [0, n] without biases.
        bias_velocity: their momentum.
        hidden: W^2..W^L.
        h_start: [L, N, n], pre-activations at step 0, or [0, N, n] where they are not needed.
        x_start: features at step 0.
        key: for what is still to be drawn.
    """

    first: Rows
    first_velocity: Rows
    readout: Rows
    readout_velocity: Rows
    biases: Rows
    bias_velocity: Rows
    hidden: tuple[RevealedMatrix, ...] | tuple[DenseMatrix, ...]
    h_start: Float[Array, "layers samples width"]
    x_start: Float[Array, "layers samples width"]
    key: PRNGKeyArray


class Start(NamedTuple):
    """Moments of the initial weights.

    Attributes:
        variances: [L + 1], Var(W^l).
        means: [L + 1], of the entries of W^l; zero for l = 1.
        bias_variances: [L + 1], of the biases.
    """

    variances: Float[Array, " layers"]
    means: Float[Array, " layers"]
    bias_variances: Float[Array, " layers"]


@partial(jax.jit, static_argnames=("network", "width", "inputs", "outputs", "capacities"))
def new_networks(
    network: Network,
    width: int,
    inputs: int,
    outputs: int,
    capacities: tuple[int, int] | None,
    start: Start,
    keys: PRNGKeyArray,
) -> NetworkState:
    """Networks at initialization, one for each key.

    Args:
        network: what all steps share.
        width: n.
        inputs: d', dimension of the span of the inputs.
        outputs: C.
        capacities: room for directions of W and of its transpose; None draws hidden matrices whole.
        start: moments of the initial weights.
        keys: one for each network.
    """

    def one(key: PRNGKeyArray) -> NetworkState:
        return _laid_out(_new(network, width, inputs, outputs, capacities, start, key), network.mesh)

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnames=("network", "full"), donate_argnames=("states",))
def train_step(
    network: Network,
    states: NetworkState,
    coordinates: Float[Array, "rows inputs"],
    y: Float[Array, "samples outputs"],
    batch: Int[Array, " batch"],
    rates: Rates,
    start: Start,
    step: Int[Array, ""],
    offsets: Int[Array, "2"],
    *,
    full: bool,
) -> tuple[NetworkState, dict[str, Float[Array, "..."]]]:
    """Forward, loss, backward and update of networks along the leading axis of `states`; what is recorded.

    Args:
        network: what all steps share.
        states: networks before the step; not to be used afterwards.
        coordinates: inputs in the basis of their span: training, then test inputs.
        y: targets of all training inputs.
        batch: which training inputs make this step.
        rates: numbers of this step.
        start: moments of the initial weights.
        step: its number.
        offsets: where new directions go in the bases of W and of its transpose.
        full: pass all inputs forward and record, or only the batch.
    """
    rows = coordinates if full else coordinates[batch]
    inside = batch if full else jnp.arange(len(batch))

    def one(state: NetworkState) -> tuple[NetworkState, dict[str, Array]]:
        state, record = _step(network, state, rows, inside, y, batch, rates, start, step, offsets, full)
        return _laid_out(state, network.mesh), copied(record, network.mesh)

    return jax.vmap(one)(states)


def with_room(states: NetworkState, capacity_x: int, capacity_y: int) -> NetworkState:
    """The same networks with more room in their bases, which leading axes of replicas may precede."""
    hidden = tuple(grown(m, capacity_x, capacity_y) for m in states.hidden if isinstance(m, RevealedMatrix))
    return states._replace(hidden=hidden)


def _laid_out(state: NetworkState, mesh: Mesh | None) -> NetworkState:
    """The same network, its vectors cut along the width; the compiler lays out all between."""
    vectors = {
        name: spread(array, mesh) for name, array in state._asdict().items() if name not in ("hidden", "key")
    }
    return state._replace(hidden=tuple(matrix.spread_over(mesh) for matrix in state.hidden), **vectors)


def _new(
    network: Network, width: int, inputs: int, outputs: int, capacities, start: Start, key
) -> NetworkState:
    depth = len(network.phi)
    keys = jax.random.split(key, depth + 3)
    std, means = jnp.sqrt(start.variances), start.means
    first = std[0] * jax.random.normal(keys[0], (inputs, width))
    readout = means[-1] + std[-1] * jax.random.normal(keys[1], (outputs, width))
    biases = jnp.zeros((0, width))
    if network.biased:
        biases = jnp.sqrt(start.bias_variances[:depth, None]) * jax.random.normal(keys[2], (depth, width))
    if capacities is None:
        hidden = tuple(dense_matrix(keys[3 + k], width, std[k], means[k]) for k in range(1, depth))
    else:
        hidden = tuple(revealed_matrix(width, *capacities) for _ in range(1, depth))
    empty = jnp.zeros((depth if network.grams else 0, network.samples, width))
    return NetworkState(
        first,
        jnp.zeros_like(first),
        readout,
        jnp.zeros_like(readout),
        biases,
        jnp.zeros_like(biases),
        hidden,
        empty,
        empty,
        keys[3],
    )


def _step(
    network: Network,
    state: NetworkState,
    rows: Float[Array, "rows inputs"],
    inside: Int[Array, " batch"],
    y: Float[Array, "samples outputs"],
    batch: Int[Array, " batch"],
    rates: Rates,
    start: Start,
    step: Int[Array, ""],
    offsets: Int[Array, "2"],
    full: bool,
) -> tuple[NetworkState, dict[str, Array]]:
    """The step of one network; `inside` says where the batch is among the rows."""
    width = state.first.shape[1]
    ahead, back = _draws(network, state, len(rows), len(batch), start, step, offsets)
    h, x, coefficients, hidden = _forward(network, state, rows, ahead)
    f = x[-1] @ state.readout.T
    chi = network.loss.chi(f[inside], y[batch])
    b, errors, hidden = _backward(network, hidden, width * chi @ state.readout, [a[inside] for a in h], back)

    record = {}
    if full:
        record = _outputs(network, f, y)
        if network.grams:
            state = _remember_start(network, state, h, x, step)
            record |= _grams(network, state, h, x)
        if network.signals:
            record["G"] = _signal_grams(network, b, batch)

    def moved(weight: Array, velocity: Array, gradient: Array, rate: Array) -> tuple[Array, Array]:
        velocity = rates.momentum * velocity + gradient
        return rates.shrink * weight - rate * velocity, velocity

    scaled = rates.layers / width
    first = moved(state.first, state.first_velocity, rows[inside].T @ b[0], scaled[0])
    readout = moved(state.readout, state.readout_velocity, chi.T @ x[-1][inside], rates.layers[-1])
    biases = state.biases, state.bias_velocity
    if network.biased:
        biases = moved(*biases, jnp.stack([jnp.sum(part, axis=0) for part in b]), rates.bias / width)
    hidden = tuple(
        matrix.updated(e, c[inside], rate, rates.momentum, rates.shrink)
        for matrix, e, c, rate in zip(hidden, errors, coefficients, scaled[1:-1], strict=True)
    )
    return NetworkState(*first, *readout, *biases, hidden, state.h_start, state.x_start, state.key), record


def _draws(
    network: Network,
    state: NetworkState,
    rows: int,
    batch: int,
    start: Start,
    step: Int[Array, ""],
    offsets: Int[Array, "2"],
) -> tuple[list[Draw], list[Draw]]:
    """What the products with W^2..W^L and with their transposes draw; all normals at once compile sooner."""
    matrices, width = len(state.hidden), state.first.shape[1]
    whole = any(isinstance(matrix, DenseMatrix) for matrix in state.hidden)
    count = 0 if whole else rows + batch
    normal = jax.random.normal(jax.random.fold_in(state.key, step), (matrices, count, width))
    fresh = spread(jnp.sqrt(start.variances[1:-1, None, None]) * normal, network.mesh)
    ahead = [Draw(part[:rows], mean, offsets[0]) for part, mean in zip(fresh, start.means[1:-1], strict=True)]
    back = [Draw(part[rows:], mean, offsets[1]) for part, mean in zip(fresh, start.means[1:-1], strict=True)]
    return ahead, back


def _forward(network: Network, state: NetworkState, rows: Float[Array, "rows inputs"], draws: list[Draw]):
    """Pre-activations, features, coefficients of x^{l-1} for W^l, and the matrices afterwards."""
    h, x, coefficients, hidden = [rows @ state.first], [], [], []
    for k, phi in enumerate(network.phi):
        if k:
            value, c, matrix = state.hidden[k - 1].forward(x[-1], draws[k - 1])
            coefficients.append(c)
            hidden.append(matrix)
            h.append(value)
        if network.biased:
            h[k] = h[k] + state.biases[k]
        x.append(phi(h[k]))
    return h, x, coefficients, hidden


def _backward(network: Network, hidden: list, dx: Rows, h: list[Rows], draws: list[Draw]):
    """Signals b^1..b^L of the batch, their coefficients for W^l, and the matrices afterwards."""
    b, errors, hidden = [dx * network.dphi[-1](h[-1])], [], list(hidden)
    for k in reversed(range(len(hidden))):
        dx, e, hidden[k] = hidden[k].backward(b[0], draws[k])
        errors.insert(0, e)
        b.insert(0, dx * network.dphi[k](h[k]))
    return b, errors, hidden


def _outputs(network: Network, f: Float[Array, "rows outputs"], y: Array) -> dict[str, Array]:
    train, test = f[: network.samples], f[network.samples :]
    record = {"f": train, "loss": network.loss.value(train, y)}
    return record | ({"f_test": test} if len(test) else {})


def _remember_start(
    network: Network, state: NetworkState, h: list[Rows], x: list[Rows], step: Array
) -> NetworkState:
    now = [jnp.stack([layer[: network.samples] for layer in part]) for part in (h, x)]
    return state._replace(
        h_start=jnp.where(step == 0, now[0], state.h_start),
        x_start=jnp.where(step == 0, now[1], state.x_start),
    )


def _grams(network: Network, state: NetworkState, h: list[Rows], x: list[Rows]) -> dict[str, Array]:
    """Gram matrices over the training inputs, [L, N, N], those with step 0, and the change of h, [L]."""
    count, width = network.samples, state.first.shape[1]

    def products(left: list[Array], right: list[Array]) -> Array:
        return jnp.stack([a[:count] @ b[:count].T / width for a, b in zip(left, right, strict=True)])

    def change(now: Array, start: Array) -> Array:
        sizes = jnp.linalg.norm(start, axis=1)
        return jnp.mean(jnp.linalg.norm(now[:count] - start, axis=1) / sizes)

    h_start, x_start = list(state.h_start), list(state.x_start)
    return {
        "K_pre": products(h, h),
        "K_post": products(x, x),
        "K_pre_cross": products(h, h_start),
        "K_post_cross": products(x, x_start),
        "change": jnp.stack([change(now, start) for now, start in zip(h, h_start, strict=True)]),
    }


def _signal_grams(network: Network, b: list[Rows], batch: Int[Array, " batch"]) -> Float[Array, "layers n n"]:
    """Gram matrices of b over the training inputs; zero outside the batch, where the derivative is."""
    empty = jnp.zeros((network.samples, network.samples))
    return jnp.stack([empty.at[jnp.ix_(batch, batch)].set(part @ part.T / part.shape[1]) for part in b])
