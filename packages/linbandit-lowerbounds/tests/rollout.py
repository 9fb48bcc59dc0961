"""A transparent loop for tests of instances: fixed policies, every round recorded, randomness handed in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RANDOM, WORST, BEST, LEADER, CONTRARIAN = range(5)


class Trace(NamedTuple):
    """One entry for each round and run, [K, n, ...]; theta and state one for each run."""

    regret: Any
    reward: Any
    mean: Any
    block: Any
    choice: Any
    scale: Any
    theta: Any
    state: Any


def hidden(state):
    """Theta as [n_blocks, block_dim]."""
    theta = getattr(state, "theta", state)
    return theta if theta.ndim == 2 else theta[None]


@jax.jit
def _roll(instance, sigma, draws, picks, policy, keys):
    def run(key, policy, draws, picks):
        start = instance.init(key)

        def step(carry, at_round):
            state, response = carry
            k, sigma, draw, pick = at_round
            shown = instance.decision_set(state, k, sigma, draw)
            theta, leader = hidden(state)[shown.block], response[shown.block]
            choices = [
                shown.pick(pick),
                shown.argmax(-theta),
                shown.argmax(theta),
                shown.argmax(leader),
                shown.argmax(-leader),
            ]
            choice = jnp.stack(choices)[policy]
            outcome = instance.reward(state, shown, choice, sigma, draw)
            # The known bias is no hint at the signs: the leader looks at the deviation from it only.
            response = response.at[shown.block].add(outcome.reward * shown.features(choice))
            state = instance.after(state, shown, sigma)
            scale = getattr(shown, "scale", jnp.ones(()))
            row = (outcome.best_mean - outcome.mean, outcome.reward, outcome.mean, shown.block, choice, scale)
            return (state, response), row

        rounds = (jnp.arange(sigma.size), sigma, draws, picks)
        (state, _), rows = jax.lax.scan(step, (start, jnp.zeros_like(hidden(start))), rounds)
        return rows, hidden(start), state

    rows, theta, state = jax.vmap(run)(keys, policy, draws, picks)
    return Trace(*(jnp.swapaxes(row, 0, 1) for row in rows), theta, state)


def randomness(instance, n, *, seed=0):
    """What the instance draws, and uniform numbers for picks: [n, K, ...]."""
    of_instance, of_picks = jax.random.split(jax.random.key(seed))
    K = instance.horizon
    keys = jax.random.split(of_instance, K)
    draws = jax.vmap(lambda key: instance.draw(key, (n,)), out_axes=1)(keys)
    return draws, jax.random.uniform(of_picks, (n, K, max(1, instance.n_signs)))


def rollout(instance, policy, n, *, sigma=None, seed=0, given=None):
    """Plays n runs; `policy` is one number or one for each run, sigma one sequence for all."""
    draws, picks = randomness(instance, n, seed=seed) if given is None else given
    sigma = instance.prefix if sigma is None else jnp.asarray(sigma, float)
    keys = jax.random.split(jax.random.key(seed + 1), n)
    policy = jnp.broadcast_to(jnp.asarray(policy), (n,))
    trace = _roll(instance, sigma, draws, picks, policy, keys)
    return jax.tree.map(np.asarray, trace)
