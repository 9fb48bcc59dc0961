"""mabwiser's policies through the object loop."""

import sys

import numpy as np
import pytest
import reference
from mabwiser.mab import MAB, LearningPolicy, NeighborhoodPolicy
from waves import N_SEEDS, WAVES, Sequence, fixed, loop

from linbandit_lowerbounds.interop import from_mabwiser, from_object


@pytest.fixture(autouse=True)
def _fresh(x64):
    Sequence.made = []


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
