"""Instances against a weak adversary: many independent hypercubes, tuned to different amounts of noise.

    CyclicMultiInstance   groups x sub-instances x copies, visited cyclically (Theorem 5.2)
    LeastLoadedInstance   guesses x copies; a round goes to the block with the least variance so far (ours)

The adversary picks sigma_k while the game runs, so the block of a round follows from sigma_k and counters in
the state. Sizes and gaps come from `weak`, which also evaluates the bounds. Thousands of blocks, each with
few signs, are meant for mode "block" of `simulate`, where a round costs nothing for the other blocks.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from . import checks
from .decision_sets import Choice, SignSet
from .environment import Instance, Reward, register
from .hypercubes import bernoulli_reward
from .linalg import at
from .peeling import lower_thresholds, upper_thresholds
from .weak import LEAST_LOADED_GAP, Copies, cyclic_layout, least_loaded_layout

_P0 = 1 / 3


class _Blocks(Instance):
    """What these instances share: equal blocks filled by hidden signs, one gap for each block."""

    uses_sigma = True
    _gap: Float[Array, " blocks"]

    @property
    def gap(self) -> Float[Array, " blocks"]:
        """|theta_i| of each block."""
        return self._gap

    @property
    def reward_range(self) -> Float[Array, ""]:
        """All signs wrong at features of size 1, in the block of the largest gap."""
        return 2.0 * self.n_signs * self._gap.max()

    def _signs(self, key: Key[Array, ""]) -> Float[Array, "blocks n"]:
        shape = (self.n_blocks, self.n_signs)
        return self._gap[:, None] * jax.random.rademacher(key, shape, self._gap.dtype)

    def _cube(
        self, scale: Float[Array, ""], bias: Float[Array, ""], block: Int[Array, ""], active: Any = True
    ) -> SignSet:
        zero, start = jnp.zeros((), jnp.int32), jnp.asarray(self.block_dim - self.n_signs, jnp.int32)
        signs = jnp.broadcast_to(jnp.asarray(active, bool), (self.n_signs,))
        return SignSet(scale, signs, bias, block, start, zero, None, self.n_blocks, self.block_dim, True)


class Visits(NamedTuple):
    """State of a `CyclicMultiInstance`.

    Args:
        theta: hidden signs of every block, after the bias if there is one.
        visits: rounds of every group so far.
    """

    theta: Float[Array, "blocks b"]
    visits: Int[Array, " L"]


@register(
    arrays=("_gap", "_scales", "_limits"),
    static=("dim", "n_blocks", "block_dim", "n_signs", "max_actions", "horizon", "copies", "bias"),
)
class CyclicMultiInstance(_Blocks):
    """The paper's instance for a weak adversary: (L - 1) groups x L sub-instances x B copies of a hypercube.

    Round t = 0, 1, .. of group i = 1 .. L-1 (2^(i-1)/K < sigma_k <= 2^i/K, decided when sigma_k is known)
    goes to sub-instance j = 1 + t mod L; visit v of that to copy v mod B. Sub-instance j is tuned to 2^(j-1)
    visits: one of them is right for whatever number of rounds the adversary grants the group, and
    not all of its copies are lucky. Rounds of group 0 offer the single action 0.

    Args:
        K: rounds, >= 2.
        d: dimension, >= L^2 B (`required_dimension`); every copy has floor(d / (L^2 B)) signs.
        copies: B: "tight" or "sharp" for failure probability eta, or the paper's ceil(ln(d K)^2).
        eta: failure probability that B is chosen for; None takes 1/K.
        bias: "centered" subtracts the known part p0 sigma(i) of rewards; "per_block" keeps it, with one more
            coordinate in every block, as printed.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or d too small (the message says which d is needed).

    Source: He and Gu 2025, Theorem 5.2.
    """

    def __init__(
        self,
        K: int,
        d: int,
        copies: Copies = "tight",
        *,
        eta: float | None = None,
        bias: Literal["centered", "per_block"] = "centered",
    ) -> None:
        checks.one_of("bias", bias, ("centered", "per_block"))
        layout = cyclic_layout(K, d, eta=eta, copies=copies)
        self.horizon = int(K)
        self.copies = layout.copies
        self.bias = bias
        self.n_signs = layout.block_dim
        self.max_actions = 2**self.n_signs
        self.block_dim = self.n_signs + (bias == "per_block")
        self.n_blocks = (layout.groups - 1) * layout.groups * layout.copies
        self.dim = self.n_blocks * self.block_dim
        of_group = np.repeat(layout.gaps, layout.copies)
        self._gap = jnp.asarray(np.tile(of_group, layout.groups - 1), float)
        self._scales = jnp.asarray(lower_thresholds(K), float)
        self._limits = jnp.asarray(upper_thresholds(K, self._scales.dtype))

    def init(self, key: Key[Array, ""]) -> Visits:
        """Hidden signs; nothing visited."""
        theta = self._signs(key)
        if self.bias == "per_block":
            theta = jnp.concatenate([jnp.full((self.n_blocks, 1), _P0), theta], axis=1)
        return Visits(theta, jnp.zeros(self._limits.size, jnp.int32))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Uniform numbers that decide the Bernoulli rewards."""
        return jax.random.uniform(key, shape)

    def group(self, sigma: Float[Array, ""]) -> Int[Array, ""]:
        """The group of a round.

        Args:
            sigma: sigma_k.
        """
        return (sigma > self._limits).sum().astype(jnp.int32)

    def decision_set(self, state: Visits, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """The sign vectors of the block whose turn it is in the group of sigma_k, scaled by sigma(i)."""
        L = self._limits.size
        group = self.group(sigma)
        t = state.visits[group]
        block = ((group - 1) * L + t % L) * self.copies + (t // L) % self.copies
        scale = self._scales[group]
        bias = scale if self.bias == "per_block" else jnp.zeros_like(scale)
        return self._cube(scale, bias, jnp.maximum(block, 0), group > 0)

    def reward(
        self,
        state: Visits,
        decision_set: SignSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """sigma(i) * (Bernoulli(p0 + <mu, a>) - p0), or without the subtraction; 0 in group 0."""
        theta = at(state.theta, decision_set.block)
        mean = decision_set.features(choice) @ theta
        offset = _P0 if self.bias == "centered" else 0.0
        reward = bernoulli_reward(mean, decision_set.scale, offset, sigma, draw)
        return Reward(reward, mean, decision_set.best_value(theta))

    def after(self, state: Visits, decision_set: SignSet, sigma: Float[Array, ""]) -> Visits:
        """One more visit to the group."""
        return Visits(state.theta, state.visits.at[self.group(sigma)].add(1))


class Loads(NamedTuple):
    """State of a `LeastLoadedInstance`.

    Args:
        theta: hidden signs of every block.
        load: sum of sigma_k^2 of every block so far.
    """

    theta: Float[Array, "blocks b"]
    load: Float[Array, " blocks"]


@register(
    arrays=("_gap",), static=("dim", "n_blocks", "block_dim", "n_signs", "max_actions", "horizon", "copies")
)
class LeastLoadedInstance(_Blocks):
    """Ours against a weak adversary: J guesses V_j = V1 2^(j-1) of the variance, B copies each, in turn.

    Each of the M = J B blocks is a variance-scaled hypercube with gap x / sqrt(V_j). A round goes to the
    block with the least variance so far (ties: the lowest index), so that all loads differ by at most 1 and
    every block has at least S/M - 1. The guess just below that is tuned to what its copies met, whatever the
    adversary did.

    Args:
        K: rounds, >= 2.
        d: dimension, >= M (`required_dimension`); every block has floor(d / M) signs.
        eta: failure probability in (0, 1) that B is chosen for.
        V1: smallest guess, > 0.
        x: scaled gap, > 0.
        copies: "tight" or "sharp" (see `weak_adversary_bound`).

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or d too small (the message says which d is needed).

    Source: docs/proofs.md, section 9 (an addition of this package).
    """

    def __init__(
        self,
        K: int,
        d: int,
        eta: float,
        V1: float = 1.0,
        x: float = LEAST_LOADED_GAP,
        *,
        copies: Literal["tight", "sharp"] = "tight",
    ) -> None:
        layout = least_loaded_layout(K, d, eta=eta, copies=copies, V1=V1, x=x)
        self.horizon = int(K)
        self.copies = layout.copies
        self.n_blocks = layout.blocks
        self.n_signs = self.block_dim = layout.block_dim
        self.max_actions = 2**self.n_signs
        self.dim = self.n_blocks * self.block_dim
        self._gap = jnp.asarray(np.repeat(layout.gaps, layout.copies), float)

    def init(self, key: Key[Array, ""]) -> Loads:
        """Hidden signs; no variance yet."""
        return Loads(self._signs(key), jnp.zeros_like(self._gap))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Standard normal noise."""
        return jax.random.normal(key, shape)

    def decision_set(self, state: Loads, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """sigma_k^2 * {-1, 1}^n in the block with the least variance so far."""
        return self._cube(sigma**2, jnp.zeros_like(sigma), jnp.argmin(state.load).astype(jnp.int32))

    def reward(
        self,
        state: Loads,
        decision_set: SignSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """sigma_k^2 <theta, a> + sigma_k N(0, 1)."""
        theta = at(state.theta, decision_set.block)
        mean = decision_set.features(choice) @ theta
        return Reward(mean + sigma * draw, mean, decision_set.best_value(theta))

    def after(self, state: Loads, decision_set: SignSet, sigma: Float[Array, ""]) -> Loads:
        """The block is loaded with sigma_k^2."""
        return Loads(state.theta, state.load.at[decision_set.block].add(sigma**2))
