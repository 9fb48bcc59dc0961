"""B independent copies of the Bernoulli hypercube in one game, visited cyclically (Lemma A.2).

One learner sees all of them, as in the proof of Theorem 5.2; the copies move in turn, so that after B K
rounds each has had its K.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sizes import Copies
from stage import Stage

from linbandit_lowerbounds.decision_sets import SignSet
from linbandit_lowerbounds.environment import Algorithm, Instance, Reward, register
from linbandit_lowerbounds.hypercube_bound import hypercube_bound, lemma_gap
from linbandit_lowerbounds.hypercubes import bernoulli_reward

_P0 = 1 / 3


@register(
    arrays=("_gap",), static=("dim", "n_blocks", "block_dim", "n_signs", "max_actions", "horizon", "copies")
)
class HypercubeCopies(Instance):
    """Copy k mod B of the hypercube for K rounds and d signs, rewards less the known p0, in round k."""

    def __init__(self, copies: int, K: int, d: int) -> None:
        self.copies = self.n_blocks = copies
        self.n_signs = self.block_dim = d
        self.max_actions = 2**d
        self.dim = copies * d
        self.horizon = copies * K
        self._gap = jnp.full(copies, lemma_gap(K, _P0), float)

    @property
    def prefix(self) -> jax.Array:
        """Full noise."""
        return jnp.ones(self.horizon)

    @property
    def gap(self) -> jax.Array:
        """|theta_i| of each copy."""
        return self._gap

    def init(self, key: jax.Array) -> jax.Array:
        """Hidden signs."""
        shape = (self.n_blocks, self.n_signs)
        return self._gap[:, None] * jax.random.rademacher(key, shape, self._gap.dtype)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Uniform numbers that decide the rewards."""
        return jax.random.uniform(key, shape)

    def decision_set(self, state: Any, k: Any, sigma: jax.Array, draw: Any) -> SignSet:  # noqa: ARG002
        """The sign vectors of the copy whose turn it is."""
        zero = jnp.zeros((), jnp.int32)
        copy = jnp.asarray(k % self.copies, jnp.int32)
        one = jnp.ones_like(self._gap[0])
        signs = jnp.ones(self.n_signs, bool)
        return SignSet(one, signs, 0.0 * one, copy, zero, zero, None, self.n_blocks, self.block_dim, True)

    def reward(
        self, state: jax.Array, decision_set: SignSet, choice: Any, sigma: jax.Array, draw: jax.Array
    ) -> Reward:
        """Bernoulli(p0 + <mu, a>) - p0."""
        theta = state[decision_set.block]
        mean = decision_set.features(choice) @ theta
        reward = bernoulli_reward(mean, decision_set.scale, _P0, sigma, draw)
        return Reward(reward, mean, decision_set.best_value(theta))


def lucky_copies(on: Stage, algorithm: Algorithm, copies: int, game: Copies) -> np.ndarray:
    """Whether regret stays below half of Lemma 4.3, in every run and copy, shape (runs, copies)."""
    regret = regret_of_copies(on, algorithm, copies, game)
    return regret < 0.5 * hypercube_bound(game.K, game.d).value


def regret_of_copies(on: Stage, algorithm: Algorithm, copies: int, game: Copies) -> np.ndarray:
    """Regret of every copy in every run, shape (runs, copies)."""
    result = on.play(algorithm, HypercubeCopies(copies, game.K, game.d), runs=game.runs, record="all")
    assert result.checkpoints is not None  # noqa: S101  (record="all")
    of_round = np.diff(result.checkpoints.regret, axis=0, prepend=0.0)
    return of_round.reshape(game.K, copies, game.runs).sum(0).T
