"""Objects in the plain loop and through callbacks meet what compiled learners meet; bad objects say where."""

import sys
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from mabwiser.mab import MAB, LearningPolicy, NeighborhoodPolicy

from linbandit_lowerbounds.adversaries import Prefixed
from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.decision_sets import DecisionSet, SignSet
from linbandit_lowerbounds.environment import Adversary, Algorithm, Instance, Reward, no_draw, register
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.interop import from_mabwiser, from_object, play_object
from linbandit_lowerbounds.objects import playable
from linbandit_lowerbounds.simulate import simulate

KEY = jax.random.key(11)
RAISED = (ValueError, RuntimeError)  # what JAX makes of an exception in a callback
K, N_SEEDS = 30, 3
SIGMA = np.linspace(0.2, 1.0, K)
# K ridge updates in float64 in another order of operations; programs that were compiled differently.
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}
loop = partial(play_object, key=KEY, n_seeds=N_SEEDS, progress=False)
compiled = partial(simulate, key=KEY, n_seeds=N_SEEDS, progress=False)


def fixed() -> Prefixed:
    """Made inside the tests, where floats have 64 bits."""
    return Prefixed(SIGMA)


@register(arrays=("mask",), static=("n_blocks", "horizon"))
class Waves(Instance):
    """Sines of the key instead of random numbers, which compile slowly.

    With two blocks, which take turns, the second has a padding coordinate and row 1 may not be played.
    """

    block_dim, max_actions = 3, 4

    def __init__(self, n_blocks=1, horizon=K):
        self.n_blocks = n_blocks
        self.horizon = horizon
        self.mask = jnp.arange(4) != (1 if n_blocks == 2 else -1)

    @property
    def dim(self):
        return len(self.columns)

    @property
    def columns(self):
        return tuple(range(3 if self.n_blocks == 1 else 5))

    def init(self, key):
        return waves(key, (self.n_blocks, 3))

    def draw(self, key, shape):
        return waves(key, (*shape, 13))

    def decision_set(self, state, k, sigma, draw):
        block = k % self.n_blocks
        real = (jnp.arange(3) < 2) | (block == 0)
        return DecisionSet(draw[:12].reshape(4, 3) * real, self.mask, block, self.n_blocks)

    def reward(self, state, decision_set, choice, sigma, draw):
        theta = state[decision_set.block]
        mean = decision_set.features(choice) @ theta
        return Reward(mean + sigma * draw[12], mean, decision_set.best_value(theta))


def waves(key, shape):
    phase = (jax.random.key_data(key) % 1000).sum().astype(float)
    return 0.5 * jnp.sin(phase + 2.7 * jnp.arange(np.prod(shape))).reshape(shape)


WAVES = Waves()


class Sequence:
    """Plays the rows 0, 1, 2, ... in turn and keeps what it is told."""

    made: ClassVar[list] = []

    def __init__(self, answer=None):
        self.k = 0
        self.answer = answer
        self.seen = []
        type(self).made = [*type(self).made, self]

    def act(self, actions, sigma=None):
        self.seen.append([actions, sigma])
        return self.k % len(actions) if self.answer is None else self.answer(self.k, actions)

    def update(self, x, reward, sigma=None):
        self.seen[-1] += [x, reward, sigma]
        self.k += 1


def in_turn() -> Algorithm:
    """The same as `Sequence`, compiled."""
    return Algorithm(_start_turn, _take_turn, _end_turn, "never", "in turn", no_draw)


def _start_turn(key, spec):
    return jnp.zeros((), jnp.int32)


def _take_turn(k, decision_set, sigma, draw):
    rows = jnp.flatnonzero(decision_set.enumerate().mask, size=decision_set.enumerate().mask.shape[0])
    return decision_set.choice_of(rows[k % decision_set.enumerate().mask.sum()])


def _end_turn(k, decision_set, choice, reward, sigma):
    return k + 1


@pytest.fixture(autouse=True)
def _fresh(x64):
    Sequence.made = []


# ---------------------------------------------------------------------------------------------- the loop


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


# ------------------------------------------------------------------------------------ what objects are told


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


# ---------------------------------------------------------------------------------------------- action lists


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


# ---------------------------------------------------------------------------------------------- bad objects


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (4, ValueError, r"index in \[0, 4\).*got 4 in round 2 \(from 0\) of run 0"),
        (-1, ValueError, "got -1 in round 2"),
        (1.0, TypeError, r"integer index of a row, got 1\.0 in round 2"),
        (None, TypeError, "got None in round 2"),
        (True, TypeError, "got True in round 2"),
        (ArithmeticError("lost"), RuntimeError, r"Bad.*\.act failed in round 2.*ArithmeticError: lost"),
    ],
)
def test_bad_answers_name_the_round_and_the_rule(answer, error, message):
    class Bad(Sequence):
        def act(self, actions, sigma=None):
            row = super().act(actions)
            if self.k == 2 and isinstance(answer, Exception):
                raise answer
            return answer if self.k == 2 else np.int64(row)

    with pytest.raises(error, match=message):
        loop(from_object(Bad), WAVES, fixed())


def beyond(k, actions):
    return len(actions)


def test_a_masked_row_cannot_be_named():
    with pytest.raises(ValueError, match=r"index in \[0, 3\), the rows that may be played, got 3 in round 0"):
        loop(from_object(Sequence, answer=beyond), Waves(2), fixed())


def test_exceptions_in_update_and_constructor_are_chained():
    class Deaf(Sequence):
        def update(self, x, reward, sigma=None):
            raise KeyError("lost")

    with pytest.raises(RuntimeError, match=r"Deaf.*\.update failed in round 0") as caught:
        loop(from_object(Deaf), WAVES, fixed())
    assert isinstance(caught.value.__cause__, KeyError)

    def broken():
        raise OSError("no disk")

    with pytest.raises(RuntimeError, match="cannot be made for run 0: OSError: no disk"):
        loop(from_object(broken), WAVES, fixed())


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (reference.OFUL(3), {}, TypeError, "class or a function"),
        (dict, {}, TypeError, "lacks act"),
        (Sequence, {"answr": 1}, TypeError, "answr"),
        (type("Odd", (Sequence,), {"needs_sigma": "always"}), {}, ValueError, "needs_sigma"),
        (Sequence, {"callback": 1}, TypeError, "callback"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_learner_is_refused_before_any_round(make, settings, error, message):
    with pytest.raises(error, match=message):
        from_object(make, **settings)


@pytest.mark.usefixtures("unchecked")
def test_play_object_refuses_compiled_learners_and_bad_sizes():
    with pytest.raises(TypeError, match="from_object"):
        loop(oful(), WAVES, fixed())
    learner = from_object(Sequence)
    with pytest.raises(ValueError, match="adversary must be given"):
        loop(learner, WAVES)
    with pytest.raises(ValueError, match="horizon must be <= 30"):
        loop(learner, WAVES, fixed(), horizon=31)
    with pytest.raises(ValueError, match="n_seeds must be >= 1"):
        play_object(learner, WAVES, fixed(), key=KEY, n_seeds=0)
    with pytest.raises(ValueError, match="record must be one of"):
        loop(learner, WAVES, fixed(), record="some")
    with pytest.raises(ValueError, match="not enumerated"):
        loop(learner, VarianceScaledHypercube(SIGMA, 13))
    assert not Sequence.made or Sequence.made[0].k == 0


# ---------------------------------------------------------------------------------------------- callbacks


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


# ---------------------------------------------------------------------------------------------- mabwiser


def test_mabwisers_linucb_with_one_shared_arm_is_linucb():
    expected = loop(from_object(reference.LinUCB, alpha=0.7), WAVES, fixed())
    theirs = loop(from_mabwiser(MAB([0], LearningPolicy.LinUCB(alpha=0.7)), "shared"), WAVES, fixed())
    np.testing.assert_array_equal(theirs.regret, expected.regret)  # equal choices
    assert theirs.algorithm == "mabwiser LinUCB, shared [Python loop]"


class Disjoint:
    """LinUCB of Li et al. 2010, Algorithm 1: a ridge model for each row; context = the row, or all rows."""

    def __init__(self, together, alpha):
        self.together = together
        self.alpha = alpha
        self.models = {}

    def contexts(self, actions):
        return np.tile(actions.reshape(-1), (len(actions), 1)) if self.together else actions

    def act(self, actions):
        self.shown = self.contexts(actions)
        scores = []
        for arm, x in enumerate(self.shown):
            model = self.models.setdefault(arm, reference.LinUCB(len(x), alpha=self.alpha))
            scores.append(model.ucb(x[None])[0])
        self.arm = int(np.argmax(scores))
        return self.arm

    def update(self, x, reward):
        self.models[self.arm].update(self.shown[self.arm], reward)


@pytest.mark.parametrize("context", ["action", "all"])
def test_mabwisers_linucb_has_a_model_for_each_row(context):
    expected = loop(from_object(Disjoint, together=context == "all", alpha=0.7), WAVES, fixed())
    theirs = loop(from_mabwiser(MAB([0], LearningPolicy.LinUCB(alpha=0.7)), context), WAVES, fixed())
    # Equal choices (no ties after round 0): equal regret, to the bit.
    np.testing.assert_array_equal(theirs.regret, expected.regret)


@pytest.mark.parametrize(
    "policy",
    [
        LearningPolicy.LinTS(alpha=0.5),
        LearningPolicy.LinGreedy(epsilon=0.5),
        LearningPolicy.UCB1(alpha=1.0),
        LearningPolicy.EpsilonGreedy(epsilon=0.5),
    ],
)
def test_mabwisers_policies_draw_from_the_seed_of_their_run(policy):
    first, again = (loop(from_mabwiser(MAB(["a"], policy)), WAVES, fixed()) for _ in range(2))
    np.testing.assert_array_equal(first.regret, again.regret)
    assert len(set(first.regret)) == N_SEEDS


def test_arms_are_added_when_a_round_offers_more_rows():
    bandit = from_mabwiser(MAB([0], LearningPolicy.LinUCB(alpha=1.0))).make()
    bandit.reset(1)
    assert bandit.act(np.eye(2)) == 0
    bandit.update(np.eye(2)[0], -1.0)
    assert bandit.act(np.eye(2)) == 1
    bandit.update(np.eye(2)[1], -1.0)
    assert bandit.act(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])) == 2


def test_a_missing_mabwiser_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mabwiser.mab", None)
    with pytest.raises(ImportError, match="pip install mabwiser"):
        from_mabwiser(MAB([0], LearningPolicy.LinUCB()))


@pytest.mark.usefixtures("unchecked")
def test_what_mabwiser_cannot_mean_is_refused():
    with pytest.raises(TypeError, match="must be a mabwiser"):
        from_mabwiser(Sequence())
    with pytest.raises(ValueError, match="context must be one of"):
        from_mabwiser(MAB([0], LearningPolicy.LinUCB()), "none")
    with pytest.raises(ValueError, match="neighborhood policy"):
        from_mabwiser(MAB([0], LearningPolicy.UCB1(), NeighborhoodPolicy.KNearest(k=1)))
