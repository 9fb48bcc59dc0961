"""Bayes-optimal regret on the Bernoulli hypercube by exact dynamic programming over histories.

mu is uniform on {-gap, gap}^d, an action a in {-1, 1}^d pays Bernoulli(p0 + <mu, a>), regret of a round is
d gap - <mu, a>. No policy does better than this number, and every lower bound must lie below it.
The state is the vector of unnormalised posterior weights 2^{-d} P(history | mu), one per mu; a history
matters only through it. Exponential in K: for tiny K and d.
"""

import itertools
import math

import numpy as np


def lemma_gap(K, p0=1 / 3):
    """Gap of Lemma 4.3: sqrt(p0 / K) / (4 sqrt(2)), which is 1 / sqrt(96 K) for p0 = 1/3."""
    return math.sqrt(p0 / K) / (4 * math.sqrt(2))


def bayes_optimal_regret(K, d, *, gap, p0=1 / 3):
    """Smallest E_mu Regret(K) over all policies, sigma = 1."""
    cube = np.array(list(itertools.product((-1.0, 1.0), repeat=d)))  # signs of mu, and the actions
    inner = gap * cube @ cube.T  # <mu, a>: rows mu, columns a
    prob = p0 + inner
    regret = d * gap - inner
    uniform = np.full(len(cube), 1 / len(cube))
    return _value(uniform, K, prob, regret, {})


def _value(weights, rounds_left, prob, regret, memo):
    """min over a of the expected regret to go; weights carry the probability of the history."""
    if rounds_left == 0:
        return 0.0
    key = (rounds_left, weights.tobytes())
    if key not in memo:
        memo[key] = min(
            weights @ regret[:, a]  # regret of this round
            + _value(weights * prob[:, a], rounds_left - 1, prob, regret, memo)  # reward 1
            + _value(weights * (1 - prob[:, a]), rounds_left - 1, prob, regret, memo)  # reward 0
            for a in range(prob.shape[1])
        )
    return memo[key]
