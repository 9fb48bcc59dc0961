"""SAVE equals its reference in every layer; its limits, blocks, rotations, certificate and bad input."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replay
from reference_layers import SAVE

from linbandit_lowerbounds.algorithms.save import number_of_layers, residual_squares, save
from linbandit_lowerbounds.decision_sets import DecisionSet
from linbandit_lowerbounds.environment import Spec

pytestmark = pytest.mark.usefixtures("x64")
X = np.array([0.6, 0.8])
TENTH = 0.6e-10  # ten printed decimals

# Radii are small, so that actions are eliminated within 40 rounds.
LEARNERS = {
    "theory": {"radius_scale": 0.02},
    "practical": {"preset": "practical", "c": 0.5, "delta": 0.1},
    "one layer": {"R": 2 / replay.ROUNDS**1.5, "explore": "optimistic"},
}


def depths(seed, **settings):
    """Contexts of three scales: the smaller the actions, the deeper the layer that explores them first."""
    rounds = replay.contexts(seed, **settings)
    scales = np.random.default_rng(seed).choice([1.0, 0.1, 0.02], size=rounds.sigma.shape)
    return rounds._replace(actions=scales[..., None, None] * rounds.actions)


def same_layers(reference, state, width, x):
    """Radii, estimates, counts and residual squares of all layers."""
    replay.close(state.radius, reference.beta)
    replay.close(state.layers.theta, reference.theta)
    np.testing.assert_array_equal(state.count, reference.count)
    layers = range(1, reference.layers + 1)
    replay.close(residual_squares(state), [reference.empirical_variance(layer) for layer in layers])
    if reference.layer is not None:
        # The half width is that of the action, or more if another survivor has a larger upper bound.
        own = reference.radius_scale * reference.beta[reference.layer - 1]
        own *= reference.norms(reference.layer, x[None])[0]
        assert width >= own * (1 - replay.TOLERANCE)


def test_save_gives_its_worked_numbers():
    algorithm = save()
    offered = DecisionSet(jnp.asarray(X[None]), jnp.ones(1, bool), jnp.zeros((), int), 1)
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 1, 0, 100))
    assert state.radius.shape == (10,)
    assert algorithm.act(state, offered, None, ()) == 0
    state = algorithm.update(state, offered, 0, jnp.asarray(0.5), None)
    assert np.flatnonzero(state.count).tolist() == [0]
    # Sigma_1 = I / 4 + w^2 x x' with w = 1/4.
    assert np.linalg.inv(state.layers.ridge.inverse[0]) == pytest.approx(
        np.eye(2) / 4 + np.outer(X, X) / 16, abs=1e-14
    )
    assert state.layers.theta[0] == pytest.approx([0.06, 0.08], abs=1e-15)
    assert state.radius[:3] == pytest.approx([245.5247095116, 114.5421883846, 56.9784274280], abs=TENTH)


@pytest.mark.parametrize("name", LEARNERS)
def test_save_equals_its_reference_on_contexts(name):
    settings = LEARNERS[name]
    rounds = depths(21)
    trace = replay.play(save(**settings), replay.SPEC, rounds)
    replay.follow(trace, rounds, lambda: SAVE(6, K=replay.ROUNDS, **settings), same_layers)
    visited = trace.after.count > 0
    assert visited.sum(-1).min() >= (1 if name == "one layer" else 3)


def test_save_equals_its_reference_on_hypercubes():
    settings = LEARNERS["practical"]
    rounds = replay.hypercubes(22)
    trace = replay.play(save(**settings), replay.SIGN_SPEC, rounds)
    replay.follow(trace, rounds, lambda: SAVE(4, K=replay.ROUNDS, **settings), same_layers)


def test_blocks_equal_one_block():
    """Loss and size are sums over all blocks, so that radii of a layer agree whichever block was visited."""
    algorithm = save(**LEARNERS["practical"])
    rounds = depths(23, blocks=replay.BLOCKS)
    blocks = replay.play(algorithm, replay.BLOCK_SPEC, rounds)
    one = replay.play(algorithm, replay.SPEC, replay.dense(rounds))
    np.testing.assert_array_equal(blocks.index, one.index)
    for field in ("loss", "size", "count", "radius"):
        replay.close(getattr(blocks.after, field), getattr(one.after, field))
    replay.close(blocks.width, one.width)


def test_with_one_layer_it_explores_until_everything_is_narrow_then_stays():
    """One layer of limit 1/2 = alpha: no elimination, and no learning where all norms are at most 1/2."""
    rounds = replay.contexts(24, norm=0.4)
    algorithm = save(**LEARNERS["one layer"])
    assert number_of_layers(LEARNERS["one layer"]["R"], replay.ROUNDS) == 1
    trace = replay.play(algorithm, replay.SPEC, rounds)
    for run in range(replay.RUNS):
        inverse = trace.before.layers.ridge.inverse[run, :, 0]
        squares = np.einsum("tai,tij,taj->ta", rounds.actions[run], inverse, rounds.actions[run])
        norms = np.sqrt(np.where(rounds.mask[run], squares, 0.0))
        learns = np.diff(trace.before.count[run, :, 0], append=trace.after.count[run, 0])
        np.testing.assert_array_equal(learns, norms.max(-1) > 0.5)
        assert 0 < learns.sum() < replay.ROUNDS


@pytest.mark.parametrize("name", ["theory", "practical"])
def test_rotating_all_features_leaves_the_choices(name):
    rounds = depths(25)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    turned = rounds._replace(actions=rounds.actions @ rotation, theta=rounds.theta @ rotation)
    plain, other = (replay.play(save(**LEARNERS[name]), replay.SPEC, each) for each in (rounds, turned))
    np.testing.assert_array_equal(plain.index, other.index)
    assert len(np.unique(plain.index)) > 2


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_elimination_begins_at_twice_the_confidence_width(scale):
    """Layer 1 is narrow and drops the first action iff it is more than 2 * 2^{-1} beta_1 worse.

    Both have the same norm in layer 2, where the lowest surviving index is explored.
    """
    algorithm = save(radius_scale=scale)
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 2, 0, 100))
    actions = jnp.asarray([[0.0, 0.1], [0.1, 0.0]])
    offered = DecisionSet(actions, jnp.ones(2, bool), jnp.zeros((), int), 1)
    act = jax.jit(algorithm.act, compiler_options=replay.QUICK)
    beta = 0.7
    for gap, expected in ((2 * 0.5 * scale * beta * (1 - 1e-9), 0), (2 * 0.5 * scale * beta * (1 + 1e-9), 1)):
        theta = state.layers.theta.at[0, 0].set(gap / 0.1)
        known = dataclasses.replace(
            state, layers=state.layers._replace(theta=theta), radius=state.radius.at[0].set(beta)
        )
        assert act(known, offered, None, ()) == expected


def test_masked_actions_are_never_played():
    rounds = depths(26)
    trace = replay.play(save(**LEARNERS["practical"]), replay.SPEC, rounds)
    assert np.take_along_axis(rounds.mask, trace.index[..., None], -1).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trace.after))


def test_the_certificate_covers_the_regret_of_every_round():
    """The survivors' largest upper bound minus the lower bound of what was played, at radii that cover.

    Not in the first round: 2^{1-l} covers ||theta|| <= 2, and 0.02 of it does not.
    """
    rounds = replay.contexts(27)
    trace = replay.play(save(**LEARNERS["theory"]), replay.SPEC, rounds)
    means = np.where(rounds.mask, np.einsum("rtai,ri->rta", rounds.actions, rounds.theta[:, 0]), -np.inf)
    regret = means.max(-1) - np.take_along_axis(means, trace.index[..., None], -1)[..., 0]
    assert (regret <= 2 * trace.width)[:, 1:].all()
    assert regret.max() > 0.1


def test_deep_layers_of_the_theory_preset_use_the_empirical_variance():
    """At R = 4 the layers from 2^l >= 64 sqrt(ln(..)) on are there, but no short run can fill them."""
    rng = np.random.default_rng(5)
    reference = SAVE(2, K=40, R=4.0)
    algorithm = save(R=4.0)
    state = algorithm.init(None, Spec(None, None, 2, 1, 2, 1, 0, 40))
    loss, size, count = (np.zeros(reference.layers) for _ in range(3))
    for layer in (3, 10):
        for _ in range(5):
            reference.absorb(layer, rng.normal(size=2), rng.normal())
        theta = reference.theta[layer - 1]
        loss[layer - 1] = reference.squares[layer - 1] - reference.b[layer - 1] @ theta
        size[layer - 1] = theta @ theta
        count[layer - 1] = 5
    state = dataclasses.replace(state, loss=loss, size=size, count=count.astype(int))
    nothing = DecisionSet(jnp.zeros((1, 2)), jnp.ones(1, bool), jnp.zeros((), int), 1)
    state = algorithm.update(state, nothing, 0, jnp.asarray(0.3), None)
    reference.layer = None
    reference.update(np.zeros(2), 0.3)
    replay.close(state.radius, reference.beta)
    assert reference.variance_estimate(10) != 16 * 5
    assert reference.variance_estimate(3) == 16 * 5


def test_an_action_of_norm_zero_teaches_nothing():
    """Quiet rounds of a scaled hypercube offer 0 alone: exploited, and finite."""
    algorithm = save(preset="practical")
    nothing = DecisionSet(jnp.zeros((1, 2)), jnp.ones(1, bool), jnp.zeros((), int), 1)
    first = algorithm.init(None, Spec(None, None, 2, 1, 2, 1, 0, 100))
    assert algorithm.act(first, nothing, None, ()) == 0
    state = algorithm.update(first, nothing, 0, jnp.asarray(0.0), None)
    assert algorithm.width(state, nothing, 0) == 0.0
    assert state.rounds == 1
    np.testing.assert_array_equal(state.layers.ridge.inverse, first.layers.ridge.inverse)
    np.testing.assert_array_equal(state.radius, first.radius)


@pytest.mark.slow  # compiles every primitive of three rounds by itself
def test_without_jit_it_plays_the_same():
    rounds = depths(21)
    algorithm = save(**LEARNERS["practical"])
    trace = replay.play(algorithm, replay.SPEC, rounds)
    indices, state = replay.without_jit(algorithm, replay.SPEC, rounds, 3)
    assert indices == trace.index[0, :3].tolist()
    replay.close(state.radius, trace.before.radius[0, 3])


@pytest.mark.parametrize(
    ("R", "horizon", "layers"),
    [(1.0, 100, 10), (1.0, 16, 6), (1.0, 2**20, 30), (0.5, 64, 8), (1.0, 17, 7), (0.01, 10, 1)],
)
def test_the_number_of_layers_is_exact_at_powers_of_two(R, horizon, layers):
    """Ceil(log2(R K^1.5)): 16^1.5 = 2^6, (2^20)^1.5 = 2^30, 64^1.5 / 2 = 2^8."""
    assert number_of_layers(R, horizon) == layers


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"delta": 2.0}, ValueError, "delta must be in"),
        ({"R": 0.0}, ValueError, "R must be finite and > 0"),
        ({"preset": "fast"}, ValueError, "preset must be one of"),
        ({"explore": "random"}, ValueError, "explore must be one of"),
        ({"preset": "practical", "c": 0.0}, ValueError, "c must be finite and > 0"),
        ({"c": 2.0}, ValueError, 'c must be 1 under preset="theory"'),
        ({"radius_scale": math.nan}, ValueError, "radius_scale must be"),
        ({"R": None}, TypeError, "R must be a real number"),
    ],
)
def test_bad_input_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        save(**settings)


def test_more_than_12_signs_are_refused():
    with pytest.raises(ValueError, match="13 signs"):
        save().init(None, Spec(None, None, 13, 1, 13, 0, 13, 100))


def test_labels_show_preset_and_what_was_tuned():
    assert save().name == "SAVE (theory)"
    assert save(radius_scale=0.02, explore="first").name == "SAVE (theory, radius x 0.02, explore first)"
    assert save(preset="practical", c=0.5).name == "SAVE (practical, c 0.5)"
