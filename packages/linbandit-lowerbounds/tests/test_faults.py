"""What the protocol does not allow ends a simulation with the reason and the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.algorithms.baselines import greedy
from linbandit_lowerbounds.contexts import FixedSet
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Adversary, Algorithm, no_draw, register
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.simulate import simulate

KEY = jax.random.key(1)
NOISE = Prefixed(np.ones(4))


def stubborn(choice) -> Algorithm:
    """Plays the same choice in every round."""

    def init(key, spec):
        return ()

    def act(state, decision_set, sigma, draw):
        return jnp.asarray(choice)

    def update(state, decision_set, chosen, reward, sigma):
        return state

    return Algorithm(init, act, update, "never", "stubborn", no_draw)


@register(arrays=("actions", "theta", "mask"), static=("dim", "block_dim", "max_actions", "horizon"))
class Masked(FixedSet):
    """Offers only the rows of a mask."""

    def __init__(self, mask):
        super().__init__(np.eye(3), horizon=4)
        self.mask = jnp.asarray(mask)

    def decision_set(self, state, k, sigma, draw):
        return DecisionSet(self.actions, self.mask, jnp.zeros((), jnp.int32), 1)


@register(arrays=())
class Loud(Adversary):
    """Twice as much noise as there may be, in the third of four rounds only."""

    def choose(self, state, observation, draw):
        return jnp.where(observation.k == 2, 2.0, 1.0)


def play(algorithm, instance, adversary=NOISE):
    return simulate(algorithm, instance, adversary, key=KEY, n_seeds=2, progress=False)


@pytest.mark.parametrize("choice", [3, -1, 1])
def test_an_action_that_is_not_offered_is_refused(choice):
    with pytest.raises(
        ValueError, match=r"learner chose an action that is not offered, first in run 0 \(stub"
    ):
        play(stubborn(choice), Masked([True, False, True]))


def test_signs_of_another_size_are_refused():
    with pytest.raises(ValueError, match="learner chose an action that is not offered"):
        play(stubborn([1000.0, 1.0]), VarianceScaledHypercube(np.ones(4), 2))


def test_an_empty_decision_set_is_refused():
    with pytest.raises(ValueError, match="instance offered no action that may be played"):
        play(greedy(), Masked([False, False, False]))


def test_a_sigma_outside_the_unit_interval_is_refused_also_when_it_was_one_round_of_many():
    instance = FixedSet(np.eye(3), horizon=4)
    with pytest.raises(ValueError, match=r"adversary chose a sigma outside \[0, 1\]"):
        play(greedy(), instance, Loud())


def test_what_is_allowed_goes_through():
    assert (play(stubborn(2), Masked([True, False, True])).regret >= 0.0).all()
