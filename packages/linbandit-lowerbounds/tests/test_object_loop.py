"""Objects in the plain loop meet the rounds of the simulator and are told what they declared."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from waves import N_SEEDS, ROUNDING, SIGMA, WAVES, K, Sequence, Waves, compiled, fixed, in_turn, loop

from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.decision_sets import SignSet
from linbandit_lowerbounds.environment import Adversary, register
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.interop import from_object
from linbandit_lowerbounds.objects import playable


@pytest.fixture(autouse=True)
def _fresh(x64):
    Sequence.made = []


def test_numpy_oful_has_the_regret_of_the_compiled_one_run_for_run():
    ours = compiled(oful(), WAVES, fixed(), record="all")
    theirs = loop(from_object(reference.OFUL), WAVES, fixed(), record="all")
    np.testing.assert_allclose(theirs.regret, ours.regret, **ROUNDING)
    assert np.ptp(theirs.regret) > 0.1  # the runs differ
    np.testing.assert_array_equal(theirs.checkpoints.rounds, ours.checkpoints.rounds)
    np.testing.assert_allclose(theirs.checkpoints.regret, ours.checkpoints.regret, **ROUNDING)
    np.testing.assert_allclose(theirs.checkpoints.variance_sum, ours.checkpoints.variance_sum, **ROUNDING)


def test_sign_sets_and_checkpoints_are_those_of_the_simulator():
    hypercube = VarianceScaledHypercube(SIGMA, 3)
    ours = compiled(in_turn(), hypercube, record="checkpoints", horizon=20)
    theirs = loop(from_object(Sequence), hypercube, record="checkpoints", horizon=20)
    assert (theirs.rounds, theirs.sees_theta, theirs.self_certificate) == (20, False, None)
    for name in ("regret", "variance_sum", "rounds_stopped"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), **ROUNDING)
    for mine, other in zip(ours.checkpoints, theirs.checkpoints, strict=True):
        np.testing.assert_allclose(mine, other, **ROUNDING)
    total = loop(from_object(Sequence), hypercube, horizon=20)
    assert total.checkpoints is None
    np.testing.assert_array_equal(total.regret, ours.regret)


def test_results_say_that_the_loop_is_python():
    assert loop(from_object(Sequence), WAVES, fixed(), horizon=1).algorithm == "Sequence [Python loop]"


def test_a_result_of_the_loop_cannot_be_resumed_as_another_simulation():
    done = loop(from_object(Sequence), WAVES, fixed(), horizon=2)
    with pytest.raises(ValueError, match="resume must come from the same learner"):
        compiled(in_turn(), WAVES, fixed(), resume=done)


@register(arrays=())
class Quiet(Adversary):
    """Strong: quiet where the first action points to the left or the last reward was high."""

    sees = "decision_set"

    def init(self, spec):
        return jnp.zeros(())

    def choose(self, state, observation, draw):
        left = observation.decision_set.actions[0, 0] < 0
        return jnp.where(left | (state > 0.5), 0.0, 1.0 / (1.0 + observation.variance_sum))

    def update(self, state, transition):
        return transition.reward


def test_adaptive_adversaries_play_the_same_against_objects():
    ours = compiled(in_turn(), WAVES, Quiet())
    theirs = loop(from_object(Sequence), WAVES, Quiet())
    assert 0 < theirs.rounds_stopped.min() < theirs.rounds_stopped.max() < K
    for name in ("regret", "variance_sum", "rounds_stopped"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), **ROUNDING)


@pytest.mark.parametrize("time", ["never", "after", "before"])
def test_sigma_is_told_at_the_declared_time_and_no_other(time):
    kind = type("Declared", (Sequence,), {"needs_sigma": time})
    loop(from_object(kind), WAVES, fixed(), horizon=2)
    (_, acted, x, reward, updated), (_, again, _, _, _) = kind.made[0].seen
    assert acted == (SIGMA[0] if time == "before" else None)
    assert again == (SIGMA[1] if time == "before" else None)
    assert updated == (None if time == "never" else SIGMA[0])
    assert isinstance(reward, float)
    assert x.dtype == np.float64


def test_the_whole_sequence_reaches_the_constructor_of_those_who_need_it_upfront():
    class Upfront(Sequence):
        needs_sigma = "upfront"

        def __init__(self, sigma):
            super().__init__()
            self.sigma = sigma

    loop(from_object(Upfront), WAVES, fixed(), horizon=1)
    np.testing.assert_array_equal(Upfront.made[0].sigma, SIGMA)
    with pytest.raises(ValueError, match="needs the whole sequence"):
        loop(from_object(Upfront), WAVES, Quiet())
    with pytest.raises(ValueError, match="needs_sigma"):
        from_object(type("Forgetful", (Sequence,), {"needs_sigma": "upfront"}))


def test_sizes_are_filled_in_and_settings_win():
    class Sized(Sequence):
        def __init__(self, d, K, twice=False):
            super().__init__()
            self.sizes = (d, K, twice)

    loop(from_object(Sized, K=7, twice=True), WAVES, fixed(), horizon=1)
    assert Sized.made[0].sizes == (3, 7, True)


def test_every_run_has_an_object_and_a_seed_of_its_own():
    class Seeded(Sequence):
        def reset(self, seed):
            self.seed = seed

    loop(from_object(Seeded), WAVES, fixed(), horizon=1)
    loop(from_object(Seeded), WAVES, fixed(), horizon=1)
    seeds = [made.seed for made in Seeded.made]
    assert len(set(seeds[:N_SEEDS])) == N_SEEDS
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds[:N_SEEDS] == seeds[N_SEEDS:]


def test_an_object_that_spoils_its_arguments_harms_nobody():
    def spoil(k, actions):
        actions[:] = 7.0
        return k % len(actions)

    spoiled = loop(from_object(Sequence, answer=spoil), WAVES, fixed())
    assert np.abs(Sequence.made[0].seen[0][2]).max() <= 1.0
    np.testing.assert_array_equal(spoiled.regret, loop(from_object(Sequence), WAVES, fixed()).regret)


def test_objects_see_playable_rows_in_the_real_columns():
    result = loop(from_object(Sequence), Waves(2), fixed())
    for k, (actions, _, x, _, _) in enumerate(Sequence.made[0].seen):
        block = [0, 1, 2] if k % 2 == 0 else [3, 4]
        assert actions.shape == (3, 5)
        np.testing.assert_array_equal(x, actions[k % 3])
        np.testing.assert_array_equal(np.flatnonzero(actions.any(0)), block)
    assert (result.regret >= 0).all()


def test_numpy_oful_equals_the_compiled_one_on_masked_blocks():
    instance = Waves(2)
    ours = compiled(oful(), instance, fixed())
    theirs = loop(from_object(reference.OFUL), instance, fixed())
    np.testing.assert_allclose(theirs.regret, ours.regret, **ROUNDING)


def signs(active, one_hot=None):
    zero = jnp.zeros((), jnp.int32)
    hot = None if one_hot is None else jnp.array(one_hot)
    return SignSet(
        jnp.array(0.5), jnp.array(active), jnp.array(0.0), zero, zero, zero, hot, 1, len(active), True
    )


@pytest.mark.parametrize(
    ("offered", "rows"),
    [
        (signs([True, True]), [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]),
        (signs([True, False]), [[-0.5, 0.0], [0.5, 0.0]]),
        (signs([True, True, False], one_hot=True), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        (signs([True, False], one_hot=False), [[-0.5, 0.0], [0.5, 0.0]]),
        (signs([False, False], one_hot=True), [[0.0, 0.0]]),
    ],
)
def test_every_action_of_a_sign_set_is_listed_once(offered, rows):
    listed = playable(offered)
    np.testing.assert_array_equal(np.asarray(listed.actions)[np.asarray(listed.mask)], rows)
