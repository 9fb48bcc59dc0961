"""A run of the limit: replicas side by side through the steps, and what is recorded of them.

A step is split in two. `prepare` makes the forward and backward pass of step t, after which everything about
step t is known and recorded; `apply` moves the weights. The last step of a run is prepared and not applied,
exactly as a longer run would have done, so that a run can be taken up again bit for bit.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .columns import Columns, Small, inner, mean_products
from .fields import FieldSource
from .losses import Loss
from .precision import float64
from .products import Basis, Matrix
from .replica import (
    Backward,
    Fresh,
    Layers,
    Replica,
    Signals,
    Step,
    backward,
    forward,
    new_replica,
    outputs,
    updated,
)
from .run_plan import Data, Settings, batch_at
from .trajectory import Record

__all__ = ["LimitState", "Prepared", "Run"]


class Prepared(NamedTuple):
    """Both passes of a step of one replica, made and not yet applied."""

    signals: Signals
    back: Backward
    chi: Small


POPULATION: Any = jax.ShapeDtypeStruct((), np.float64)
"""Stands for columns in a skeleton."""


class Start(NamedTuple):
    """Pre-activations and features of the training set at step 0, with which later ones are compared."""

    h: tuple[Columns, ...]
    x: tuple[Columns, ...]


@dataclass
class LimitState:
    """Everything a run has made so far.

    Attributes:
        step: t, updates made.
        replicas: weights of each replica.
        prepared: the passes of step t, if made; one for each replica, or none.
        starts: the training set's signals at step 0; one for each replica, or none if not recorded.
        recorded: steps that were recorded.
        records: their records, one for each replica.
    """

    step: int
    replicas: list[Replica]
    prepared: list[Prepared] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    records: list[list[Record]] = field(default_factory=list)

    def merged(self) -> dict[str, np.ndarray]:
        """Records as name -> [replicas, recorded steps, ...]."""
        if not self.records:
            return {}
        return {
            name: np.stack([np.stack([replica[name] for replica in step]) for step in self.records], axis=1)
            for name in self.records[0][0]
        }


def blocks_of(state: LimitState) -> list[list[tuple[int, int]]]:
    """For each replica and matrix the numbers of blocks of its two bases."""
    return [[(len(matrix.x.q), len(matrix.y.q)) for matrix in replica.matrices] for replica in state.replicas]


class Run:
    """The plan of a run; all that changes is in its LimitState.

    Args:
        settings: what is trained.
        layers: activations and initial sizes as the replicas see them.
        sources: fields of each replica and population.
        data: what it is trained on.
        record: what to record of "f", "K", "G", "change".
        every: number of steps between records.
        batch_key: where batches come from.
        first_step: under `ip_llr`, the layers of the first pass.
    """

    def __init__(
        self,
        settings: Settings,
        layers: Layers,
        sources: list[tuple[FieldSource, ...]],
        data: Data,
        record: frozenset[str],
        every: int,
        batch_key: PRNGKeyArray,
        first_step: Layers | None,
    ) -> None:
        self.settings, self.layers, self.sources, self.data = settings, layers, sources, data
        self.record, self.every, self.batch_key, self.first_step = record, every, batch_key, first_step
        # Test inputs have no part in the basis, so that training is the same with and without them.
        self.train, self.test, self.beyond = (part.T for part in data.coordinates_apart())
        self.samples, self.y = len(data.X), data.y
        self._warned = False

    def start(self) -> LimitState:
        """Replicas before training."""
        layers = self.first_step or self.layers
        inputs, count = len(self.train), self.settings.output_dim
        samples = self._samples()
        if layers.match and inputs + count + 2 > samples:
            raise ValueError(
                f"samples must exceed the fields of W^1, V and biases, {inputs + count + 1}, got {samples}"
            )
        return LimitState(0, [new_replica(layers, source, inputs, count) for source in self.sources])

    def prepare(self, state: LimitState, recording: bool) -> None:
        """Make the passes of step t, and record it; nothing happens if they are made already.

        Raises:
            FloatingPointError: if outputs, signals or their squares are not finite; the step is not
                recorded then.
            RankError: if a basis would exceed the largest rank allowed.
        """
        if state.prepared:
            return
        batch = self._batch(state.step)

        def passes(number: int) -> _Step:
            replica, source = state.replicas[number], self.sources[number]
            if self.first_step is not None and state.step == 0:
                return self._first(self.first_step, replica, source, batch, recording)
            return self._usual(
                replica, source, batch, recording, state.starts[number] if state.starts else None
            )

        # The first step compiles what all replicas share.
        made = self._of_each_replica(passes, side_by_side=state.step > 0)
        replicas = [step.replica for step in made]
        self._warn_if_crowded(state.step, replicas)
        state.replicas, state.prepared = replicas, [step.prepared for step in made]
        if recording:
            if not state.starts and self.record & {"K", "change"}:
                state.starts = [step.start for step in made if step.start is not None]
            state.recorded.append(state.step)
            state.records.append([step.record for step in made])

    def _of_each_replica(self, passes: Callable[[int], "_Step"], *, side_by_side: bool) -> list["_Step"]:
        """The passes of every replica; on the cores of one CPU side by side, as they share nothing."""
        numbers = range(len(self.sources))
        cores = min(len(numbers), os.cpu_count() or 1)
        on_host = self.sources[0][0].sharding is None and jax.default_backend() == "cpu"
        if not side_by_side or cores == 1 or not on_host:
            return [passes(number) for number in numbers]

        def on_a_thread(number: int) -> _Step:
            with float64():
                return passes(number)

        with ThreadPoolExecutor(cores) as pool:
            waiting = [pool.submit(copy_context().run, on_a_thread, number) for number in numbers]
            return [one.result() for one in waiting]

    def _warn_if_crowded(self, step: int, replicas: list[Replica]) -> None:
        used, samples = max(max(replica.fields_used) for replica in replicas), self._samples()
        if self.layers.match and not self._warned and 4 * used > samples:
            self._warned = True
            warnings.warn(
                f"at step {step} a population of samples={samples} points holds {used} orthonormal "
                "fields, more than a quarter: too few degrees of freedom are left to be independent; "
                "raise samples or tol",
                stacklevel=6,
            )

    def _samples(self) -> int:
        return self.sources[0][0].samples

    def apply(self, state: LimitState) -> None:
        """Move the weights by the prepared step."""
        inputs = self.train[:, self._batch(state.step)]
        rate = self.settings.rate(state.step)
        step = Step(rate, self.settings.momentum, self.settings.weight_decay)
        moved = []
        for replica, made in zip(state.replicas, state.prepared, strict=True):
            after = updated(replica, inputs, made.signals, made.back, made.chi, step)
            if self.first_step is not None and state.step == 0:
                gone = tuple(matrix._replace(scale=0.0) for matrix in after.matrices)
                after = after._replace(matrices=gone)
            moved.append(after)
        state.replicas, state.prepared, state.step = moved, [], state.step + 1

    def _batch(self, step: int) -> Int[np.ndarray, " batch"]:
        return np.asarray(batch_at(self.batch_key, step, self.samples, self.settings.batch))

    def outputs(self, state: LimitState, replica: int) -> Small:
        """Outputs of one replica on the batch of the prepared step."""
        return outputs(state.replicas[replica], state.prepared[replica].signals)

    def skeleton(
        self, blocks: Sequence[Sequence[Sequence[int]]], prepared: bool, started: bool
    ) -> tuple[list[Replica], list[Prepared], list[Start]]:
        """The tree of a state without its arrays, for reading one.

        Zeros stand where numbers belong, an empty array where one belongs that stays on the host, POPULATION
        where columns belong.

        Args:
            blocks: for each replica and matrix the numbers of blocks of its two bases, as `blocks_of` gives.
            prepared: whether the passes of the step have been made.
            started: whether the signals of step 0 are kept.
        """
        L, small = self.layers.depth, np.zeros(0)
        biases = (POPULATION,) * (L if self.layers.bias_std else 0)
        P = POPULATION

        def basis(count: int) -> Basis:
            return Basis((POPULATION,) * count, (POPULATION,) * count, 0, 0.0)

        replicas = []
        for counts in blocks:
            matrices = tuple(Matrix(basis(x), basis(y), small, small, 0.0) for x, y in counts)
            means, used = (0.0,) * (L - 1), (0,) * L
            replicas.append(Replica(P, P, P, P, P, P, biases, biases, biases, matrices, means, used))
        layers, inner_layers = (POPULATION,) * L, (small,) * (L - 1)
        step = Prepared(Signals(layers, layers, inner_layers), Backward(layers, inner_layers), small)
        R = len(replicas)
        return replicas, [step] * (R if prepared else 0), [Start(layers, layers)] * (R if started else 0)

    def _usual(
        self,
        replica: Replica,
        source: tuple[FieldSource, ...],
        batch: Int[np.ndarray, " batch"],
        recording: bool,
        start: Start | None,
    ) -> "_Step":
        everything = None
        if recording and not start and self.record & {"K", "change"} and len(batch) < self.samples:
            # Later steps are compared with this one: what W_0 makes of samples outside the batch must last.
            fresh = Fresh(self.layers, source, replica)
            everything, replica = forward(self.layers, replica, self.train, fresh, keep=True)
        fresh = Fresh(self.layers, source, replica)
        signals, replica = forward(self.layers, replica, self.train[:, batch], fresh, keep=True)
        f = _finite(outputs(replica, signals))
        record: Record = {}
        if recording:
            if len(batch) == self.samples:
                everything = signals
            elif everything is None:
                everything = self._look(replica, source, self.train)[0]
            f_all = outputs(replica, everything)
            record = self._record(everything, f_all, start)
            start = start or Start(everything.h, everything.x)
            if self.test.shape[1]:
                record["f_test"] = self._look(replica, source, self.test, self.beyond)[1]
        chi = _chi(self.settings.loss, f, self.y[batch])
        back, replica = backward(self.layers, replica, signals, chi, fresh, keep=True)
        if recording and "G" in self.record:
            record["G"] = self._signal_grams(back, batch)
        return _Step(replica, Prepared(signals, back, chi), record, start)

    def _first(
        self,
        layers: Layers,
        replica: Replica,
        source: tuple[FieldSource, ...],
        batch: Int[np.ndarray, " batch"],
        recording: bool,
    ) -> "_Step":
        """The first step of `ip_llr`: seen is IP at its start, what moves is a pass of linearised muP."""
        vanished = replica._replace(matrices=tuple(m._replace(scale=0.0) for m in replica.matrices))
        fresh = Fresh(self.layers, source, replica)
        seen, _ = forward(self.layers, vanished, self.train, fresh, keep=False)
        f = _finite(outputs(replica, seen))
        record: Record = {}
        if recording:
            record = self._record(seen, f, None)
            if self.test.shape[1]:
                record["f_test"] = self._look(vanished, source, self.test, self.beyond)[1]
            if "G" in self.record:
                chi = _chi(self.settings.loss, f[batch], self.y[batch])
                part = Signals(_chosen(seen.h, batch), _chosen(seen.x, batch), ())
                back, _ = backward(self.layers, vanished, part, chi, fresh, keep=False)
                record["G"] = self._signal_grams(back, batch)
        fresh = Fresh(layers, source, replica)
        signals, replica = forward(layers, replica, self.train[:, batch], fresh, keep=True)
        chi = _chi(self.settings.loss, f[batch], self.y[batch])
        back, replica = backward(layers, replica, signals, chi, fresh, keep=True)
        return _Step(replica, Prepared(signals, back, chi), record, Start(seen.h, seen.x))

    def _look(
        self,
        replica: Replica,
        source: tuple[FieldSource, ...],
        inputs: Small,
        beyond: Small | None = None,
    ) -> tuple[Signals, Small]:
        """A pass that leaves no trace."""
        fresh = Fresh(self.layers, source, replica)
        signals, _ = forward(self.layers, replica, inputs, fresh, keep=False, beyond=beyond)
        return signals, outputs(replica, signals)

    def _record(self, signals: Signals, f: Small, start: Start | None) -> Record:
        record: Record = {"f": f, "loss": np.asarray(_loss(self.settings.loss, f, self.y))}
        if self.record & {"K", "change"}:
            start = start or Start(signals.h, signals.x)
            made = jax.device_get(_grams(signals.h, signals.x, start))
            kept = {"change"} if "K" not in self.record else set(made)
            if "change" not in self.record:
                kept.discard("change")
            record |= {name: made[name] for name in kept}
        return record

    def _signal_grams(self, back: Backward, batch: Int[np.ndarray, " batch"]) -> np.ndarray:
        """Gram matrices of b, with zeros outside the batch, where chi is zero."""
        made = np.zeros((self.layers.depth, self.samples, self.samples))
        made[:, batch[:, None], batch] = np.stack([inner((b,), b) for b in back.b])
        return made


class _Step(NamedTuple):
    replica: Replica
    prepared: Prepared
    record: Record
    start: Start | None


def _chosen(columns: tuple[Columns, ...], batch: Int[np.ndarray, " batch"]) -> tuple[Columns, ...]:
    return tuple(part[:, batch] for part in columns)


def _finite(f: Small) -> Small:
    if not np.isfinite(f).all():
        raise FloatingPointError("outputs are not finite")
    return f


@partial(jax.jit, static_argnums=0)
def _loss(loss: Loss, f: Array, y: Array) -> Array:
    return loss.value(f, y)


def _chi(loss: Loss, f: Small, y: Small) -> Small:
    return np.asarray(_loss_gradient(loss, f, y))


@partial(jax.jit, static_argnums=0)
def _loss_gradient(loss: Loss, f: Array, y: Array) -> Array:
    return loss.chi(f, y)


@jax.jit
def _grams(h: tuple[Columns, ...], x: tuple[Columns, ...], start: Start) -> dict[str, Array]:
    def products(left: tuple[Columns, ...], right: tuple[Columns, ...]) -> Array:
        return jnp.stack([mean_products(u, v) for u, v in zip(left, right, strict=True)])

    def change(now: Columns, first: Columns) -> Array:
        return jnp.mean(jnp.sqrt(jnp.mean((now - first) ** 2, axis=0) / jnp.mean(first**2, axis=0)))

    return {
        "K_pre": products(h, h),
        "K_post": products(x, x),
        "K_pre_cross": products(h, start.h),
        "K_post_cross": products(x, start.x),
        "change": jnp.stack([change(now, first) for now, first in zip(h, start.h, strict=True)]),
    }
