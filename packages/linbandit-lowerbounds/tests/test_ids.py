"""Information-directed sampling against NumPy, and its mixtures against a search over the simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scripted import draws_of, play, play_many, play_reference, played, script, spec_of

from linbandit_lowerbounds.algorithms.ids import best_action, best_mixture, ids
from linbandit_lowerbounds.hypercubes import filling_cube

K = 60
SCALED = ids(radius_scale=0.3, S_theta=0.5)
MIXED = ids(mode="randomised", radius_scale=0.3, S_theta=0.5)


@pytest.fixture(scope="module")
def contexts():
    """Rounds of all noise levels, with a few of sigma 0, and a third of the actions masked."""
    rounds = script(13, K=K, A=6, d=3, masked=0.3)
    quiet = np.arange(K) % 12 == 5
    return rounds._replace(sigma=np.where(quiet, 0.0, rounds.sigma), noise=np.where(quiet, 0.0, rounds.noise))


def test_deterministic_ids_plays_as_the_reference(contexts, x64):
    truth = reference.IDS(3, S_theta=0.5, radius_scale=0.3)
    expected = play_reference(truth, contexts)
    state, choices, _ = play(SCALED, contexts)
    np.testing.assert_array_equal(choices, expected)
    # P is updated 60 times with weights up to 10^6, V is inverted once: relative to its largest entry.
    inverse = np.linalg.inv(truth.gram)
    np.testing.assert_allclose(state.inverse[0], inverse, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(state.inverse[0] @ state.response[0], truth.theta, rtol=1e-8)


def test_randomised_ids_plays_as_the_reference(contexts, x64):
    truth = reference.IDS(3, S_theta=0.5, radius_scale=0.3, randomised=True)
    expected = play_reference(truth, contexts, uniform=np.asarray(draws_of(MIXED, contexts)))
    np.testing.assert_array_equal(play(MIXED, contexts)[1], expected)


def test_the_two_modes_differ_and_several_runs_at_once_are_the_runs_one_by_one(contexts, x64):
    other = script(14, K=K, A=6, d=3, masked=0.3)
    together = play_many(MIXED, [contexts, other])
    alone = [play(MIXED, rounds)[1] for rounds in (contexts, other)]
    np.testing.assert_array_equal(together, alone)
    assert not np.array_equal(alone[0], play(SCALED, contexts)[1])


def test_mixture_is_the_optimum_over_all_distributions(x64):
    rng = np.random.default_rng(3)
    gaps, infos = rng.uniform(0.05, 1.0, (40, 5)), rng.uniform(0.01, 1.0, (40, 5)) ** 3
    found = jax.jit(jax.vmap(best_mixture))(gaps, infos, np.ones((40, 5), bool))
    mixtures = 0
    for gap, info, first, second, p in zip(gaps, infos, *found, strict=True):
        mixture = np.zeros(5)
        mixture[int(first)] += float(p)
        mixture[int(second)] += 1.0 - float(p)
        ratio = (mixture @ gap) ** 2 / (mixture @ info)
        # min_p (gap p)^2 / (info p) = max_l min_x (2 l gap(x) - l^2 info(x)) by minimax: a dual certificate.
        grid = ratio / (mixture @ gap) * np.linspace(0.9, 1.1, 2001)
        dual = (2 * grid[:, None] * gap - grid[:, None] ** 2 * info).min(1).max()
        assert dual <= ratio * (1 + 1e-12)
        assert ratio <= dual * (1 + 1e-7)  # the grid contains the optimum l = ratio / E gap to rounding
        mixtures += int(first) != int(second)
    assert 5 < mixtures < 40


def test_masked_and_uninformative_actions_are_not_played(x64):
    gap, info = jnp.asarray([0.1, 0.5, 0.2, 0.9]), jnp.asarray([0.0, 0.1, 0.5, 0.4])
    mask = jnp.asarray([True, True, False, True])
    action, mixture = jax.jit(best_action), jax.jit(best_mixture)
    assert int(action(gap, info, mask)) == 3
    first, second, p = mixture(gap, info, mask)
    assert {int(first), int(second)} == {0, 3}  # the free action, diluted by the informative one
    assert 0.0 < float(p) < 1.0
    nothing = jnp.zeros(4)
    mask = jnp.asarray([False, False, True, True])
    assert int(action(gap, nothing, mask)) == 2
    assert int(mixture(gap, nothing, mask).first) == 2


def test_sign_sets_are_played_as_their_lists(x64):
    signs = filling_cube(jnp.asarray(0.5), 3)
    spec = spec_of(script(0, K=2, A=8, d=3))
    sigma, reward = jnp.asarray(0.3), jnp.asarray(0.4)
    choice = jnp.asarray([1.0, -1.0, 1.0])
    state = jax.jit(SCALED.update)(SCALED.init(None, spec), signs, choice, reward, sigma)
    listed = jax.jit(type(signs).enumerate)(signs)
    expected = played(SCALED, state, listed, sigma)
    np.testing.assert_array_equal(played(SCALED, state, signs, sigma), expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"mode": "random"}, ValueError, "mode must be one of"),
        ({"delta": 0.0}, ValueError, "delta must be"),
        ({"lam": -1.0}, ValueError, "lam must be"),
        ({"floor": 0.0}, ValueError, "floor must be"),
        ({"S_theta": "1"}, TypeError, "S_theta must be"),
        ({"radius_scale": float("nan")}, ValueError, "radius_scale must be"),
    ],
)
def test_ids_refuses_bad_input(wrong, error, message):
    with pytest.raises(error, match=message):
        ids(**wrong)


def test_ids_refuses_too_many_actions():
    with pytest.raises(ValueError, match="at most 256 actions, got 300"):
        MIXED.init(None, spec_of(script(0, K=2, A=300, d=2)))
    SCALED.init(None, spec_of(script(0, K=2, A=300, d=2)))
