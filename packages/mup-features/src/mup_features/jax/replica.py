"""One replica of the infinite-width network: its populations, their signals, and one step of SGD.

Order within step t (spec section c4): forward through layers 1 to L, each with the products W^T b of earlier
steps in view; outputs and loss gradient; backward through layers L to 2, each with the forward products of
the same step in view (that is the s = t term of Zdot, which vanishes at t = 0 only); then the updates.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .activations import Elementwise
from .columns import Columns, Small, combined, inner
from .fields import FieldSource, match_moments
from .products import DrawFields, Matrix, empty_matrix, product, record_update

__all__ = [
    "Backward",
    "Fresh",
    "Layers",
    "RankError",
    "Replica",
    "Signals",
    "Step",
    "backward",
    "forward",
    "new_replica",
    "outputs",
    "updated",
]


class Layers(NamedTuple):
    """What all steps of a run share.

    Attributes:
        depth: L, hidden layers.
        phi: activation of each hidden layer.
        dphi: their derivatives.
        sigma: standard deviations of the entries of W^1 .. W^{L+1} without their width factors.
        tol: directions shorter than this, relative to the longest argument so far, are dropped.
        max_rank: largest rank of a basis; None for no bound but memory.
        match: whether fields are moment matched.
        initial_products: whether W_0 of layers 2..L acts at all (not under IP, where it vanishes).
        mean: n times the mean of the entries of W^2 .. W^{L+1} at the start, 0 but under `ip_noncentered`.
        bias_std: standard deviation of the initial biases of hidden layers, 0 for none.
    """

    depth: int
    phi: tuple[Elementwise, ...]
    dphi: tuple[Elementwise, ...]
    sigma: tuple[float, ...]
    tol: float
    max_rank: int | None
    match: bool
    initial_products: bool
    mean: float = 0.0
    bias_std: float = 0.0


class Replica(NamedTuple):
    """State of one replica between two steps; a pytree of arrays and numbers.

    Attributes:
        first: [M, d'], W^1_t over an orthonormal basis of the inputs' span, on population 1.
        first_fields: W^1_0 / sigma, the fields.
        first_velocity: momentum of W^1.
        readout: [M, C], V_t = n W^{L+1}_t, on population L.
        readout_fields: V_0 / sigma.
        readout_velocity: momentum of V.
        biases: [M, 1] each, of layers 1..L; none without biases.
        bias_fields: their fields at the start.
        bias_velocities: their momentum.
        matrices: W^2 .. W^L.
        means: n times the mean that is left of the entries of W^2 .. W^L.
        fields_used: fields drawn on each population so far.
    """

    first: Columns
    first_fields: Columns
    first_velocity: Columns
    readout: Columns
    readout_fields: Columns
    readout_velocity: Columns
    biases: tuple[Columns, ...]
    bias_fields: tuple[Columns, ...]
    bias_velocities: tuple[Columns, ...]
    matrices: tuple[Matrix, ...]
    means: tuple[float, ...]
    fields_used: tuple[int, ...]


class Signals(NamedTuple):
    """Columns of one pass, for a set of inputs.

    Attributes:
        h: pre-activations of layers 1..L, [M, B] each.
        x: features.
        coefficients: x^{l-1} in the basis of W^l, for l = 2..L, [rank, B] each.
    """

    h: tuple[Columns, ...]
    x: tuple[Columns, ...]
    coefficients: tuple[Small, ...]


class Backward(NamedTuple):
    """Backward signals b^1 .. b^L, [M, B] each, and b^l in the basis of W^l transposed, for l = 2..L."""

    b: tuple[Columns, ...]
    coefficients: tuple[Small, ...]


def new_replica(layers: Layers, sources: tuple[FieldSource, ...], inputs: int, outputs: int) -> Replica:
    """A replica before training. V_0 and W^1 get the first Sobol dimensions, which are the best."""
    here: list[tuple[Columns, ...]] = [()] * layers.depth
    used = [0] * layers.depth

    def draw(layer: int, count: int) -> Columns:
        new = sources[layer].draw(used[layer], count)
        if layers.match:
            new = match_moments(new, here[layer])
        here[layer] = (*here[layer], new)
        used[layer] += count
        return new

    readout_fields = draw(layers.depth - 1, outputs)
    first_fields = draw(0, inputs)
    bias_fields = tuple(draw(layer, 1) for layer in range(layers.depth)) if layers.bias_std else ()
    first, readout = layers.sigma[0] * first_fields, layers.mean + layers.sigma[-1] * readout_fields
    matrices = tuple(
        empty_matrix(layers.sigma[layer] if layers.initial_products else 0.0)
        for layer in range(1, layers.depth)
    )
    return Replica(
        first,
        first_fields,
        jnp.zeros_like(first),
        readout,
        readout_fields,
        jnp.zeros_like(readout),
        tuple(layers.bias_std * field for field in bias_fields),
        bias_fields,
        tuple(jnp.zeros_like(field) for field in bias_fields),
        matrices,
        (layers.mean,) * (layers.depth - 1),
        tuple(used),
    )


class Fresh:
    """Draws fields on the populations of a replica during one pass, orthonormal to all that are there.

    Attributes:
        used: fields drawn on each population so far.
    """

    def __init__(self, layers: Layers, sources: tuple[FieldSource, ...], replica: Replica) -> None:
        self._layers, self._sources = layers, sources
        self._onlookers: list[tuple[Columns, ...]] = [()] * layers.depth
        self.used = list(replica.fields_used)

    def on(self, layer: int, others: tuple[Columns, ...], keep: bool) -> DrawFields:
        """A function that draws fields on the population of a layer (0-based) beside those given.

        Its arguments are the number of fields, that of columns (the others are zero), and more fields that
        are there.
        """

        def draw(count: int, columns: int, known: Sequence[Columns]) -> Columns:
            source, used = self._sources[layer], self.used[layer]
            if self._layers.match and used + count >= source.samples:
                raise RankError(
                    f"the population of layer {layer + 1} has {source.samples} points and would need "
                    f"{used + count} orthonormal fields: raise samples or tol"
                )
            # A field does not depend on those after it: more of them fill up a shape while there is room.
            drawn = columns if used + columns < source.samples else count
            new = source.draw(used, drawn)
            if self._layers.match:
                new = match_moments(new, (*others, *known, *self._onlookers[layer]))
            if count < columns:
                new = combined(new, np.eye(drawn, columns) * (np.arange(columns) < count))
            self.used[layer] += count
            if not keep:
                self._onlookers[layer] = (*self._onlookers[layer], new)
            return new

        return draw


def forward(
    layers: Layers,
    replica: Replica,
    coordinates: Small,
    fresh: Fresh,
    *,
    keep: bool,
    beyond: Small | None = None,
) -> tuple[Signals, Replica]:
    """Signals of a set of inputs, given in the basis of the inputs' span, at the current weights.

    Args:
        layers: what all steps share.
        replica: the state.
        coordinates: [d', B].
        fresh: where new fields come from.
        keep: whether the matrices remember the products; not for inputs that are only looked at.
        beyond: coordinates of the inputs in directions that no training input has. Training does not move W^1
            there, so that fresh fields stand for it.

    Raises:
        RankError: if a basis would exceed `max_rank`.
    """
    matrices = list(replica.matrices)
    h = [_plus(combined(replica.first, coordinates), replica.biases[:1])]
    if beyond is not None and len(beyond):
        others = _other_fields(layers, replica, matrices, 0, -1)
        fields = fresh.on(0, others, keep=False)(len(beyond), len(beyond), ())
        h[0] = h[0] + combined(fields, layers.sigma[0] * beyond)
    x = [_applied(layers.phi[0], h[0])]
    coefficients = []
    for layer in range(1, layers.depth):
        made = product(
            matrices[layer - 1],
            x[-1],
            transpose=False,
            fresh=fresh.on(layer, _other_fields(layers, replica, matrices, layer, layer - 1), keep),
            tol=layers.tol,
            extend=keep,
        )
        matrices[layer - 1] = matrices[layer - 1]._replace(x=made.basis)
        _check_rank(layers, made.basis.rank, layer)
        coefficients.append(made.coefficients)
        value = _plus(made.value, replica.biases[layer : layer + 1])
        if replica.means[layer - 1]:
            value = _plus_mean(value, x[-1], replica.means[layer - 1])
        h.append(value)
        x.append(_applied(layers.phi[layer], value))
    replica = replica._replace(matrices=tuple(matrices))
    if keep:
        replica = replica._replace(fields_used=tuple(fresh.used))
    return Signals(tuple(h), tuple(x), tuple(coefficients)), replica


def backward(
    layers: Layers,
    replica: Replica,
    signals: Signals,
    chi: Small,
    fresh: Fresh,
    *,
    keep: bool,
) -> tuple[Backward, Replica]:
    """Backward signals of the batch whose forward products were just made; chi is absorbed in them.

    Args:
        layers: what all steps share.
        replica: the state after the forward pass.
        signals: what the forward pass gave.
        chi: [B, C], derivative of the loss with respect to the outputs.
        fresh: that of the forward pass.
        keep: whether the matrices remember the products.

    Raises:
        RankError: if a basis would exceed `max_rank`.
    """
    matrices = list(replica.matrices)
    last = layers.depth - 1
    b = [_through(layers.dphi[last], combined(replica.readout, chi.T), signals.h[last])]
    coefficients = []
    for layer in range(last, 0, -1):
        made = product(
            matrices[layer - 1],
            b[0],
            transpose=True,
            fresh=fresh.on(layer - 1, _other_fields(layers, replica, matrices, layer - 1, layer - 1), keep),
            tol=layers.tol,
            extend=keep,
        )
        matrices[layer - 1] = matrices[layer - 1]._replace(y=made.basis)
        _check_rank(layers, made.basis.rank, layer)
        coefficients.insert(0, made.coefficients)
        value = made.value
        if replica.means[layer - 1]:
            value = _plus_mean(value, b[0], replica.means[layer - 1])
        b.insert(0, _through(layers.dphi[layer - 1], value, signals.h[layer - 1]))
    if keep:
        replica = replica._replace(matrices=tuple(matrices), fields_used=tuple(fresh.used))
    return Backward(tuple(b), tuple(coefficients)), replica


class RankError(ArithmeticError):
    """A basis needs more directions than `max_rank`."""


class Step(NamedTuple):
    """Rate, momentum and weight decay of one step."""

    lr: float
    momentum: float
    weight_decay: float


def updated(
    replica: Replica, coordinates: Small, signals: Signals, back: Backward, chi: Small, step: Step
) -> Replica:
    """The replica after one step of SGD with momentum; weight decay multiplies weights, as in AdamW."""
    lr, momentum, decay = step
    shrink = 1.0 - lr * decay
    first, first_velocity = _moved(
        replica.first, replica.first_velocity, back.b[0], coordinates.T, lr, momentum, shrink
    )
    readout, readout_velocity = _moved(
        replica.readout, replica.readout_velocity, signals.x[-1], chi, lr, momentum, shrink
    )
    matrices = [
        record_update(matrix, y, x, lr, momentum, shrink)
        for matrix, y, x in zip(replica.matrices, back.coefficients, signals.coefficients, strict=True)
    ]
    everyone = np.ones((len(chi), 1))
    moved = [
        _moved(bias, velocity, b, everyone, lr, momentum, shrink)
        for bias, velocity, b in zip(replica.biases, replica.bias_velocities, back.b, strict=False)
    ]
    return replica._replace(
        biases=tuple(bias for bias, _ in moved),
        bias_velocities=tuple(velocity for _, velocity in moved),
        means=tuple(mean * shrink for mean in replica.means),
        first=first,
        first_velocity=first_velocity,
        readout=readout,
        readout_velocity=readout_velocity,
        matrices=tuple(matrices),
    )


def outputs(replica: Replica, signals: Signals) -> Small:
    """f_t = <V_t, x^L_t>, [B, C]."""
    return inner((signals.x[-1],), replica.readout)


def _other_fields(
    layers: Layers, replica: Replica, matrices: list[Matrix], layer: int, without: int
) -> tuple[Columns, ...]:
    """Fields on the population of a layer (0-based), those that belong to the matrix `without` left out."""
    fields = list(replica.bias_fields[layer : layer + 1])
    if layer == 0:
        fields.append(replica.first_fields)
    if layer == layers.depth - 1:
        fields.append(replica.readout_fields)
    if layer > 0 and layer - 1 != without:
        fields += matrices[layer - 1].x.g
    if layer < layers.depth - 1 and layer != without:
        fields += matrices[layer].y.g
    return tuple(fields)


def _check_rank(layers: Layers, rank: int, layer: int) -> None:
    if layers.max_rank is not None and rank > layers.max_rank:
        raise RankError(
            f"W^{layer + 1} has met {rank} directions, more than max_rank={layers.max_rank}: "
            "raise max_rank or tol"
        )


def _plus(columns: Columns, bias: tuple[Columns, ...]) -> Columns:
    return columns + bias[0] if bias else columns


@jax.jit
def _plus_mean(value: Columns, x: Columns, mean: float) -> Columns:
    return value + mean * jnp.mean(x, axis=0)


@partial(jax.jit, static_argnums=0)
def _applied(phi: Elementwise, h: Columns) -> Columns:
    return phi(h)


@partial(jax.jit, static_argnums=0)
def _through(dphi: Elementwise, dx: Columns, h: Columns) -> Columns:
    return dx * dphi(h)


@jax.jit
def _moved(weight, velocity, columns, small, lr, momentum, shrink):
    velocity = momentum * velocity + columns @ small
    return shrink * weight - lr * velocity, velocity
