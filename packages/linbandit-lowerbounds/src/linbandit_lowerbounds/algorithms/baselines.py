"""Yardsticks: uniform, greedy and Bayesian learners, and oracles that are told theta.

    greedy          argmax <theta, x>, theta the ridge estimate, or the posterior mean under N(0, gap^2 I)
    epsilon_greedy  uniform with probability epsilon k^{-decay}, else greedy
    bayes_ucb       argmax <m, x> + z_k sqrt(x' C x), (m, C) the posterior, z_k = Phi^{-1}(1 - 1 / (k + 1))
    random          uniform
    worst, oracle   argmin and argmax of <theta, x>: they know theta
    coordinate_oracle   knows theta but for one coordinate, whose posterior mean it uses

In one dimension `greedy(prior="gap")` is the sign rule: it plays the more likely sign, and its regret equals
the bound LB_seq of the variance-scaled hypercube exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int, Key

from linbandit_lowerbounds import checks, linalg
from linbandit_lowerbounds.decision_sets import Choice, Explore, check_enumerable
from linbandit_lowerbounds.environment import Algorithm, AnySet, SigmaTime, Spec, no_draw

from .factories import factory, named
from .posterior import Posterior, condition, gaussian_prior, over, without_bias


class KnownButOne(NamedTuple):
    """Theta with a hole, and a Gaussian belief about the missing coordinate.

    Args:
        theta: the parameter, zero at the missing coordinate.
        mean: posterior mean of the missing coordinate.
        variance: its posterior variance.
    """

    theta: Float[Array, "blocks b"]
    mean: Float[Array, ""]
    variance: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GreedyState:
    """Statistics and the number of finished rounds."""

    statistics: linalg.Ridge
    rounds: Int[Array, ""]


# ---------------------------------------------------------------------------------------------- learners


@factory
def greedy(
    *,
    lam: float = 1.0,
    prior: Literal["ridge", "gap"] = "ridge",
    needs_sigma: SigmaTime = "never",
    noise: float = 1.0,
    p0: float = 1 / 3,
) -> Algorithm:
    """Plays argmax <theta, x> without any exploration.

    With `prior="gap"` the estimate is the posterior mean under theta ~ N(0, gap^2 I), the gap from
    `Spec.gap`: on a hypercube it plays the sign of each posterior mean. With d = 1 that is the Bayes rule;
    its expected regret is LB_seq(gap) = 2 gap sum_k sigma_k^2 Q(gap sqrt(V_{k-1})) with equality.

    Args:
        lam: regularisation of the ridge estimate, > 0; unused with a prior.
        prior: "ridge", or "gap" (hypercubes only).
        needs_sigma: "never" takes `noise`; "after" (or "before") weighs observations by 1 / sigma_k^2. Only
            with `prior="gap"`.
        noise: standard deviation of the noise, >= 0, for a learner with a prior that is not told sigma.
        p0: the known value of theta in the bias coordinate, where sign sets have one; used with a prior.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, an option unknown, sigma is asked for without a prior, or
            (in `init`) the instance has no gap.

    Source: docs/proofs.md for the equality; the learner itself is folklore.
    """
    lam = checks.real("lam", lam, above=0.0)
    checks.one_of("prior", prior, ("ridge", "gap"))
    if prior == "gap":
        label = _label("greedy", needs_sigma, "never", noise, prior=(prior, "ridge"))
        return _bayesian(label, 0.0, needs_sigma, noise, p0)
    if needs_sigma != "never":
        raise ValueError(f'needs_sigma must be "never" unless prior="gap", got {needs_sigma!r}')

    def act(state: GreedyState, decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        return decision_set.argmax(linalg.estimate(state.statistics, decision_set.block))

    return Algorithm(_ridge_init(lam), act, _ridge_update, "never", named("greedy", lam=(lam, 1.0)), no_draw)


@factory
def epsilon_greedy(*, epsilon: float = 0.1, decay: float = 0.0, lam: float = 1.0) -> Algorithm:
    """Plays uniformly with probability epsilon k^{-decay} in round k = 1, 2, ..., else greedily (ridge).

    Args:
        epsilon: probability in the first round, in [0, 1].
        decay: exponent, >= 0; 0 keeps the probability constant.
        lam: regularisation, > 0.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range.

    Source: Sutton and Barto 1998, Section 2.2.
    """
    epsilon = checks.real("epsilon", epsilon, at_least=0.0)
    if epsilon > 1.0:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon!r}")
    decay = checks.real("decay", decay, at_least=0.0)
    lam = checks.real("lam", lam, above=0.0)

    def draw(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> Float[Array, "*shape n"]:
        return jax.random.uniform(key, (*shape, 1 + max(1, spec.n_signs)))

    def act(state: GreedyState, decision_set: AnySet, sigma: None, draw: Float[Array, " n"]) -> Choice:
        best = decision_set.argmax(linalg.estimate(state.statistics, decision_set.block))
        k = (state.rounds + 1).astype(draw.dtype)
        return jnp.where(draw[0] < epsilon * k ** (-decay), decision_set.pick(draw[1:]), best)

    label = named("epsilon-greedy", epsilon=(epsilon, None), decay=(decay, 0.0), lam=(lam, 1.0))
    return Algorithm(_ridge_init(lam), act, _ridge_update, "never", label, draw)


@factory
def bayes_ucb(
    *,
    width: float | None = None,
    needs_sigma: SigmaTime = "after",
    noise: float = 1.0,
    p0: float = 1 / 3,
    explore: Explore = "enumerate",
) -> Algorithm:
    """Upper quantiles of the posterior under theta ~ N(0, gap^2 I), the gap from `Spec.gap` (hypercubes).

    The quantile of round k is of order 1 - 1 / (k + 1): order 1 - 1/k, as the paper has it with c = 0,
    shifted by one round because order 0 in the first round is minus infinity.

    Args:
        width: standard deviations to add in every round, >= 0; None takes the quantiles.
        needs_sigma: "after" (or "before") takes sigma_k^2 for the noise variance, "never" takes `noise`.
        noise: standard deviation of the noise, >= 0, when sigma is not told.
        p0: the known value of theta in the bias coordinate, where sign sets have one.
        explore: how sign sets of more than 12 signs are searched (see `SignSet.argmax_ucb`).

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, an option unknown, or (in `init`) the instance has no
            gap.

    Source: Kaufmann, Cappe and Garivier 2012, Algorithm 1; the Gaussian prior is ours.
    """
    if width is not None:
        width = checks.real("width", width, at_least=0.0)
    settings = {"width": (width, None), "explore": (explore, "enumerate")}
    label = _label("Bayes-UCB", needs_sigma, "after", noise, **settings)
    return _bayesian(label, width, needs_sigma, noise, p0, explore)


# ---------------------------------------------------------------------------------------------- no learning


@factory
def random() -> Algorithm:
    """Plays uniformly over the actions that may be played.

    On the Bernoulli hypercube its expected regret is exactly twice the bound of Lemma 4.3.
    """

    def draw(key: Key[Array, ""], spec: Spec, shape: tuple[int, ...]) -> Float[Array, "*shape n"]:
        return jax.random.uniform(key, (*shape, max(1, spec.n_signs)))

    def act(state: tuple[()], decision_set: AnySet, sigma: None, draw: Float[Array, " n"]) -> Choice:
        return decision_set.pick(draw)

    return Algorithm(_nothing, act, _keep, "never", "random", draw)


@factory
def oracle() -> Algorithm:
    """Plays argmax <theta, x>: it is told theta, its regret is 0."""
    return _informed("oracle", 1.0)


@factory
def worst() -> Algorithm:
    """Plays argmin <theta, x>: it is told theta, no learner has more regret.

    On the Bernoulli hypercube that is exactly four times the bound of Lemma 4.3.
    """
    return _informed("worst", -1.0)


@factory
def coordinate_oracle(
    *, coordinate: int = 0, needs_sigma: SigmaTime = "after", noise: float = 1.0
) -> Algorithm:
    """Is told theta except for one coordinate, plays the others right and that one by its posterior mean.

    On the variance-scaled hypercube the missing sign has, after rounds of total variance V, a log-likelihood
    ratio N(2 gap^2 V, 4 gap^2 V) whatever is played, so the sign of the posterior is wrong with probability
    Q(gap sqrt(V)) and a wrong sign costs 2 gap sigma_k^2:

        E Regret = 2 gap sum_k sigma_k^2 Q(gap sqrt(V_{k-1})) = LB_seq(gap) / d,

    the share of one coordinate in the lower bound, attained with equality. The sign does not depend on the
    variance of the (Gaussian, centred) prior, so no gap is needed.

    Args:
        coordinate: index of the coordinate it does not know, among all n_blocks * block_dim columns.
        needs_sigma: "after" (or "before") weighs observations by 1 / sigma_k^2, "never" takes `noise`.
        noise: standard deviation of the noise, >= 0, when sigma is not told.

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is out of its range, or (in `init`) the problem has no such coordinate.

    Source: docs/proofs.md (an addition of this package).
    """
    coordinate = checks.count("coordinate", coordinate, at_least=0)
    label = _label("coordinate oracle", needs_sigma, "after", noise, coordinate=(coordinate, None))

    def init(key: Any, spec: Spec) -> KnownButOne:
        columns = spec.n_blocks * spec.block_dim
        if coordinate >= columns:
            raise ValueError(
                f"coordinate must be < {columns}, the columns of the problem, got {coordinate!r}"
            )
        return KnownButOne(_no_theta(spec), jnp.zeros(()), jnp.ones(()))

    def place(state: KnownButOne) -> tuple[int, int]:
        return divmod(coordinate, state.theta.shape[1])

    def act(state: KnownButOne, decision_set: AnySet, sigma: Float[Array, ""] | None, draw: Any) -> Choice:
        theta = state.theta.at[place(state)].set(state.mean)
        return decision_set.argmax(linalg.at(theta, decision_set.block))

    def update(
        state: KnownButOne,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: Float[Array, ""] | None,
    ) -> KnownButOne:
        block, column = place(state)
        features = decision_set.features(choice)
        x = jnp.where(decision_set.block == block, features[column], 0.0)
        rest = reward - features @ linalg.at(state.theta, decision_set.block) - x * state.mean
        gain = over(state.variance * x, _variance(sigma, noise) + state.variance * x * x)
        return state._replace(mean=state.mean + gain * rest, variance=state.variance * (1.0 - gain * x))

    def reveal(state: KnownButOne, instance: Any, hidden: Any) -> KnownButOne:
        theta = _theta_of(hidden, state.theta)
        return state._replace(theta=theta.at[place(state)].set(0.0))

    return Algorithm(init, act, update, needs_sigma, label, no_draw, None, reveal)


# ---------------------------------------------------------------------------------------------- shared parts


def _ridge_init(lam: float) -> Any:
    def init(key: Any, spec: Spec) -> GreedyState:
        return GreedyState(linalg.ridge(spec, lam), jnp.zeros((), jnp.int32))

    return init


def _ridge_update(
    state: GreedyState, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: None
) -> GreedyState:
    x = decision_set.features(choice)
    return GreedyState(linalg.add(state.statistics, decision_set.block, x, reward), state.rounds + 1)


def _bayesian(
    label: str,
    width: float | None,
    needs_sigma: SigmaTime,
    noise: float,
    p0: float,
    explore: Explore = "enumerate",
) -> Algorithm:
    """Posterior mean plus `width` posterior standard deviations (None: the quantiles of Bayes-UCB)."""
    p0 = checks.real("p0", p0)
    checks.one_of("explore", explore, ("enumerate", "coordinate_ascent"))
    linear = width == 0.0

    def init(key: Any, spec: Spec) -> Posterior:
        if explore == "enumerate" and not linear:
            check_enumerable(spec.n_signs)
        return gaussian_prior(spec)

    def act(state: Posterior, decision_set: AnySet, sigma: Float[Array, ""] | None, draw: Any) -> Choice:
        centred = without_bias(decision_set)
        mean = linalg.at(state.mean, centred.block)
        if linear:
            return centred.argmax(mean)
        beta = _quantile(state.rounds, mean) if width is None else jnp.asarray(width, mean.dtype)
        return centred.argmax_ucb(mean, linalg.at(state.covariance, centred.block), beta, explore)

    def update(
        state: Posterior,
        decision_set: AnySet,
        choice: Choice,
        reward: Float[Array, ""],
        sigma: Float[Array, ""] | None,
    ) -> Posterior:
        return condition(state, decision_set, choice, reward, _variance(sigma, noise), p0)

    return Algorithm(init, act, update, needs_sigma, label, no_draw)


def _informed(label: str, factor: float) -> Algorithm:
    """Plays argmax factor * <theta, x>."""

    def init(key: Any, spec: Spec) -> Float[Array, "blocks b"]:
        return _no_theta(spec)

    def act(theta: Float[Array, "blocks b"], decision_set: AnySet, sigma: None, draw: Any) -> Choice:
        return decision_set.argmax(factor * linalg.at(theta, decision_set.block))

    def reveal(theta: Float[Array, "blocks b"], instance: Any, hidden: Any) -> Float[Array, "blocks b"]:
        return _theta_of(hidden, theta)

    return Algorithm(init, act, _keep, "never", label, no_draw, None, reveal)


def _theta_of(hidden: Any, like: Float[Array, "blocks b"]) -> Float[Array, "blocks b"]:
    """Theta of an instance's state, which is theta itself or has it as its field `theta`."""
    return jnp.reshape(getattr(hidden, "theta", hidden), like.shape)


def _no_theta(spec: Spec) -> Float[Array, "blocks b"]:
    return jnp.zeros((spec.n_blocks, spec.block_dim))


def _quantile(rounds: Int[Array, ""], like: Array) -> Float[Array, ""]:
    """Phi^{-1}(1 - 1 / (k + 1)), k = rounds + 1 the coming round, from the small tail (no cancellation)."""
    return -ndtri(1.0 / (rounds + 2).astype(like.dtype))


def _label(
    name: str, needs_sigma: SigmaTime, default: SigmaTime, noise: float, **settings: tuple[Any, Any]
) -> str:
    """Checks how a learner comes to know the noise, and names it."""
    checks.one_of("needs_sigma", needs_sigma, ("never", "after", "before"))
    noise = checks.real("noise", noise, at_least=0.0)
    settings["needs_sigma"] = (needs_sigma, default)
    settings["noise"] = (noise if needs_sigma == "never" else 1.0, 1.0)
    return named(name, radius_scale=1.0, preset="", **settings)


def _variance(sigma: Float[Array, ""] | None, noise: float) -> Float[Array, ""] | float:
    return noise**2 if sigma is None else sigma**2


def _nothing(key: Any, spec: Spec) -> tuple[()]:
    return ()


def _keep(state: Any, decision_set: AnySet, choice: Choice, reward: Float[Array, ""], sigma: None) -> Any:
    return state
