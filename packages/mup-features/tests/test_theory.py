"""Checks of data, of independence along training, and of the covariance identity."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mup_features.theory import check_data, check_independence, covariance_preservation_error


@given(st.integers(1, 9), st.integers(2, 5), st.integers(0, 10**6))
def test_random_data_satisfy_the_assumption_in_both_readings(samples, dimension, seed):
    report = check_data(np.random.default_rng(seed).standard_normal((samples, dimension)))
    assert report.holds == {"distinct": True, "inclusive": True}
    assert report.failing_triples == {"distinct": [], "inclusive": []}
    assert not (report.orthogonal_pairs or report.duplicates or report.negated)


def test_margins_are_the_smallest_gaps_over_all_triples():
    X = np.random.default_rng(0).standard_normal((6, 4))
    report, norms = check_data(X), np.linalg.norm(X, axis=1)
    G = np.abs(X @ X.T) / np.outer(norms, np.full(6, norms.max()))
    triples = [(i, j, k) for i in range(6) for j in range(6) for k in range(6) if j != k]
    gaps = {t: abs(G[t[0], t[1]] - G[t[0], t[2]]) for t in triples}
    distinct = min(gap for (i, j, k), gap in gaps.items() if i not in (j, k))
    # Products of 4 terms, divided in another order.
    assert report.margins["distinct"] == pytest.approx(distinct, abs=1e-14)
    assert report.margins["inclusive"] == pytest.approx(min(gaps.values()), abs=1e-14)
    cosines = np.abs(X @ X.T) / np.outer(norms, norms)
    assert report.product_margin == pytest.approx(cosines[~np.eye(6, dtype=bool)].min(), abs=1e-14)


def test_duplicates_and_negated_copies_are_named():
    X = np.random.default_rng(1).standard_normal((5, 3))
    X[3], X[4] = X[0], -X[1]
    report = check_data(X, "distinct")
    assert report.holds == {"distinct": False}
    assert (report.duplicates, report.negated) == ([(0, 3)], [(1, 4)])
    # Seen from sample 2 both pairs look alike; from 0 and 3 samples 1 and 4 do, from 1 and 4 samples 0 and 3.
    expected = {(2, 0, 3), (2, 1, 4), (0, 1, 4), (3, 1, 4), (1, 0, 3), (4, 0, 3)}
    assert set(report.failing_triples["distinct"]) == expected


def test_one_hot_inputs_fail_by_orthogonality():
    report = check_data(np.eye(3))
    assert report.holds == {"distinct": False, "inclusive": False}
    assert report.orthogonal_pairs == [(0, 1), (0, 2), (1, 2)]
    assert report.product_margin == 0


def test_the_readings_differ_where_a_product_equals_a_squared_norm():
    X = np.array([[1.0, 0.5], [1.0, 1.5], [0.3, 2.0]])
    X[1] = [1.25, 0.0] + 0.2 * np.array([-0.5, 1.0])  # <x_0, x_1> = 1.25 = |x_0|^2
    report = check_data(X)
    assert report.holds == {"distinct": True, "inclusive": False}
    assert report.failing_triples["inclusive"] == [(0, 0, 1)]


def test_a_zero_sample_fails_the_inclusive_reading_by_itself_and_listing_is_limited():
    X = np.vstack([np.zeros((1, 2)), np.random.default_rng(0).standard_normal((4, 2))])
    report = check_data(X, max_triples=2)
    assert (0, 0) in check_data(X).orthogonal_pairs
    assert len(report.failing_triples["inclusive"]) == 2 < report.failing_count["inclusive"]


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones(3), {}, "X must be"),
        (np.array([[np.inf]]), {}, "X must be finite"),
        (np.eye(2), {"readings": "all"}, "readings must be .*, got 'all'"),
        (np.eye(2), {"tol": -1.0}, "tol must be >= 0, got -1.0"),
    ],
)
def test_bad_data_or_options_are_refused(X, options, message):
    with pytest.raises(ValueError, match=message):
        check_data(X, **options)


SINGULAR = np.ones((2, 2))


def statuses(report):
    return {(e.layer, e.kind, e.step): e.status for e in report.entries}


def test_first_preactivations_are_exempt_only_where_the_inputs_are_dependent():
    pre, post = {1: SINGULAR, 2: np.eye(2)}, {1: np.eye(2), 2: np.eye(2)}
    report = check_independence(pre, post, rank_X=1)
    assert report.holds and statuses(report)[1, "pre", 0] == "exempt"
    strict = check_independence(pre, post, rank_X=2)
    assert not strict.holds and [entry.layer for entry in strict.failures] == [1]
    assert strict.smallest.status == "dependent"


def test_every_layer_kind_and_step_is_judged():
    stack = np.stack([np.eye(2), SINGULAR, np.diag([1.0, 1e-3])])
    found = statuses(check_independence([stack, stack], [stack, stack], rank_X=0))
    assert len(found) == 12
    assert found[2, "pre", 1] == found[1, "post", 1] == "dependent"
    assert found[2, "post", 2] == "independent" and found[1, "pre", 0] == "exempt"


def test_standard_errors_of_the_eigenvalue_or_of_the_entries_set_the_threshold():
    K = np.diag([1.0, 1e-2])
    judge = lambda stderr, **o: check_independence({}, {2: K}, 2, {"K_post": {2: stderr}}, **o).entries[0]  # noqa: E731
    assert judge(1e-3).status == "independent"
    assert judge([3e-3]).status == "unresolved"
    assert judge(3e-3, standard_errors=3).status == "independent"
    entry = judge(np.full((2, 2), 1e-3))
    # The eigenvector is a unit vector: only the error of its own entry counts.
    assert entry.threshold == pytest.approx(5e-3, rel=1e-12) and entry.status == "independent"
    for cross in (-0.495, 0.495):  # eigenvectors with equal and with opposite signs
        mixed = np.array([[0.505, cross], [cross, 0.505]])
        wide = check_independence({}, {2: mixed}, 2, {"K_post": {2: np.full((2, 2), 2e-3)}}).entries[0]
        assert wide.threshold == pytest.approx(5 * 4e-3, rel=1e-12) and wide.status == "unresolved"


def test_bad_grams_or_errors_are_refused():
    for arguments, message in [
        (({1: np.ones((2, 3))}, {}, 2), r"K_pre\[1\]\[0\] must be"),
        (({}, {}, 2), "at least one Gram"),
        (({1: np.eye(2)}, {}, -1), "rank_X must be >= 0, got -1"),
        (({1: np.eye(2)}, {}, 2, {"pre": {}}), "stderr must have the keys"),
        (({1: np.eye(2)}, {}, 2, {"K_pre": {1: [0.1, 0.2]}}), r"stderr of K_pre\[1\] must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_independence(*arguments)


def test_covariance_error_is_zero_for_exact_fields_and_the_relative_distance_otherwise():
    moments = np.array([[2.0, 0.5], [0.5, 1.0]])
    # Fields with exactly this covariance: a root of it times orthonormal rows.
    root = np.linalg.cholesky(moments)
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 2)))[0].T * np.sqrt(50)
    errors = covariance_preservation_error({2: (root @ rows, moments), 3: (1.1 * moments, moments)})
    assert errors == pytest.approx({2: 0.0, 3: 0.1}, abs=1e-14)
    trajectory = SimpleNamespace(gaussian_covariances={2: (moments, moments)})
    assert covariance_preservation_error(trajectory) == {2: 0.0}
    with pytest.raises(TypeError, match="gaussian_covariances, got int"):
        covariance_preservation_error(3)
    with pytest.raises(ValueError, match="must have 2 rows as its moments, got 3"):
        covariance_preservation_error({2: (np.eye(3), moments)})
    with pytest.raises(ValueError, match="moments of layer 2 must not vanish"):
        covariance_preservation_error({2: (np.eye(2), np.zeros((2, 2)))})
