"""Bad objects say what is wrong, and in which round."""

import numpy as np
import pytest
import reference
from waves import KEY, SIGMA, WAVES, Sequence, Waves, beyond, fixed, loop

from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.hypercubes import VarianceScaledHypercube
from linbandit_lowerbounds.interop import from_object, play_object


@pytest.fixture(autouse=True)
def _fresh(x64):
    Sequence.made = []


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
