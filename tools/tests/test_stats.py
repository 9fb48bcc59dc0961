import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tenfold_tools.stats import (
    Estimate,
    bootstrap_interval,
    loglog_slope,
    paired_difference,
    paired_ratio,
    t_interval,
)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


# Three binomial standard errors of a coverage of 0.95 over n simulations.
def coverage_tolerance(simulations):
    return 3 * math.sqrt(0.95 * 0.05 / simulations)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("size", [3, 5, 40])
def test_t_interval_equals_scipy(size, level):
    samples = np.random.default_rng(size).exponential(size=size)
    expected = scipy_stats.ttest_1samp(samples, 0.0).confidence_interval(level)
    # float64 rounding of two ways to write the same formula
    assert t_interval(samples, level) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_t_interval_covers_the_mean_of_five_normal_samples_95_percent_of_the_time():
    rng = np.random.default_rng(1)
    intervals = [t_interval(rng.normal(2.0, 3.0, size=5)) for _ in range(2000)]
    assert coverage(intervals, 2.0) == pytest.approx(0.95, abs=coverage_tolerance(2000))


@pytest.mark.parametrize("samples", [[1.0], [1.0, 2.0]])
def test_fewer_than_three_samples_say_nothing(samples):
    assert t_interval(samples) == (-math.inf, math.inf)
    assert bootstrap_interval(samples) == (-math.inf, math.inf)
    assert paired_difference(samples, [0.0] * len(samples)).high == math.inf
    ratio = paired_ratio(samples, samples)
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 0.0, math.inf)


def test_equal_samples_give_a_point():
    assert t_interval([0.25] * 4) == (0.25, 0.25)
    assert bootstrap_interval([0.25] * 4) == (0.25, 0.25)


@pytest.mark.parametrize("method", ["BCa", "percentile"])
@pytest.mark.parametrize("statistic", [np.mean, np.std])
def test_bootstrap_interval_equals_scipy_with_the_same_generator(statistic, method):
    samples = np.random.default_rng(3).exponential(size=25)
    expected = scipy_stats.bootstrap(
        (samples,), statistic, n_resamples=2000, method=method, rng=np.random.default_rng(7)
    ).confidence_interval
    got = bootstrap_interval(samples, statistic, resamples=2000, seed=7, method=method)
    assert got == (expected.low, expected.high)


def test_bootstrap_interval_is_reproducible_and_depends_on_the_seed():
    samples = np.random.default_rng(3).exponential(size=25)
    first, again, other = (bootstrap_interval(samples, resamples=500, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_bootstrap_interval_accepts_a_statistic_without_axis():
    samples = np.random.default_rng(4).normal(size=20)
    spread = bootstrap_interval(samples, lambda values: max(values) - min(values), resamples=200)
    assert spread[0] <= np.ptp(samples) <= spread[1]


def test_bootstrap_interval_falls_back_to_percentiles_where_bca_is_undefined():
    # Leaving one sample out never moves this median, so BCa's acceleration is 0 / 0.
    samples = [1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 9.0]
    got = bootstrap_interval(samples, np.median, resamples=500)
    assert got == bootstrap_interval(samples, np.median, resamples=500, method="percentile")
    assert all(map(math.isfinite, got))


def test_bca_covers_the_mean_of_skewed_samples():
    rng = np.random.default_rng(5)
    draws = rng.exponential(size=(400, 30))
    bca = coverage([bootstrap_interval(row, resamples=500, seed=i) for i, row in enumerate(draws)], 1.0)
    # BCa's error is O(1/n): about 0.93 for exponential samples at n = 30 (Efron 1987), plus simulation noise.
    assert bca == pytest.approx(0.935, abs=coverage_tolerance(400))


def test_paired_difference_equals_the_paired_t_test():
    rng = np.random.default_rng(6)
    b = rng.normal(size=8)
    a = b + 0.3 + 0.1 * rng.normal(size=8)
    expected = scipy_stats.ttest_rel(a, b).confidence_interval(0.9)
    got = paired_difference(a, b, level=0.9)
    # cancellation in a - b costs a digit or two
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-11)
    assert got.value == pytest.approx(np.mean(a - b), rel=1e-12)


def test_pairing_removes_the_spread_between_seeds():
    seeds = np.array([0.0, 10.0, 20.0, 30.0])
    got = paired_difference(seeds + np.array([1.0, 1.1, 0.9, 1.0]), seeds)
    assert got.low > 0.8
    assert got.high < 1.2


def test_loglog_slope_equals_linregress():
    rng = np.random.default_rng(8)
    x = np.geomspace(1, 1e4, 12)
    y = 3 * x**-0.5 * np.exp(0.1 * rng.normal(size=12))
    expected = scipy_stats.linregress(np.log(x), np.log(y))
    half_width = scipy_stats.t.ppf(0.975, 10) * expected.stderr
    got = loglog_slope(x, y)
    # linregress derives the error from 1 - r^2, which loses digits
    assert got.value == pytest.approx(expected.slope, rel=1e-11)
    assert got.high - got.value == pytest.approx(half_width, rel=1e-8)
    assert got.value - got.low == pytest.approx(half_width, rel=1e-8)


def test_loglog_slope_covers_the_true_exponent_95_percent_of_the_time():
    rng = np.random.default_rng(9)
    x = np.geomspace(1, 100, 6)
    fits = [loglog_slope(x, 2 * x**0.7 * np.exp(0.2 * rng.normal(size=6))) for _ in range(2000)]
    assert coverage([(fit.low, fit.high) for fit in fits], 0.7) == pytest.approx(
        0.95, abs=coverage_tolerance(2000)
    )


def test_loglog_slope_of_replicates_is_the_t_interval_of_the_slopes_of_the_rows():
    rng = np.random.default_rng(10)
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    y = x**-0.33 * np.exp(0.05 * rng.normal(size=(5, 4)))
    slopes = [scipy_stats.linregress(np.log(x), np.log(row)).slope for row in y]
    got = loglog_slope(x, y)
    # float64 rounding
    assert (got.low, got.high) == pytest.approx(t_interval(slopes), rel=1e-11)
    assert got.value == pytest.approx(np.mean(slopes), rel=1e-11)


def test_two_points_or_two_rows_have_a_slope_without_a_finite_interval():
    # exactly the quotient of the logarithms, up to rounding
    assert loglog_slope([1.0, 4.0], [1.0, 2.0]).value == pytest.approx(0.5, rel=1e-14)
    assert loglog_slope([1.0, 4.0], [1.0, 2.0]).low == -math.inf
    assert loglog_slope([1.0, 2.0, 4.0], [[1.0, 2.0, 4.0]] * 2).high == math.inf


def test_paired_ratio_ignores_a_descheduled_round():
    baseline = np.full(21, 1.0)
    timing = np.full(21, 1.5)
    timing[3] = 400.0
    got = paired_ratio(timing, baseline)
    # rounding of exp(log(1.5))
    assert (got.value, got.low, got.high) == pytest.approx((1.5, 1.5, 1.5), rel=1e-14)


@pytest.mark.parametrize("size", [4, 20, 21])
def test_paired_ratio_inverts_when_the_sides_are_exchanged(size):
    rng = np.random.default_rng(11)
    a, b = rng.lognormal(size=size), rng.lognormal(size=size)
    # rounding of log and exp
    assert paired_ratio(a, b).value == pytest.approx(1 / paired_ratio(b, a).value, rel=1e-13)


def test_paired_ratio_is_not_fooled_by_drift_common_to_both_sides():
    drift = np.geomspace(1, 10, 20)
    noise = np.exp(0.01 * np.random.default_rng(12).normal(size=20))
    got = paired_ratio(2 * drift * noise, drift)
    assert 1.9 < got.low <= got.value <= got.high < 2.1


def test_paired_ratio_covers_the_true_ratio_at_its_nominal_level():
    rng = np.random.default_rng(13)
    simulations = 300
    fits = []
    for seed in range(simulations):
        noise = np.exp(0.05 * rng.standard_t(3, size=(2, 25)))
        fits.append(paired_ratio(1.3 * noise[0], noise[1], resamples=400, seed=seed))
    # The percentile bootstrap of a median is slightly conservative: order statistics are discrete.
    assert 0.95 - coverage_tolerance(simulations) <= coverage([(f.low, f.high) for f in fits], 1.3) <= 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([]), r"samples must be a non-empty vector, got shape \(0,\)"),
        (lambda: t_interval([[1.0, 2.0]]), r"samples must be a non-empty vector, got shape \(1, 2\)"),
        (lambda: t_interval([1.0, math.nan, 2.0]), r"samples must be finite, got nan at index \[1\]"),
        (lambda: t_interval([1.0, 2.0, 3.0], level=1.0), r"level must be in \(0, 1\), got 1.0"),
        (lambda: bootstrap_interval([1.0, math.inf, 2.0]), r"samples must be finite, got inf at index \[1\]"),
        (lambda: bootstrap_interval([1.0] * 3, resamples=10), "resamples must be >= 100, got 10"),
        (
            lambda: bootstrap_interval([1.0] * 3, method="basic"),
            "method must be 'BCa' or 'percentile', got 'basic'",
        ),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "a and b must be paired, got lengths 2 and 1"),
        (lambda: paired_ratio([1.0, 2.0], [1.0, 0.0]), r"b must be > 0 .*, got 0.0 at index \[1\]"),
        (lambda: paired_ratio([-1.0, 2.0], [1.0, 1.0]), r"a must be > 0 .*, got -1.0 at index \[0\]"),
        (lambda: loglog_slope([1.0, 2.0], [1.0, 2.0, 3.0]), r"y must have shape \(2,\) or \(seeds, 2\)"),
        (lambda: loglog_slope([0.0, 2.0], [1.0, 2.0]), r"x must be > 0"),
        (
            lambda: loglog_slope([1.0, 2.0], [[1.0, 2.0], [1.0, -2.0]]),
            r"y must be > 0 .* got -2.0 at index \[1, 1\]",
        ),
        (lambda: loglog_slope([2.0, 2.0], [1.0, 2.0]), "x must hold at least two different values"),
    ],
)
def test_bad_input_is_named_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_estimate_cannot_be_changed():
    with pytest.raises(AttributeError):
        Estimate(1.0, 0.0, 2.0).value = 3.0
