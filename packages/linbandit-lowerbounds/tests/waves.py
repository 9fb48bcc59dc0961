"""What the tests of Python objects share: an instance that compiles quickly, a learner that plays in turn."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Algorithm, Instance, Reward, no_draw, register
from linbandit_lowerbounds.interop import play_object
from linbandit_lowerbounds.simulate import simulate

KEY = jax.random.key(11)
K, N_SEEDS = 30, 3
SIGMA = np.linspace(0.2, 1.0, K)
# K ridge updates in float64 in another order of operations; programs that were compiled differently.
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}
loop = partial(play_object, key=KEY, n_seeds=N_SEEDS, progress=False)
compiled = partial(simulate, key=KEY, n_seeds=N_SEEDS, progress=False)


def fixed() -> Prefixed:
    """Made inside the tests, where floats have 64 bits."""
    return Prefixed(SIGMA)


@register(arrays=("mask",), static=("n_blocks", "horizon"))
class Waves(Instance):
    """Sines of the key instead of random numbers, which compile slowly.

    With two blocks, which take turns, the second has a padding coordinate and row 1 may not be played.
    """

    block_dim, max_actions = 3, 4

    def __init__(self, n_blocks=1, horizon=K):
        self.n_blocks = n_blocks
        self.horizon = horizon
        self.mask = jnp.arange(4) != (1 if n_blocks == 2 else -1)

    @property
    def dim(self):
        return len(self.columns)

    @property
    def columns(self):
        return tuple(range(3 if self.n_blocks == 1 else 5))

    def init(self, key):
        return waves(key, (self.n_blocks, 3))

    def draw(self, key, shape):
        return waves(key, (*shape, 13))

    def decision_set(self, state, k, sigma, draw):
        block = k % self.n_blocks
        real = (jnp.arange(3) < 2) | (block == 0)
        return DecisionSet(draw[:12].reshape(4, 3) * real, self.mask, block, self.n_blocks)

    def reward(self, state, decision_set, choice, sigma, draw):
        theta = state[decision_set.block]
        mean = decision_set.features(choice) @ theta
        return Reward(mean + sigma * draw[12], mean, decision_set.best_value(theta))


def waves(key, shape):
    phase = (jax.random.key_data(key) % 1000).sum().astype(float)
    return 0.5 * jnp.sin(phase + 2.7 * jnp.arange(np.prod(shape))).reshape(shape)


WAVES = Waves()


class Sequence:
    """Plays the rows 0, 1, 2, ... in turn and keeps what it is told."""

    made: ClassVar[list] = []

    def __init__(self, answer=None):
        self.k = 0
        self.answer = answer
        self.seen = []
        type(self).made = [*type(self).made, self]

    def act(self, actions, sigma=None):
        self.seen.append([actions, sigma])
        return self.k % len(actions) if self.answer is None else self.answer(self.k, actions)

    def update(self, x, reward, sigma=None):
        self.seen[-1] += [x, reward, sigma]
        self.k += 1


def in_turn() -> Algorithm:
    """The same as `Sequence`, compiled."""
    return Algorithm(_start_turn, _take_turn, _end_turn, "never", "in turn", no_draw)


def _start_turn(key, spec):
    return jnp.zeros((), jnp.int32)


def _take_turn(k, decision_set, sigma, draw):
    rows = jnp.flatnonzero(decision_set.enumerate().mask, size=decision_set.enumerate().mask.shape[0])
    return decision_set.choice_of(rows[k % decision_set.enumerate().mask.sum()])


def _end_turn(k, decision_set, choice, reward, sigma):
    return k + 1


def beyond(k, actions):
    """An answer that is no row."""
    return len(actions)
