"""Networks of finite width, exact in distribution, at the cost of their rank instead of their width squared.

    h^1 = W^1 xi, x^l = phi(h^l), h^l = W^l x^{l-1}, f = W^{L+1} x^L,  Var(W^l) and rates by parametrization

The matrices of layers 2..L are drawn only where training looks at them (`conditioning`), so n = 10^6 fits on
a laptop. Outputs, features and backward signals have exactly the distribution of those of a real network.
Source: spec sections c1, c3 and c4.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray

from mup_features.parametrization import Parametrization

from .activations import Elementwise
from .losses import Reduction, SampleLoss
from .network_step import Network, Rates, Start, new_networks, rates_of, train_step, with_room
from .run_plan import RECORDABLE, Data, batch_at, checked_count, checked_data, recorded_steps, settings
from .trajectory import DivergedError, Trajectory
from .width_sharding import mesh_over

NAMES = {
    "f": ("f", "f_test", "loss"),
    "K": ("K_pre", "K_post", "K_pre_cross", "K_post_cross"),
    "G": ("G",),
    "change": ("change",),
}

AT_ONCE = 2**27
"""Numbers in the hidden matrices of the replicas trained side by side, on each device: a gigabyte."""

__all__ = ["WidthSimulator"]


class WidthSimulator:
    """Independent networks of width n under SGD, without their n x n matrices.

    A run that looks at r directions of a hidden matrix costs O(n r) memory, and O(n r) time per product. When
    r comes near n, a matrix drawn whole is cheaper, and exact all the same: `conditioning` chooses.

    Args:
        width: n >= 1.
        depth: L >= 1 hidden layers.
        activation: name, elementwise function, or one of these for each hidden layer.
        input_dim: d.
        output_dim: C.
        loss: "mse" (1/2 squared error), "cross_entropy", "logistic", or a function of one sample's f and y.
        reduction: "mean" or "sum" over the batch.
        parametrization: a preset's name (mup, ip, ip_llr, ip_bias, ip_noncentered, ntp, sp, sp_const), or a
            Parametrization.
        sigma: factor of the initial standard deviations, as in Parametrization; left alone if one is given.
        lr: eta > 0.
        lr_schedule: factor of lr at each step, a function of its number.
        batch: samples per step, drawn without replacement within a step; None is all of them.
        momentum: in [0, 1).
        weight_decay: >= 0; a step multiplies weights by 1 - lr * weight_decay.
        replicas: R >= 1 independent networks, all with the same batches.
        replicas_at_once: how many are trained side by side; None bounds their memory to about a gigabyte on
            each device.
        conditioning: draw hidden matrices where they are looked at (True), whole (False), or as is cheaper.
        devices: jax devices that share the neurons of each layer, an equal part each; None is the default
            device. Numbers do not depend on it beyond the rounding of sums over the width.
        key: jax.random.key for weights and batches.

    Raises:
        ValueError: for arguments out of range, or if jax is not set to float64.
        NotImplementedError: for another optimizer than SGD.

    Source: spec section c4, method "width".
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        activation: str | Elementwise | Sequence[str | Elementwise] = "tanh",
        input_dim: int,
        output_dim: int = 1,
        loss: str | SampleLoss = "mse",
        reduction: Reduction = "mean",
        parametrization: str | Parametrization = "mup",
        sigma: float | tuple[float, ...] = 1.0,
        lr: float,
        lr_schedule: Callable[[int], float] | None = None,
        batch: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        replicas: int = 4,
        replicas_at_once: int | None = None,
        conditioning: bool | None = None,
        devices: Sequence[Any] | None = None,
        key: PRNGKeyArray,
    ) -> None:
        checked_count("width", width, 1)
        if replicas_at_once is not None:
            checked_count("replicas_at_once", replicas_at_once, 1)
        if devices is not None and (not devices or width % len(devices)):
            raise ValueError(
                f"width must be a multiple of the number of devices, got {width!r} and {len(devices)} devices"
            )
        self.settings = settings(
            depth=depth,
            activation=activation,
            input_dim=input_dim,
            output_dim=output_dim,
            loss=loss,
            reduction=reduction,
            parametrization=parametrization,
            sigma=sigma,
            lr=lr,
            lr_schedule=lr_schedule,
            batch=batch,
            momentum=momentum,
            weight_decay=weight_decay,
            replicas=replicas,
        )
        self.width, self.conditioning, self.replicas_at_once = width, conditioning, replicas_at_once
        self.devices, self.key = devices, key

    def fit(
        self,
        X: Float[ArrayLike, "n d"],
        y: Float[ArrayLike, "n *outputs"],
        steps: int,
        X_test: Float[ArrayLike, "m d"] | None = None,
        *,
        record: Sequence[str] = RECORDABLE,
        every: int = 1,
    ) -> Trajectory:
        """Train all replicas from fresh weights; the same call gives the same numbers.

        Args:
            X: training inputs.
            y: targets, [n] or [n, C].
            steps: number of updates >= 0.
            X_test: inputs to look at on the way. They take part in what is drawn, so that their outputs at
                different steps are those of one network.
            record: which of "f" (with the loss), "K" (Gram matrices of h and x, also with step 0), "G" (Gram
                matrices of b) and "change"; "f" always is.
            every: record steps 0, every, 2 every, ... and the last.

        Raises:
            ValueError: for wrong shapes, values that are not finite, or arguments out of range.
            DivergedError: if outputs leave the finite numbers; it carries the trajectory before.
        """
        data = checked_data(self.settings, X, y, X_test)
        run = _Run(self, data, recorded_steps(steps, every, record), frozenset(record))
        return run.trajectory([run.train(keys) for keys in run.groups()])


class _Run:
    """One call of `fit`: the plan of its steps, and the loop over them."""

    def __init__(
        self, simulator: WidthSimulator, data: Data, recorded: list[int], record: frozenset[str]
    ) -> None:
        s = self.settings = simulator.settings
        self.simulator, self.recorded, self.steps = simulator, recorded, recorded[-1]
        self.y, self.coordinates = jnp.asarray(data.y), jnp.asarray(data.coordinates())
        batch_key, self.replica_key = jax.random.split(simulator.key)
        self.batches = [batch_at(batch_key, t, len(data.X), s.batch) for t in range(self.steps + 1)]
        self.rates = [s.rate(t) for t in range(self.steps)]
        # Directions that every hidden matrix and its transpose meet at each step.
        size = len(self.batches[0])
        self.rows = [(len(self.coordinates) if t in recorded else size, size) for t in range(self.steps + 1)]
        self.totals = tuple(sum(side) for side in zip(*self.rows, strict=True))
        self.network = Network(
            tuple(a.phi for a in s.activations),
            tuple(a.dphi for a in s.activations),
            s.loss,
            any(s.parametrization.bias_variances(s.depth)),
            len(data.X),
            bool(record & {"K", "change"}),
            "G" in record,
            mesh_over(simulator.devices),
        )
        self.names = [name for group in ("f", *sorted(record)) for name in NAMES[group]]
        self.dense = self._dense()

    def _dense(self) -> bool:
        width, total = self.simulator.width, max(self.totals)
        if self.simulator.conditioning is None:
            return 4 * total > width  # the four bases then hold more numbers than the matrix
        if self.simulator.conditioning and total > width:
            raise ValueError(
                f"conditioning must be None or False when a run meets more directions ({total}) than the"
                f" width ({width}), got True"
            )
        return not self.simulator.conditioning

    def groups(self) -> list[PRNGKeyArray]:
        """Keys of the replicas, in groups that are trained side by side."""
        width, matrices = self.simulator.width, max(1, self.settings.depth - 1)
        numbers = 2 * width * matrices * (width if self.dense else sum(self.totals))
        parts = 1 if self.simulator.devices is None else len(self.simulator.devices)
        at_once = self.simulator.replicas_at_once or max(1, AT_ONCE * parts // numbers)
        keys = [jax.random.fold_in(self.replica_key, r) for r in range(self.settings.replicas)]
        return [jnp.stack(keys[k : k + at_once]) for k in range(0, len(keys), at_once)]

    def train(self, keys: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Train one group; name -> [replicas of the group, recorded steps, ...]."""
        s, width = self.settings, self.simulator.width
        table = s.parametrization
        moments = table.variances(width, s.depth, input_dim=s.input_dim), table.means(width, s.depth)
        start = Start(*map(jnp.asarray, (*moments, table.bias_variances(s.depth))))
        widest = self.rows[-1]
        room = None if self.dense else tuple(map(min, self.totals, (64 + 4 * rows for rows in widest)))
        inputs = self.coordinates.shape[1]
        states = new_networks(self.network, width, inputs, s.output_dim, room, start, keys)
        records: list[dict[str, np.ndarray]] = []
        offsets = (0, 0)
        for t in range(self.steps + 1):
            after = offsets[0] + self.rows[t][0], offsets[1] + self.rows[t][1]
            if room is not None and (after[0] > room[0] or after[1] > room[1]):
                # Bases double, so that few sizes are compiled.
                room = tuple(min(total, 2 * have) for total, have in zip(self.totals, room, strict=True))
                states = with_room(states, *room)
            states, made = train_step(
                self.network,
                states,
                self.coordinates,
                self.y,
                self.batches[t],
                self._step_rates(t),
                start,
                jnp.asarray(t),
                jnp.asarray(offsets),
                full=t in self.recorded,
            )
            offsets = after
            if made:
                record = {name: np.asarray(made[name]) for name in self.names if name in made}
                if not np.isfinite(record["f"]).all():
                    before = self.trajectory([_stacked(records)]) if records else None
                    raise DivergedError(
                        f"outputs were not finite at step {t} (lr={s.lr}, width={width})", before
                    )
                records.append(record)
        return _stacked(records)

    def _step_rates(self, t: int) -> Rates:
        s = self.settings
        layers, momentum, shrink = [0.0] * (s.depth + 1), 0.0, 1.0  # the last step only looks
        if t < self.steps:
            layers = s.parametrization.rates(self.simulator.width, s.depth, self.rates[t], step=t)
            momentum, shrink = s.momentum, 1.0 - self.rates[t] * s.weight_decay
        return rates_of(layers, layers[0], momentum, shrink)

    def trajectory(self, groups: list[dict[str, np.ndarray]]) -> Trajectory:
        """All replicas together."""
        merged = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
        made = self.recorded[: merged["f"].shape[1]]
        return Trajectory(np.asarray(made), "width", merged, np.asarray(self.rates[: made[-1]]))


def _stacked(records: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([record[name] for record in records], axis=1) for name in records[0]}
