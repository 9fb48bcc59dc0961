"""Stateful Python objects inside the compiled simulator, through callbacks to the host.

The compiled program carries a `Seat` for each run: the number of its object on the host and the rounds that
object has finished. Every call takes the seat of the call before, so that data dependence, not luck, keeps a
run's calls in order:

    init:    seat = (number of a new object, 0)
    act:     (seat, decision set)       -> row
    update:  (seat, chosen row, reward) -> seat with one more round

Under `vmap` the host is called for one run after the other, each with its own object; nothing is shared
between runs. Calls are `pure_callback`s: along its seats a run is a pure function, once. The host refuses a
seat whose rounds are not those of its object, and a second choice in a round: what would break that promise,
a call that the compiler repeats or a saved state that was gone beyond, is an error and no silent change of
the object. The newest state resumes as long as the process lives. Objects leave the host after their last
round.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .decision_sets import Choice
from .environment import Algorithm, AnySet, Spec, no_draw
from .objects import ObjectLearner, ObjectPlayer, object_seed, playable, rows_of


class Seat(NamedTuple):
    """Which object plays a run, and how many rounds it has finished."""

    number: Int[Array, ""]
    rounds: Int[Array, ""]


def embed(learner: ObjectLearner) -> Algorithm:
    """An `Algorithm` that asks Python objects on the host, one for each run.

    Unlike in `play_object`, padding columns of block instances are not dropped (features are zero there), and
    exceptions arrive as JAX raises them, a ValueError or RuntimeError whose text ends with the original
    message. For one device: the objects live on the host that started them.

    Args:
        learner: what makes the objects.
    """
    host = _Host(learner)

    def init(key: Any, spec: Spec) -> Seat:
        none = jnp.zeros(()) if spec.sigma is None else spec.sigma
        enter = partial(host.enter, spec.n_blocks * spec.block_dim, spec.horizon)
        return Seat(_ask(enter, object_seed(key), none), jnp.zeros((), jnp.int32))

    def act(state: Seat, decision_set: AnySet, sigma: Any, draw: Any) -> Choice:
        listed = playable(decision_set)
        call = partial(host.act, listed.n_blocks)
        told = math.nan if sigma is None else sigma
        shown = (listed.actions, listed.mask, listed.block)
        return decision_set.choice_of(_ask(call, *state, *shown, told))

    def update(
        state: Seat, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: Any
    ) -> Seat:
        call = partial(host.update, decision_set.n_blocks)
        told = math.nan if sigma is None else sigma
        chosen = (decision_set.features(choice), decision_set.block)
        return Seat(state.number, _ask(call, *state, *chosen, reward, told))

    # The identity of this host: no other process or host may resume its states.
    config = f"callback to {learner.name}, {uuid.uuid4()}"
    return Algorithm(
        init, act, update, learner.needs_sigma, f"{learner.name} [callback]", no_draw, config=config
    )


def _ask(host: Callable[..., np.ndarray], *arguments: Any) -> Int[Array, ""]:
    return jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.int32), *arguments, vmap_method="sequential")


@dataclass
class _Playing:
    """An object at work: finished rounds, and whether it has chosen in the coming one."""

    player: ObjectPlayer
    horizon: int
    rounds: int = 0
    chosen: bool = False


class _Host:
    """The objects of all runs that are not over."""

    def __init__(self, learner: ObjectLearner) -> None:
        self._learner = learner
        self._numbers = itertools.count()
        self._playing: dict[int, _Playing] = {}

    def enter(self, d: int, horizon: int, seed: Any, sigma: Any) -> np.ndarray:
        sequence = np.asarray(sigma, np.float64) if np.ndim(sigma) else None
        number = next(self._numbers)
        player = self._learner.new(number, d=d, K=horizon, sigma=sequence, seed=int(seed))
        self._playing[number] = _Playing(player, horizon)
        return np.asarray(number, np.int32)

    def act(
        self, n_blocks: int, number: Any, rounds: Any, actions: Any, mask: Any, block: Any, sigma: Any
    ) -> np.ndarray:
        playing = self._seated(int(number), int(rounds), chosen=False)
        rows = np.flatnonzero(mask)
        features = rows_of(np.asarray(actions)[rows], int(block), n_blocks, None)
        row = rows[playing.player.choose(playing.rounds, features, float(sigma))]
        playing.chosen = True
        return np.asarray(row, np.int32)

    def update(
        self, n_blocks: int, number: Any, rounds: Any, x: Any, block: Any, reward: Any, sigma: Any
    ) -> np.ndarray:
        playing = self._seated(int(number), int(rounds), chosen=True)
        features = rows_of(np.asarray(x)[None], int(block), n_blocks, None)[0]
        playing.player.learn(playing.rounds, features, float(reward), float(sigma))
        playing.rounds, playing.chosen = playing.rounds + 1, False
        if playing.rounds == playing.horizon:
            del self._playing[int(number)]
        return np.asarray(playing.rounds, np.int32)

    def _seated(self, number: int, rounds: int, *, chosen: bool) -> _Playing:
        name, playing = self._learner.name, self._playing.get(number)
        if playing is None:
            raise ValueError(f"{name} has no object for run {number}: its last round is over")
        if (playing.rounds, playing.chosen) != (rounds, chosen):
            raise ValueError(
                f"the object of {name} in run {number} has finished {playing.rounds} rounds and cannot go "
                f"back to round {rounds}; resume from the newest state"
            )
        return playing
