"""Contexts from a real data set: every round offers rows of scikit-learn's digits, scaled to unit norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Instance, Reward, register
from tenfold_tools.data import digits


class Drawn(NamedTuple):
    """Rows of the data set and noise of one round."""

    rows: jax.Array
    noise: jax.Array


@register(arrays=("_table",), static=("dim", "block_dim", "max_actions", "horizon"))
class DigitContexts(Instance):
    """`n_actions` random digits in every round, theta uniform on the unit sphere, Gaussian noise.

    The pixels that are zero in every digit are left out: 61 of 64 remain.
    """

    n_blocks = 1

    def __init__(self, n_actions: int, *, horizon: int) -> None:
        rows = digits().inputs
        rows = rows[:, rows.any(0)]
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self._table = jnp.asarray(rows, float)
        self.dim = self.block_dim = rows.shape[1]
        self.max_actions = n_actions
        self.horizon = horizon

    def init(self, key: jax.Array) -> jax.Array:
        """A uniformly random unit vector."""
        direction = jax.random.normal(key, (self.dim,))
        return direction / jnp.linalg.norm(direction)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """Which digits are offered, and standard normal noise."""
        of_rows, of_noise = jax.random.split(key)
        rows = jax.random.randint(of_rows, (*shape, self.max_actions), 0, self._table.shape[0])
        return Drawn(rows, jax.random.normal(of_noise, shape))

    def decision_set(self, state: Any, k: Any, sigma: jax.Array, draw: Drawn) -> DecisionSet:  # noqa: ARG002
        """The drawn digits."""
        mask = jnp.ones(self.max_actions, bool)
        return DecisionSet(self._table[draw.rows], mask, jnp.zeros((), jnp.int32), 1)

    def reward(
        self, state: jax.Array, decision_set: DecisionSet, choice: Any, sigma: jax.Array, draw: Drawn
    ) -> Reward:
        """<theta, x> + sigma N(0, 1)."""
        mean = decision_set.features(choice) @ state
        return Reward(mean + sigma * draw.noise, mean, decision_set.best_value(state))
