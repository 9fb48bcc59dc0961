"""The infinite-width limit of SGD in the maximal-update parametrization, with error bars.

    fit -> for each step: forward, record, backward, update (`replica`), for each of R independent replicas

Outputs, features and backward signals of a network of infinite width are random variables whose joint law
solves a recursion in time (spec section c3); a replica follows that law with a population of M points. Chance
enters through the points alone: replicas differ by their scrambling, and their spread gives standard errors.
In the NTP and SP schemes features stand still and outputs follow kernel gradient descent (`kernels`).

Source: Yang and Hu 2021 (arXiv 2011.14522) for the limit; Chen et al. 2025 (arXiv 2503.09565), section 3.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from mup_features.parametrization import Parametrization

from .activations import Elementwise
from .checkpoint import load_state, save_state
from .columns import Columns, Small, inner
from .fields import MAX_SOBOL_DIMS, FieldSource, Sampler
from .kernel_run import kernel_trajectory
from .limit_run import LimitState, Run
from .losses import Reduction, SampleLoss
from .quadrature import quadrature_trajectory
from .replica import Layers, RankError
from .run_plan import RECORDABLE, Data, checked_count, checked_data, recorded_steps, require_float64, settings
from .trajectory import DivergedError, Trajectory

__all__ = ["DivergedError", "InfiniteWidthMLP", "Trajectory"]

SMALLEST_TOL = 1e-14
"""Below, what rounding leaves of vectors in a basis would pass for new directions."""


class InfiniteWidthMLP:
    """An MLP of infinite width under SGD.

    In high dimension one replica's standard deviation is only 1.5 to 5 times below that of a network of width
    M; what is gained is cost, since there are no M x M matrices, and that the mean has no finite-width bias.

    Args:
        depth: L >= 1 hidden layers.
        activation: name, elementwise function, or one of these for each hidden layer.
        input_dim: d.
        output_dim: C.
        loss: "mse" (1/2 squared error), "cross_entropy", "logistic", or a function of one sample's f and y.
        reduction: "mean" or "sum" over the batch.
        parametrization: "mup" (with one hidden layer also "mfp"), "ip", "ip_llr", "ip_bias",
            "ip_noncentered", "ntp", "sp", or a Parametrization without base width whose exponents are those
            of one of these.
        sigma: standard deviation of the entries without their width factors, one or one for each layer.
        lr: eta > 0.
        lr_schedule: factor of lr at each step, a function of its number.
        batch: samples in a step, drawn without replacement within a step; None is all of them.
        momentum: in [0, 1).
        weight_decay: >= 0; a step multiplies weights by 1 - rate * weight_decay.
        samples: M, points of a population; a power of two for "sobol". It should be several times the number
            of fields that a run draws, else their mutual orthogonality leaves too few degrees of freedom.
        replicas: R independent replicas; standard errors need two.
        sampler: "sobol" (scrambled, through the normal quantile) or "normal".
        moment_match: make fields exactly orthonormal to all earlier ones and to the constant.
        qmc_dims: how many fields of a population are Sobol's; None is all that scipy has numbers for.
        max_rank: largest rank of a basis; None for no bound but memory. Room grows as needed.
        tol: directions shorter than this, relative to the longest vector so far, are dropped. 1e-10 makes the
            error invisible; around 1e-3 many runs need half the directions or less.
        devices: jax devices that share the population; None is the default device.
        key: jax.random.key for fields and batches. Numbers do not depend on `devices` beyond rounding.
        method: "limit" (sampling) or "quadrature" (exact, few samples and steps only).

    Raises:
        ValueError: for arguments out of range, or if jax is not set to float64.
        NotImplementedError: for another optimizer than SGD.

    Source: spec section c4.
    """

    def __init__(
        self,
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
        samples: int = 65536,
        replicas: int = 4,
        sampler: Sampler = "sobol",
        moment_match: bool = True,
        qmc_dims: int | None = None,
        max_rank: int | None = None,
        tol: float = 1e-10,
        devices: Sequence[Any] | None = None,
        key: PRNGKeyArray,
        method: Literal["limit", "quadrature"] = "limit",
    ) -> None:
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
        if method not in ("limit", "quadrature"):
            raise ValueError(f"method must be 'limit' or 'quadrature', got {method!r}")
        if sampler not in ("sobol", "normal"):
            raise ValueError(f"sampler must be 'sobol' or 'normal', got {sampler!r}")
        checked_count("samples", samples, 2)
        if sampler == "sobol" and samples & (samples - 1):
            raise ValueError(f"samples must be a power of two for Sobol points, got {samples!r}")
        if qmc_dims is not None:
            checked_count("qmc_dims", qmc_dims, 0)
        if max_rank is not None:
            checked_count("max_rank", max_rank, 1)
        if not SMALLEST_TOL <= tol < 1:
            raise ValueError(f"tol must be in [{SMALLEST_TOL}, 1), got {tol!r}")
        if devices is not None and (not devices or samples % len(devices)):
            raise ValueError(
                f"samples must be a multiple of the number of devices, got {samples!r}, {devices!r}"
            )
        if not all(a.twice_differentiable for a in self.settings.activations):
            names = ", ".join(
                sorted({a.name for a in self.settings.activations if not a.twice_differentiable})
            )
            warnings.warn(
                f"the theory asks for an activation with two derivatives; {names} has not", stacklevel=2
            )
        self.scheme = _scheme(self.settings.parametrization, depth)
        self.method = method
        self.samples, self.moment_match = samples, moment_match
        self.sampler: Sampler = sampler
        self.qmc_dims = MAX_SOBOL_DIMS if qmc_dims is None else min(qmc_dims, MAX_SOBOL_DIMS)
        self.max_rank, self.tol, self.devices, self.key = max_rank, tol, devices, key
        self.state: LimitState | None = None
        self._run: Run | None = None

    def fit(
        self,
        X: Float[ArrayLike, "n d"],
        y: Float[ArrayLike, "n *outputs"],
        steps: int,
        X_test: Float[ArrayLike, "m d"] | None = None,
        *,
        record: Sequence[str] = RECORDABLE,
        every: int = 1,
        save_to: str | Path | None = None,
        save_every: int = 10,
    ) -> Trajectory:
        """Train from fresh weights; the same call gives the same numbers.

        Quadrature and the NTP and SP limits leave no state: there is nothing to save or to resume.

        Args:
            X: training inputs.
            y: targets, [n] or [n, C].
            steps: number of updates >= 0.
            X_test: inputs that are only looked at.
            record: which of "f" (with the loss; always), "K" (Gram matrices of h and x, also with those of
                step 0), "G" (Gram matrices of b) and "change". With minibatches "K" and "change" give the
                bases the features of all samples at step 0, which moves other numbers within their errors.
            every: record steps 0, every, 2 every, ... and the last.
            save_to: file to which the state is saved on the way and at the end.
            save_every: number of updates between two saves.

        Raises:
            ValueError: for wrong shapes, values that are not finite, or arguments out of range.
            DivergedError: if outputs leave the finite numbers, or a basis `max_rank`; it carries the
                trajectory so far.
        """
        data = checked_data(self.settings, X, y, X_test)
        recorded = recorded_steps(steps, every, record)
        checked_count("save_every", save_every, 1)
        if len(np.unique(data.X, axis=0)) < len(data.X):
            warnings.warn(
                "X has equal rows: their features are equal, so Gram matrices are singular", stacklevel=2
            )
        if self.method == "quadrature" or self.scheme in ("ntp", "sp"):
            if save_to is not None:
                raise ValueError(f"save_to must be None where there is no sampler's state, got {save_to!r}")
            self._run = self.state = None
            if self.method == "quadrature":
                return quadrature_trajectory(self.settings, data, recorded, record)
            batch_key, _ = jax.random.split(self.key)
            return kernel_trajectory(self.settings, self.scheme, data, recorded, record, batch_key)
        self._run = self._new_run(data, frozenset(record), every)
        self.state = self._run.start()
        return self._advance(steps, save_to, save_every)

    def resume(self, steps: int, *, save_to: str | Path | None = None, save_every: int = 10) -> Trajectory:
        """Train on, from the present state, until `steps` updates have been made in all.

        The trajectory holds what an uninterrupted run of that length would have recorded, bit for bit.

        Raises:
            RuntimeError: if nothing was begun or loaded, or a step was interrupted halfway: load a save.
            ValueError: if the state is beyond `steps` already.
            DivergedError: as in `fit`.
        """
        _, state = self._begun()
        checked_count("steps", steps, state.step)
        return self._advance(steps, save_to, save_every)

    def step(self) -> Float[np.ndarray, "n C"]:
        """One more update; returns the mean over replicas of the outputs before it, on the batch.

        Raises:
            RuntimeError: as in `resume`.
            DivergedError: as in `fit`.
        """
        run, state = self._begun()
        self._prepare(run, state, recording=state.step % run.every == 0)
        outputs = np.mean([run.outputs(state, r) for r in range(len(state.replicas))], axis=0)
        self._apply(run, state)
        return outputs

    @property
    def gaussian_covariances(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """For l = 2..L: covariance of the fields of W_0^l transposed, and moments of what it has met.

        All backward signals b^l_s so far are combinations of the orthonormal basis that the transpose has
        met, so the basis stands for them; means over replicas.
        `mup_features.covariance_preservation_error` takes the model and compares the two, layer by layer.

        Raises:
            RuntimeError: as in `resume`.
        """
        _, state = self._begun()
        found = {}
        for layer in range(2, self.settings.depth + 1):
            sides = [replica.matrices[layer - 2].y for replica in state.replicas]
            rank = min(side.rank for side in sides)
            covariances = [_all_products(side.g)[:rank, :rank] for side in sides]
            moments = [_all_products(side.q)[:rank, :rank] for side in sides]
            found[layer] = (np.mean(covariances, axis=0), np.mean(moments, axis=0))
        return found

    def save(self, path: str | Path) -> None:
        """Write the state as npz, atomically.

        Raises:
            RuntimeError: as in `resume`.
        """
        save_state(path, *self._begun(), self._description())

    def load(self, path: str | Path) -> None:
        """Take up a saved state, with its data; `resume` and `step` go on from there.

        Raises:
            ValueError: if the file is not a state of a model with these settings.
        """
        self._run, self.state = load_state(path, self._new_run, self._description(), self._sharding())

    def _advance(self, steps: int, save_to: str | Path | None, save_every: int) -> Trajectory:
        run, state = self._begun()
        recorded = recorded_steps(steps, run.every, ())
        with tqdm(
            total=steps, initial=state.step, desc="limit", unit="step", disable=None, leave=False
        ) as bar:
            while True:
                self._prepare(run, state, recording=state.step in recorded)
                if state.step == steps:
                    break
                self._apply(run, state)
                bar.update()
                if save_to is not None and state.step % save_every == 0:
                    self.save(save_to)
        if save_to is not None:
            self.save(save_to)
        return self._trajectory(state, recorded)

    def _prepare(self, run: Run, state: LimitState, *, recording: bool) -> None:
        self.state = None  # replicas are replaced one by one: what an interruption leaves is no state
        try:
            with _small_algebra():
                run.prepare(state, recording)
        except (FloatingPointError, RankError) as error:
            before = self._trajectory(state, state.recorded) if state.recorded else None
            raise DivergedError(f"step {state.step}: {error} (lr={self.settings.lr})", before) from error
        self.state = state

    def _apply(self, run: Run, state: LimitState) -> None:
        self.state = None
        with _small_algebra():
            run.apply(state)
        self.state = state

    def _begun(self) -> tuple[Run, LimitState]:
        require_float64()
        if self.state is None or self._run is None:
            raise RuntimeError("there is no state to go on from: call fit, or load a save")
        return self._run, self.state

    def _trajectory(self, state: LimitState, steps: Sequence[int]) -> Trajectory:
        kept = [number for number, step in enumerate(state.recorded) if step in steps]
        merged = {name: values[:, kept] for name, values in state.merged().items()}
        rates = np.asarray([self.settings.rate(t) for t in range(state.step)])
        return Trajectory(np.asarray([state.recorded[number] for number in kept]), "limit", merged, rates)

    def _sharding(self) -> jax.sharding.Sharding | None:
        if self.devices is None:
            return None
        mesh = jax.sharding.Mesh(np.asarray(self.devices), ("population",))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("population"))

    def _new_run(self, data: Data, record: frozenset[str], every: int) -> Run:
        chosen, depth = self.settings, self.settings.depth
        table = chosen.parametrization
        deviations = np.sqrt(table.variances(1, depth, input_dim=chosen.input_dim))
        layers = Layers(
            depth,
            tuple(a.phi for a in chosen.activations),
            tuple(a.dphi for a in chosen.activations),
            tuple(float(s) for s in deviations),
            self.tol,
            self.max_rank,
            self.moment_match,
            self.scheme == "mup",
            table.means(1, depth)[-1],
            float(np.sqrt(table.bias_variances(depth)[0])),
        )
        sharding = self._sharding()
        sources = [
            tuple(
                FieldSource(self.key, r, population, self.samples, self.sampler, self.qmc_dims, sharding)
                for population in range(depth)
            )
            for r in range(chosen.replicas)
        ]
        first = None
        if table.name == "ip_llr":
            straight = [
                a if number == 0 or a.homogeneous else a.linearised()
                for number, a in enumerate(chosen.activations)
            ]
            first = layers._replace(
                phi=tuple(a.phi for a in straight),
                dphi=tuple(a.dphi for a in straight),
                initial_products=True,
            )
        batch_key, _ = jax.random.split(self.key)
        return Run(chosen, layers, sources, data, record, every, batch_key, first)

    def _description(self) -> dict[str, Any]:
        chosen = self.settings
        return {
            "depth": chosen.depth,
            "activation": [a.name for a in chosen.activations],
            "loss": [chosen.loss.name, chosen.loss.reduction],
            "parametrization": chosen.parametrization.to_dict(),
            "lr": chosen.lr,
            "lr_schedule": chosen.lr_schedule is not None,
            "batch": chosen.batch,
            "momentum": chosen.momentum,
            "weight_decay": chosen.weight_decay,
            "replicas": chosen.replicas,
            "samples": self.samples,
            "sampler": [self.sampler, self.moment_match, self.qmc_dims],
            "tol": self.tol,
            "key": hashlib.sha256(np.asarray(jax.random.key_data(self.key)).tobytes()).hexdigest(),
        }


@contextmanager
def _small_algebra() -> Iterator[None]:
    """How NumPy treats small matrices: on one thread, and silent where numbers overflow.

    Threads of its BLAS fight XLA's for the cores: fifty steps on 32 digits took 1.5 times as long or more
    with two. What overflows is refused, with the trajectory so far.
    """
    with _blas().limit(limits=1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
        yield


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _all_products(blocks: tuple[Columns, ...]) -> Small:
    made = [inner(blocks, block) for block in blocks]
    return np.concatenate(made, axis=1) if made else np.zeros((0, 0))


def _scheme(parametrization: Parametrization, depth: int) -> str:
    """Which limit these exponents have: "mup", "ip", "ntp" or "sp".

    Raises:
        ValueError: if it is none of ours.
    """
    if parametrization.base_width is not None:
        raise ValueError(
            "parametrization must have base_width=None in the limit, got base_width="
            f"{parametrization.base_width!r}"
        )
    found = parametrization.layer_exponents(depth)
    for name in ("mup", "ip", "ntp", "sp"):
        if np.allclose(found, Parametrization(name).layer_exponents(depth)):
            return name
    raise ValueError(
        "parametrization must have the exponents of mup, ip, ntp or sp to have a limit here, got "
        f"{parametrization.name!r}; WidthSimulator takes any"
    )
