"""Plays the same rounds with an algorithm of the package and with its NumPy reference.

`play` runs RUNS runs of an algorithm at once (jit, vmap over runs, scan over rounds) and keeps every state:
comparing each run with a plain loop of the reference also says that vmap is a loop and jit changes nothing.
Some actions are masked and hold huge features: an algorithm that looks at them is found out.
"""

from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linbandit_lowerbounds.decision_sets import DecisionSet, SignSet
from linbandit_lowerbounds.environment import Spec

RUNS, ROUNDS, ACTIONS, DIM, BLOCKS, SIGNS = 2, 40, 6, 6, 3, 3
WARM_UP = 8  # forced rounds on sign sets, whose symmetries are ties until theta is generic
TOLERANCE = 1e-10  # float64, tens of rank-one updates against as many solves of well conditioned systems

# Programs run for milliseconds here: the time LLVM takes to optimise them is not worth it.
QUICK = {"xla_backend_optimization_level": 0}

SPEC = Spec(None, None, DIM, 1, DIM, ACTIONS, 0, ROUNDS)
BLOCK_SPEC = Spec(None, None, DIM, BLOCKS, DIM // BLOCKS, ACTIONS, 0, ROUNDS)
SIGN_SPEC = Spec(None, None, SIGNS + 1, 1, SIGNS + 1, 0, SIGNS, ROUNDS)


class Rounds(NamedTuple):
    """What happens in every round but the choice; leading axes (runs, rounds)."""

    actions: np.ndarray  # [runs, rounds, A, b]; for sign sets [.., 1, 2]: scale and bias
    mask: np.ndarray
    block: np.ndarray
    sigma: np.ndarray
    noise: np.ndarray
    normal: np.ndarray
    forced: np.ndarray  # index to play, or -1
    theta: np.ndarray


class Trace(NamedTuple):
    """What an algorithm did: choices, rewards, widths, the state before each round, and the last one."""

    index: np.ndarray
    reward: np.ndarray
    width: np.ndarray
    before: object
    after: object


def contexts(seed, *, blocks=1, norm=1.0):
    """Random actions, some masked, of lengths up to `norm`; a third of the rounds are noiseless."""
    rng = np.random.default_rng(seed)
    shape = (RUNS, ROUNDS)
    b = DIM // blocks
    actions = rng.normal(size=(*shape, ACTIONS, b))
    actions *= (
        norm * rng.uniform(0.1, 1, size=(*shape, ACTIONS, 1)) / np.linalg.norm(actions, axis=-1)[..., None]
    )
    mask = rng.random((*shape, ACTIONS)) < 0.7
    mask[..., 2] |= ~mask.any(-1)
    actions[~mask] = 1e3
    sigma = np.where(rng.random(shape) < 1 / 3, 0.0, rng.uniform(0.05, 1, size=shape))
    theta = rng.normal(size=(RUNS, blocks, b))
    return Rounds(
        actions,
        mask,
        rng.integers(blocks, size=shape),
        sigma,
        sigma * rng.normal(size=shape),
        rng.normal(size=(*shape, b)),
        np.full(shape, -1),
        theta / np.linalg.norm(theta, axis=(1, 2), keepdims=True),
    )


def hypercubes(seed):
    """Sign sets with a bias coordinate and a scale of their own in each round."""
    rounds = contexts(seed)
    rng = np.random.default_rng(seed)
    shape = (RUNS, ROUNDS)
    sizes = np.stack([rng.uniform(0.1, 0.5, size=shape), np.full(shape, 0.4)], -1)[:, :, None]
    forced = np.where(np.arange(ROUNDS) < WARM_UP, rng.integers(2**SIGNS, size=shape), -1)
    theta = rng.normal(size=(RUNS, 1, SIGNS + 1))
    return rounds._replace(actions=sizes, forced=forced, theta=theta / 4)


def dense(rounds):
    """The same rounds with all coordinates in one block."""
    blocks, b = rounds.theta.shape[1:]
    place = (np.arange(blocks) == rounds.block[..., None]).astype(float)
    spread = np.einsum("rtm,rtai->rtami", place, rounds.actions)
    normal = np.einsum("rtm,rti->rtmi", place, rounds.normal)
    return rounds._replace(
        actions=spread.reshape(*spread.shape[:3], blocks * b),
        block=np.zeros_like(rounds.block),
        normal=normal.reshape(*normal.shape[:2], blocks * b),
        theta=rounds.theta.reshape(-1, 1, blocks * b),
    )


def decision_set(rounds):
    """The set of one round of one run."""
    if rounds.actions.shape[0] > 1:
        return DecisionSet(rounds.actions, rounds.mask, rounds.block, rounds.theta.shape[0])
    zero = jnp.zeros((), jnp.int32)
    scale, bias = rounds.actions[0]
    return SignSet(scale, jnp.ones(SIGNS, bool), bias, zero, zero, zero, None, 1, SIGNS + 1, True)


def step(algorithm, state, rounds):
    """One round: (state after, (index, reward, width, state before))."""
    offered = decision_set(rounds)
    needs = algorithm.needs_sigma
    choice = algorithm.act(state, offered, rounds.sigma if needs == "before" else None, rounds.normal)
    forced = offered.choice_of(jnp.maximum(rounds.forced, 0))
    choice = jnp.where(rounds.forced >= 0, forced, choice)
    reward = offered.features(choice) @ rounds.theta[rounds.block] + rounds.noise
    after = algorithm.update(state, offered, choice, reward, None if needs == "never" else rounds.sigma)
    width = jnp.zeros(()) if algorithm.width is None else algorithm.width(state, offered, choice)
    index = choice
    if isinstance(offered, SignSet):
        index = ((choice > 0) * 2 ** jnp.arange(SIGNS)).sum()
    return after, (index, reward, width, state)


def of_run(rounds, run):
    """Rounds of one run, with theta repeated in each."""
    return Rounds(*(leaf[run] for leaf in repeated(rounds)))


def repeated(rounds):
    """The rounds with theta in each, so that a scan can take them apart."""
    theta = np.repeat(rounds.theta[:, None], ROUNDS, 1)
    return rounds._replace(theta=theta)


def play(algorithm, spec, rounds):
    """All runs."""
    after, outputs = _play(algorithm, spec, repeated(rounds))
    return jax.tree.map(np.asarray, Trace(*outputs, after))


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _play(algorithm, spec, rounds):
    def run(rounds):
        return jax.lax.scan(partial(step, algorithm), algorithm.init(None, spec), rounds)

    return jax.vmap(run)(rounds)


def listed(rounds, run, t):
    """(actions, indices): what the reference may choose from, and their indices in the set."""
    if rounds.actions.shape[2] > 1:
        playable = np.flatnonzero(rounds.mask[run, t])
        return rounds.actions[run, t][playable], playable
    scale, bias = rounds.actions[run, t, 0]
    signs = 2.0 * ((np.arange(2**SIGNS)[:, None] >> np.arange(SIGNS)) & 1) - 1
    return np.concatenate([np.full((2**SIGNS, 1), bias), scale * signs], 1), np.arange(2**SIGNS)


def follow(trace, rounds, make_reference, compare, *, act=None):
    """Plays the reference through the same rounds, in one block; compares choices, then what `compare` says.

    `compare(reference, state, width, x)` sees both before the update; `act` may replace reference.act.
    """
    for run in range(RUNS):
        reference = make_reference()
        for t in range(ROUNDS):
            actions, indices = listed(rounds, run, t)
            state = jax.tree.map(itemgetter((run, t)), trace.before)
            if act is None:
                chosen = reference.act(actions, rounds.sigma[run, t])
            else:
                chosen = act(reference, actions, state, rounds.normal[run, t])
            if rounds.forced[run, t] >= 0:
                chosen = int(rounds.forced[run, t])
            assert indices[chosen] == trace.index[run, t], f"run {run}, round {t}"
            x = actions[chosen]
            compare(reference, state, trace.width[run, t], x)
            reference.update(x, trace.reward[run, t], rounds.sigma[run, t])


def close(got, expected):
    """Equality up to rounding, relative to the size of the array."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * (1 + np.abs(expected).max()))


def same_ridge(reference, state, width, x):
    """Estimate and confidence width of algorithms with one Gram matrix."""
    close(state.statistics.inverse[0] @ state.statistics.response[0], reference.theta)
    close(width, reference.radius_scale * reference.beta * reference.norm(x))


def without_jit(algorithm, spec, rounds, n):
    """Indices and last state of the first n rounds of run 0, primitive by primitive."""
    with jax.disable_jit():
        state, indices = algorithm.init(None, spec), []
        for t in range(n):
            one = Rounds(*(jnp.asarray(leaf[t]) for leaf in of_run(rounds, 0)))
            state, (index, *_) = step(algorithm, state, one)
            indices.append(int(index))
    return indices, state


def million_rounds(algorithm):
    """(state, L) after 10^6 rounds over a cycle of 50 unit actions, V = I + sum xx' = LL' in float64."""
    rounds, cycle = 1_000_000, 50
    actions = np.random.default_rng(0).normal(size=(cycle, DIM)).astype(np.float32)
    actions /= np.linalg.norm(actions, axis=1, keepdims=True)
    offered = DecisionSet(jnp.asarray(actions), jnp.ones(cycle, bool), jnp.zeros((), jnp.int32), 1)

    @jax.jit
    def run(state):
        def advance(k, state):
            return algorithm.update(state, offered, k % cycle, jnp.float32(0.1), None)

        return jax.lax.fori_loop(0, rounds, advance, state)

    state = jax.tree.map(np.asarray, run(algorithm.init(None, SPEC)))
    gram = np.eye(DIM) + rounds // cycle * (actions.T.astype(np.float64) @ actions)
    return state, np.linalg.cholesky(gram)
