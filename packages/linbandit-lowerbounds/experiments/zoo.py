"""The zoo: the learners that every lower bound must hold for, from the best to the worst.

"greedy" is ridge regression without exploration; "posterior signs" is greedy with the prior N(0, gap^2) of
the hypercube, in one dimension the Bayes rule. What reads 2^d actions (OFUL, SAVE, Bayes-UCB) plays cubes of
at most 12 signs.
"""

from __future__ import annotations

import math

from linbandit_lowerbounds.algorithms.baselines import bayes_ucb, greedy, random, worst
from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.algorithms.save import save
from linbandit_lowerbounds.algorithms.thompson import lin_ts
from linbandit_lowerbounds.algorithms.weighted import weighted_ucb
from linbandit_lowerbounds.environment import Algorithm

SAVE = "SAVE (practical)"
SAVE_THEORY = "SAVE (theory)"
LINEAR = ("greedy", "posterior signs", "LinTS")
LEARNERS = ("greedy", "OFUL", "LinTS", SAVE, "Bayes-UCB")
YARDSTICKS = ("random", "worst")
ZOO = (*LEARNERS, *YARDSTICKS)
_BERNOULLI_DEVIATION = math.sqrt(1 / 3 * 2 / 3)


def learner(name: str) -> Algorithm:
    """A learner of the zoo; those with a prior are told sigma_k after each round."""
    return {
        "greedy": greedy,
        "posterior signs": lambda: greedy(prior="gap", needs_sigma="after"),
        "OFUL": oful,
        "LinTS": lin_ts,
        SAVE: lambda: save(preset="practical"),
        SAVE_THEORY: lambda: save(preset="theory"),
        "weighted UCB": weighted_ucb,
        "Bayes-UCB": bayes_ucb,
        "random": random,
        "worst": worst,
    }[name]()


def bernoulli_learner(name: str) -> Algorithm:
    """The same for rewards Bernoulli(1/3 +- ...), whose deviation the learners with a prior know."""
    return {
        "posterior signs": lambda: greedy(prior="gap", noise=_BERNOULLI_DEVIATION),
        "Bayes-UCB": lambda: bayes_ucb(needs_sigma="never", noise=_BERNOULLI_DEVIATION),
    }.get(name, lambda: learner(name))()
