"""Stateful Python objects inside the compiled simulator, through callbacks to the host.

The compiled program carries a `Seat` for each run: the number of its object on the host and the rounds that
object has finished. Every call takes the seat of the call before, so that data dependence, not luck, keeps a
run's calls in order:

    init:    seat = (number of a new object, 0)
    act:     (seat, decision set)       -> row
    update:  (seat, chosen row, reward) -> seat with one more round

Under `vmap` the host is called for one run after the other (`io_callback` does so by itself), each with its
own object; nothing is shared between runs. The host refuses a seat whose rounds are not those of its object:
so a state that was saved and gone beyond cannot be played a second time from the middle, while the newest
state resumes as long as the process lives. Objects leave the host when their last round is over.
"""

from __future__ import annotations

import itertools
import math
import uuid
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int

from .decision_sets import Choice
from .environment import Algorithm, AnySet, Spec, no_draw
from .objects import ObjectLearner, ObjectPlayer, playable, rows_of

_ROW = jax.ShapeDtypeStruct((), jnp.int32)


class Seat(NamedTuple):
    """Which object plays a run, and how many rounds it has finished."""

    number: Int[Array, ""]
    rounds: Int[Array, ""]


def embed(learner: ObjectLearner) -> Algorithm:
    """An `Algorithm` that asks Python objects on the host, one for each run.

    Unlike in `play_object`, padding columns of block instances are not dropped (features are zero there), and
    exceptions arrive as `jax.errors.JaxRuntimeError` whose text ends with the original message. For one
    device: the objects live on the host that started them.

    Args:
        learner: what makes the objects.
    """
    host = _Host(learner)

    def init(key: Any, spec: Spec) -> Seat:
        none = jnp.zeros(()) if spec.sigma is None else spec.sigma
        enter = partial(host.enter, spec.n_blocks * spec.block_dim, spec.horizon)
        return Seat(io_callback(enter, _ROW, jax.random.bits(key), none), jnp.zeros((), jnp.int32))

    def act(state: Seat, decision_set: AnySet, sigma: Any, draw: Any) -> Choice:
        listed = playable(decision_set)
        call = partial(host.act, listed.n_blocks)
        told = math.nan if sigma is None else sigma
        shown = (listed.actions, listed.mask, listed.block)
        return decision_set.choice_of(io_callback(call, _ROW, *state, *shown, told))

    def update(
        state: Seat, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: Any
    ) -> Seat:
        call = partial(host.update, decision_set.n_blocks)
        told = math.nan if sigma is None else sigma
        chosen = (decision_set.features(choice), decision_set.block)
        return Seat(state.number, io_callback(call, _ROW, *state, *chosen, reward, told))

    # The identity of this host: no other process or host may resume its states.
    config = f"callback to {learner.name}, {uuid.uuid4()}"
    return Algorithm(
        init, act, update, learner.needs_sigma, f"{learner.name} [callback]", no_draw, config=config
    )


class _Host:
    """The objects of all runs that are not over."""

    def __init__(self, learner: ObjectLearner) -> None:
        self._learner = learner
        self._numbers = itertools.count()
        self._playing: dict[int, tuple[ObjectPlayer, int, int]] = {}

    def enter(self, d: int, horizon: int, seed: Any, sigma: Any) -> np.ndarray:
        sequence = np.asarray(sigma, np.float64) if np.ndim(sigma) else None
        number = next(self._numbers)
        player = self._learner.new(number, d=d, K=horizon, sigma=sequence, seed=int(seed))
        self._playing[number] = (player, 0, horizon)
        return np.asarray(number, np.int32)

    def act(
        self, n_blocks: int, number: Any, rounds: Any, actions: Any, mask: Any, block: Any, sigma: Any
    ) -> np.ndarray:
        player, k, _ = self._seated(int(number), int(rounds))
        rows = np.flatnonzero(mask)
        features = rows_of(np.asarray(actions)[rows], int(block), n_blocks, None)
        return np.asarray(rows[player.choose(k, features, float(sigma))], np.int32)

    def update(
        self, n_blocks: int, number: Any, rounds: Any, x: Any, block: Any, reward: Any, sigma: Any
    ) -> np.ndarray:
        player, k, horizon = self._seated(int(number), int(rounds))
        features = rows_of(np.asarray(x)[None], int(block), n_blocks, None)[0]
        player.learn(k, features, float(reward), float(sigma))
        if k + 1 < horizon:
            self._playing[int(number)] = (player, k + 1, horizon)
        else:
            del self._playing[int(number)]
        return np.asarray(k + 1, np.int32)

    def _seated(self, number: int, rounds: int) -> tuple[ObjectPlayer, int, int]:
        player, finished, horizon = self._playing.get(number, (None, -1, 0))
        name = self._learner.name
        if player is None:
            raise ValueError(f"{name} has no object for run {number}: its last round is over")
        if finished != rounds:
            raise ValueError(
                f"the object of {name} in run {number} has finished {finished} rounds and cannot go back to "
                f"round {rounds}; resume from the newest state"
            )
        return player, finished, horizon
