"""Weighted OFUL, Weighted OFUL+ and weighted UCB equal their references; limits, quiet rounds, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import replay

from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.algorithms.weighted import weighted_oful, weighted_oful_plus, weighted_ucb
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec

pytestmark = pytest.mark.usefixtures("x64")
X = np.array([0.6, 0.8])
TENTH = 0.6e-10  # ten printed decimals
ELEVENTH = 0.6e-11

# Small radii, so that choices depend on estimates as well; a floor that keeps the systems well conditioned.
LEARNERS = {
    "oful": (
        weighted_oful(radius_scale=0.02, R=0.8),
        lambda d: reference.WeightedOFUL(d, radius_scale=0.02, R=0.8),
    ),
    "oful+": (
        weighted_oful_plus(radius_scale=0.002, S_theta=0.9),
        lambda d: reference.WeightedOFULPlus(d, K=replay.ROUNDS, radius_scale=0.002, S_theta=0.9),
    ),
    "ucb": (
        weighted_ucb(radius_scale=0.1, floor=0.1),
        lambda d: reference.WeightedUCB(d, radius_scale=0.1, floor=0.1),
    ),
}


def first_round(algorithm):
    """Radii before and after one observation of x = (0.6, 0.8), r = 1/2, sigma = 1/5; the state after it."""
    offered = DecisionSet(jnp.asarray(X[None]), jnp.ones(1, bool), jnp.zeros((), int), 1)
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 1, 0, 100))
    radii = []
    for _ in range(2):
        norm = math.sqrt(X @ state.statistics.inverse[0] @ X)
        radii.append(algorithm.width(state, offered, 0) / norm)
        last, state = state, algorithm.update(state, offered, 0, jnp.asarray(0.5), jnp.asarray(0.2))
    return radii, last.statistics


def test_weighted_oful_gives_its_worked_numbers():
    radii, statistics = first_round(weighted_oful())
    assert radii == pytest.approx([57.9488548922, 74.9448115929], abs=TENTH)
    assert np.linalg.inv(statistics.inverse[0]) == pytest.approx(
        np.array([[1.72, 0.96], [0.96, 2.28]]), abs=1e-13
    )
    assert statistics.inverse[0] @ statistics.response[0] == pytest.approx([0.2, 0.26666666667], abs=ELEVENTH)


def test_weighted_oful_plus_gives_its_worked_numbers():
    radii, statistics = first_round(weighted_oful_plus())
    assert radii == pytest.approx([482.5005130681, 557.8861641999], abs=TENTH)
    # lam = d / S^2 = 2, and weight 1 / 0.70710678119^2 = 2.
    assert np.linalg.inv(statistics.inverse[0]) == pytest.approx(
        2 * np.eye(2) + 2 * np.outer(X, X), abs=1e-13
    )
    assert statistics.inverse[0] @ statistics.response[0] == pytest.approx([0.15, 0.2], abs=1e-14)


@pytest.mark.parametrize("name", LEARNERS)
def test_it_equals_its_reference_on_contexts(name):
    algorithm, make = LEARNERS[name]
    rounds = replay.contexts(11)
    trace = replay.play(algorithm, replay.SPEC, rounds)
    replay.follow(trace, rounds, lambda: make(6), replay.same_ridge)
    # Otherwise the radius decides everything and the estimate is not tried.
    greedy = [np.argmax(np.where(rounds.mask[0], rounds.actions[0] @ rounds.theta[0, 0], -np.inf), -1)]
    assert 0.2 < np.mean(trace.index[0] == greedy) < 1


@pytest.mark.parametrize("name", ["oful+"])
def test_it_equals_its_reference_on_hypercubes(name):
    algorithm, make = LEARNERS[name]
    rounds = replay.hypercubes(12)
    trace = replay.play(algorithm, replay.SIGN_SPEC, rounds)
    replay.follow(trace, rounds, lambda: make(4), replay.same_ridge)


@pytest.mark.parametrize("name", ["oful+", "ucb"])
def test_blocks_equal_one_block(name):
    algorithm, _ = LEARNERS[name]
    rounds = replay.contexts(13, blocks=replay.BLOCKS)
    blocks = replay.play(algorithm, replay.BLOCK_SPEC, rounds)
    one = replay.play(algorithm, replay.SPEC, replay.dense(rounds))
    np.testing.assert_array_equal(blocks.index, one.index)
    replay.close(blocks.width, one.width)
    replay.close(blocks.after.statistics.log_det, one.after.statistics.log_det)


def test_weighted_oful_with_constant_sigma_estimates_as_oful():
    """At sigma = 1 = lam all weights are 1; the same actions then give the same estimates and norms."""
    rounds = replay.contexts(14)
    played = np.argmax(rounds.mask, -1)
    rounds = rounds._replace(sigma=np.ones_like(rounds.sigma), forced=played)
    weighted = replay.play(LEARNERS["oful"][0], replay.SPEC, rounds).after.statistics
    plain = replay.play(oful(radius_scale=0.3), replay.SPEC, rounds).after.statistics
    replay.close(weighted.inverse, plain.inverse)
    replay.close(weighted.response, plain.response)


@pytest.mark.parametrize("algorithm", [weighted_oful(), weighted_oful_plus(), weighted_ucb()])
def test_quiet_rounds_stay_finite(algorithm):
    """Noiseless rounds weigh 1 / floor^2, not infinitely; some offer only the action 0."""
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 1, 0, 100))
    for x in (X, np.zeros(2)):
        offered = DecisionSet(jnp.asarray(x[None]), jnp.ones(1, bool), jnp.zeros((), int), 1)
        state = algorithm.update(state, offered, 0, jnp.asarray(0.5), jnp.asarray(0.0))
        assert np.isfinite(algorithm.width(state, offered, 0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_they_are_told_sigma_when_they_say():
    assert [a.needs_sigma for a, _ in LEARNERS.values()] == ["after", "after", "before"]


@pytest.mark.parametrize("factory", [weighted_oful, weighted_oful_plus, weighted_ucb])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"delta": 0.0}, ValueError, "delta must be in"),
        ({"lam": -1.0}, ValueError, "lam must be"),
        ({"S_theta": -1.0}, ValueError, "S_theta must be"),
        ({"radius_scale": math.inf}, ValueError, "radius_scale must be"),
        ({"explore": "first"}, ValueError, "explore must be one of"),
        ({"lam": True}, TypeError, "lam must be a real number"),
    ],
)
def test_bad_input_is_refused(factory, settings, error, message):
    with pytest.raises(error, match=message):
        factory(**settings)


@pytest.mark.parametrize(
    ("factory", "settings", "name"),
    [
        (weighted_oful_plus, {"alpha": 0.0}, "alpha"),
        (weighted_oful_plus, {"gamma": -1.0}, "gamma"),
        (weighted_oful_plus, {"S_theta": 0.0}, "S_theta"),
        (weighted_ucb, {"floor": 0.0}, "floor"),
        (weighted_oful, {"R": 0.0}, "R"),
    ],
)
def test_arguments_of_one_are_checked(factory, settings, name):
    with pytest.raises(ValueError, match=f"{name} must be finite and > 0"):
        factory(**settings)


def test_weighted_oful_plus_refuses_a_horizon_without_levels():
    """gamma^2 / alpha = sqrt(K / d): below 1 / e there is no level left."""
    with pytest.raises(ValueError, match="must be > 0, got gamma"):
        weighted_oful_plus().init(None, Spec(None, None, 40, 1, 40, 2, 0, 4))
    weighted_oful_plus().init(None, Spec(None, None, 4, 1, 4, 2, 0, 4))


def test_more_than_12_signs_need_another_search():
    spec = Spec(None, None, 13, 1, 13, 0, 13, 100)
    with pytest.raises(ValueError, match="13 signs"):
        weighted_ucb().init(None, spec)
    weighted_ucb(explore="coordinate_ascent").init(None, spec)


def test_labels_show_what_was_tuned():
    assert weighted_oful().name == "Weighted OFUL"
    assert weighted_oful_plus(radius_scale=0.1, alpha=0.5).name == "Weighted OFUL+ (radius x 0.1, alpha 0.5)"
    assert weighted_ucb(floor=0.1).name == "weighted UCB (floor 0.1)"
