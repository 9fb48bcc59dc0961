"""Objects inside the compiled program play as in the loop, once, and say where they fail."""

from functools import partial

import numpy as np
import pytest
import reference
from waves import N_SEEDS, ROUNDING, WAVES, K, Sequence, Waves, beyond, compiled, fixed, loop

from linbandit_lowerbounds.interop import from_object

RAISED = (ValueError, RuntimeError)  # what JAX makes of an exception in a callback


@pytest.fixture(autouse=True)
def _fresh(x64):
    Sequence.made = []


def test_a_callback_plays_as_the_loop_and_resumes_from_its_newest_state_only():
    seeds = []

    class Seeded(reference.OFUL):
        def reset(self, seed):
            seeds.append(seed)

    run = partial(compiled, from_object(Seeded, callback=True), WAVES, fixed())
    half = run(horizon=10)
    inside = run(resume=half)
    outside = loop(from_object(Seeded), WAVES, fixed())
    np.testing.assert_allclose(inside.regret, outside.regret, **ROUNDING)
    assert inside.algorithm == "Seeded [callback]"
    assert seeds[:N_SEEDS] == seeds[N_SEEDS:]
    with pytest.raises(RAISED, match="last round is over"):
        run(resume=half)
    third = run(horizon=5)
    run(horizon=6, resume=third)
    with pytest.raises(RAISED, match="cannot go back to round 5"):
        run(horizon=6, resume=third)


def test_a_callback_tells_what_the_loop_tells_and_says_where_it_fails():
    class Before(Sequence):
        needs_sigma = "before"

        def act(self, actions, sigma=None):
            return beyond(0, actions) if broken else super().act(actions, sigma)

    broken = False
    learner, instance = from_object(Before, callback=True), Waves(2)
    compiled(learner, instance, fixed())
    loop(from_object(Before), instance, fixed())
    assert len(Before.made) == 2 * N_SEEDS
    for inside, outside in zip(Before.made[:N_SEEDS], Before.made[N_SEEDS:], strict=True):
        assert len(inside.seen) == len(outside.seen) == K
        for (rows, acted, x, reward, told), (other_rows, *other) in zip(
            inside.seen, outside.seen, strict=True
        ):
            np.testing.assert_array_equal(rows[:, :5], other_rows)
            assert (rows[:, 5] == 0).all()  # padding is kept by callbacks
            np.testing.assert_array_equal(x[:5], other[1])
            assert (acted, reward, told) == (other[0], other[2], other[3])
    broken = True
    with pytest.raises(RAISED, match=r"index in \[0, 3\).*got 3 in round 0 \(from 0\)"):
        compiled(learner, instance, fixed())
