"""Plays stateful Python objects: a plain Python loop over rounds and runs, slow and without surprises.

Theta, decision sets and noise are those of `simulate` with the same key, entry for entry, so that the regret
of an object and of a compiled learner can be compared run for run. Every round is two compiled calls for all
runs (what is offered; what the choices bring) around the objects' own code.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm import tqdm

from . import checks
from .decision_sets import Choice, check_enumerable
from .environment import Adversary, Algorithm, AnySet, Instance, Spec, no_draw
from .objects import ObjectLearner, ObjectPlayer, playable, rows_of
from .results import Result
from .simulate import (
    Carry,
    Plan,
    Record,
    adversary_of,
    checkpoint_rounds,
    chunk_length,
    collect,
    draw_chunk,
    fingerprint,
    match,
    offer,
    play_round,
    start_runs,
    streams_of,
)


class Shown(NamedTuple):
    """What the objects of all runs are shown in a round."""

    sigma: Float[Array, " seeds"]
    actions: Float[Array, "seeds A b"]
    mask: Bool[Array, "seeds A"]
    block: Int[Array, " seeds"]


def play_object(
    learner: ObjectLearner,
    instance: Instance,
    adversary: Adversary | None = None,
    *,
    key: Key[Array, ""],
    n_seeds: int,
    horizon: int | None = None,
    record: Record = "total",
    progress: bool = True,
) -> Result:
    """Plays `n_seeds` independent runs with one object for each, in a plain Python loop.

    Args:
        learner: as `from_object` or `from_mabwiser` give it.
        instance: the environment; sign sets are listed, so they may have at most 12 signs.
        adversary: who chooses sigma_k; None plays the sequence that the instance was built for.
        key: a `jax.random.key`; theta, decision sets and noise are those that `simulate` draws from it.
        n_seeds: number of runs, >= 1.
        horizon: play only the first so many rounds; by default all that the instance has.
        record: as for `simulate`.
        progress: show a bar on terminals.

    Returns:
        As `simulate`. Its state does not hold the objects, so that nothing can be resumed from it.

    Raises:
        TypeError: if an argument has the wrong type, or an object's answer is no integer.
        ValueError: as `simulate`, or if an object's answer is no playable row.
        RuntimeError: if an object raises; the message names the round, the cause is chained.
    """
    if not isinstance(learner, ObjectLearner):
        raise TypeError(f"learner must come from from_object or from_mabwiser, got {type(learner).__name__}")
    n_seeds = checks.count("n_seeds", n_seeds)
    checks.one_of("record", record, ("total", "checkpoints", "all"))
    check_enumerable(instance.n_signs)
    adversary = adversary_of(instance, adversary)
    last = checks.count("horizon", instance.horizon if horizon is None else horizon)
    declared = _REPLAY._replace(needs_sigma=learner.needs_sigma, name=learner.name, config=repr(learner))
    spec = match(declared, instance, adversary, last)
    plan = Plan(_REPLAY, "block", n_seeds, 1, False, None)
    streams = streams_of(key)
    players = _players(learner, instance, spec, streams["learner"], n_seeds)
    columns = np.asarray(instance.columns)
    kept = None if len(columns) == instance.n_blocks * instance.block_dim else columns

    carry = start_runs(plan, instance, adversary, spec, streams)
    chunk = chunk_length(plan, instance, adversary, spec)
    wanted = {"total": (), "checkpoints": checkpoint_rounds(instance.horizon), "all": range(1, last + 1)}
    marks = {int(k) for k in wanted[record] if k <= last}
    drawn: Any = None
    sums = []
    with tqdm(
        total=last, desc="Python loop", unit="round", disable=None if progress else True, leave=False
    ) as bar:
        for k in range(last):
            if k % chunk == 0:
                drawn = draw_chunk(plan, chunk, instance, adversary, spec, streams, k)
            carry = _round(plan, instance, adversary, carry, drawn, k % chunk, k, players, kept)
            if k + 1 in marks:
                sums.append((np.asarray(carry.regret.total), np.asarray(carry.variance.total)))
            bar.update()
    plan = plan._replace(algorithm=declared, traced=record != "total")
    identity = fingerprint(plan, instance, adversary, key)
    if not plan.traced:
        return collect(plan, carry, last, identity, None, [], [])
    regret, variance = (np.stack(rows) for rows in zip(*sums, strict=True))
    return collect(plan, carry, last, identity, None, [np.array(sorted(marks))], [(regret, variance)])


def _players(
    learner: ObjectLearner, instance: Instance, spec: Spec, key: Key[Array, ""], n_seeds: int
) -> list[ObjectPlayer]:
    sigma = None if spec.sigma is None else np.asarray(spec.sigma, np.float64)
    d, K = len(instance.columns), spec.horizon
    seeds = np.asarray(_object_seeds(key, n_seeds))
    return [learner.new(run, d=d, K=K, sigma=sigma, seed=int(seed)) for run, seed in enumerate(seeds)]


@partial(jax.jit, static_argnums=1)
def _object_seeds(key: Key[Array, ""], n_seeds: int) -> Int[Array, " seeds"]:
    """From the key that `Algorithm.init` would get in the same run."""
    return jax.vmap(lambda run: jax.random.bits(jax.random.fold_in(key, run)))(jnp.arange(n_seeds))


def _round(
    plan: Plan,
    instance: Instance,
    adversary: Adversary,
    carry: Carry,
    drawn: Any,
    at: int,
    k: int,
    players: list[ObjectPlayer],
    columns: np.ndarray | None,
) -> Carry:
    sigma, actions, mask, block = (
        np.asarray(part) for part in _show(instance, adversary, carry, drawn, at, k)
    )
    played, chosen = np.zeros(len(players), np.int32), []
    for run, player in enumerate(players):
        rows = np.flatnonzero(mask[run])
        features = rows_of(actions[run][rows], int(block[run]), instance.n_blocks, columns)
        index = player.choose(k, features, float(sigma[run]))
        played[run] = rows[index]
        chosen.append(features[index])
    carry = _advance(plan, instance, adversary, carry, drawn, at, k, played)
    rewards = np.asarray(carry.learner)
    for run, player in enumerate(players):
        player.learn(k, chosen[run], float(rewards[run]), float(sigma[run]))
    return carry


# ---------------------------------------------------------------------------------------------- programs


@jax.jit
def _show(
    instance: Instance, adversary: Adversary, carry: Carry, drawn: Any, at: Int[Array, ""], k: Int[Array, ""]
) -> Shown:
    of_instance, _, of_adversary = _at(drawn, at)

    def one(carry: Carry, of_instance: Any, of_adversary: Any) -> Shown:
        sigma, offered = offer(instance, adversary, carry, of_instance, of_adversary, k)
        listed = playable(offered)
        return Shown(sigma, listed.actions, listed.mask, listed.block)

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
    played: Int[Array, " seeds"],
) -> Carry:
    of_instance, _, of_adversary = _at(drawn, at)
    step = partial(play_round, plan, instance, adversary)
    return jax.vmap(step, in_axes=(0, 0, None))(carry, (of_instance, played, of_adversary), k)[0]


def _at(drawn: Any, at: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, at, keepdims=False), drawn)


# The choices that the objects made, replayed in the simulator's own round: a learner whose randomness is the
# row to play, and whose state is the last reward.


def _replay_init(key: Any, spec: Spec) -> Float[Array, ""]:
    return jnp.zeros(())


def _replay_act(state: Any, decision_set: AnySet, sigma: Any, played: Int[Array, ""]) -> Choice:
    return decision_set.choice_of(played)


def _replay_update(
    state: Any, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: Any
) -> Float[Array, ""]:
    return reward


_REPLAY = Algorithm(_replay_init, _replay_act, _replay_update, "never", "replay", no_draw)
