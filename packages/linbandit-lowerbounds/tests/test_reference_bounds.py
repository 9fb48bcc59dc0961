"""The reference of the bounds reproduces the worked numbers of the specification to their printed digits."""

import math

import numpy as np
import pytest
import reference_bounds as reference
from bayes_oracle import bayes_optimal_regret, lemma_gap

DIGITS = 0.6e-10  # ten printed decimals and a rounding error

TWO_LEVELS = [1.0] * 2**13 + [0.1] * 2**13


def test_lemma_43_and_its_tight_form_match():
    assert reference.lemma_43(600, 20) == pytest.approx(25, abs=1e-13)
    assert reference.tight(600, 20) == pytest.approx(38.2577806933, abs=DIGITS)
    assert reference.lemma_43(4096, 4, 0.25) == pytest.approx(3.2659863237, abs=DIGITS)
    assert reference.tight(4096, 4) == pytest.approx(20.4479726124, abs=DIGITS)
    assert reference.pinsker_half(1, 1) == pytest.approx(0.0780058114, abs=DIGITS)
    assert reference.lemma_43(10**4, 1) / 100 == pytest.approx(0.051031036, abs=1e-9)


@pytest.mark.parametrize(
    "K, d, gap, oracle, tight, lemma",
    [
        (2, 1, 1 / math.sqrt(192), 0.1339209006, 0.1123245324, 0.0721687836),
        (4, 1, 1 / math.sqrt(384), 0.1861978938, 0.1592304289, None),
        (2, 2, 1 / 24, 0.1597222222, 0.1446995192, 0.0),
    ],
)
def test_bounds_and_the_bayes_optimal_regret_match(K, d, gap, oracle, tight, lemma):
    assert bayes_optimal_regret(K, d, gap=gap) == pytest.approx(oracle, abs=DIGITS)
    assert reference.tight(K, d) == pytest.approx(tight, abs=DIGITS)
    if lemma is not None:
        assert reference.lemma_43(K, d) == pytest.approx(lemma, abs=DIGITS)


def test_gap_of_the_reference_oracle_is_that_of_the_lemma():
    assert lemma_gap(2) == pytest.approx(1 / math.sqrt(192), rel=1e-15)


def test_scaled_bounds_match():
    assert reference.lb_seq([1, 0.25, 0.04, 0, 1], 3, 0.3) == pytest.approx(1.7584563414, abs=DIGITS)
    assert reference.lb_seq([1.0] * 400, 1, 0.0375) == pytest.approx(9.343680781696, abs=0.6e-12)


def test_groups_match():
    sigma = [0, 0.1, 0.125, 0.13, 0.25, 0.26, 0.5, 1]
    assert [reference.group_of(s, 8) for s in sigma] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert [reference.number_of_groups(K) for K in (8, 2**12, 2**14, 2**20)] == [4, 13, 15, 21]
    assert {reference.group_of(s, 2**14) for s in TWO_LEVELS} == {11, 14}


def test_peeling_bounds_match():
    ones = [1.0] * 2**14
    assert reference.theorem_41(ones, 4) == pytest.approx(0.4354515536, abs=DIGITS)
    assert reference.eq42(ones, 4) == pytest.approx(0.8531519085, abs=DIGITS)
    assert math.fsum(s**2 for s in TWO_LEVELS) == pytest.approx(8273.92, abs=1e-9)
    assert reference.eq42(TWO_LEVELS, 30) == pytest.approx(3.6418387161, abs=DIGITS)
    assert reference.lemma_sum(TWO_LEVELS, [2] * 15) == pytest.approx(5.1961524227, abs=DIGITS)
    assert reference.theorem_41([1.0] * 2**15, 8) == pytest.approx(1.15468, abs=0.5e-5)  # printed cut off


def test_two_point_optimum_is_root_three_over_eight():
    variance = np.full(100, 0.3)
    gap = math.sqrt(3) / (4 * math.sqrt(30))
    assert reference.two_point(variance, 2, gap) == pytest.approx(
        0.216506350946 * 2 * math.sqrt(30), rel=1e-11
    )


def test_greedy_loads_differ_by_at_most_one():
    loads = reference.least_loaded_loads(np.random.default_rng(0).uniform(size=5000), 37)
    assert loads.max() - loads.min() <= 1
