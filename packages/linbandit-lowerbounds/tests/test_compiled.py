"""Streams of randomness: nobody gets one key twice."""

import jax
import jax.numpy as jnp
import numpy as np

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.contexts import FixedSet
from linbandit_lowerbounds.environment import Algorithm
from linbandit_lowerbounds.simulate import simulate

ROUNDS = 5


def test_a_learner_starts_with_a_key_that_no_round_has():
    def init(key, spec):
        return jax.random.key_data(key)

    def draw(key, spec, shape):
        return jnp.broadcast_to(jax.random.key_data(key), (*shape, 2))

    def act(own, decision_set, sigma, drawn):
        return jnp.where((own == drawn).all(), 0, 1).astype(jnp.int32)

    def update(own, decision_set, choice, reward, sigma):
        return own

    spy = Algorithm(init, act, update, "never", "spy", draw)
    unequal = FixedSet([[0.0], [1.0]], [1.0], horizon=ROUNDS)  # row 0, played for equal keys, costs 1
    noise, key = Prefixed(np.ones(ROUNDS)), jax.random.key(0)
    result = simulate(spy, unequal, noise, key=key, n_seeds=ROUNDS, progress=False)
    np.testing.assert_array_equal(result.regret, 0.0)
