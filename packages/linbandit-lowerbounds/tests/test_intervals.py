"""Intervals against scipy, and how often they cover."""

import math

import numpy as np
import pytest
from scipy import stats

from linbandit_lowerbounds.intervals import (
    Estimate,
    bootstrap_interval,
    mean_interval,
    slope_interval,
    wilson_interval,
)

GENERATOR = np.random.default_rng(5)


def test_mean_interval_is_students():
    samples = GENERATOR.normal(3.0, 2.0, 20)
    low, high = stats.t.interval(0.9, 19, samples.mean(), stats.sem(samples))
    found = mean_interval(samples, 0.9)
    # Two programs for one formula in float64.
    np.testing.assert_allclose(found, (samples.mean(), low, high), rtol=1e-12)


def test_one_sample_has_no_interval():
    assert mean_interval(np.array([2.0])) == (2.0, -math.inf, math.inf)


def test_bootstrap_and_t_agree_for_many_normal_samples():
    samples = GENERATOR.normal(0.0, 1.0, 2000)
    t, bootstrap = mean_interval(samples), bootstrap_interval(samples, GENERATOR)
    # The limits are 0.044 from the mean; 2000 resamples fix them to about 0.002.
    np.testing.assert_allclose(bootstrap, t, atol=0.006)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (170, 400)])
def test_wilson_interval_is_scipys(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    found = wilson_interval(successes, trials)
    np.testing.assert_allclose(found, (successes / trials, expected.low, expected.high), atol=1e-12)


def test_an_exact_power_has_its_exponent():
    x = [1.0, 2.0, 8.0]
    found = slope_interval(x, [[np.full(5, 3.0 * v**0.5)] for v in x], GENERATOR)
    # Rounding of logarithms.
    np.testing.assert_allclose(found, 0.5, atol=1e-12)


def test_the_exponent_is_that_of_the_largest_mean():
    x = [1.0, 4.0]
    sets = [[np.full(4, v), np.full(4, v**2)] for v in x]
    assert slope_interval(x, sets, GENERATOR).value == pytest.approx(2.0, abs=1e-12)


def test_the_slope_interval_holds_the_truth_most_of_the_time():
    hits = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        sets = [[v**0.5 * generator.gamma(4.0, 0.25, 60)] for v in (1.0, 4.0, 16.0)]
        _, low, high = slope_interval([1.0, 4.0, 16.0], sets, generator)
        hits += low <= 0.5 <= high
    # 95 % of 40 is 38; fewer than 33 would have probability 1e-3 at 93 %.
    assert hits >= 33


def test_a_ratio_to_nothing_is_no_number():
    assert all(math.isnan(v) for v in Estimate(1.0, 0.5, 1.5).over(0.0))
    assert Estimate(1.0, 0.5, 1.5).over(2.0) == (0.5, 0.25, 0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.zeros(0)), "samples must hold at least one number"),
        (lambda: mean_interval(np.zeros(3), 1.0), r"level must be in \(0, 1\), got 1.0"),
        (lambda: wilson_interval(3, 2), "successes must be <= trials = 2, got 3"),
        (lambda: wilson_interval(0, 0), "trials must be >= 1, got 0"),
        (lambda: slope_interval([1.0, 1.0], [[np.ones(2)]] * 2, GENERATOR), "two different values"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
