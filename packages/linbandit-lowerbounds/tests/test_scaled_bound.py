import math

import numpy as np
import pytest
import reference_bounds as reference
import small_games
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from linbandit_lowerbounds.bounds import PREFIXED_KINDS, prefixed_bound
from linbandit_lowerbounds.information import kl_bernoulli
from linbandit_lowerbounds.scaled_bound import (
    END_GAP,
    SEQ_GAP,
    TWO_POINT_GAP,
    end_constant,
    lb_end,
    lb_seq,
    mean_tail,
    seq_constant,
    two_point,
)

DIGITS = 0.6e-10  # ten printed decimals and a rounding error
LOG_UNIFORM = 10 ** np.random.default_rng(7).uniform(-3, 0, 2**12)
SEQUENCES = st.lists(st.floats(0, 1), min_size=2, max_size=60).map(np.array)


def holds(bound):
    return [value == 1.0 for name, value in bound.steps.items() if name.endswith(".holds")]


def test_scaled_numbers_match_to_their_printed_digits():
    bound = prefixed_bound(np.sqrt([1, 0.25, 0.04, 0, 1]), 3, delta=0.3, kind="scaled_seq")
    assert bound.value == pytest.approx(1.7584563414, abs=DIGITS)
    bound = prefixed_bound(np.ones(400), 1, delta=0.0375, kind="scaled_seq")
    assert bound.value == pytest.approx(9.343680781696, abs=0.6e-12)


@given(SEQUENCES, st.integers(1, 8), st.floats(0.01, 2))
def test_scaled_bounds_equal_the_reference(sigma, d, gap):
    variance = sigma**2
    assert lb_end(variance, d, gap) == pytest.approx(reference.lb_end(variance, d, gap), rel=1e-11)
    assert lb_seq(variance, d, gap) == pytest.approx(reference.lb_seq(variance, d, gap), rel=1e-11)
    # a difference: absolute error relative to its first term
    scale = d * gap * float(variance.sum()) * (1 + gap)
    assert two_point(variance, d, gap) == pytest.approx(
        reference.two_point(variance, d, gap), abs=1e-12 * scale
    )


@pytest.mark.parametrize(
    "constant, at, value",
    [
        (end_constant, END_GAP, 0.339942414960),
        (seq_constant, SEQ_GAP, 0.529788559523),
        (lambda x: x * (1 - x), 0.5, 0.25),
        (lambda x: x * (1 - math.sqrt(4 / 3) * x), TWO_POINT_GAP, 0.216506350946),
    ],
)
def test_optimal_gaps_are_found_again_by_numerical_optimisation(constant, at, value):
    found = optimize.minimize_scalar(
        lambda x: -constant(x), bounds=(0.05, 3), method="bounded", options={"xatol": 1e-9}
    )
    assert found.x == pytest.approx(at, abs=2e-8)  # a flat maximum: sqrt(2^-52)
    assert -found.fun == pytest.approx(value, abs=0.6e-12)
    assert constant(at) == pytest.approx(value, abs=0.6e-12)


def test_printed_optimal_gaps_match():
    assert pytest.approx(0.751791524694, abs=0.6e-12) == END_GAP
    assert pytest.approx(1.246858674625, abs=0.6e-12) == SEQ_GAP
    assert pytest.approx(1.555, abs=0.5e-3) == SEQ_GAP**2


@given(st.floats(1e-6, 12))
def test_mean_tail_is_the_integral_of_the_tail(x):
    expected, _ = integrate.quad(lambda t: stats.norm.sf(x * t) * 2 * t, 0, 1, epsabs=1e-13, epsrel=1e-12)
    assert mean_tail(x) == pytest.approx(expected, rel=1e-9)


def test_sequential_bound_tends_to_its_continuous_limit_from_above():
    d, x = 3, SEQ_GAP
    excess = []
    for K in (100, 1000, 10_000):
        value = prefixed_bound(np.ones(K), d, kind="scaled_seq").value
        excess.append(value / (d * math.sqrt(K)) - 0.529788559523)
    assert excess[0] > excess[1] > excess[2] > 0
    # a left Riemann sum of a monotone function f: off by at most (f(0) - f(1)) / K < 1 / (2 K), times 2 x
    assert excess[2] <= 2 * x * 0.5 / 10_000


@given(SEQUENCES, st.integers(1, 10))
def test_sequential_bound_beats_its_limit_for_every_sequence_and_all_steps_hold(sigma, d):
    S = float((sigma**2).sum())
    for kind in PREFIXED_KINDS[5:]:
        bound = prefixed_bound(sigma, d, kind=kind)
        assert all(holds(bound))
        assert bound.value == (0.0 if bound.failed else bound.steps["raw"])
    bound = prefixed_bound(sigma, d, kind="scaled_seq")
    if S > 0:
        assert bound.steps["raw"] >= 0.529788559523 * d * math.sqrt(S) * (1 - 1e-11)
        assert bound.conditions["theta_norm_le_1"] == ((SEQ_GAP * d) ** 2 <= S * (1 + 3e-12))
    else:
        assert bound.failed[0] == "variance_sum_positive"


def test_end_bound_does_not_depend_on_the_order_and_nothing_on_noiseless_rounds():
    rng = np.random.default_rng(3)
    shuffled = rng.permutation(LOG_UNIFORM)
    end = prefixed_bound(LOG_UNIFORM, 2, kind="scaled_end").value
    assert prefixed_bound(shuffled, 2, kind="scaled_end").value == pytest.approx(end, rel=1e-13)
    with_zeros = np.insert(LOG_UNIFORM, [0, 5, 99], 0.0)
    for kind in ("scaled_end", "scaled_seq", "scaled_two_point"):
        before = prefixed_bound(LOG_UNIFORM, 2, kind=kind).value
        assert prefixed_bound(with_zeros, 2, kind=kind).value == pytest.approx(before, rel=1e-13)


def test_sign_of_the_posterior_attains_the_sequential_bound_in_one_dimension():
    sigma, gap, runs = np.array([1.0, 0.5, 0.2, 0.0, 1.0, 0.7] * 10), 0.15, 40_000
    rng = np.random.default_rng(11)
    theta = gap * rng.choice([-1.0, 1.0], runs)
    evidence, regret = np.zeros(runs), np.zeros(runs)
    for s in sigma:
        action = np.where(evidence >= 0, 1.0, -1.0)
        regret += s**2 * (gap - theta * action)
        if s > 0:  # reward s^2 theta a + s z, whose information on theta is a r / s^2 with precision s^2
            evidence += action * (s**2 * theta * action + s * rng.standard_normal(runs))
    expected = prefixed_bound(sigma, 1, delta=gap, kind="scaled_seq").steps["raw"]
    error = regret.std() / math.sqrt(runs)
    assert abs(regret.mean() - expected) < 4 * error
    assert error < 0.01 * expected


@pytest.mark.parametrize("policy", ["random", "greedy", "stubborn"])
def test_log_likelihood_ratio_of_a_flip_is_gaussian_whatever_the_policy(policy):
    sigma, gap, d, runs = np.tile([1.0, 0.3, 0.6], 20), 0.2, 2, 4000
    rng = np.random.default_rng(5)
    theta = gap * rng.choice([-1.0, 1.0], (runs, d))
    estimate, ratio = np.zeros((runs, d)), np.zeros(runs)
    for s in sigma:
        signs = {
            "random": rng.choice([-1.0, 1.0], (runs, d)),
            "greedy": np.where(estimate >= 0, 1.0, -1.0),
            "stubborn": np.where(ratio[:, None] > 1, -1.0, 1.0) * np.ones((runs, d)),
        }[policy]
        mean = s**2 * (theta * signs).sum(axis=1)
        reward = mean + s * rng.standard_normal(runs)
        flipped = mean - 2 * s**2 * theta[:, 0] * signs[:, 0]
        ratio += stats.norm.logpdf(reward, mean, s) - stats.norm.logpdf(reward, flipped, s)
        estimate += signs * reward[:, None]
    V = float((sigma**2).sum())
    test = stats.kstest(ratio, "norm", args=(2 * gap**2 * V, 2 * gap * math.sqrt(V)))
    assert test.pvalue > 1e-3  # one fixed seed, three policies


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_two_point_divergence_is_below_eight_thirds_gap_squared_times_variance(share):
    d, gap = 3, share / 6
    for sigma in (0.1, 0.5, 1.0):
        others = gap * np.array([-2, 0, 2])
        high, low = 0.5 + sigma * (others + gap) / 2, 0.5 + sigma * (others - gap) / 2
        worst = max(kl_bernoulli(high, low).max(), kl_bernoulli(low, high).max())
        assert worst <= 8 / 3 * gap**2 * sigma**2
    assert d * gap <= 0.5


@pytest.mark.parametrize("K", [2, 5, 12, 20])
def test_two_point_bounds_lie_below_the_bayes_optimal_regret(K):
    bound = prefixed_bound(np.ones(K), 1, kind="scaled_two_point")
    gap = bound.steps["gap"]  # sigma = 1, d = 1: P(+1) = 1/2 + theta a / 2, a wrong sign costs 2 gap
    optimum = 2 * gap * small_games.fewest_wrong(K, gap / 2, 0.5)
    assert 0 < bound.value < bound.steps["two_point_seq"] < optimum < gap * K
