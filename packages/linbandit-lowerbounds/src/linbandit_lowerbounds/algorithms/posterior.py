"""A Gaussian belief about theta, updated in covariance form.

The prior is N(0, gap^2) for every coordinate. Bounded noise is treated as if it were Gaussian: with s^2 the
noise variance of a round and q = s^2 + x' C x,

    m <- m + C x (r - <m, x>) / q,   C <- C - C x x' C / q,

which is exact for s = 0 and leaves everything as it is when q = 0. A bias coordinate, where theta is known to
be p0, is taken out of features and rewards first.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from linbandit_lowerbounds import linalg
from linbandit_lowerbounds.decision_sets import Choice, SignSet
from linbandit_lowerbounds.environment import AnySet, Spec


class Posterior(NamedTuple):
    """A Gaussian belief about theta, one for each block, and the number of finished rounds.

    Args:
        mean: posterior mean.
        covariance: posterior covariance.
        rounds: finished rounds.
    """

    mean: Float[Array, "blocks b"]
    covariance: Float[Array, "blocks b b"]
    rounds: Int[Array, ""]


def gaussian_prior(spec: Spec) -> Posterior:
    """The belief before the first round.

    Args:
        spec: sizes of the problem and its gap, one for each block or one for each column.

    Raises:
        ValueError: if the instance has no gap.
    """
    if spec.gap is None:
        raise ValueError("a prior of variance gap^2 needs an instance with a gap (a hypercube), got none")
    gap = spec.gap.reshape(spec.n_blocks, 1, -1)
    variance = jnp.broadcast_to(gap**2, (spec.n_blocks, 1, spec.block_dim))
    mean = jnp.zeros((spec.n_blocks, spec.block_dim))
    return Posterior(mean, variance * jnp.eye(spec.block_dim), jnp.zeros((), jnp.int32))


def condition(
    belief: Posterior,
    decision_set: AnySet,
    choice: Choice,
    reward: Float[Array, ""],
    variance: float | Float[Array, ""],
    p0: float,
) -> Posterior:
    """The belief after one more round, O(b^2).

    Args:
        belief: what is believed so far.
        decision_set: what was offered.
        choice: what was played.
        reward: what it brought.
        variance: noise variance of the round, >= 0.
        p0: theta in the bias coordinate.
    """
    centred = without_bias(decision_set)
    block = centred.block
    offset = p0 * decision_set.bias if isinstance(decision_set, SignSet) else 0.0
    x = centred.features(choice)
    mean, covariance = linalg.at(belief.mean, block), linalg.at(belief.covariance, block)
    direction = covariance @ x
    total = variance + jnp.maximum(x @ direction, 0.0)
    mean = mean + direction * over(reward - offset - x @ mean, total)
    # The outer product of one vector with itself keeps the covariance exactly symmetric.
    scaled = direction * jnp.sqrt(over(jnp.ones_like(total), total))
    covariance = covariance - scaled[:, None] * scaled[None, :]
    if belief.mean.shape[0] == 1:
        return Posterior(mean[None], covariance[None], belief.rounds + 1)
    return Posterior(
        belief.mean.at[block].set(mean), belief.covariance.at[block].set(covariance), belief.rounds + 1
    )


def without_bias(decision_set: AnySet) -> AnySet:
    """The set without its bias coordinate.

    Args:
        decision_set: what is offered.
    """
    if isinstance(decision_set, SignSet):
        return dataclasses.replace(decision_set, bias=jnp.zeros_like(decision_set.bias))
    return decision_set


def over(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Float[Array, ""]:
    """The quotient, 0 where the denominator is 0: nothing is learned there.

    Args:
        numerator: any number.
        denominator: a number >= 0.
    """
    return jnp.where(denominator > 0.0, numerator / jnp.where(denominator > 0.0, denominator, 1.0), 0.0)
