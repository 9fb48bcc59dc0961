"""OFUL and LinUCB equal their references, in blocks, on hypercubes and after rotations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import replay
from precision import float64

from linbandit_lowerbounds.algorithms.oful import linucb, oful
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec

pytestmark = pytest.mark.usefixtures("x64")
X = np.array([0.6, 0.8])
TENTH = 0.6e-10  # ten printed decimals


def first_round(algorithm, spec):
    """Radii before and after one observation of x = (0.6, 0.8) with reward 1/2, and the estimate."""
    offered = DecisionSet(jnp.asarray(X[None]), jnp.ones(1, bool), jnp.zeros((), int), 1)
    state = algorithm.init(None, spec)
    before = algorithm.width(state, offered, 0) / math.sqrt(X @ state.statistics.inverse[0] @ X)
    state = algorithm.update(state, offered, 0, jnp.asarray(0.5), None)
    after = algorithm.width(state, offered, 0) / math.sqrt(X @ state.statistics.inverse[0] @ X)
    return before, after, state.statistics.inverse[0] @ state.statistics.response[0]


def test_oful_gives_its_worked_numbers():
    before, after, theta = first_round(oful(), Spec(None, None, 2, 1, 2, 1, 0, 100))
    assert before == pytest.approx(4.0348542588, abs=TENTH)
    assert after == pytest.approx(4.1469807042, abs=TENTH)
    assert theta == pytest.approx([0.15, 0.2], abs=1e-14)


def test_oful_equals_its_reference_on_contexts():
    rounds = replay.contexts(1)
    trace = replay.play(oful(radius_scale=0.3), replay.SPEC, rounds)
    replay.follow(trace, rounds, lambda: reference.OFUL(6, radius_scale=0.3), replay.same_ridge)


def test_oful_equals_its_reference_on_hypercubes():
    rounds = replay.hypercubes(2)
    trace = replay.play(oful(radius_scale=0.3), replay.SIGN_SPEC, rounds)
    replay.follow(trace, rounds, lambda: reference.OFUL(4, radius_scale=0.3), replay.same_ridge)


def test_linucb_equals_its_reference():
    rounds = replay.contexts(3)
    trace = replay.play(linucb(alpha=0.4, lam=0.5), replay.SPEC, rounds)
    replay.follow(trace, rounds, lambda: reference.LinUCB(6, alpha=0.4, lam=0.5), replay.same_ridge)


def test_oful_in_blocks_equals_oful_in_one_block():
    rounds = replay.contexts(4, blocks=replay.BLOCKS)
    blocks = replay.play(oful(radius_scale=0.3), replay.BLOCK_SPEC, rounds)
    one = replay.play(oful(radius_scale=0.3), replay.SPEC, replay.dense(rounds))
    np.testing.assert_array_equal(blocks.index, one.index)
    replay.close(blocks.width, one.width)


def test_trace_radius_counts_observations():
    """R sqrt(d ln((1 + n X^2 / lam) / delta)) + sqrt(lam) S after n observations: before the first, n = 0."""
    spec = Spec(None, None, 2, 1, 2, 1, 0, 100)
    algorithm = oful(radius="trace", lam=4.0, R=0.5, X=2.0, S_theta=0.7)
    before, after, _ = first_round(algorithm, spec)
    assert before == pytest.approx(0.5 * math.sqrt(2 * math.log(100)) + 1.4, abs=1e-12)
    assert after == pytest.approx(0.5 * math.sqrt(2 * math.log(200)) + 1.4, abs=1e-12)


def test_rotating_all_features_leaves_the_choices():
    rounds = replay.contexts(5)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    turned = rounds._replace(actions=rounds.actions @ rotation, theta=rounds.theta @ rotation)
    plain, other = (replay.play(oful(radius_scale=0.3), replay.SPEC, each) for each in (rounds, turned))
    np.testing.assert_array_equal(plain.index, other.index)
    assert len(np.unique(plain.index)) > 2


def test_oful_without_jit_plays_the_same():
    rounds = replay.contexts(1)
    trace = replay.play(oful(radius_scale=0.3), replay.SPEC, rounds)
    indices, state = replay.without_jit(oful(radius_scale=0.3), replay.SPEC, rounds, 4)
    assert indices == trace.index[0, :4].tolist()
    replay.close(state.statistics.inverse, trace.before.statistics.inverse[0, 4])


def test_a_million_rounds_in_float32_do_not_drift():
    """P = V^{-1} after 10^6 rank-one updates; V is known exactly from a cycle of contexts."""
    with float64(False):
        state, lower = replay.million_rounds(oful())
    inverse = state.statistics.inverse[0]
    assert inverse.dtype == np.float32
    np.testing.assert_array_equal(inverse, inverse.T)
    # Rounding errors of 6e-8 that all had one sign would add up to 6e-2.
    np.testing.assert_allclose(lower.T @ inverse @ lower, np.eye(len(lower)), atol=6e-2)
    assert state.statistics.log_det == pytest.approx(2 * np.log(np.diag(lower)).sum(), rel=6e-2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"delta": 1.0}, ValueError, r"delta must be in \(0, 1\), got 1.0"),
        ({"lam": 0.0}, ValueError, "lam must be finite and > 0, got 0.0"),
        ({"R": -1.0}, ValueError, "R must be"),
        ({"S_theta": math.nan}, ValueError, "S_theta must be"),
        ({"radius_scale": -0.1}, ValueError, "radius_scale must be"),
        ({"X": "1"}, TypeError, "X must be a real number"),
        ({"radius": "det"}, ValueError, "radius must be one of"),
        ({"explore": "all"}, ValueError, "explore must be one of"),
    ],
)
def test_oful_refuses_bad_input(settings, error, message):
    with pytest.raises(error, match=message):
        oful(**settings)


def test_oful_refuses_to_list_more_than_12_signs():
    spec = Spec(None, None, 13, 1, 13, 0, 13, 100)
    with pytest.raises(ValueError, match="13 signs"):
        oful().init(jax.random.key(0), spec)
    oful(explore="coordinate_ascent").init(jax.random.key(0), spec)


def test_a_scaled_radius_is_in_the_label():
    assert oful(radius_scale=0.3).name == "OFUL (radius x 0.3)"
    assert oful().name == "OFUL"
