"""The compiled part of a simulation: one round of one run, and the programs that play many.

    start_runs   theta, learner and adversary of every run, before the first round
    draw_chunk   everything random of some rounds, for all runs
    play_chunk   those rounds, one after the other, for all runs at once

A round is `play_round`: the protocol of `environment`, in its order. The programs map it over the runs; a
chunk is drawn ahead of the loop because drawing many numbers at once is several times faster than a few in
every round.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from .environment import Adversary, Algorithm, AnySet, Instance, Observation, Spec, Transition

Mode = Literal["block", "dense"]
Round = Int[Array, ""] | int

# "theta" and "start" are folded with the number of a run, the others with that of a round: a stream with both
# would hand out one key twice.
_STREAMS = {"theta": 0, "rounds": 1, "learner": 2, "adversary": 3, "start": 4}
# Draws of a chunk stay in the cache of a core; longer chunks only save dispatches.
_CHUNK_BYTES = 4 * 2**20
_CHUNK_ROUNDS = (16, 1024)


class Sum(NamedTuple):
    """A running sum and what rounding took from it (Kahan): float32 holds 10^6 rounds without loss."""

    total: Float[Array, ""]
    lost: Float[Array, ""]

    def plus(self, term: Float[Array, ""]) -> Sum:
        """The sum with one more term."""
        corrected = term - self.lost
        total = self.total + corrected
        return Sum(total, (total - self.total) - corrected)


class Carry(NamedTuple):
    """Everything that lives from one round to the next, for one run."""

    instance: Any
    learner: Any
    adversary: Any
    regret: Sum
    variance: Sum
    certificate: Sum
    stopped: Int[Array, ""]
    fault: Int[Array, ""]


FAULTS = (
    "the adversary chose a sigma outside [0, 1]",
    "the instance offered no action that may be played",
    "the learner chose an action that is not offered",
)
"""What `Carry.fault` - 1 means; 0 is a run in order, and the first fault of a run stays."""


class Plan(NamedTuple):
    """What a compiled program depends on besides the shapes of its arguments."""

    algorithm: Algorithm
    mode: Mode
    n_seeds: int
    unroll: int
    traced: bool
    sharding: NamedSharding | None


def streams_of(key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
    """Independent keys for theta, the rounds of instance, learner and adversary, and the learner's start.

    Args:
        key: the key of the simulation.
    """
    return {name: jax.random.fold_in(key, number) for name, number in _STREAMS.items()}


def chunk_length(plan: Plan, instance: Instance, adversary: Adversary, spec: Spec) -> int:
    """Rounds that are drawn at once: a power of two, so many that the draws take about 4 MiB.

    Args:
        plan: learner and number of runs.
        instance: the environment.
        adversary: the chooser of sigma_k.
        spec: sizes of the problem.
    """
    streams = _stream_keys()
    drawn = jax.eval_shape(lambda keys: _draw_round(plan, instance, adversary, spec, keys, 0), streams)
    per_round = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(drawn))
    low, high = _CHUNK_ROUNDS
    fitting = max(1, _CHUNK_BYTES // max(1, per_round))
    return int(min(high, max(low, 2 ** (fitting.bit_length() - 1))))


def _stream_keys() -> dict[str, Any]:
    return dict.fromkeys(_STREAMS, jax.ShapeDtypeStruct((), jax.random.key(0).dtype))


# ---------------------------------------------------------------------------------------------- one round


def offer(
    instance: Instance,
    adversary: Adversary,
    carry: Carry,
    of_instance: Any,
    of_adversary: Any,
    k: Int[Array, ""],
) -> tuple[Float[Array, ""], AnySet]:
    """Sigma_k and D_k of one run, chosen in the order that the adversary's sight allows.

    Args:
        instance: the environment.
        adversary: the chooser of sigma_k.
        carry: the run so far.
        of_instance: what the instance drew for the round.
        of_adversary: what the adversary drew for the round.
        k: the round, from 0.
    """
    seen = None
    if adversary.sees == "decision_set":
        seen = instance.decision_set(carry.instance, k, jnp.ones(()), of_instance)
    observation = Observation(k, carry.variance.total, seen)
    sigma = adversary.choose(carry.adversary, observation, of_adversary)
    if seen is not None:
        return sigma, seen
    return sigma, instance.decision_set(carry.instance, k, sigma, of_instance)


def play_round(
    plan: Plan, instance: Instance, adversary: Adversary, carry: Carry, drawn: Any, k: Int[Array, ""]
) -> tuple[Carry, Any]:
    """One round of one run: the protocol of `environment`, in its order.

    Args:
        plan: learner and mode.
        instance: the environment.
        adversary: the chooser of sigma_k.
        carry: the run so far.
        drawn: what instance, learner and adversary drew for the round.
        k: the round, from 0.

    Returns:
        The run after the round, and its running sums.
    """
    algorithm = plan.algorithm
    of_instance, of_learner, of_adversary = drawn
    sigma, offered = offer(instance, adversary, carry, of_instance, of_adversary, k)
    shown = offered.in_one_block() if plan.mode == "dense" else offered

    before = sigma if algorithm.needs_sigma in ("before", "upfront") else None
    choice = algorithm.act(carry.learner, shown, before, of_learner)
    outcome = instance.reward(carry.instance, offered, choice, sigma, of_instance)
    after = None if algorithm.needs_sigma == "never" else sigma
    learner = algorithm.update(carry.learner, shown, choice, outcome.reward, after)
    past = carry.adversary
    if adversary.sees != "nothing":
        past = adversary.update(past, Transition(k, offered, choice, outcome.reward, sigma))

    # From the least to the most basic: what comes later covers what it may have caused.
    fault = jnp.where(offered.allows(choice), 0, 3)
    fault = jnp.where(offered.is_empty(), 2, fault)
    fault = jnp.where((sigma >= 0.0) & (sigma <= 1.0), fault, 1).astype(jnp.int32)

    certificate = carry.certificate
    if algorithm.width is not None:
        width = algorithm.width(carry.learner, shown, choice)
        certificate = certificate.plus(jnp.minimum(instance.reward_range, 2.0 * width))
    carry = Carry(
        instance.after(carry.instance, offered, sigma),
        learner,
        past,
        carry.regret.plus(outcome.best_mean - outcome.mean),
        carry.variance.plus(sigma**2),
        certificate,
        carry.stopped + (sigma == 0.0),
        jnp.where(carry.fault == 0, fault, carry.fault),
    )
    return carry, (carry.regret.total, carry.variance.total) if plan.traced else None


# ---------------------------------------------------------------------------------------------- programs


@partial(jax.jit, static_argnums=0)
def start_runs(
    plan: Plan, instance: Instance, adversary: Adversary, spec: Spec, streams: dict[str, Key[Array, ""]]
) -> Carry:
    """All runs before the first round: theta, learners, adversaries.

    Args:
        plan: learner and number of runs.
        instance: the environment.
        adversary: the chooser of sigma_k.
        spec: what the learner is told.
        streams: as `streams_of` gives them.
    """
    algorithm = plan.algorithm
    zero = jnp.zeros(())

    def run(seed: Int[Array, ""]) -> Carry:
        hidden = instance.init(jax.random.fold_in(streams["theta"], seed))
        learner = algorithm.init(jax.random.fold_in(streams["start"], seed), spec)
        if algorithm.reveal is not None:
            learner = algorithm.reveal(learner, instance, hidden)
        nothing, count = Sum(zero, zero), jnp.zeros((), jnp.int32)
        past = adversary.init(instance.spec())
        return Carry(hidden, learner, past, nothing, nothing, nothing, count, count)

    return jax.vmap(run)(jnp.arange(plan.n_seeds))


def _draw_round(
    plan: Plan,
    instance: Instance,
    adversary: Adversary,
    spec: Spec,
    streams: dict[str, Any],
    k: Round,
) -> tuple[Any, Any, Any]:
    keys = {name: jax.random.fold_in(key, k) for name, key in streams.items()}
    shape = (plan.n_seeds,)
    return (
        instance.draw(keys["rounds"], shape),
        plan.algorithm.draw(keys["learner"], spec, shape),
        adversary.draw(keys["adversary"], shape),
    )


@partial(jax.jit, static_argnums=(0, 1))
def draw_chunk(
    plan: Plan,
    chunk: int,
    instance: Instance,
    adversary: Adversary,
    spec: Spec,
    streams: dict[str, Key[Array, ""]],
    start: Round,
) -> tuple[Any, Any, Any]:
    """What instance, learner and adversary draw in `chunk` rounds from `start` on, for all runs.

    Args:
        plan: learner and number of runs.
        chunk: number of rounds.
        instance: the environment.
        adversary: the chooser of sigma_k.
        spec: what the learner is told.
        streams: as `streams_of` gives them.
        start: the first round.

    Returns:
        Three pytrees whose leaves have shape (chunk, n_seeds, ...).
    """
    rounds = start + jnp.arange(chunk)
    drawn = jax.vmap(partial(_draw_round, plan, instance, adversary, spec, streams))(rounds)
    if plan.sharding is None:
        return drawn
    along = NamedSharding(plan.sharding.mesh, PartitionSpec(None, *plan.sharding.spec))
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, along), drawn)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def play_chunk(
    plan: Plan,
    chunk: int,
    instance: Instance,
    adversary: Adversary,
    carry: Carry,
    drawn: tuple[Any, Any, Any],
    start: Round,
    low: Round,
    high: Round,
) -> tuple[Carry, Any]:
    """Rounds start + low to start + high - 1; parts of a chunk run the same program, to the same bits."""
    step = jax.vmap(partial(play_round, plan, instance, adversary), in_axes=(0, 0, None))
    trace = None
    if plan.traced:
        empty = jnp.zeros((chunk, plan.n_seeds), carry.regret.total.dtype)
        trace = (empty, empty)

    def advance(i: Int[Array, ""], state: tuple[Carry, Any]) -> tuple[Carry, Any]:
        carry, trace = state
        carry, sums = step(carry, jax.tree.map(lambda leaf: leaf[i], drawn), start + i)
        if trace is not None:
            trace = jax.tree.map(lambda rows, row: rows.at[i].set(row), trace, sums)
        return carry, trace

    def several(j: Int[Array, ""], state: tuple[Carry, Any]) -> tuple[Carry, Any]:
        for offset in range(plan.unroll):
            state = advance(low + plan.unroll * j + offset, state)
        return state

    groups = (high - low) // plan.unroll
    state = lax.fori_loop(0, groups, several, (carry, trace))
    if plan.unroll == 1:
        return state
    return lax.fori_loop(low + plan.unroll * groups, high, advance, state)
