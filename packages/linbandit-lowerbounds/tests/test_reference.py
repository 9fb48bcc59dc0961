"""The reference reproduces the worked numbers of the specification to their printed digits."""

import math

import numpy as np
import pytest
from bayes_oracle import bayes_optimal_regret, lemma_gap
from reference import OFUL, WeightedOFUL, WeightedOFULPlus
from reference_layers import SAVE

X = np.array([0.6, 0.8])  # the action of every worked example, reward 1/2, sigma 1/5
TENTH = 0.6e-10  # ten printed decimals: half a unit of the last place and a rounding error
ELEVENTH = 0.6e-11


def test_weighted_oful_plus_matches_its_worked_numbers():
    algorithm = WeightedOFULPlus(2, K=100)
    assert algorithm.beta == pytest.approx(482.5005130681, abs=TENTH)
    assert algorithm.sigma_bar(X, 0.2) == pytest.approx(0.70710678119, abs=ELEVENTH)
    algorithm.update(X, 0.5, 0.2)
    assert algorithm.theta == pytest.approx([0.15, 0.2], abs=1e-15)
    assert algorithm.beta == pytest.approx(557.8861641999, abs=TENTH)


def test_weighted_oful_matches_its_worked_numbers():
    algorithm = WeightedOFUL(2)
    assert algorithm.beta == pytest.approx(57.9488548922, abs=TENTH)
    algorithm.update(X, 0.5, 0.2)
    assert algorithm.gram == pytest.approx(np.array([[1.72, 0.96], [0.96, 2.28]]), abs=1e-14)
    assert algorithm.theta == pytest.approx([0.2, 0.26666666667], abs=ELEVENTH)
    assert algorithm.beta == pytest.approx(74.9448115929, abs=TENTH)


def test_oful_matches_its_worked_numbers():
    algorithm = OFUL(2)
    assert algorithm.beta == pytest.approx(4.0348542588, abs=TENTH)
    algorithm.update(X, 0.5)
    assert algorithm.theta == pytest.approx([0.15, 0.2], abs=1e-15)
    assert algorithm.beta == pytest.approx(4.1469807042, abs=TENTH)


def test_save_matches_its_worked_numbers():
    algorithm = SAVE(2, K=100)
    assert algorithm.layers == 10
    assert algorithm.act(X[None]) == 0
    assert algorithm.layer == 1
    algorithm.update(X, 0.5, 0.2)
    assert algorithm.history[0][0][0] == pytest.approx(0.25, abs=1e-15)
    assert algorithm.theta[0] == pytest.approx([0.06, 0.08], abs=1e-15)
    assert algorithm.beta[:3] == pytest.approx([245.5247095116, 114.5421883846, 56.9784274280], abs=TENTH)


@pytest.mark.parametrize(
    ("K", "d", "gap", "expected"),
    [
        (2, 1, 1 / math.sqrt(192), 0.1339209006),
        (4, 1, 1 / math.sqrt(384), 0.1861978938),
        (2, 2, 1 / 24, 0.1597222222),
    ],
)
def test_bayes_optimal_regret_matches_the_specification(K, d, gap, expected):
    assert bayes_optimal_regret(K, d, gap=gap) == pytest.approx(expected, abs=TENTH)


def test_lemma_gap_is_one_over_sqrt_96_k_at_one_third():
    assert lemma_gap(600) == pytest.approx(1 / 240, abs=1e-17)


@pytest.mark.parametrize(("K", "d"), [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_bayes_optimal_regret_lies_between_lemma_4_3_and_random_play(K, d):
    gap = min(lemma_gap(K), 1 / (12 * d))  # the second where K < 1.5 d^2
    optimal = bayes_optimal_regret(K, d, gap=gap)
    assert d * gap * K / 2 <= optimal  # Lemma 4.3 counts half the wrong signs of random play
    assert optimal < d * gap * K or K == 1  # one round: nothing to learn from, all actions are alike
