"""VOFUL2's confidence set and its optimistic search against NumPy, test by test."""

import itertools
import math

import derived_radii
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import initial, play, play_many, played, script, spec_of

from linbandit_lowerbounds.algorithms.voful import History, voful2, voful_contains
from linbandit_lowerbounds.hypercubes import filling_cube

K = 60
GRID = np.array(list(itertools.product((-0.8, -0.3, 0.2, 0.7), repeat=2)))
SCALE = 0.5  # small radii, so that candidates are thrown out within 60 rounds


def width(squares, level, *, constants, d, K, N, delta=0.01, R=1.0):
    """Width of one test, from docs/radii.md or as the paper is remembered."""
    layers = max(1, math.floor(math.log2(1 + K / d)))
    if constants == "derived":
        sizes = {"directions": N, "layers": layers, "K": K, "delta": delta, "R": R}
        return derived_radii.voful_radius(squares, level, **sizes)
    iota = 128 * math.log((12 * K * 2**layers) ** (d + 2) / delta)
    return math.sqrt(iota * squares) + 2.0**-level * R * iota


def contains(theta, actions, rewards, nu_set, *, K, scale=1.0, **settings):
    """The definition: every direction, every layer, sums over all rounds."""
    d = len(theta)
    residuals = rewards - actions @ theta
    for nu in nu_set:
        for level in range(1, max(1, math.floor(math.log2(1 + K / d))) + 1):
            clipped = np.clip(actions @ nu, -(2.0**-level), 2.0**-level)
            squares = np.sum(clipped**2 * residuals**2)
            limit = scale * width(squares, level, d=d, K=K, N=len(nu_set), **settings)
            if abs(np.sum(clipped * residuals)) > limit:
                return False
    return True


def differences(parameters):
    """All distinct nonzero differences, one of each sign."""
    found = []
    for a, b in itertools.product(parameters, repeat=2):
        known = any(np.allclose(a - b, nu) or np.allclose(b - a, nu) for nu in found)
        if not known and not np.allclose(a, b):
            found.append(a - b)
    return np.array(found)


@pytest.fixture(scope="module")
def contexts():
    rounds = script(17, K=K, A=5, d=2, masked=0.3, low=0.02)
    noise = np.random.default_rng(1).choice((-0.1, 0.1), K)
    return rounds._replace(noise=noise, theta=np.array([0.7, -0.3]))


@pytest.mark.parametrize(("constants", "scale", "R"), [("derived", 0.5, 0.1), ("paper", 0.04, 0.01)])
def test_membership_is_the_definition(constants, scale, R, x64):
    rng = np.random.default_rng(4)
    actions, nu_set = rng.uniform(-0.9, 0.9, (30, 2)), rng.uniform(-1.5, 1.5, (5, 2))
    rewards = actions @ [0.7, 0.2] + 0.1 * rng.uniform(-1.0, 1.0, 30)
    thetas = np.array([0.7, 0.2]) + rng.uniform(-0.4, 0.4, (200, 2))
    settings = {"constants": constants, "delta": 0.05, "R": R}
    history = History(actions, rewards)
    for horizon in (2, 100):  # one layer, and five of which the least forgiving decides
        found = voful_contains(thetas, history, nu_set, horizon=horizon, radius_scale=scale, **settings)
        expected = [contains(t, actions, rewards, nu_set, K=horizon, scale=scale, **settings) for t in thetas]
        np.testing.assert_array_equal(found, expected)
        assert 5 < sum(expected) < 195


def test_everything_belongs_before_the_first_round_and_the_truth_afterwards(contexts):
    actions = np.concatenate(list(contexts.actions.transpose(1, 0, 2)))
    rewards = actions @ contexts.theta + np.tile(contexts.noise, 5)
    for n in (0, 300):
        inside = voful_contains(
            GRID, History(actions[:n], rewards[:n]), differences(GRID), horizon=300, R=0.1
        )
        assert inside[np.abs(GRID - contexts.theta).sum(1).argmin()]
        assert bool(inside.all()) == (n == 0)


def test_search_plays_as_its_definition_and_never_what_is_masked(contexts, x64):
    _, choices, rewards = play(voful2(candidates=GRID, R=0.1, radius_scale=SCALE), contexts)
    nu_set, settings = differences(GRID), {"K": K, "scale": SCALE, "constants": "derived", "R": 0.1}
    features = contexts.actions[np.arange(K), choices]
    sizes = []
    for k in range(K):
        left = [theta for theta in GRID if contains(theta, features[:k], rewards[:k], nu_set, **settings)]
        values = (contexts.actions[k] @ np.array(left).T).max(1)
        assert choices[k] == np.argmax(np.where(contexts.mask[k], values, -np.inf))
        sizes.append(len(left))
    assert sizes[0] == 16
    assert sizes[-1] < 8


def test_several_runs_at_once_are_the_runs_one_by_one(contexts, x64):
    learner = voful2(candidates=GRID, R=0.1, radius_scale=SCALE)
    other = script(18, K=K, A=5, d=2, masked=0.3)
    alone = [play(learner, rounds)[1] for rounds in (contexts, other)]
    np.testing.assert_array_equal(play_many(learner, [contexts, other]), alone)


def test_least_violated_candidates_stay_when_none_is_left(x64):
    learner = voful2(candidates=[[-0.5], [0.5]], R=0.1)
    rounds = script(0, K=400, A=2, d=1, shared=np.array([[1.0], [-1.0]]))
    rounds = rounds._replace(theta=np.array([2.0]), noise=np.zeros(400))
    state, choices, _ = play(learner, rounds)
    violation = np.abs(state.sums) / (state.root * np.sqrt(state.squares) + state.slope * state.levels)
    assert violation.max((1, 2)).min() > 1.0
    assert (choices[-100:] == 0).all()  # 0.5 fits 2 better than -0.5


def test_quiet_noise_is_learned_from_faster_than_its_bound_says():
    """Without being told the variance: the same bound R = 1, noise of 0.02 against noise of 1."""
    learner = voful2(candidates=np.linspace(-1, 1, 9)[:, None])
    rounds = script(0, K=1500, A=2, d=1, shared=np.array([[0.9], [-0.9]]))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), 1500)
    left = []
    for sigma in (1.0, 0.02):
        state, _, _ = play(learner, rounds._replace(theta=np.array([0.5]), noise=sigma * signs))
        width = state.root * np.sqrt(state.squares) + state.slope * state.levels
        inside = (np.abs(state.sums) <= width).all((1, 2))
        assert inside[6]  # the truth, 0.5
        left.append(int(inside.sum()))
    assert left[1] < left[0]


def test_search_lists_sign_sets(x64):
    learner = voful2(candidates=[[0.5, -0.5], [0.4, 0.1]])
    state = initial(learner, script(0, K=10, A=4, d=2))
    np.testing.assert_array_equal(played(learner, state, filling_cube(jnp.asarray(1.0), 2)), [1.0, -1.0])


def test_equal_arguments_give_the_same_learner():
    assert voful2(candidates=GRID) == voful2(candidates=GRID.tolist())
    assert voful2(candidates=GRID).config != voful2(candidates=-GRID / 2).config


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"candidates": [1.0, 2.0]}, ValueError, "candidates must be a finite"),
        ({"candidates": [["a"]]}, TypeError, "candidates must be an array of numbers"),
        ({"candidates": [[np.nan]]}, ValueError, "candidates must be a finite"),
        ({"candidates": np.ones((2, 4))}, ValueError, "at most 3 columns, got 4"),
        ({"candidates": np.ones((2, 2))}, ValueError, "two different parameters"),
        ({"nu_set": [[1.0]]}, ValueError, "nu_set must have 2 columns, got 1"),
        ({"delta": 0.0}, ValueError, "delta must be"),
        ({"R": -1.0}, ValueError, "R must be"),
        ({"constants": "best"}, ValueError, "constants must be one of"),
        ({"radius_scale": "1"}, TypeError, "radius_scale must be"),
    ],
)
def test_search_refuses_bad_input(wrong, error, message):
    with pytest.raises(error, match=message):
        voful2(**({"candidates": GRID} | wrong))


def test_search_refuses_a_problem_of_another_dimension():
    with pytest.raises(ValueError, match="candidates have 2 columns"):
        voful2(candidates=GRID).init(None, spec_of(script(0, K=2, A=2, d=3)))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"theta": np.ones(3)}, ValueError, "theta must have shape"),
        ({"history": History(np.ones((4, 2)), np.ones(3))}, ValueError, "history must hold"),
        ({"nu_set": np.ones((0, 2))}, ValueError, "nu_set must have shape"),
        ({"horizon": 1}, ValueError, "horizon must be"),
        ({"horizon": 1.5}, TypeError, "horizon must be"),
    ],
)
def test_membership_refuses_bad_input(wrong, error, message):
    right = {
        "theta": np.ones(2),
        "history": History(np.ones((4, 2)), np.ones(4)),
        "nu_set": np.ones((1, 2)),
        "horizon": 10,
    }
    with pytest.raises(error, match=message):
        voful_contains(**(right | wrong))


def test_membership_is_a_pure_function(x64):
    history = History(np.ones((4, 2)), np.ones(4))
    compiled = jax.jit(lambda theta: voful_contains(theta, history, GRID, horizon=10))
    assert compiled(jnp.ones(2)).shape == ()
