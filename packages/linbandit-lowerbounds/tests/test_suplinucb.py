"""SupLinUCB equals its reference in every stage; blocks, the range of the noise, bad input."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import replay
from derived_radii import sup_lin_ucb_alpha
from reference_layers import SupLinUCB

from linbandit_lowerbounds.algorithms.suplinucb import number_of_stages, sup_lin_ucb
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec

pytestmark = pytest.mark.usefixtures("x64")

# A scale at which 40 rounds reach exploration, elimination and exploitation.
SETTINGS = {"radius_scale": 0.12, "explore": "first", "lam": 0.5}


def same_stages(reference, state, width, x):
    """Estimates and Gram matrices of all stages; the certificate is at least the action's own width."""
    replay.close(state.layers.theta, reference.theta)
    replay.close(state.layers.ridge.inverse, np.linalg.inv(reference.gram))
    if reference.stage is not None:
        own = reference.ridge[reference.stage - 1].norm(x) * reference.beta * reference.radius_scale
        assert width >= own * (1 - replay.TOLERANCE)


def test_sup_lin_ucb_equals_its_reference():
    rounds = replay.contexts(31)
    trace = replay.play(sup_lin_ucb(**SETTINGS), replay.SPEC, rounds)

    def make():
        return SupLinUCB(6, K=replay.ROUNDS, n_actions=replay.ACTIONS, **SETTINGS)

    replay.follow(trace, rounds, make, same_stages)
    learned = (np.abs(trace.after.layers.theta) > 0).any(-1)
    # Some stages learned, and some rounds taught nothing.
    assert learned.sum(-1).min() >= 2
    unchanged = (np.diff(trace.before.layers.ridge.response, axis=1) == 0).all((2, 3))
    assert unchanged.any()


def test_blocks_equal_one_block():
    rounds = replay.contexts(32, blocks=replay.BLOCKS)
    blocks = replay.play(sup_lin_ucb(**SETTINGS), replay.BLOCK_SPEC, rounds)
    one = replay.play(sup_lin_ucb(**SETTINGS), replay.SPEC, replay.dense(rounds))
    np.testing.assert_array_equal(blocks.index, one.index)
    replay.close(blocks.width, one.width)


@pytest.mark.parametrize("R", [0.5, 1.0])
def test_the_width_follows_the_range_of_the_noise(R):
    """(alpha + 1) ||x|| with the derived alpha of one stage; R = 1/2 gives the paper's."""
    algorithm = sup_lin_ucb(R=R, delta=0.05)
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 4, 0, 100))
    x = np.array([0.3, 0.4])
    offered = DecisionSet(jnp.asarray(x[None]), jnp.ones(1, bool), jnp.zeros((), int), 1)
    alpha = sup_lin_ucb_alpha(100, 4, stages=1, delta=0.05, R=R)
    assert algorithm.width(state, offered, 0) == pytest.approx((alpha + 1) * 0.5, rel=1e-12)
    if R == 0.5:
        assert alpha == pytest.approx(math.sqrt(0.5 * math.log(2 * 4 * 100 / 0.05)), rel=1e-12)


@pytest.mark.parametrize(("horizon", "stages"), [(2, 1), (7, 1), (8, 2), (2000, 7), (10**6, 13)])
def test_there_are_floor_ln_k_stages(horizon, stages):
    assert number_of_stages(horizon) == stages


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"delta": -0.1}, ValueError, "delta must be in"),
        ({"lam": 0.0}, ValueError, "lam must be finite and > 0"),
        ({"R": 0.0}, ValueError, "R must be finite and > 0"),
        ({"radius_scale": -1.0}, ValueError, "radius_scale must be"),
        ({"explore": "widest"}, ValueError, "explore must be one of"),
        ({"lam": "1"}, TypeError, "lam must be a real number"),
    ],
)
def test_bad_input_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        sup_lin_ucb(**settings)


def test_more_than_12_signs_are_refused():
    with pytest.raises(ValueError, match="13 signs"):
        sup_lin_ucb().init(None, Spec(None, None, 13, 1, 13, 0, 13, 100))


def test_sign_sets_count_all_their_actions():
    assert sup_lin_ucb().init(None, replay.SIGN_SPEC).n_actions == 2**replay.SIGNS


def test_labels_show_what_was_tuned():
    assert sup_lin_ucb().name == "SupLinUCB"
    assert sup_lin_ucb(R=1.0, radius_scale=0.1).name == "SupLinUCB (radius x 0.1, R 1)"
