"""The realised certificate caps a round by the regret that the instance allows, whatever its scale."""

import jax
import numpy as np
import pytest

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.algorithms.baselines import worst
from linbandit_lowerbounds.algorithms.oful import linucb
from linbandit_lowerbounds.contexts import FixedSet
from linbandit_lowerbounds.hypercubes import GaussianHypercube, VarianceScaledHypercube
from linbandit_lowerbounds.multi_instances import LeastLoadedInstance
from linbandit_lowerbounds.simulate import simulate

ROUNDS = 6
PLAIN = Prefixed(np.ones(ROUNDS))
CONFIDENT = linucb(alpha=1e6)  # an interval that covers, so that only the cap is left


@pytest.mark.parametrize(
    "instance",
    [
        VarianceScaledHypercube(np.ones(ROUNDS), 3, gap=2.0),
        GaussianHypercube(ROUNDS, 3, gap=2.0),
        FixedSet([[3.0, 0.0], [-3.0, 0.0]], [1.0, 0.0], horizon=ROUNDS),
        FixedSet([[3.0, 0.0], [-3.0, 0.0]], horizon=ROUNDS),
        LeastLoadedInstance(ROUNDS, 12, 0.9, V1=0.5, x=1.0),
    ],
    ids=["scaled", "gaussian", "fixed", "unknown theta", "least loaded"],
)
def test_a_round_is_capped_by_the_regret_that_the_instance_allows(instance):
    adversary = None if instance.prefix is not None else PLAIN
    settings = {"key": jax.random.key(0), "n_seeds": 4, "progress": False}
    covered = simulate(CONFIDENT, instance, adversary, **settings).self_certificate
    largest = simulate(worst(), instance, adversary, **settings).regret
    assert covered is not None
    assert (largest > 2.0 * ROUNDS).any()  # more than means in [-1, 1] allow
    assert (covered >= largest - 1e-4).all()  # rounding of float32 sums


def test_the_cap_is_attained_where_all_signs_are_wrong():
    instance = GaussianHypercube(ROUNDS, 3, gap=2.0)
    regret = simulate(worst(), instance, key=jax.random.key(0), n_seeds=1, progress=False).regret
    assert regret[0] == pytest.approx(ROUNDS * float(instance.reward_range), rel=1e-6)
