"""Hypercubes have the laws and the extreme regrets that the bounds are derived from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout import BEST, CONTRARIAN, LEADER, RANDOM, WORST, randomness, rollout
from scipy import stats

from linbandit_lowerbounds.hypercubes import BernoulliHypercube, GaussianHypercube, VarianceScaledHypercube

P0 = 1 / 3
KEY = jax.random.key(3)
BIASES = ("shared", "per_block", "centered")


def all_means(instance, sigma=1.0):
    """(mean reward of every action, best mean, the state) in one round."""
    state = instance.init(KEY)
    shown, means, best = offer(instance, state, jnp.asarray(sigma, float))
    return np.asarray(means), float(best), (state, shown)


@jax.jit
def offer(instance, state, sigma):
    shown = instance.decision_set(state, jnp.asarray(0), sigma, None)
    return shown, shown.enumerate().values(state), shown.best_value(state)


# ---------------------------------------------------------------------------------------------- Bernoulli


@pytest.mark.parametrize("bias", BIASES)
def test_worst_regret_is_four_times_the_lemma_and_random_twice(bias, x64):
    K, d, sigma = 96, 4, 0.5
    means, best, _ = all_means(BernoulliHypercube(K, d, sigma, bias=bias))
    lemma = d * sigma * math.sqrt(K) / (8 * math.sqrt(6))
    # Exact expectations over all actions: only float64 rounding.
    assert K * (best - means.min()) == pytest.approx(4 * lemma, rel=1e-13)
    assert K * (best - means.mean()) == pytest.approx(2 * lemma, rel=1e-13)
    assert best == pytest.approx(means.max(), abs=1e-15)


def test_worst_regret_matches_the_worked_number(x64):
    instance = BernoulliHypercube(600, 20)
    assert float(instance.gap[0]) == pytest.approx(1 / 240, rel=1e-14)
    state = instance.init(KEY)
    shown = instance.decision_set(state, jnp.asarray(0), jnp.ones(()), None)
    worst = shown.features(shown.argmax(-state)) @ state
    assert 600 * float(shown.best_value(state) - worst) == pytest.approx(100.0, rel=1e-12)


def test_simulated_regret_of_every_policy_lies_between_the_bound_and_its_fourfold():
    K, d, n = 300, 4, 512
    policy = np.repeat([RANDOM, WORST, BEST, LEADER], n // 4)
    lemma = d * math.sqrt(K) / (8 * math.sqrt(6))
    regret = rollout(BernoulliHypercube(K, d), policy, n).regret.sum(0) / lemma
    random, worst, best, leader = regret.reshape(4, -1)
    assert worst == pytest.approx(np.full(n // 4, 4.0), rel=1e-5)  # float32 sums of 300 terms
    assert best == pytest.approx(np.zeros(n // 4), abs=1e-4)
    # 300 rounds of 4 coordinates: a run has standard deviation 2 / sqrt(1200); five of the mean's.
    assert random.mean() == pytest.approx(2.0, abs=5 * 2 / math.sqrt(1200 * n / 4))
    assert 1.0 < leader.mean() < 2.0


@pytest.mark.parametrize("bias", BIASES)
def test_probabilities_and_variances_stay_in_their_ranges(bias, x64):
    # K = 1.5 d^2 is the smallest number of rounds: both ends are attained.
    sigma, d = 0.8, 4
    means, _, _ = all_means(BernoulliHypercube(24, d, sigma, bias=bias))
    p = means / sigma + (P0 if bias == "centered" else 0.0)
    assert p.min() == pytest.approx(0.75 * P0, rel=1e-12)
    assert p.max() == pytest.approx(1.25 * P0, rel=1e-12)
    variance = sigma**2 * p * (1 - p)
    assert variance.min() == pytest.approx(3 / 16 * sigma**2, rel=1e-12)
    assert variance.max() == pytest.approx(35 / 144 * sigma**2, rel=1e-12)


@pytest.mark.parametrize("bias", BIASES)
def test_reward_is_sigma_times_a_bernoulli(bias, x64):
    sigma = 0.5
    means, _, (state, shown) = all_means(BernoulliHypercube(24, 3, sigma, bias=bias))
    offset = P0 if bias == "centered" else 0.0
    instance = BernoulliHypercube(24, 3, sigma, bias=bias)
    for index, mean in enumerate(means):
        p = mean / sigma + offset
        # The reward is sigma below p and 0 above, so that its law is Bernoulli(p) for a uniform number.
        for u, value in ((0.0, 1.0), (p - 1e-12, 1.0), (p + 1e-12, 0.0), (1 - 1e-9, 0.0)):
            reward = instance.reward(state, shown, shown.choice_of(index), jnp.asarray(sigma), jnp.asarray(u))
            assert float(reward.reward) == pytest.approx(sigma * (value - offset), abs=1e-15)
            assert float(reward.mean) == pytest.approx(mean, abs=1e-15)


def test_noise_below_its_own_shrinks_towards_the_mean(x64):
    instance = BernoulliHypercube(24, 2, 0.8)
    _, _, (state, shown) = all_means(instance)
    choice = shown.choice_of(1)
    rewards = [
        instance.reward(state, shown, choice, jnp.asarray(0.2), jnp.asarray(u)) for u in (0.0, 1 - 1e-9)
    ]
    mean = float(rewards[0].mean)
    p = mean / 0.8
    high, low = (float(r.reward) for r in rewards)
    assert p * high + (1 - p) * low == pytest.approx(mean, abs=1e-15)
    variance = p * (high - mean) ** 2 + (1 - p) * (low - mean) ** 2
    assert variance == pytest.approx(0.2**2 * p * (1 - p), rel=1e-12)
    silent = instance.reward(state, shown, choice, jnp.zeros(()), jnp.zeros(()))
    assert float(silent.reward) == mean


def test_few_rounds_take_the_small_gap_unless_strict(x64):
    assert float(BernoulliHypercube(23, 4).gap[0]) == pytest.approx(P0 / 16, rel=1e-15)
    assert float(BernoulliHypercube(24, 4).gap[0]) == pytest.approx(1 / math.sqrt(96 * 24), rel=1e-14)
    with pytest.raises(ValueError, match="strict=True"):
        BernoulliHypercube(23, 4, strict=True)


def test_regret_scales_with_sigma_under_common_random_numbers():
    one, quarter = (rollout(BernoulliHypercube(300, 4, sigma), LEADER, 512) for sigma in (1.0, 0.25))
    np.testing.assert_array_equal(one.choice, quarter.choice)
    # A power of two scales float32 exactly, but best and worst values are sums in other orders.
    np.testing.assert_allclose(quarter.regret, 0.25 * one.regret, atol=1e-7)


def test_sizes_follow_the_bias():
    shared, centered = BernoulliHypercube(24, 3), BernoulliHypercube(24, 3, bias="centered")
    assert (shared.dim, shared.block_dim, shared.n_signs, shared.max_actions) == (4, 4, 3, 8)
    assert (centered.dim, centered.block_dim, centered.n_signs, centered.max_actions) == (3, 3, 3, 8)
    assert shared.columns == (0, 1, 2, 3)
    assert shared.prefix.shape == (24,)


# ---------------------------------------------------------------------------------------------- Gaussian


def test_gaussian_cube_is_the_scaled_one_in_other_units(x64):
    K, d, sigma, gap = 7, 2, 0.5, 0.1
    plain = rollout(GaussianHypercube(K, d, sigma, gap=gap), LEADER, 16)
    scaled = rollout(VarianceScaledHypercube(np.full(K, sigma), d, gap=gap / sigma**2), LEADER, 16)
    np.testing.assert_array_equal(plain.choice, scaled.choice)
    np.testing.assert_allclose(plain.regret, scaled.regret, atol=1e-14)
    np.testing.assert_allclose(plain.reward, scaled.reward, atol=1e-14)


def test_default_gaps_are_the_optima(x64):
    sigma = np.array([1.0, 0.5, 0.0, 0.2])
    root = math.sqrt(1.29)
    assert float(VarianceScaledHypercube(sigma, 2).gap[0]) == pytest.approx(1.246858674625 / root, rel=1e-12)
    two = VarianceScaledHypercube(sigma, 1, noise="two_point")
    assert float(two.gap[0]) == pytest.approx(math.sqrt(3) / 4 / root, rel=1e-14)
    prefix = VarianceScaledHypercube(sigma, 2, budget=1.0)
    assert float(prefix.gap[0]) == pytest.approx(1.246858674625, rel=1e-12)
    constant = GaussianHypercube(100, 3, 0.4)
    assert float(constant.gap[0]) == pytest.approx(1.246858674625 * 0.4 / 10, rel=1e-12)


@pytest.fixture(scope="module")
def mixed():
    """Random, leading and contrarian play on a sequence of mixed variances, 1500 runs each, float32."""
    sigma = np.exp(np.linspace(math.log(0.05), 0.0, 40))[np.random.default_rng(5).permutation(40)]
    instance = VarianceScaledHypercube(sigma, 3)
    return sigma, instance, rollout(instance, np.repeat([RANDOM, LEADER, CONTRARIAN], 1500), 4500)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["random", "leader", "contrarian"])
@pytest.mark.parametrize("upto", [17, 40])
def test_log_likelihood_ratio_is_normal_whatever_is_played(mixed, which, upto):
    sigma, instance, trace = mixed
    runs = slice(1500 * which, 1500 * (which + 1))
    theta, choice, reward = trace.theta[runs, 0], trace.choice[:upto, runs], trace.reward[:upto, runs]
    flipped = theta * np.array([-1.0, 1.0, 1.0])
    variance = sigma[:upto, None] ** 2
    residual, other = (reward - variance * np.einsum("kni,ni->kn", choice, t) for t in (theta, flipped))
    ratio = ((other**2 - residual**2) / (2 * variance)).sum(0)
    V, gap = float(variance.sum()), float(instance.gap[0])
    law = stats.norm(2 * gap**2 * V, 2 * gap * math.sqrt(V))
    # Fixed keys; six such tests at 0.001 would fail by chance in 0.6 % of the choices of a key.
    assert stats.kstest(ratio, law.cdf).pvalue > 1e-3


def test_random_play_differs_from_contrarian_play(mixed):
    # Otherwise the law above would have been tried on one policy only.
    _, _, trace = mixed
    random, leader, contrarian = trace.regret.sum(0).reshape(3, -1).mean(1)
    assert leader < 0.9 * random < random < 0.95 * contrarian


def test_quiet_rounds_change_nothing(x64):
    sigma = np.array([1.0, 0.3, 0.7, 0.5, 0.9])
    padded = np.insert(sigma, [2, 5], 0.0)
    short, long = VarianceScaledHypercube(sigma, 2), VarianceScaledHypercube(padded, 2)
    assert float(short.gap[0]) == float(long.gap[0])
    draws, picks = randomness(short, 16)
    spread = tuple(jnp.insert(array, jnp.array([2, 5]), 0.7, axis=1) for array in (draws, picks))
    one, two = rollout(short, LEADER, 16, given=(draws, picks)), rollout(long, LEADER, 16, given=spread)
    noisy = padded > 0
    np.testing.assert_array_equal(two.regret[noisy], one.regret)
    np.testing.assert_array_equal(two.regret[~noisy], 0.0)
    np.testing.assert_array_equal(two.reward[~noisy], 0.0)


def test_permuting_rounds_leaves_gap_and_worst_regret(x64):
    sigma = np.random.default_rng(0).uniform(0, 1, 7)
    turned = sigma[::-1]
    one, two = VarianceScaledHypercube(sigma, 2), VarianceScaledHypercube(turned, 2)
    assert float(one.gap[0]) == pytest.approx(float(two.gap[0]), rel=1e-15)
    regrets = [rollout(cube, WORST, 16).regret.sum(0) for cube in (one, two)]
    np.testing.assert_allclose(regrets[0], regrets[1], rtol=1e-13)
    np.testing.assert_allclose(regrets[0], 4 * float(one.gap[0]) * (sigma**2).sum(), rtol=1e-13)


def test_two_point_noise_has_the_stated_mean_and_variance(x64):
    instance = VarianceScaledHypercube([0.6, 1.0], 2, gap=0.3, noise="two_point")
    sigma = 0.6
    means, _, (state, shown) = all_means(instance, sigma)
    for index, mean in enumerate(means):
        above = 0.5 + mean / (2 * sigma)  # = 1/2 + sigma <theta, a> / 2
        choice = shown.choice_of(index)
        inner = float(choice @ state)
        assert mean == pytest.approx(sigma**2 * inner, abs=1e-15)
        assert above == pytest.approx(0.5 + sigma * inner / 2, abs=1e-15)
        for u, value in ((0.0, sigma), (above - 1e-12, sigma), (above + 1e-12, -sigma)):
            reward = instance.reward(state, shown, choice, jnp.asarray(sigma), jnp.asarray(u)).reward
            assert float(reward) == value
        second_moment = above * sigma**2 + (1 - above) * sigma**2
        assert second_moment - mean**2 <= sigma**2


def test_two_point_noise_is_silent_without_variance():
    instance = VarianceScaledHypercube([0.6, 1.0], 2, gap=0.3, noise="two_point")
    _, _, (state, shown) = all_means(instance, 0.0)
    reward = instance.reward(state, shown, shown.choice_of(3), jnp.zeros(()), jnp.asarray(0.9))
    assert (float(reward.reward), float(reward.mean), float(reward.best_mean)) == (0.0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BernoulliHypercube(1, 2), "K must be >= 2"),
        (lambda: BernoulliHypercube(20, 0), "d must be >= 1"),
        (lambda: BernoulliHypercube(20, 2, 1.5), "sigma must lie in"),
        (lambda: BernoulliHypercube(20, 2, p0=0.4), "p0 must be in"),
        (lambda: BernoulliHypercube(20, 2, bias="none"), "bias must be one of"),
        (lambda: GaussianHypercube(20, 2, 0.0), "sigma must be finite and > 0"),
        (lambda: GaussianHypercube(20, 2, 1.1), "sigma must lie in"),
        (lambda: GaussianHypercube(20, 2, gap=-1.0), "gap must be"),
        (lambda: VarianceScaledHypercube([0.0, 0.0], 2), "positive entry"),
        (lambda: VarianceScaledHypercube([0.5, 2.0], 2), "sigma must lie in"),
        (lambda: VarianceScaledHypercube([0.5, math.nan], 2), "sigma must lie in"),
        (lambda: VarianceScaledHypercube([0.5, 0.5], 2, gap=0.1, budget=1.0), "one of the two"),
        (lambda: VarianceScaledHypercube([0.5, 0.5], 4, gap=0.3, noise="two_point"), "two_point"),
        (lambda: VarianceScaledHypercube([0.5, 0.5], 2, noise="uniform"), "noise must be one of"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
