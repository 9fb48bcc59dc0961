"""Plays stateful Python objects: a plain Python loop over rounds and runs, slow and without surprises.

Theta, decision sets and noise are those of `simulate` with the same key, entry for entry, so that the regret
of an object and of a compiled learner can be compared run for run (see `rounds`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32
from tqdm import tqdm

from . import checks
from .compiled import Plan, streams_of
from .decision_sets import check_enumerable
from .environment import Adversary, Instance, Spec
from .objects import ObjectLearner, ObjectPlayer, object_seed
from .results import Result
from .rounds import REPLAY, Rounds
from .simulate import Record, adversary_of, checkpoint_rounds, collect, fingerprint, match


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
    checks.random_key("key", key)
    adversary = adversary_of(instance, adversary)
    check_enumerable(instance.n_signs)
    last = checks.count("horizon", instance.horizon if horizon is None else horizon)
    declared = REPLAY._replace(needs_sigma=learner.needs_sigma, name=learner.name, config=repr(learner))
    spec = match(declared, instance, adversary, last)
    players = _players(learner, instance, spec, streams_of(key)["start"], n_seeds)
    rounds = Rounds(instance, adversary, key=key, n_seeds=n_seeds)
    wanted = {"total": (), "checkpoints": checkpoint_rounds(instance.horizon), "all": range(1, last + 1)}
    marks = [int(k) for k in wanted[record] if k <= last]
    kept, sums = set(marks), []
    with tqdm(
        total=last, desc="Python loop", unit="round", disable=None if progress else True, leave=False
    ) as bar:
        for k in range(last):
            _round(rounds, players)
            if k + 1 in kept:
                carry = rounds.carry
                sums.append((np.asarray(carry.regret.total), np.asarray(carry.variance.total)))
            bar.update()
    plan = Plan(declared, "block", n_seeds, 1, record != "total", None)
    identity = fingerprint(plan, instance, adversary, key)
    if not plan.traced:
        return collect(plan, rounds.carry, last, identity, None, [], [])
    regret, variance = (np.stack(rows) for rows in zip(*sums, strict=True))
    return collect(plan, rounds.carry, last, identity, None, [np.array(marks)], [(regret, variance)])


def _players(
    learner: ObjectLearner, instance: Instance, spec: Spec, key: Key[Array, ""], n_seeds: int
) -> list[ObjectPlayer]:
    sigma = None if spec.sigma is None else np.asarray(spec.sigma, np.float64)
    d, K = len(instance.columns), spec.horizon
    seeds = np.asarray(_object_seeds(key, n_seeds))
    return [learner.new(run, d=d, K=K, sigma=sigma, seed=int(seed)) for run, seed in enumerate(seeds)]


@partial(jax.jit, static_argnums=1)
def _object_seeds(key: Key[Array, ""], n_seeds: int) -> UInt32[Array, " seeds"]:
    """From the key that `Algorithm.init` would get in the same run."""
    return jax.vmap(lambda run: object_seed(jax.random.fold_in(key, run)))(jnp.arange(n_seeds))


def _round(rounds: Rounds, players: list[ObjectPlayer]) -> None:
    k, shown = rounds.k, rounds.show()
    played, chosen = np.zeros(len(players), np.int32), []
    for run, player in enumerate(players):
        rows = np.flatnonzero(shown.distinct[run])
        features = rounds.features(shown, run, rows)
        index = player.choose(k, features, float(shown.sigma[run]))
        played[run] = rows[index]
        chosen.append(features[index])
    rewards = rounds.play(played).reward
    for run, player in enumerate(players):
        player.learn(k, chosen[run], float(rewards[run]), float(shown.sigma[run]))
