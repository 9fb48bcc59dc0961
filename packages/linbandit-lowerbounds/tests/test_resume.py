"""Resuming where nothing is left to play, and with another record than before."""

from functools import partial

import jax
import numpy as np
import pytest

from linbandit_lowerbounds.algorithms.baselines import random
from linbandit_lowerbounds.hypercubes import BernoulliHypercube
from linbandit_lowerbounds.simulate import simulate

ROUNDS = 8
play = partial(
    simulate, random(), BernoulliHypercube(ROUNDS, 2), key=jax.random.key(0), n_seeds=3, progress=False
)


@pytest.mark.parametrize("record", ["all", "checkpoints"])
def test_a_finished_simulation_resumes_to_itself(record):
    done = play()
    again = play(resume=done, record=record)
    np.testing.assert_array_equal(again.regret, done.regret)
    assert again.checkpoints.rounds.shape == (0,)  # nothing was played that could have been recorded
    assert again.checkpoints.regret.shape == again.checkpoints.variance_sum.shape == (0, 3)


def test_a_record_that_begins_later_holds_the_later_rounds():
    half, whole = play(horizon=4), play(record="all")
    later = play(resume=half, record="all")
    np.testing.assert_array_equal(later.checkpoints.rounds, [5, 6, 7, 8])
    np.testing.assert_array_equal(later.checkpoints.regret, whole.checkpoints.regret[4:])
    assert later.checkpoints.regret.dtype == half.regret.dtype
