import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from linbandit_lowerbounds.information import (
    bretagnolle_huber,
    bretagnolle_huber_root,
    chernoff_lower,
    kl_bernoulli,
    kl_gaussian,
    normal_tail,
    pinsker,
    reverse_markov,
    tv_gaussian,
    tv_upper,
)

DIGITS = 0.6e-10  # ten printed decimals and a rounding error
probabilities = st.floats(0, 1)


def test_worked_divergences_match_to_their_printed_digits():
    assert kl_bernoulli(5 / 12, 1 / 4) == pytest.approx(0.0662439267, abs=DIGITS)
    assert kl_bernoulli(1 / 4, 5 / 12) == pytest.approx(0.0607794153, abs=DIGITS)
    assert pinsker(1.0) == pytest.approx(0.7071067812, abs=DIGITS)
    assert bretagnolle_huber_root(1.0) == pytest.approx(0.7950600976, abs=DIGITS)
    assert bretagnolle_huber(1.0) == pytest.approx(0.8160602794, abs=DIGITS)
    assert kl_gaussian(0.0, math.sqrt(2)) == pytest.approx(1.0, abs=1e-15)
    assert tv_gaussian(0.0, math.sqrt(2)) == pytest.approx(0.5204998778, abs=DIGITS)


def test_normal_tail_equals_scipy_far_into_the_tail():
    x = np.linspace(-8, 30, 400)
    # rounding x moves the tail by x^2 2^-53 in relative terms, 1e-13 at x = 30
    np.testing.assert_allclose(normal_tail(x), stats.norm.sf(x), rtol=1e-12)


@given(probabilities, probabilities)
def test_bernoulli_divergence_equals_scipy_entropy(p, q):
    expected = stats.entropy([p, 1 - p], [q, 1 - q])
    # the two terms of the sum may cancel, which costs 2^-52 in absolute terms
    assert kl_bernoulli(p, q) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@given(probabilities, probabilities)
def test_total_variation_of_bernoulli_lies_below_every_bound(p, q):
    tv, kl = abs(p - q), kl_bernoulli(p, q)
    rounding = 1e-7  # kl is good to 1e-15 where p and q are close, and the bounds take its square root
    assert tv <= pinsker(kl) + rounding
    assert tv <= bretagnolle_huber_root(kl) + rounding
    assert tv <= bretagnolle_huber(kl) + rounding
    assert tv_upper(kl) == min(pinsker(kl), bretagnolle_huber_root(kl))


@given(st.floats(0, 1e3))
def test_root_form_is_the_sharper_one(kl):
    assert bretagnolle_huber_root(kl) <= bretagnolle_huber(kl) + 1e-15  # both round once


@given(st.floats(0, 30))  # beyond, the root form rounds to 1
def test_pinsker_is_sharper_than_the_root_form_up_to_a_divergence_of_1_594(kl):
    assert (pinsker(kl) <= bretagnolle_huber_root(kl) + 1e-15) == (kl < 1.593624260040041)


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.1, 4), st.floats(0.1, 4))
def test_gaussian_divergence_equals_its_integral(mean_p, mean_q, variance_p, variance_q):
    p, q = stats.norm(mean_p, math.sqrt(variance_p)), stats.norm(mean_q, math.sqrt(variance_q))
    scale = math.sqrt(variance_p)
    grid = mean_p + scale * np.linspace(-10, 10, 4001)
    expected = integrate.simpson(p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid)), x=grid)
    # Simpson's rule on +-10 standard deviations of a smooth integrand
    assert kl_gaussian(mean_p, mean_q, variance_p, variance_q) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_gaussian_total_variation_equals_its_integral():
    grid = np.linspace(-12, 12, 200_001)
    for gap, variance in [(0.3, 1.0), (1.5, 0.5), (4.0, 2.0)]:
        p, q = stats.norm(0, math.sqrt(variance)), stats.norm(gap, math.sqrt(variance))
        expected = integrate.simpson(np.abs(p.pdf(grid) - q.pdf(grid)), x=grid) / 2
        assert tv_gaussian(0.0, gap, variance) == pytest.approx(expected, abs=1e-7)  # kink of the integrand


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-200])
def test_bernoulli_divergence_survives_tiny_probabilities(tiny):
    assert kl_bernoulli(0.0, tiny) == 0.0
    assert kl_bernoulli(tiny, 0.0) == math.inf
    assert kl_bernoulli(0.5, tiny) == pytest.approx(0.5 * math.log(0.25) - 0.5 * math.log(tiny), rel=1e-12)


def test_zero_variances_are_point_masses_and_huge_quotients_infinite():
    assert kl_gaussian(0.2, 0.2, 0.0) == 0.0
    assert kl_gaussian(0.2, 0.3, 0.0) == math.inf
    assert kl_gaussian(0.2, 0.2, 1.0, 0.0) == math.inf
    assert kl_gaussian(0.2, 0.2, 0.0, 1.0) == math.inf
    assert (kl_gaussian(0.0, 1e200), kl_gaussian(0.0, 0.0, 1e200, 1e-200)) == (math.inf, math.inf)
    assert (tv_gaussian(0.2, 0.2, 0.0), tv_gaussian(0.2, 0.3, 0.0)) == (0.0, 1.0)
    assert (kl_bernoulli(0, 0), kl_bernoulli(1, 1), kl_bernoulli(0.5, 1)) == (0.0, 0.0, math.inf)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 0.99))
def test_reverse_markov_is_below_the_probability_of_any_law_on_the_unit_interval(atoms, threshold):
    weights = np.array([w for w, _ in atoms]) + 1e-3
    weights, values = weights / weights.sum(), np.array([v for _, v in atoms])
    mean = min(float(weights @ values), 1.0)
    assert reverse_markov(mean, 1.0, threshold) <= weights[values >= threshold].sum() + 1e-12


def test_reverse_markov_gives_one_seventh_and_its_sharper_form():
    assert reverse_markov(1.0, 4.0, 0.5) == pytest.approx(1 / 7, abs=1e-16)
    assert reverse_markov(2 * (1 - 1 / math.sqrt(18)), 4.0, 0.5) == pytest.approx(0.2938844226, abs=DIGITS)


@pytest.mark.parametrize("form", ["square", "exact"])
@pytest.mark.parametrize("n, p", [(5, 0.3), (40, 0.1), (40, 0.9), (200, 0.226)])
def test_chernoff_is_above_the_binomial_tail(form, n, p):
    for fraction in np.linspace(0, 1, 21):
        tail = stats.binom.cdf((1 - fraction) * n * p + 1e-12, n, p)
        assert tail <= chernoff_lower(n * p, float(fraction), form=form) * (1 + 1e-12)


@given(st.floats(0, 50), st.floats(0, 1))
def test_exact_chernoff_is_below_the_square_form(mean, fraction):
    assert chernoff_lower(mean, fraction, form="exact") <= chernoff_lower(mean, fraction) * (1 + 1e-12)


def test_scalars_give_floats_and_arrays_broadcast():
    assert isinstance(kl_bernoulli(0.2, 0.3), float)
    assert kl_gaussian(np.zeros(3), np.ones((2, 1))).shape == (2, 3)
    assert normal_tail(np.zeros((2, 2))).dtype == np.float64


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: kl_bernoulli(1.1, 0.5), ValueError, "p must be in"),
        (lambda: kl_bernoulli(0.5, math.nan), ValueError, "q must be in"),
        (lambda: kl_gaussian(0, 1, -1.0), ValueError, "variance_p must be in"),
        (lambda: kl_gaussian(math.inf, 1), ValueError, "mean_p must be finite"),
        (lambda: tv_gaussian(0, 1, -0.1), ValueError, "variance must be in"),
        (lambda: pinsker(-1.0), ValueError, "kl must be in"),
        (lambda: bretagnolle_huber("one"), TypeError, "kl must be numbers"),
        (lambda: reverse_markov(2.0, 1.0, 0.5), ValueError, "mean must be <= maximum"),
        (lambda: reverse_markov(0.5, 1.0, 1.0), ValueError, "threshold must be < maximum"),
        (lambda: chernoff_lower(1.0, 1.5), ValueError, "fraction must be in"),
        (lambda: chernoff_lower(1.0, 0.5, form="cubic"), ValueError, "form must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_raises_with_the_arguments_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
