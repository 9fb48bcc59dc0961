"""The rounds of many runs, opened one at a time, for players outside the compiled program.

`simulate` keeps learner and environment in one compiled loop. Here the environment alone is compiled: `show`
says what all runs are offered, `play` takes the chosen rows. Theta, decision sets, noise and sums are those
of `simulate` with the same key, because a round is the simulator's own `play_round` with a learner that
replays given choices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from .compiled import Carry, Plan, chunk_length, draw_chunk, offer, play_round, start_runs, streams_of
from .decision_sets import Choice, SignSet, check_enumerable
from .environment import Adversary, Algorithm, AnySet, Instance, Reward, Spec, no_draw
from .objects import playable, rows_of


class Shown(NamedTuple):
    """What all runs are offered in a round; every decision set is listed.

    Args:
        sigma: sigma_k.
        actions: features inside the block.
        mask: rows that may be played.
        distinct: the same without repetitions of an action.
        block: the block of the actions.
        group: which of the hypercubes (groups, blocks) the round belongs to; -1 where there is nothing to
            choose.
    """

    sigma: Float[np.ndarray, " seeds"]
    actions: Float[np.ndarray, "seeds A b"]
    mask: Bool[np.ndarray, "seeds A"]
    distinct: Bool[np.ndarray, "seeds A"]
    block: Int[np.ndarray, " seeds"]
    group: Int[np.ndarray, " seeds"]


class Outcome(NamedTuple):
    """What the choices of all runs brought: `Reward` for each run.

    Args:
        reward: the noisy rewards.
        mean: <theta, x_k>.
        best_mean: max over the decision set of <theta, x>.
    """

    reward: Float[np.ndarray, " seeds"]
    mean: Float[np.ndarray, " seeds"]
    best_mean: Float[np.ndarray, " seeds"]


class Rounds:
    """Runs that wait for choices.

    Args:
        instance: the environment; sign sets may have at most 12 signs.
        adversary: the chooser of sigma_k.
        key: a `jax.random.key`.
        n_seeds: number of runs.

    Raises:
        ValueError: if sign sets are too large to be listed.
    """

    def __init__(
        self, instance: Instance, adversary: Adversary, *, key: Key[Array, ""], n_seeds: int
    ) -> None:
        check_enumerable(instance.n_signs)
        self.k = 0
        self._instance = instance
        self._adversary = adversary
        self._spec = instance.spec()
        self._streams = streams_of(key)
        self._plan = Plan(REPLAY, "block", n_seeds, 1, False, None)
        self._chunk = chunk_length(self._plan, instance, adversary, self._spec)
        self._drawn: Any = None
        self._columns = kept_columns(instance)
        self.carry: Carry = start_runs(self._plan, instance, adversary, self._spec, self._streams)

    def show(self) -> Shown:
        """What is offered in round k, as NumPy arrays."""
        at = self.k % self._chunk
        if self._drawn is None or at == 0:
            participants = (self._instance, self._adversary, self._spec, self._streams)
            self._drawn = draw_chunk(self._plan, self._chunk, *participants, self.k - at)
        shown = _show(self._instance, self._adversary, self.carry, self._drawn, at, self.k)
        return Shown(*(np.asarray(part) for part in shown))

    def features(
        self, shown: Shown, run: int, rows: Int[np.ndarray, " A"] | slice
    ) -> Float[np.ndarray, "A d"]:
        """Rows of one run in the real coordinates of the problem, float64.

        Args:
            shown: what `show` gave.
            run: the run.
            rows: which rows.
        """
        block, n_blocks = int(shown.block[run]), self._instance.n_blocks
        return rows_of(np.asarray(shown.actions[run])[rows], block, n_blocks, self._columns)

    def dense(self, shown: Shown) -> Float[np.ndarray, "seeds A d"]:
        """All rows of all runs in the real coordinates of the problem.

        Args:
            shown: what `show` gave.
        """
        n_seeds, count, width = shown.actions.shape
        n_blocks = self._instance.n_blocks
        placed = np.zeros((n_seeds, count, n_blocks, width), shown.actions.dtype)
        placed[np.arange(n_seeds), :, shown.block] = shown.actions
        rows = placed.reshape(n_seeds, count, n_blocks * width)
        return rows if self._columns is None else rows[..., self._columns]

    def play(self, rows: Int[np.ndarray, " seeds"]) -> Outcome:
        """Plays a row in each run, after `show`, and goes to the next round.

        Args:
            rows: indices into the listed actions.

        Returns:
            What the choices brought.
        """
        at = self.k % self._chunk
        self.carry, outcome = _advance(
            self._plan, self._instance, self._adversary, self.carry, self._drawn, at, self.k, rows
        )
        self.k += 1
        return Outcome(*(np.asarray(part) for part in outcome))


def kept_columns(instance: Instance) -> np.ndarray | None:
    """Columns of the dense view that are no padding; None if all are kept.

    Args:
        instance: the environment.
    """
    columns = instance.columns
    return None if len(columns) == instance.n_blocks * instance.block_dim else np.asarray(columns)


# ---------------------------------------------------------------------------------------------- programs


@jax.jit
def _show(
    instance: Instance, adversary: Adversary, carry: Carry, drawn: Any, at: Int[Array, ""], k: Int[Array, ""]
) -> tuple[Array, ...]:
    """The fields of `Shown`."""
    of_instance, _, of_adversary = _at(drawn, at)

    def one(carry: Carry, of_instance: Any, of_adversary: Any) -> tuple[Array, ...]:
        sigma, offered = offer(instance, adversary, carry, of_instance, of_adversary, k)
        listed = playable(offered)
        mask = offered.enumerate().mask | listed.mask
        return sigma, listed.actions, mask, listed.mask, listed.block, _group(offered)

    return jax.vmap(one)(carry, of_instance, of_adversary)


@partial(jax.jit, static_argnums=0)
def _advance(
    plan: Plan,
    instance: Instance,
    adversary: Adversary,
    carry: Carry,
    drawn: Any,
    at: Int[Array, ""],
    k: Int[Array, ""],
    rows: Int[Array, " seeds"],
) -> tuple[Carry, Reward]:
    of_instance, _, of_adversary = _at(drawn, at)

    def one(carry: Carry, of_instance: Any, row: Int[Array, ""], of_adversary: Any) -> tuple[Carry, Reward]:
        # The compiler merges this with the same computation inside the round.
        sigma, offered = offer(instance, adversary, carry, of_instance, of_adversary, k)
        outcome = instance.reward(carry.instance, offered, offered.choice_of(row), sigma, of_instance)
        drawn = (of_instance, row, of_adversary)
        return play_round(plan, instance, adversary, carry, drawn, k)[0], outcome

    return jax.vmap(one)(carry, of_instance, rows, of_adversary)


def _at(drawn: Any, at: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, at, keepdims=False), drawn)


def _group(offered: AnySet) -> Int[Array, ""]:
    if not isinstance(offered, SignSet) or offered.n_blocks > 1:
        group = offered.block
    else:
        # Groups that share a bias lie side by side in one block, after the bias.
        group = jnp.maximum(offered.start - 1, 0) // offered.n_signs
    if isinstance(offered, SignSet):
        choice = offered.scale > 0.0 if offered.one_hot is None else (offered.scale > 0.0) | offered.one_hot
        group = jnp.where(choice & offered.active.any(), group, -1)
    return group.astype(jnp.int32)


# A learner whose randomness is the row to play.


def _replay_init(key: Any, spec: Spec) -> tuple[()]:
    return ()


def _replay_act(state: Any, decision_set: AnySet, sigma: Any, row: Int[Array, ""]) -> Choice:
    return decision_set.choice_of(row)


def _replay_update(state: Any, decision_set: AnySet, choice: Choice, reward: Any, sigma: Any) -> tuple[()]:
    return ()


REPLAY = Algorithm(_replay_init, _replay_act, _replay_update, "never", "replay", no_draw)
"""Plays given rows; only for `Rounds`, which hands it the rows as its randomness."""
