"""LinTS samples the distribution of its reference, plays the same actions, and does not drift."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import replay

from linbandit_lowerbounds.algorithms.thompson import lin_ts, sample
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec

SETTINGS = {"R": 0.5, "lam": 0.7}


def make():
    return reference.LinTS(6, K=replay.ROUNDS, **SETTINGS)


def as_reference_normal(oracle, state, normal):
    """The zeta with which the reference's Cholesky root gives the sample of our root: C'F zeta.

    Both are square roots of V^{-1}, so C'F is orthogonal, and zeta stays standard normal.
    """
    turn = np.linalg.cholesky(oracle.gram).T @ state.root[0]
    np.testing.assert_allclose(turn @ turn.T, np.eye(6), atol=1e-10)
    return turn @ normal


def test_lin_ts_plays_the_actions_of_its_reference(x64):
    rounds = replay.contexts(41)
    trace = replay.play(lin_ts(**SETTINGS), replay.SPEC, rounds)

    def act(oracle, actions, state, normal):
        return oracle.act(actions, zeta=as_reference_normal(oracle, state, normal))

    def compare(oracle, state, width, x):
        replay.close(state.root[0] @ (state.root[0].T @ state.response[0]), oracle.theta)
        replay.close(state.root[0] @ state.root[0].T, np.linalg.inv(oracle.gram))
        replay.close(state.log_det, oracle.log_det_ratio())

    replay.follow(trace, rounds, make, compare, act=act)


def test_blocks_equal_one_block(x64):
    """Given the same normal numbers: F stays block diagonal when it starts as a multiple of I."""
    rounds = replay.contexts(42, blocks=replay.BLOCKS)
    blocks = replay.play(lin_ts(**SETTINGS), replay.BLOCK_SPEC, rounds)
    one = replay.play(lin_ts(**SETTINGS), replay.SPEC, replay.dense(rounds))
    np.testing.assert_array_equal(blocks.index, one.index)
    replay.close(blocks.after.log_det, one.after.log_det)


@pytest.mark.parametrize("inflation", ["posterior", "agrawal-goyal", "abeille-lazaric"])
def test_inflation_is_that_of_the_reference(x64, inflation):
    """x and y tie at exactly one v; the choice must change between v (1 - 1e-9) and v (1 + 1e-9)."""
    settings = {"inflation": inflation, "R": 0.5, "S_theta": 0.8, "lam": 2.0, "radius_scale": 0.3}
    algorithm = lin_ts(**settings)
    oracle = reference.LinTS(2, K=100, **settings)
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 2, 0, 100))
    rng = np.random.default_rng(1)
    for _ in range(3):
        x, reward = rng.normal(size=2), rng.normal()
        seen = DecisionSet(jnp.asarray(x[None]), jnp.ones(1, bool), jnp.zeros((), int), 1)
        state = algorithm.update(state, seen, 0, jnp.asarray(reward), None)
        oracle.update(x, reward)
    offered = DecisionSet(jnp.asarray(rng.normal(size=(2, 2))), jnp.ones(2, bool), jnp.zeros((), int), 1)
    difference = np.asarray(offered.actions[0] - offered.actions[1])
    normal = rng.normal(size=2)
    slope = oracle.radius_scale * oracle.beta * (difference @ np.asarray(state.root[0]) @ normal)
    tie = -(oracle.theta @ difference) / slope
    choices = [int(algorithm.act(state, offered, None, tie * s * normal)) for s in (1 - 1e-9, 1 + 1e-9)]
    assert sorted(choices) == [0, 1]


def test_samples_have_the_mean_and_covariance_of_the_posterior(x64):
    rounds = replay.contexts(41)
    trace = replay.play(lin_ts(**SETTINGS), replay.SPEC, rounds)
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), trace.after)
    count = 20_000
    normals = lin_ts().draw(jax.random.key(0), replay.SPEC, (count,))
    block, spread = jnp.zeros((), int), jnp.asarray(0.5)
    drawn = jax.jit(jax.vmap(lambda normal: sample(state, block, spread, normal)))(normals)
    covariance = 0.25 * np.asarray(state.root[0] @ state.root[0].T)
    error = np.asarray(drawn).mean(0) - np.asarray(state.root[0] @ state.root[0].T @ state.response[0])
    deviations = np.sqrt(np.diag(covariance))
    # Five standard errors: of a mean sd / sqrt(n), of a covariance at most sqrt(2) sd_i sd_j / sqrt(n).
    assert (np.abs(error) < 5 * deviations / math.sqrt(count)).all()
    limit = 5 * math.sqrt(2 / count) * np.outer(deviations, deviations)
    assert (np.abs(np.cov(np.asarray(drawn).T) - covariance) < limit).all()


def test_draws_of_runs_are_normal_numbers_of_a_block():
    assert lin_ts().draw(jax.random.key(0), replay.BLOCK_SPEC, (3, 5)).shape == (3, 5, 2)


def test_a_million_rounds_in_float32_do_not_drift():
    """L'F F'L = I with V = LL', known exactly from a cycle of contexts (peers lose positivity in 15 000)."""
    state, lower = replay.million_rounds(lin_ts())
    root = lower.T @ state.root[0]
    # Rounding errors of 6e-8 that all had one sign would add up to 6e-2.
    np.testing.assert_allclose(root @ root.T, np.eye(len(lower)), atol=6e-2)
    assert state.log_det == pytest.approx(2 * np.log(np.diag(lower)).sum(), rel=6e-2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"delta": 0.0}, ValueError, "delta must be in"),
        ({"lam": 0.0}, ValueError, "lam must be finite and > 0"),
        ({"R": -1.0}, ValueError, "R must be finite and > 0"),
        ({"S_theta": -1.0}, ValueError, "S_theta must be"),
        ({"inflation": "none"}, ValueError, "inflation must be one of"),
        ({"radius_scale": "1"}, TypeError, "radius_scale must be a real number"),
    ],
)
def test_bad_input_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        lin_ts(**settings)


def test_it_never_lists_a_sign_set():
    state = lin_ts().init(None, Spec(None, None, 40, 1, 40, 0, 40, 100))
    assert state.root.shape == (1, 40, 40)


def test_labels_show_what_was_tuned():
    assert lin_ts().name == "LinTS"
    assert (
        lin_ts(inflation="agrawal-goyal", radius_scale=0.1).name
        == "LinTS (radius x 0.1, inflation agrawal-goyal)"
    )
