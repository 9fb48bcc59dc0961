"""One run of a learner on given decision sets, parameter and noise: by jax in a scan, by NumPy in a loop."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec


class Script(NamedTuple):
    """Rounds that do not depend on what is played, apart from the rewards <theta, x> + noise."""

    actions: np.ndarray  # [K, A, d]
    mask: np.ndarray  # [K, A]
    sigma: np.ndarray  # [K]
    noise: np.ndarray  # [K], the noise itself, sigma included
    theta: np.ndarray  # [d]


def script(seed, *, K, A, d, masked=0.0, low=0.05, shared=None):
    """Random unit actions (or one fixed set), some of them masked, log-uniform sigmas with a few zeros."""
    rng = np.random.default_rng(seed)
    actions = rng.standard_normal((K, A, d)) if shared is None else np.broadcast_to(shared, (K, A, d))
    if shared is None:
        actions = actions / np.linalg.norm(actions, axis=-1, keepdims=True)
    mask = rng.random((K, A)) >= masked
    mask[:, 0] |= ~mask.any(1)
    sigma = np.exp(rng.uniform(np.log(low), 0.0, K))
    theta = rng.standard_normal(d)
    return Script(actions, mask, sigma, sigma * rng.standard_normal(K), theta / np.linalg.norm(theta))


def spec_of(rounds, *, gap=None):
    """What a learner is told."""
    K, A, d = rounds.actions.shape
    return Spec(None, None if gap is None else jnp.full(1, gap), d, 1, d, A, 0, K)


def initial(algorithm, rounds, *, key=None, gap=None):
    """The state before the first round."""
    return algorithm.init(jax.random.key(0) if key is None else key, spec_of(rounds, gap=gap))


@partial(jax.jit, static_argnums=0)
def _scan(algorithm, state, rounds, draws):
    told_before = algorithm.needs_sigma in ("before", "upfront")
    told_after = algorithm.needs_sigma != "never"

    def step(state, now):
        actions, mask, sigma, noise, draw = now
        offered = DecisionSet(actions, mask, jnp.zeros((), jnp.int32), 1)
        choice = algorithm.act(state, offered, sigma if told_before else None, draw)
        reward = actions[choice] @ rounds.theta + noise
        state = algorithm.update(state, offered, choice, reward, sigma if told_after else None)
        return state, (choice, reward)

    return lax.scan(step, state, (rounds.actions, rounds.mask, rounds.sigma, rounds.noise, draws))


def draws_of(algorithm, rounds):
    """What the learner draws in all rounds."""
    return algorithm.draw(jax.random.key(1), spec_of(rounds), (len(rounds.sigma),))


@partial(jax.jit, static_argnums=0)
def played(algorithm, state, offered, sigma=None, draw=()):
    """Features of what a learner plays."""
    return offered.features(algorithm.act(state, offered, sigma, draw))


def play(algorithm, rounds, *, state=None, gap=None):
    """The state at the end, and the choices and rewards of all rounds."""
    state = initial(algorithm, rounds, gap=gap) if state is None else state
    state, (choices, rewards) = _scan(algorithm, state, _arrays(rounds), draws_of(algorithm, rounds))
    return state, np.asarray(choices), np.asarray(rewards)


def play_many(algorithm, scripts, *, gap=None):
    """The choices in several runs at once, by vmap; every run draws the same."""
    first = scripts[0]
    run = partial(_scan, algorithm, initial(algorithm, first, gap=gap))
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *map(_arrays, scripts))
    return np.asarray(jax.vmap(run, in_axes=(0, None))(stacked, draws_of(algorithm, first))[1][0])


def _arrays(rounds):
    return Script(*(jnp.asarray(a, bool if a.dtype == bool else float) for a in rounds))


def play_reference(learner, rounds, *, told=True, **draws):
    """The choices of an object of reference.py; it is shown the playable rows only."""
    choices = []
    for k, (actions, mask, sigma, noise) in enumerate(zip(*rounds[:4], strict=True)):
        rows = np.flatnonzero(mask)
        extra = {name: values[k] for name, values in draws.items()}
        row = rows[learner.act(actions[rows], sigma if told else None, **extra)]
        x = actions[row]
        learner.update(x, x @ rounds.theta + noise, sigma if told else None)
        choices.append(row)
    return np.array(choices)
