"""Instances that are mixed from smaller ones: the paper's peeling for any prefixed sequence, and a budget.

    PeelingInstance     groups of similar noise, each a Bernoulli hypercube of its own (Theorem 4.1)
    JiaBudgetInstance   m contexts in turn, each a bandit of A arms, noise for the first Lambda rounds

Instances for adaptive noise are in `multi_instances`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from . import checks
from .decision_sets import Choice, DecisionSet, SignSet
from .environment import Instance, Reward, register
from .hypercubes import BIASES, Bias, bernoulli_gap, bernoulli_reward
from .linalg import at
from .peeling import Dims, groups

Scale = Literal["lowest", "threshold"]
_P0 = 1 / 3


class _Cubes(NamedTuple):
    """The groups that own coordinates ("cubes"), and which of them a round belongs to.

    Args:
        of_round: cube of every round, -1 if its group owns no coordinate.
        scale: size of the features, 0 for group 0.
        signs: number of signs.
        gap: |theta_i|, 1 for group 0.
    """

    of_round: Int[Array, " K"]
    scale: Float[Array, " cubes"]
    signs: Int[Array, " cubes"]
    gap: Float[Array, " cubes"]


@register(
    arrays=("_sigma", "_cubes"),
    static=(
        "dim",
        "n_blocks",
        "block_dim",
        "n_signs",
        "max_actions",
        "horizon",
        "bias",
        "_has_arms",
        "_equal_gaps",
        "_columns",
    ),
)
class PeelingInstance(Instance):
    """The paper's instance for a prefixed sequence: one Bernoulli hypercube for each group of similar noise.

    Group i = {k : 2^(i-1)/K < sigma_k <= 2^i/K} owns d_i coordinates; its rounds offer the sign vectors of
    those. Group 0 (sigma_k <= 1/K), if it owns coordinates, offers its unit vectors instead, a random one of
    which pays 1, without noise. A group without coordinates offers the single action 0.

    Args:
        sigma: standard deviations in [0, 1].
        d: coordinates to share out; hidden signs of all groups together. None takes the sum of an explicit
            vector.
        dims: how (see `peeling.groups`): "equal", "occupied", "best" or an explicit vector.
        bias: where the known p0 = 1/3 sits: "shared" in one coordinate for all groups (d + 1 in all, a single
            block), "per_block" in one for each group (a block for each group), "centered" nowhere: the known
            part of the reward is subtracted (exactly d coordinates, a block for each group).
        scale: size of group i's features: "lowest" takes the smallest sigma_k of its rounds, the largest
            scale that the variances allow (every bound, `tight_sum` included, lies below the regret);
            "threshold" takes 2^(i-1)/K as printed.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sigma leaves [0, 1], d < 1, or an option or a vector of dimensions is wrong.

    Source: He and Gu 2025, Theorem 4.1; coordinates of the bias and whole dimensions are ours (README).
    """

    def __init__(
        self,
        sigma: Any,
        d: int | None,
        dims: Dims = "occupied",
        bias: Bias = "shared",
        *,
        scale: Scale = "lowest",
    ) -> None:
        sequence = checks.sigmas("sigma", sigma)
        checks.one_of("bias", bias, BIASES)
        checks.one_of("scale", scale, ("lowest", "threshold"))
        if isinstance(dims, str):
            d = checks.count("d", d)
        peeling = groups(sigma, d, dims=dims)
        owners = np.flatnonzero(peeling.dims)
        signs = peeling.dims[owners]
        level = peeling.thresholds.copy()
        if scale == "lowest":
            occupied = peeling.counts > 0
            lowest = np.full(peeling.L, np.inf)
            np.minimum.at(lowest, peeling.index, sequence)
            level[occupied] = lowest[occupied]
        level[0] = 0.0
        gap = [bernoulli_gap(int(peeling.counts[i]), int(peeling.dims[i]), _P0) if i else 1.0 for i in owners]
        cube_of_group = np.full(peeling.L, -1)
        cube_of_group[owners] = np.arange(owners.size)

        self.bias = bias
        self.horizon = sequence.size
        self.n_signs = int(signs.max())
        self.max_actions = 2**self.n_signs
        biased = bias != "centered"
        if bias == "shared":
            self.n_blocks, self.block_dim = 1, 1 + owners.size * self.n_signs
            first = 1 + self.n_signs * np.arange(owners.size)
        else:
            self.n_blocks, self.block_dim = owners.size, self.n_signs + biased
            first = biased + self.block_dim * np.arange(owners.size)
        owned = [int(begin) + j for begin, n in zip(first, signs, strict=True) for j in range(n)]
        constant = range(0, self.n_blocks * self.block_dim, self.block_dim) if biased else ()
        self._columns = tuple(sorted([*owned, *constant]))
        self.dim = len(self._columns)
        self._has_arms = bool(owners[0] == 0)
        self._equal_gaps = len(set(gap)) == 1
        self._sigma = jnp.asarray(sequence, float)
        self._cubes = _Cubes(
            jnp.asarray(cube_of_group[peeling.index], jnp.int32),
            jnp.asarray(level[owners], float),
            jnp.asarray(signs, jnp.int32),
            jnp.asarray(gap, float),
        )

    @property
    def prefix(self) -> Float[Array, " K"]:
        """The sequence it was built for."""
        return self._sigma

    @property
    def gap(self) -> Float[Array, " blocks"] | None:
        """|theta_i| of each block; None if groups of different gaps share one."""
        if self.n_blocks == 1:
            return self._cubes.gap[:1] if self._equal_gaps else None
        return self._cubes.gap

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns that a group owns, and those of the bias."""
        return self._columns

    def init(self, key: Key[Array, ""]) -> Float[Array, "blocks b"]:
        """Signs times the group's gap, the rewarded arm of group 0, and p0."""
        cubes, n = self._cubes, self.n_signs
        of_signs, of_arm = jax.random.split(key) if self._has_arms else (key, key)
        theta = cubes.gap[:, None] * jax.random.rademacher(of_signs, (cubes.gap.size, n), cubes.gap.dtype)
        if self._has_arms:
            arm = jax.random.randint(of_arm, (), 0, cubes.signs[0])
            theta = theta.at[0].set((jnp.arange(n) == arm).astype(theta.dtype))
        theta = jnp.where(jnp.arange(n) < cubes.signs[:, None], theta, 0.0)
        if self.bias == "centered":
            return theta
        theta = theta.reshape(self.n_blocks, self.block_dim - 1)
        return jnp.concatenate([jnp.full((self.n_blocks, 1), _P0), theta], axis=1)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Uniform numbers that decide the Bernoulli rewards."""
        return jax.random.uniform(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """The sign vectors (or unit vectors) of the round's group."""
        cubes = self._cubes
        owner = cubes.of_round[k]
        owned = owner >= 0
        cube = jnp.maximum(owner, 0)
        scale = jnp.where(owned, cubes.scale[cube], 0.0)
        active = owned & (jnp.arange(self.n_signs) < cubes.signs[cube])
        zero, one = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
        shared = self.bias == "shared"
        return SignSet(
            scale=scale,
            active=active,
            bias=jnp.zeros_like(scale) if self.bias == "centered" else scale,
            block=zero if shared else cube,
            start=1 + self.n_signs * cube if shared else zero if self.bias == "centered" else one,
            bias_column=zero,
            one_hot=owned & (cube == 0) if self._has_arms else None,
            n_blocks=self.n_blocks,
            width=self.block_dim,
            fills=not shared or cubes.gap.size == 1,
        )

    def reward(
        self,
        state: Float[Array, "blocks b"],
        decision_set: SignSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """Scale * Bernoulli(p0 + <mu, a>), less scale * p0 if centered; group 0 pays its mean."""
        theta = at(state, decision_set.block)
        mean = decision_set.features(choice) @ theta
        offset = _P0 if self.bias == "centered" else 0.0
        reward = bernoulli_reward(mean, decision_set.scale, offset, sigma, draw)
        return Reward(reward, mean, decision_set.best_value(theta))


@register(
    arrays=("_gaps",),
    static=("dim", "n_blocks", "block_dim", "max_actions", "horizon", "noisy_rounds"),
)
class JiaBudgetInstance(Instance):
    """A budget of noise: m = d // A contexts in turn, each a bandit of A arms, noise for Lambda rounds.

    In each context arm 0 has mean D; with probability 1/2 one of the other arms, each equally likely, has
    mean 2 D, all else is 0. D = sqrt((A - 1) / (4 n)) for a context that meets n noisy rounds, which makes

        E Regret >= (1/8) n D exp(-2 D^2 n / (A - 1)) = exp(-1/2) / 16 sqrt((A - 1) n) > sqrt((A - 1) n) / 27.

    Noise first and silence later is the sequence that Jia et al. use, the instance is our realisation.

    Args:
        d: dimension, >= A; d - d % A coordinates are used.
        A: arms, >= 2.
        K: rounds, >= 2.
        Lambda: budget of noise; sigma_k = 1 in the first floor(Lambda) rounds, then 0. In [m (A - 1), K], so
            that every context meets at least A - 1 noisy rounds and means stay in [0, 1].

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Source: Jia, Qian, Rakhlin and Wei 2024 (arXiv 2410.12713) for the setting; Lattimore and Szepesvari 2020,
    Theorem 15.2, averaged over the position of the better arm.
    """

    def __init__(self, d: int, A: int, K: int, Lambda: float) -> None:
        self.max_actions = self.block_dim = checks.count("A", A, at_least=2)
        self.n_blocks = checks.count("d", d, at_least=A) // A
        self.dim = self.n_blocks * self.block_dim
        self.horizon = checks.count("K", K, at_least=2)
        self.noisy_rounds = math.floor(checks.real("Lambda", Lambda, above=0.0))
        least = self.n_blocks * (A - 1)
        if not least <= self.noisy_rounds <= K:
            raise ValueError(
                f"floor(Lambda) must lie in [(d // A) (A - 1), K] = [{least}, {K}], got {Lambda!r}"
            )
        share, longer = divmod(self.noisy_rounds, self.n_blocks)
        rounds = share + (np.arange(self.n_blocks) < longer)
        self._gaps = jnp.asarray(np.sqrt((A - 1) / (4 * rounds)), float)

    @property
    def prefix(self) -> Float[Array, " K"]:
        """1 for floor(Lambda) rounds, then 0."""
        return (jnp.arange(self.horizon) < self.noisy_rounds).astype(self._gaps.dtype)

    def init(self, key: Key[Array, ""]) -> Float[Array, "blocks A"]:
        """Mean rewards of all arms of all contexts."""
        of_coin, of_arm = jax.random.split(key)
        better = jax.random.bernoulli(of_coin, shape=(self.n_blocks, 1))
        arm = jax.random.randint(of_arm, (self.n_blocks, 1), 1, self.block_dim)
        arms = jnp.arange(self.block_dim)
        return self._gaps[:, None] * ((arms == 0) + 2.0 * (better & (arms == arm)))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Standard normal noise."""
        return jax.random.normal(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> DecisionSet:
        """The unit vectors of the round's context."""
        eye = jnp.eye(self.block_dim, dtype=self._gaps.dtype)
        context = jnp.asarray(k % self.n_blocks, jnp.int32)
        return DecisionSet(eye, jnp.ones(self.block_dim, bool), context, self.n_blocks)

    def reward(
        self,
        state: Float[Array, "blocks A"],
        decision_set: DecisionSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """Mean of the arm + sigma_k N(0, 1)."""
        means = at(state, decision_set.block)
        mean = means[choice]
        return Reward(mean + sigma * draw, mean, means.max())
