"""Hypercube instances: theta in {-gap, gap}^d, decision sets scale * {-1, 1}^d."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from . import checks
from .decision_sets import Choice, SignSet
from .environment import Instance, Reward, register

# x* of LB_end and LB_seq in docs/proofs.md: the gap x / sqrt(S) that maximises the bound.
SEQUENTIAL_OPTIMUM = 1.246858674625


@register(arrays=("sigma", "_gap"), static=("dim", "horizon", "noise"))
class VarianceScaledHypercube(Instance):
    """Ours: D_k = {sigma_k^2 a : a in {-1, 1}^d}, theta uniform on {-gap, gap}^d, noise N(0, sigma_k^2).

    Every learner sees the same law of the log-likelihood ratio of a sign, N(2 gap^2 V, 4 gap^2 V) with V the
    variance so far, whatever it plays; the lower bound 0.5298 d sqrt(sum sigma_k^2) follows without a
    logarithm.

    Args:
        sigma: standard deviations in [0, 1] that the gap is tuned to.
        d: dimension.
        gap: |theta_i|; None takes the optimum 1.2469 / sqrt(S) of the sequential bound, S = sum sigma_k^2.
        budget: tune the gap to this total variance instead of S (a prefix of the rounds).
        noise: "gaussian", or "two_point": rewards +-sigma_k with mean sigma_k^2 <theta, a>.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sigma leaves [0, 1], S is 0, d < 1, the gap is not positive, or under "two_point" d *
            gap exceeds 1 (probabilities would leave [0, 1]).

    Source: docs/proofs.md (an addition of this package).
    """

    n_blocks = 1
    uses_sigma = True

    def __init__(
        self,
        sigma: Any,
        d: int,
        gap: float | None = None,
        *,
        budget: float | None = None,
        noise: Literal["gaussian", "two_point"] = "gaussian",
    ) -> None:
        sequence = checks.sigmas("sigma", sigma)
        self.dim = checks.count("d", d)
        checks.one_of("noise", noise, ("gaussian", "two_point"))
        total = float((sequence**2).sum())
        if total <= 0.0:
            raise ValueError("sigma must hold a positive entry, got only zeros")
        tuned_to = total if budget is None else checks.real("budget", budget, above=0.0)
        size = SEQUENTIAL_OPTIMUM / np.sqrt(tuned_to) if gap is None else checks.real("gap", gap, above=0.0)
        if noise == "two_point" and self.dim * size > 1.0:
            raise ValueError(f'd * gap must be <= 1 under noise="two_point", got {self.dim * size!r}')
        self.noise = noise
        self.horizon = sequence.size
        self.sigma = jnp.asarray(sequence, float)
        self._gap = jnp.asarray([size], float)

    @property
    def block_dim(self) -> int:
        """One block of d coordinates."""
        return self.dim

    @property
    def n_signs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One sign for each coordinate."""
        return self.dim

    @property
    def max_actions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """2^d."""
        return 2**self.dim

    @property
    def prefix(self) -> Float[Array, " K"]:
        """The sequence it was built for."""
        return self.sigma

    @property
    def gap(self) -> Float[Array, " blocks"]:
        """|theta_i|."""
        return self._gap

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """Uniform signs times the gap."""
        return self._gap[0] * jax.random.rademacher(key, (self.dim,), self._gap.dtype)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Standard normal or uniform noise."""
        return (jax.random.normal if self.noise == "gaussian" else jax.random.uniform)(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """sigma_k^2 * {-1, 1}^d."""
        zero = jnp.zeros((), jnp.int32)
        active = jnp.ones(self.dim, bool)
        bias = jnp.zeros_like(sigma)
        return SignSet(sigma**2, active, bias, zero, zero, zero, None, 1, self.dim, True)

    def reward(
        self,
        state: Float[Array, " d"],
        decision_set: SignSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """Mean sigma_k^2 <theta, a>, variance sigma_k^2 (Gaussian) or sigma_k^2 - mean^2 (two points)."""
        mean = decision_set.features(choice) @ state
        if self.noise == "gaussian":
            reward = mean + sigma * draw
        else:
            # P(+sigma) = 1/2 + sigma <theta, a> / 2; a quiet round has mean 0 and pays 0.
            above = 0.5 + 0.5 * jnp.where(sigma > 0.0, mean / jnp.where(sigma > 0.0, sigma, 1.0), 0.0)
            reward = jnp.where(draw < above, sigma, -sigma)
        return Reward(reward, mean, decision_set.best_value(state))
