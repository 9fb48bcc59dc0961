"""Ordinary decision sets, and the fixed set on which d quiet rounds are enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from linbandit_lowerbounds.contexts import FixedSet, RandomContexts, fixed_set_counterexample

KEY = jax.random.key(1)
ACTIONS = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, -1.0]])


def test_fixed_set_offers_and_pays_what_it_was_given(x64):
    theta = np.array([0.2, -0.4, 0.6])
    instance = FixedSet(ACTIONS, theta, horizon=5)
    state = instance.init(KEY)
    np.testing.assert_array_equal(state, theta)
    draw = instance.draw(KEY, ())
    shown = instance.decision_set(state, jnp.asarray(3), jnp.asarray(0.5), draw)
    np.testing.assert_array_equal(shown.actions, ACTIONS)
    for index, x in enumerate(ACTIONS):
        outcome = instance.reward(state, shown, jnp.asarray(index), jnp.asarray(0.5), draw)
        assert float(outcome.mean) == pytest.approx(x @ theta, abs=1e-15)
        assert float(outcome.best_mean) == pytest.approx(0.2, abs=1e-15)
        assert float(outcome.reward) == pytest.approx(x @ theta + 0.5 * float(draw.noise), abs=1e-15)
    assert (instance.dim, instance.block_dim, instance.n_blocks, instance.max_actions) == (3, 3, 1, 4)
    assert instance.prefix is None


def test_fixed_set_without_theta_draws_it_from_the_sphere():
    instance = FixedSet(ACTIONS, horizon=5)
    theta = np.asarray(jax.vmap(instance.init)(jax.random.split(KEY, 3000)))
    np.testing.assert_allclose(np.linalg.norm(theta, axis=1), 1.0, rtol=1e-6)
    # Archimedes: a coordinate of a uniform point of the 2-sphere is uniform on [-1, 1].
    assert stats.kstest(theta[:, 0], stats.uniform(-1, 2).cdf).pvalue > 1e-3  # fixed key


def test_random_contexts_are_uniform_of_the_given_length():
    instance = RandomContexts(3, 5, norm=0.7, horizon=4)
    draw = instance.draw(KEY, (600,))
    shown = jax.vmap(lambda drawn: instance.decision_set(None, 0, jnp.ones(()), drawn))(draw)
    actions = np.asarray(shown.actions)
    assert actions.shape == (600, 5, 3)
    np.testing.assert_allclose(np.linalg.norm(actions, axis=2), 0.7, rtol=1e-6)
    assert stats.kstest(actions[..., 2].ravel() / 0.7, stats.uniform(-1, 2).cdf).pvalue > 1e-3  # fixed key
    assert stats.kstest(np.asarray(draw.noise), stats.norm.cdf).pvalue > 1e-3


def test_masked_actions_do_not_set_the_best_mean(x64):
    instance = FixedSet(ACTIONS, np.array([1.0, 0.0, 0.0]), horizon=5)
    state, draw = instance.init(KEY), instance.draw(KEY, ())
    shown = instance.decision_set(state, jnp.asarray(0), jnp.ones(()), draw)
    masked = shown.__class__(shown.actions, jnp.array([False, True, True, True]), shown.block, 1)
    assert float(instance.reward(state, masked, jnp.asarray(1), jnp.ones(()), draw).best_mean) == 0.3


def test_counterexample_is_silent_for_d_rounds():
    instance, adversary = fixed_set_counterexample(ACTIONS, 10)
    assert instance.horizon == 10
    np.testing.assert_array_equal(adversary.sigma, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    assert float((adversary.sigma**2).sum()) == 10 - 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedSet(ACTIONS[0], horizon=5), r"actions must be a finite \(A, d\)"),
        (lambda: FixedSet(np.zeros((0, 3)), horizon=5), "actions must be"),
        (lambda: FixedSet(ACTIONS * np.nan, horizon=5), "actions must be"),
        (lambda: FixedSet(ACTIONS, np.ones(2), horizon=5), "theta must be finite with shape"),
        (lambda: FixedSet(ACTIONS, [np.inf, 0, 0], horizon=5), "theta must be finite with shape"),
        (lambda: FixedSet(2 * ACTIONS, horizon=5, check_norms=True), "actions must have norm <= 1"),
        (lambda: FixedSet(ACTIONS, np.ones(3), horizon=5, check_norms=True), "theta must have norm <= 1"),
        (lambda: FixedSet(ACTIONS, horizon=0), "horizon must be >= 1"),
        (lambda: RandomContexts(0, 3, horizon=5), "d must be >= 1"),
        (lambda: RandomContexts(2, 0, horizon=5), "n_actions must be >= 1"),
        (lambda: RandomContexts(2, 3, 1.5, horizon=5), "norm must be in"),
        (lambda: fixed_set_counterexample(ACTIONS, 2), "K must be at least d = 3"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_norms_are_free_by_default_and_rounding_is_forgiven():
    assert FixedSet(3 * ACTIONS, horizon=5).max_actions == 4
    assert FixedSet(ACTIONS * (1 + 1e-7), horizon=5, check_norms=True).max_actions == 4
