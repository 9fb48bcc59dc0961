"""Hypercube instances: hidden signs theta_i = +-gap, decision sets scale * {-1, 1}^d.

    BernoulliHypercube        reward sigma Bernoulli(p0 + <mu, a>), one variance (Lemma 4.3)
    GaussianHypercube         reward <theta, a> + N(0, sigma^2), one variance
    VarianceScaledHypercube   reward sigma_k^2 <theta, a> + N(0, sigma_k^2), any prefixed sequence (ours)

All are one block. Sequences of many variances that are mixed from these cubes are in `composites`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from . import checks
from .decision_sets import Choice, SignSet
from .environment import Instance, Reward, register
from .hypercube_bound import base_probability, enough_rounds, lemma_gap, small_group_gap
from .scaled_bound import SEQ_GAP, TWO_POINT_GAP

Bias = Literal["shared", "per_block", "centered"]
BIASES = ("shared", "per_block", "centered")


class _Cube(Instance):
    """What single hypercubes share: one block, filled by an optional bias coordinate and d signs."""

    n_blocks = 1
    _sigma: Float[Array, " K"] | Float[Array, ""]
    _gap: Float[Array, " 1"]

    @property
    def prefix(self) -> Float[Array, " K"]:
        """The sequence it was built for."""
        return jnp.broadcast_to(self._sigma, (self.horizon,))

    @property
    def gap(self) -> Float[Array, " 1"]:
        """|theta_i| of the hidden signs."""
        return self._gap

    @property
    def reward_range(self) -> Float[Array, ""]:
        """All signs wrong at features of size 1: 2 d gap."""
        return 2.0 * self.n_signs * self._gap[0]

    def _signs(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        return self._gap[0] * jax.random.rademacher(key, (self.n_signs,), self._gap.dtype)


@register(
    arrays=("_sigma", "_gap", "_p0"),
    static=("dim", "block_dim", "n_signs", "max_actions", "horizon", "bias"),
)
class BernoulliHypercube(_Cube):
    """The paper's instance for one variance: reward sigma Bernoulli(p0 + <mu, a>), mu in {-gap, gap}^d.

    The gap sqrt(p0/K)/(4 sqrt 2) keeps probabilities in [3 p0/4, 5 p0/4]. Every policy, however good or bad,
    has expected regret between one and four times the bound of Lemma 4.3, and random play exactly twice.

    An adversary that sets sigma_k below sigma shrinks the noise, not the mean; a larger sigma_k changes
    nothing.

    Args:
        K: rounds, >= 2.
        d: hidden signs, >= 1.
        sigma: scale of the reward in [0, 1]; its variance is sigma^2 p (1 - p).
        p0: base probability in (0, 1/3].
        bias: features are (sigma, sigma a) with theta = (p0, mu), d + 1 coordinates: "shared" or "per_block",
            the same for a single block. "centered" subtracts the known sigma p0 from rewards and has exactly
            d coordinates.
        strict: raise if K < d^2 / (2 p0) instead of taking the gap p0 / (4 d), beyond the lemma.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or K is too small under strict.

    Source: He and Gu 2025, Lemma 4.3; Zhou, Gu and Szepesvari 2021, Lemma C.8.
    """

    def __init__(
        self,
        K: int,
        d: int,
        sigma: float = 1.0,
        p0: float = 1 / 3,
        bias: Bias = "shared",
        *,
        strict: bool = False,
    ) -> None:
        self.horizon = checks.count("K", K, at_least=2)
        self.n_signs = checks.count("d", d)
        scale = checks.real("sigma", sigma, at_least=0.0)
        if scale > 1.0:
            raise ValueError(f"sigma must lie in [0, 1], got {sigma!r}")
        base = base_probability(p0)
        checks.one_of("bias", bias, BIASES)
        if strict and not enough_rounds(K, d, base):
            raise ValueError(
                f"K must be >= d^2 / (2 p0) = {d**2 / (2 * base):g} under strict=True, got {K!r}"
            )
        self.bias = bias
        self.dim = self.block_dim = self.n_signs + (bias != "centered")
        self.max_actions = 2**self.n_signs
        self._sigma = jnp.asarray(scale, float)
        self._gap = jnp.asarray([bernoulli_gap(K, d, base)], float)
        self._p0 = jnp.asarray(base, float)

    def init(self, key: Key[Array, ""]) -> Float[Array, " b"]:
        """(p0, mu), or mu if centered."""
        signs = self._signs(key)
        return signs if self.bias == "centered" else jnp.concatenate([self._p0[None], signs])

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Uniform numbers that decide the Bernoulli rewards."""
        return jax.random.uniform(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """All (sigma, sigma a), or sigma a if centered, with the instance's own sigma."""
        bias = jnp.zeros_like(self._sigma) if self.bias == "centered" else self._sigma
        return filling_cube(self._sigma, self.n_signs, bias, self.block_dim)

    def reward(
        self,
        state: Float[Array, " b"],
        decision_set: SignSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """Bernoulli(p0 + <mu, a>) times sigma, less sigma p0 if centered."""
        mean = decision_set.features(choice) @ state
        offset = self._p0 if self.bias == "centered" else 0.0
        reward = bernoulli_reward(mean, decision_set.scale, offset, sigma, draw)
        return Reward(reward, mean, decision_set.best_value(state))


@register(arrays=("_sigma", "_gap"), static=("dim", "block_dim", "n_signs", "max_actions", "horizon"))
class GaussianHypercube(_Cube):
    """One variance with Gaussian noise: reward <theta, a> + N(0, sigma_k^2), theta uniform on {-gap, gap}^d.

    The lower bound is 0.5298 d sigma sqrt(K), without conditions. At sigma_k = sigma it is the
    variance-scaled hypercube of gap `gap / sigma^2` in other units, but its decision sets do not depend on
    sigma_k, so that adversaries who see them first may play, too.

    Args:
        K: rounds, >= 2.
        d: dimension, >= 1.
        sigma: standard deviation in (0, 1] that the gap is tuned to.
        gap: |theta_i|; None takes the optimum 1.2469 sigma / sqrt(K).

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Source: Lattimore and Szepesvari 2020, Theorem 24.1; the constant in docs/proofs.md (section 4).
    """

    def __init__(self, K: int, d: int, sigma: float = 1.0, gap: float | None = None) -> None:
        self.horizon = checks.count("K", K, at_least=2)
        self.dim = self.block_dim = self.n_signs = checks.count("d", d)
        self.max_actions = 2**self.n_signs
        deviation = checks.real("sigma", sigma, above=0.0)
        if deviation > 1.0:
            raise ValueError(f"sigma must lie in (0, 1], got {sigma!r}")
        size = SEQ_GAP * deviation / math.sqrt(K) if gap is None else checks.real("gap", gap, above=0.0)
        self._sigma = jnp.asarray(deviation, float)
        self._gap = jnp.asarray([size], float)

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """Uniform signs times the gap."""
        return self._signs(key)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Standard normal noise."""
        return jax.random.normal(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """{-1, 1}^d."""
        return filling_cube(jnp.ones_like(self._sigma), self.n_signs)

    def reward(
        self,
        state: Float[Array, " d"],
        decision_set: SignSet,
        choice: Choice,
        sigma: Float[Array, ""],
        draw: Float[Array, ""],
    ) -> Reward:
        """<theta, a> + sigma_k N(0, 1)."""
        mean = decision_set.features(choice) @ state
        return Reward(mean + sigma * draw, mean, decision_set.best_value(state))


@register(
    arrays=("_sigma", "_gap"), static=("dim", "block_dim", "n_signs", "max_actions", "horizon", "noise")
)
class VarianceScaledHypercube(_Cube):
    """Ours: D_k = {sigma_k^2 a : a in {-1, 1}^d}, theta uniform on {-gap, gap}^d, noise N(0, sigma_k^2).

    Every learner sees the same law of the log-likelihood ratio of a sign, N(2 gap^2 V, 4 gap^2 V) with V the
    variance so far, whatever it plays; the lower bound 0.5298 d sqrt(sum sigma_k^2) follows without a
    logarithm.

    Args:
        sigma: standard deviations in [0, 1] that the gap is tuned to.
        d: dimension.
        gap: |theta_i|; None takes the optimum of the noise's bound, S = sum sigma_k^2: 1.2469 / sqrt(S)
            (Gaussian, sequential), 0.4330 / sqrt(S) (two points).
        budget: tune the gap to this total variance instead of S (a prefix of the rounds).
        noise: "gaussian", or "two_point": rewards +-sigma_k with mean sigma_k^2 <theta, a>.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sigma leaves [0, 1], S is 0, d < 1, the gap or the budget is not positive, both are
            given, or under "two_point" d * gap exceeds 1 (probabilities would leave [0, 1]).

    Source: docs/proofs.md, sections 4 and 5 (an addition of this package).
    """

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
        self.dim = self.block_dim = self.n_signs = checks.count("d", d)
        self.max_actions = 2**self.n_signs
        checks.one_of("noise", noise, ("gaussian", "two_point"))
        total = float((sequence**2).sum())
        if total <= 0.0:
            raise ValueError("sigma must hold a positive entry, got only zeros")
        if gap is not None and budget is not None:
            raise ValueError(
                f"budget tunes the gap: give one of the two, got gap={gap!r} and budget={budget!r}"
            )
        tuned_to = total if budget is None else checks.real("budget", budget, above=0.0)
        best = (SEQ_GAP if noise == "gaussian" else TWO_POINT_GAP) / math.sqrt(tuned_to)
        size = best if gap is None else checks.real("gap", gap, above=0.0)
        if noise == "two_point" and self.dim * size > 1.0:
            raise ValueError(f'd * gap must be <= 1 under noise="two_point", got {self.dim * size!r}')
        self.noise = noise
        self.horizon = sequence.size
        self._sigma = jnp.asarray(sequence, float)
        self._gap = jnp.asarray([size], float)

    def init(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """Uniform signs times the gap."""
        return self._signs(key)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, " *shape"]:
        """Standard normal or uniform noise."""
        return (jax.random.normal if self.noise == "gaussian" else jax.random.uniform)(key, shape)

    def decision_set(self, state: Any, k: Int[Array, ""], sigma: Float[Array, ""], draw: Any) -> SignSet:
        """sigma_k^2 * {-1, 1}^d."""
        return filling_cube(sigma**2, self.n_signs)

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
            above = 0.5 + 0.5 * mean / jnp.where(sigma > 0.0, sigma, 1.0)
            reward = jnp.where(draw < above, sigma, -sigma)
        return Reward(reward, mean, decision_set.best_value(state))


# ---------------------------------------------------------------------------------------- parts of composites


def bernoulli_gap(K: int, d: int, p0: float = 1 / 3) -> float:
    """Gap of a Bernoulli hypercube: Lemma 4.3's, or the one of small groups if K < d^2 / (2 p0).

    Args:
        K: rounds, >= 0.
        d: hidden signs.
        p0: base probability.
    """
    return lemma_gap(K, p0) if enough_rounds(K, d, p0) else small_group_gap(d, p0)


def bernoulli_reward(
    mean: Float[Array, ""],
    scale: Float[Array, ""],
    offset: float | Float[Array, ""],
    sigma: Float[Array, ""],
    uniform: Float[Array, ""],
) -> Float[Array, ""]:
    """A two-valued reward, scale * (Bernoulli(mean / scale + offset) - offset), which has the given mean.

    Its standard deviation is at most scale / 2. Where sigma is smaller than the scale, the deviation from the
    mean is shrunk by sigma / scale, so that the variance never exceeds sigma^2. Scale 0 pays the mean.

    Args:
        mean: mean reward.
        scale: distance of the two rewards.
        offset: p0 for centered rewards, else 0.
        sigma: bound on the standard deviation.
        uniform: a uniform number in [0, 1).
    """
    unit = jnp.where(scale > 0.0, scale, 1.0)
    drawn = scale * ((uniform < mean / unit + offset) - offset)
    quiet = mean + jnp.minimum(sigma / unit, 1.0) * (drawn - mean)
    return jnp.where(scale > 0.0, jnp.where(sigma < scale, quiet, drawn), mean)


def filling_cube(
    scale: Float[Array, ""], n_signs: int, bias: Float[Array, ""] | None = None, width: int | None = None
) -> SignSet:
    """The hypercube that fills the only block of a problem.

    Args:
        scale: size of a coordinate.
        n_signs: number of signs.
        bias: value of the bias coordinate; None without one.
        width: coordinates of the block; None for n_signs.
    """
    width = width or n_signs
    zero, start = jnp.zeros((), jnp.int32), jnp.asarray(width - n_signs, jnp.int32)
    active = jnp.ones(n_signs, bool)
    constant = jnp.zeros_like(scale) if bias is None else bias
    return SignSet(scale, active, constant, zero, start, zero, None, 1, width, True)
