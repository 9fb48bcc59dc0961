"""Yardsticks against NumPy, and against the regret that theory says they have."""

import dataclasses
import itertools
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scripted import draws_of, initial, play, play_many, play_reference, played, script, spec_of

from linbandit_lowerbounds.algorithms.baselines import (
    bayes_ucb,
    coordinate_oracle,
    epsilon_greedy,
    greedy,
    oracle,
    random,
    worst,
)
from linbandit_lowerbounds.contexts import RandomContexts
from linbandit_lowerbounds.hypercubes import BernoulliHypercube, VarianceScaledHypercube, filling_cube
from linbandit_lowerbounds.simulate import simulate

K, GAP = 60, 0.3
Z99 = NormalDist().inv_cdf(0.995)
KEY = jax.random.key(11)
run = partial(simulate, key=KEY, progress=False)


@pytest.fixture(scope="module")
def contexts():
    return script(7, K=K, A=6, d=4, masked=0.4)


def within_99_percent(regret, expected):
    """Whether the mean over runs is that close to its expectation; the key is fixed, so is the answer."""
    return abs(regret.mean() - expected) <= Z99 * regret.std(ddof=1) / np.sqrt(regret.size)


# ---------------------------------------------------------------------------------------------- learners


def test_greedy_plays_as_the_reference_and_never_what_is_masked(contexts, x64):
    truth = reference.Greedy(4, lam=0.5)
    expected = play_reference(truth, contexts)
    state, choices, _ = play(greedy(lam=0.5), contexts)
    np.testing.assert_array_equal(choices, expected)
    # P is updated 60 times, V is inverted once.
    np.testing.assert_allclose(state.statistics.inverse[0], np.linalg.inv(truth.gram), rtol=1e-10, atol=1e-10)


def test_epsilon_greedy_explores_when_its_coin_says_so_and_is_greedy_else(contexts, x64):
    learner = epsilon_greedy(epsilon=0.9, decay=0.5)
    _, choices, rewards = play(learner, contexts)
    draws = np.asarray(draws_of(learner, contexts))
    truth, explored = reference.Greedy(4), 0
    for k, (actions, mask) in enumerate(zip(contexts.actions, contexts.mask, strict=True)):
        rows = np.flatnonzero(mask)
        if draws[k, 0] < 0.9 / np.sqrt(k + 1):
            expected, explored = rows[int(draws[k, 1] * rows.size)], explored + 1
        else:
            expected = rows[truth.act(actions[rows])]
        assert choices[k] == expected
        truth.update(actions[expected], rewards[k])
    assert 5 < explored < 40


@pytest.mark.parametrize(
    ("learner", "settings"),
    [
        (bayes_ucb(), {}),
        (bayes_ucb(needs_sigma="never", noise=0.3), {"noise": 0.3}),
        (greedy(prior="gap", needs_sigma="before"), {"radius_scale": 0.0}),
    ],
    ids=["quantiles", "sigma never told", "mean only"],
)
def test_bayesian_learners_play_as_the_reference(learner, settings, contexts, x64):
    truth = reference.BayesUCB(4, gap=GAP, **settings)
    expected = play_reference(truth, contexts, told=learner.needs_sigma != "never")
    state, choices, _ = play(learner, contexts, gap=GAP)
    np.testing.assert_array_equal(choices, expected)
    # The same recursion in another order of operations.
    np.testing.assert_allclose(state.mean[0], truth.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.covariance[0], truth.covariance, rtol=1e-10, atol=1e-10)


def test_several_runs_at_once_are_the_runs_one_by_one(contexts, x64):
    scripts = [contexts, script(8, K=K, A=6, d=4, masked=0.4)]
    together = play_many(bayes_ucb(), scripts, gap=GAP)
    for choices, rounds in zip(together, scripts, strict=True):
        np.testing.assert_array_equal(choices, play(bayes_ucb(), rounds, gap=GAP)[1])


@partial(jax.jit, static_argnums=0)
def play_signs(learner, state, scale, noise, theta):
    """Choices (as features), rewards and the belief when hypercubes with a bias coordinate are offered."""

    def step(state, now):
        scale, noise = now
        offered = filling_cube(scale, 4, scale, 5)
        x = offered.features(choice := learner.act(state, offered, None, ()))
        state = learner.update(state, offered, choice, x @ theta + noise, scale)
        return state, (x, x @ theta + noise)

    return jax.lax.scan(step, state, (scale, noise))


@pytest.mark.parametrize("learner", [bayes_ucb(width=0.7), greedy(prior="gap", needs_sigma="after")])
def test_bayesian_learners_take_the_bias_of_sign_sets_for_known(learner, x64):
    rng = np.random.default_rng(2)
    scale = np.where(np.arange(K) % 9 == 4, 0.0, rng.uniform(0.1, 1.0, K))
    theta = np.array([1 / 3, GAP, -GAP, -GAP, GAP])
    spec = spec_of(script(0, K=K, A=2, d=5), gap=GAP)
    inputs = (jnp.asarray(a) for a in (scale, scale * rng.standard_normal(K), theta))
    state, (features, rewards) = play_signs(learner, learner.init(None, spec), *inputs)
    width = 0.7 if "width" in learner.name else 0.0
    truth = reference.BayesUCB(5, gap=GAP, prior_mean=[1 / 3, 0, 0, 0, 0], prior_var=[0.0] + [GAP**2] * 4)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    for s, x, reward in zip(scale, np.asarray(features), np.asarray(rewards), strict=True):
        actions = s * np.hstack([np.ones((16, 1)), signs])

        def index(rows, truth=truth):
            return rows @ truth.mean + width * np.sqrt(((rows @ truth.covariance) * rows).sum(-1).clip(0.0))

        # Actions tie by symmetry, so the choice is judged by its index; 1e-12 is rounding.
        assert index(x[None])[0] >= index(actions).max() - 1e-12
        truth.update(x, reward, s)
    np.testing.assert_allclose(state.mean[0, 1:], truth.mean[1:], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.covariance[0, 1:, 1:], truth.covariance[1:, 1:], rtol=1e-10, atol=1e-10)


def test_posterior_is_exact_for_noiseless_rounds_and_unmoved_by_empty_ones(x64):
    update = jax.jit(bayes_ucb().update)
    state = bayes_ucb().init(None, spec_of(script(0, K=2, A=2, d=2), gap=GAP))
    known, nothing = filling_cube(jnp.asarray(1.0), 2), filling_cube(jnp.asarray(0.0), 2)
    reward, sigma = jnp.asarray(0.6), jnp.asarray(0.0)
    once = update(state, known, jnp.asarray([1.0, -1.0]), reward, sigma)
    np.testing.assert_allclose(np.asarray(once.mean[0]) @ [1.0, -1.0], 0.6, rtol=1e-14)
    for offered, choice in ((known, [1.0, -1.0]), (nothing, [1.0, 1.0])):
        twice = update(once, offered, jnp.asarray(choice), reward, sigma)
        np.testing.assert_allclose(twice.mean, once.mean, rtol=1e-14)
        np.testing.assert_allclose(twice.covariance, once.covariance, atol=1e-16)


def test_posterior_of_a_block_leaves_the_others_alone_and_starts_at_its_gap(x64):
    spec = dataclasses.replace(spec_of(script(0, K=2, A=2, d=4)), n_blocks=2, block_dim=2)
    for gap in ([0.2, 0.4], [0.2, 0.2, 0.4, 0.4]):  # for each block, or for each column
        state = bayes_ucb().init(None, dataclasses.replace(spec, gap=jnp.asarray(gap)))
        diagonals = np.einsum("mii->mi", state.covariance)
        np.testing.assert_allclose(diagonals, [[0.04, 0.04], [0.16, 0.16]], rtol=1e-14)
        assert np.count_nonzero(state.covariance) == 4
    offered = dataclasses.replace(filling_cube(jnp.asarray(1.0), 2), n_blocks=2, block=jnp.asarray(1))
    update = jax.jit(bayes_ucb().update)
    after = update(state, offered, jnp.asarray([1.0, 1.0]), jnp.asarray(0.5), jnp.asarray(1.0))
    np.testing.assert_array_equal(after.covariance[0], state.covariance[0])
    np.testing.assert_array_equal(after.mean[0], [0.0, 0.0])
    # C x / (s^2 + x'Cx) r = 0.16 * 0.5 / 1.32 in both coordinates.
    np.testing.assert_allclose(after.mean[1], 0.08 / 1.32, rtol=1e-14)


# ---------------------------------------------------------------------------------------------- regret


def test_random_plays_all_that_is_not_masked_equally_often():
    rounds = script(7, K=3000, A=4, d=2, masked=0.4)
    _, choices, _ = play(random(), rounds)
    assert rounds.mask[np.arange(3000), choices].all()
    counts = np.bincount(choices, minlength=4)
    expected = (rounds.mask / rounds.mask.sum(1, keepdims=True)).sum(0)
    # Variances of the counts are below their expectations (about 750): four standard deviations.
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_on_the_bernoulli_hypercube_worst_is_four_times_and_random_twice_the_lemma():
    instance = BernoulliHypercube(600, 20)
    bound = 25.0  # Lemma 4.3, worked number of the specification
    # float32: 600 terms of size 1/6.
    np.testing.assert_allclose(run(worst(), instance, n_seeds=400).regret, 4 * bound, rtol=1e-5)
    uniform = run(random(), instance, n_seeds=400).regret
    assert within_99_percent(uniform, 2 * bound)
    assert uniform.std() < 1.0  # so that the line above means something: 2 % of the bound


SIGN_RULE = greedy(prior="gap", needs_sigma="after")


@pytest.mark.parametrize("n_seeds", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_in_one_dimension_the_sign_of_the_posterior_attains_the_lower_bound(n_seeds):
    instance = VarianceScaledHypercube(np.ones(400), 1, gap=0.0375)
    assert within_99_percent(run(SIGN_RULE, instance, n_seeds=n_seeds).regret, 9.343680781696)


def test_coordinate_oracle_attains_its_share_of_the_lower_bound():
    instance = VarianceScaledHypercube(np.sqrt([1.0, 0.25, 0.04, 0.0, 1.0]), 3, gap=0.3)
    result = run(coordinate_oracle(coordinate=2), instance, n_seeds=20_000)
    assert within_99_percent(result.regret, 1.7584563414 / 3)  # LB_seq of the specification, d = 3
    assert result.sees_theta


def test_learners_with_linear_objectives_play_hypercubes_of_thirty_signs():
    instance = VarianceScaledHypercube(np.full(50, 0.5), 30)
    regret = run(epsilon_greedy(epsilon=0.1), instance, n_seeds=20).regret  # greedy and random in one program
    assert (regret > 0).all()
    assert regret.mean() < 30 * float(instance.gap[0]) * 0.25 * 50  # less than random play


def test_oracles_are_told_theta_and_nobody_else():
    rounds = script(0, K=2, A=2, d=4)
    for learner, told in ((oracle(), 1), (worst(), 1), (greedy(), 0), (bayes_ucb(), 0), (random(), 0)):
        assert (learner.reveal is not None) == bool(told)
    theta = jnp.asarray([0.5, 1.0, -2.0, 3.0])
    offered = filling_cube(jnp.asarray(0.25), 4)
    assert float(offered.best_value(theta)) == 0.25 * 6.5
    for learner, sign in ((oracle(), 1.0), (worst(), -1.0)):
        state = learner.reveal(initial(learner, rounds), None, theta)
        # Exact in binary: the oracle has regret 0.
        assert float(played(learner, state, offered) @ theta) == sign * 0.25 * 6.5
    blind = coordinate_oracle(coordinate=2)
    state = blind.reveal(initial(blind, rounds), None, theta)
    np.testing.assert_array_equal(state.theta, [[0.5, 1.0, 0.0, 3.0]])


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "wrong", "error", "message"),
    [
        (greedy, {"lam": 0.0}, ValueError, "lam must be"),
        (greedy, {"prior": "flat"}, ValueError, "prior must be one of"),
        (greedy, {"needs_sigma": "after"}, ValueError, 'unless prior="gap"'),
        (greedy, {"prior": "gap", "needs_sigma": "upfront"}, ValueError, "needs_sigma must be one of"),
        (greedy, {"prior": "gap", "noise": -1.0}, ValueError, "noise must be"),
        (greedy, {"prior": "gap", "p0": None}, TypeError, "p0 must be"),
        (epsilon_greedy, {"epsilon": 1.5}, ValueError, r"epsilon must be in \[0, 1\]"),
        (epsilon_greedy, {"decay": -1.0}, ValueError, "decay must be"),
        (bayes_ucb, {"width": -0.1}, ValueError, "width must be"),
        (bayes_ucb, {"width": "wide"}, TypeError, "width must be"),
        (bayes_ucb, {"explore": "all"}, ValueError, "explore must be one of"),
        (coordinate_oracle, {"coordinate": -1}, ValueError, "coordinate must be >= 0"),
        (coordinate_oracle, {"noise": "a"}, TypeError, "noise must be"),
    ],
)
def test_factories_refuse_bad_input(make, wrong, error, message):
    with pytest.raises(error, match=message):
        make(**wrong)


def test_learners_refuse_problems_that_do_not_suit_them():
    contexts, large = RandomContexts(3, 4, horizon=5), VarianceScaledHypercube(np.ones(5), 13)
    with pytest.raises(ValueError, match="needs an instance with a gap"):
        bayes_ucb().init(None, contexts.spec())
    with pytest.raises(ValueError, match="13 signs"):
        bayes_ucb().init(None, large.spec())
    bayes_ucb(explore="coordinate_ascent").init(None, large.spec())
    with pytest.raises(ValueError, match="coordinate must be < 3"):
        coordinate_oracle(coordinate=3).init(None, contexts.spec())
