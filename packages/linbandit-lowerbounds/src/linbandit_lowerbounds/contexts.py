"""Ordinary decision sets: one fixed set, fresh random contexts, and the paper's fixed-set counter-example."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from . import checks
from .adversaries import Prefixed
from .decision_sets import Choice, DecisionSet
from .environment import Instance, Reward, register


class Drawn(NamedTuple):
    """Contexts and noise of one round."""

    contexts: Float[Array, "A d"] | None
    noise: Float[Array, ""]


class _Listed(Instance):
    """What instances with listed actions in one block share: theta is the state, noise is Gaussian."""

    n_blocks = 1

    def reward(
        self,
        state: Float[Array, " d"],
        decision_set: DecisionSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Drawn,
    ) -> Reward:
        """<theta, x> + sigma * N(0, 1)."""
        values = decision_set.values(state)
        mean = decision_set.features(choice) @ state
        return Reward(mean + sigma * draw.noise, mean, values.max())


@register(arrays=("actions", "theta", "mask"), static=("dim", "block_dim", "max_actions", "horizon"))
class FixedSet(_Listed):
    """The same actions in every round; Gaussian noise of standard deviation sigma_k.

    Args:
        actions: features, one row for each action.
        theta: the parameter; None draws it uniformly from the unit sphere in every run.
        horizon: number of rounds K.
        check_norms: refuse actions or theta with norm above 1 + 1e-6.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or norms above 1.
    """

    def __init__(self, actions: Any, theta: Any = None, *, horizon: int, check_norms: bool = False) -> None:
        rows = np.asarray(actions, np.float64)
        if rows.ndim != 2 or 0 in rows.shape or not np.isfinite(rows).all():
            raise ValueError(f"actions must be a finite (A, d) array with A, d >= 1, got shape {rows.shape}")
        hidden = None if theta is None else np.asarray(theta, np.float64)
        if hidden is not None and (hidden.shape != rows.shape[1:] or not np.isfinite(hidden).all()):
            raise ValueError(f"theta must be finite with shape {rows.shape[1:]}, got shape {hidden.shape}")
        if check_norms:
            for name, vectors in (("actions", rows), ("theta", rows[:0] if hidden is None else hidden[None])):
                largest = np.linalg.norm(vectors, axis=-1).max(initial=0.0)
                if largest > 1.0 + 1e-6:
                    raise ValueError(f"{name} must have norm <= 1 under check_norms, got {largest!r}")
        self.actions = jnp.asarray(rows, float)
        self.theta = None if hidden is None else jnp.asarray(hidden, float)
        self.mask = jnp.ones(rows.shape[0], bool)
        self.max_actions, self.dim = rows.shape
        self.block_dim = self.dim
        self.horizon = checks.count("horizon", horizon)

    @property
    def reward_range(self) -> Float[Array, ""]:
        """Distance of the best from the worst action, for an unknown unit theta at most twice the longest."""
        if self.theta is None:
            return 2.0 * jnp.sqrt((self.actions**2).sum(-1).max())
        return jnp.ptp(self.actions @ self.theta)

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """The given theta, or a uniformly random unit vector."""
        return self.theta if self.theta is not None else _sphere(jax.random.normal(key, (self.dim,)))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Drawn:
        """Standard normal noise."""
        return Drawn(None, jax.random.normal(key, shape))

    def decision_set(
        self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Drawn
    ) -> DecisionSet:
        """The fixed set."""
        return DecisionSet(self.actions, self.mask, jnp.zeros((), jnp.int32), 1)


@register(arrays=("norm",), static=("dim", "block_dim", "max_actions", "horizon"))
class RandomContexts(_Listed):
    """Fresh actions in every round, uniform on a sphere; theta uniform on the unit sphere; Gaussian noise.

    Args:
        d: dimension.
        n_actions: actions of a round.
        norm: length of the actions, in (0, 1].
        horizon: number of rounds K.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size or the norm is out of range.
    """

    def __init__(self, d: int, n_actions: int, norm: float = 1.0, *, horizon: int) -> None:
        self.dim = self.block_dim = checks.count("d", d)
        self.max_actions = checks.count("n_actions", n_actions)
        length = checks.real("norm", norm, above=0.0)
        if length > 1.0:
            raise ValueError(f"norm must be in (0, 1], got {norm!r}")
        self.norm = jnp.asarray(length, float)
        self.horizon = checks.count("horizon", horizon)

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """A uniformly random unit vector."""
        return _sphere(jax.random.normal(key, (self.dim,)))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Drawn:
        """The actions, and standard normal noise."""
        contexts, noise = jax.random.split(key)
        directions = jax.random.normal(contexts, (*shape, self.max_actions, self.dim))
        return Drawn(self.norm * _sphere(directions), jax.random.normal(noise, shape))

    def decision_set(
        self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Drawn
    ) -> DecisionSet:
        """The drawn actions."""
        assert draw.contexts is not None  # noqa: S101  (tells the type checker what `draw` returned)
        mask = jnp.ones(self.max_actions, bool)
        return DecisionSet(draw.contexts, mask, jnp.zeros((), jnp.int32), 1)


def fixed_set_counterexample(D: Float[Array, "A d"], K: int, theta: Any = None) -> tuple[FixedSet, Prefixed]:
    """Why fixed decision sets have no variance-dependent lower bound: d quiet rounds reveal theta on D.

    Args:
        D: the fixed decision set.
        K: number of rounds, >= 2.
        theta: the parameter; None draws it from the unit sphere.

    Returns:
        The instance, and the sequence sigma_1 = ... = sigma_d = 0, then 1: the sum of variances is K - d, the
        regret of exploring a basis of D first at most 2d.

    Raises:
        ValueError: if K < d, or as `FixedSet`.

    Source: He and Gu 2025, Remark 4.5 and Corollary 5.7.
    """
    instance = FixedSet(D, theta, horizon=checks.count("K", K, at_least=2))
    if instance.dim > K:
        raise ValueError(f"K must be at least d = {instance.dim}, got {K!r}")
    sigma = np.ones(K)
    sigma[: instance.dim] = 0.0
    return instance, Prefixed(sigma)


def _sphere(vectors: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    return vectors * jax.lax.rsqrt((vectors * vectors).sum(-1, keepdims=True))
