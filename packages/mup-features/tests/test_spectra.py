"""Measures of one Gram against closed forms, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mup_features import metrics

EIGENVALUES = np.array([0.5, 1.0, 2.5])


@pytest.fixture
def rotated():
    """A Gram with known eigenvalues."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    return Q @ np.diag(EIGENVALUES) @ Q.T


def test_measures_of_a_gram_are_those_of_its_eigenvalues(rotated):
    p = EIGENVALUES / 4
    found = metrics.spectral_measures(rotated)
    expected = {
        "lambda_min": 0.5,
        "lambda_max": 2.5,
        "numerical_rank": 3,
        "stable_rank": 4 / 2.5,
        "effective_rank": np.prod(p**-p),
        "participation_ratio": 16 / (0.25 + 1 + 6.25),
        "condition_number": 5.0,
        "floor": 3 * 2**-52 * 2.5,
    }
    # 3 x 3 symmetric eigenproblem: a few units in the last place.
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-13)
    for name in set(expected) - {"lambda_max", "floor"}:
        assert getattr(metrics, name)(rotated) == found[name]
    assert metrics.eigenvalue_floor(rotated) == found["floor"]
    assert metrics.spectrum(rotated) == pytest.approx(EIGENVALUES, rel=1e-13)


def test_gram_is_divided_by_the_width_unless_asked_otherwise():
    A = np.array([[1.0, 2.0], [3.0, -1.0]], dtype=np.float32)
    assert np.array_equal(metrics.gram(A), [[2.5, 0.5], [0.5, 5.0]])
    assert np.array_equal(metrics.gram(A, normalize=False), [[5.0, 1.0], [1.0, 10.0]])
    assert metrics.gram(A).dtype == np.float64


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_numerical_rank_finds_the_number_of_independent_rows(rank, extra, seed):
    rng = np.random.default_rng(seed)
    # Small integers and a power of two: the Gram is exact, so only the eigenvalues are rounded.
    A = rng.integers(-3, 4, (rank + extra, rank)) @ rng.integers(-3, 4, (rank, 64)) + 0.0
    A[0, 0] += not A.any()
    K = metrics.gram(A)
    assert metrics.numerical_rank(K) <= rank
    assert metrics.condition_number(K) == np.inf
    assert 1 - 1e-12 <= metrics.stable_rank(K) <= metrics.effective_rank(K) + 1e-12 <= rank + 1e-9


def test_raw_spectra_keep_tiny_negative_eigenvalues():
    # An exact outer product in floating point has eigenvalues that scatter around zero.
    a = np.random.default_rng(1).standard_normal((12, 1))
    values = metrics.spectrum(a @ a.T)
    assert values[0] < 0 and abs(values[0]) < metrics.eigenvalue_floor(a @ a.T)


def test_centring_removes_the_common_mean_and_its_own_zero_is_not_counted():
    rng = np.random.default_rng(2)
    A = 100 + rng.standard_normal((5, 30))
    K = metrics.gram(A)
    assert metrics.centred_gram(K) == pytest.approx(metrics.gram(A - A.mean(0)), abs=1e-10)
    expected = np.linalg.eigvalsh(metrics.gram(A - A.mean(0)))[1]
    # K has entries of 1e4, so differences of them are good to 1e-12.
    assert metrics.centred_lambda_min(K) == pytest.approx(expected, abs=1e-10)


def test_jackknife_error_is_the_spread_of_the_mean_grams_eigenvalue():
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((200, 40, 2, 2)) * 1e-3
    runs = np.diag([1.0, 2.0]) + noise + noise.swapaxes(-1, -2)
    values, errors = np.array([metrics.jackknife_lambda_min(run) for run in runs]).T
    # First order: lambda_min = K_00, whose mean over 40 replicas has sd 2e-3 / sqrt(40). 200 runs give the sd
    # of the values to 5 %, and the mean of the errors to 1 %.
    assert values.std() == pytest.approx(2e-3 / np.sqrt(40), rel=0.2)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(2e-3 / np.sqrt(40), rel=0.05)


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (np.ones((2, 3)), r"K must be \(samples, samples\).*\(2, 3\)"),
        (np.array([[1.0, np.nan], [0, 1]]), "K must be finite, got 1 entries"),
        (np.array([[1.0, 2.0], [0, 1]]), "K must be symmetric"),
        (np.array([["a"]]), "K must be real numbers"),
        (np.zeros((0, 0)), "samples >= 1"),
    ],
)
def test_what_is_no_gram_is_refused(K, message):
    with pytest.raises(ValueError, match=message):
        metrics.lambda_min(K)


def test_a_zero_gram_has_no_rank_and_raises_nothing():
    found = metrics.spectral_measures(np.zeros((2, 2)))
    assert found["numerical_rank"] == found["effective_rank"] == found["participation_ratio"] == 0
    assert found["condition_number"] == np.inf
