"""Measures of movement and similarity: definitions written out, limits, and properties."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mup_features import metrics

seeds = st.integers(0, 10**6)


def features(seed, samples=6, n=40):
    return np.random.default_rng(seed).standard_normal((samples, n))


def test_change_is_the_mean_of_the_samples_relative_movements():
    A0 = np.array([[3.0, 4.0], [0.0, 2.0]])
    A = np.array([[3.0, 9.0], [2.0, 2.0]])
    assert metrics.change(A, A0) == (5 / 5 + 2 / 2) / 2
    assert metrics.change(A, A0, relative=False) == pytest.approx((5 + 2) / 2 / np.sqrt(2), rel=1e-15)


def test_change_is_infinite_where_features_start_at_zero_and_zero_where_they_stay_there():
    assert metrics.change([[1.0], [1.0]], [[0.0], [1.0]]) == np.inf
    assert metrics.change([[0.0], [3.0]], [[0.0], [1.0]]) == 1.0


@given(seeds)
def test_joint_lambda_min_is_zero_when_features_are_unchanged(seed):
    A = features(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        K = metrics.joint_gram([A, A])
    assert abs(metrics.lambda_min(K)) <= metrics.eigenvalue_floor(K)
    assert metrics.lambda_min(metrics.gram(A)) > 1e-3


def test_joint_gram_stacks_any_number_of_times():
    times = [features(seed, 3, 60) for seed in range(3)]
    K = metrics.joint_gram(times)
    assert pytest.approx(metrics.gram(np.vstack(times)), abs=1e-14) == K
    two = metrics.joint_gram_from_blocks(K[:3, :3], K[3:6, :3], K[3:6, 3:6])
    assert np.array_equal(two, K[:6, :6])
    assert metrics.joint_lambda_min(times) == metrics.lambda_min(K)


@pytest.mark.parametrize(("n", "words"), [(11, "exactly zero"), (47, "may be chance")])
def test_joint_gram_warns_where_the_width_is_too_small(n, words):
    with pytest.warns(UserWarning, match=words):
        metrics.joint_gram([features(0, 6, n), features(1, 6, n)])


def test_joint_gram_is_silent_from_four_times_the_rows():
    metrics.joint_gram([features(0, 6, 48), features(1, 6, 48)])


@given(seeds, seeds)
def test_biased_cka_lies_between_zero_and_one_and_is_one_for_a_rotation(seed, other):
    A, B = features(seed), features(other)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((40, 40)))[0]
    value = metrics.linear_cka(metrics.gram(A), metrics.gram(B))
    assert 0 <= value <= 1 + 1e-12
    assert metrics.linear_cka(metrics.gram(A), metrics.gram(3 * A @ Q + 1)) == pytest.approx(1, abs=1e-12)


def test_cka_is_the_normalised_cross_covariance_of_centred_features():
    A, B = features(0), features(1) ** 2
    A, B = A - A.mean(0), B - B.mean(0)
    norm = np.linalg.norm
    expected = norm(A.T @ B) ** 2 / (norm(A.T @ A) * norm(B.T @ B))
    assert metrics.linear_cka(metrics.gram(A + 5), metrics.gram(B - 2)) == pytest.approx(expected, rel=1e-12)


def test_hsic1_averages_over_all_tuples_of_four_distinct_samples():
    K, L = metrics.gram(features(2, 6, 3)), metrics.gram(features(3, 6, 3))
    total, count = 0.0, 0
    for i in range(6):
        for j in set(range(6)) - {i}:
            for q in set(range(6)) - {i, j}:
                for r in set(range(6)) - {i, j, q}:
                    total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                    count += 1
    assert metrics.hsic1(K, L) == pytest.approx(total / count, rel=1e-11)


def test_unbiased_cka_of_unrelated_wide_features_is_near_zero_where_the_biased_one_is_near_one():
    K, L = metrics.gram(features(0, 20, 2000)), metrics.gram(features(1, 20, 2000))
    assert metrics.linear_cka(K, L) > 0.9
    # Off-diagonal entries are independent noise: the ratio has sd about sqrt(2 / (N (N - 3))) = 0.08.
    assert abs(metrics.linear_cka(K, L, unbiased=True)) < 0.3
    assert metrics.linear_cka(K, K, unbiased=True) == pytest.approx(1, rel=1e-12)


def test_kernel_distance_is_blind_to_scale_and_frobenius_change_is_not():
    K = metrics.gram(features(0))
    assert metrics.kernel_distance(K, 3 * K) == pytest.approx(0, abs=1e-14)
    assert metrics.relative_frobenius_change(K, 3 * K) == pytest.approx(2, rel=1e-14)
    assert metrics.kernel_distance(np.diag([1.0, 0.0]), np.diag([0.0, 1.0])) == 1.0


def test_alignment_is_one_for_the_targets_own_kernel():
    y = np.array([1.0, -1.0, 2.0])
    assert metrics.kernel_target_alignment(np.outer(y, y), y) == pytest.approx(1, rel=1e-14)
    assert metrics.kernel_target_alignment(np.eye(3), y) == pytest.approx(1 / np.sqrt(3), rel=1e-14)
    shifted = np.outer(y + 7, y + 7)
    assert metrics.kernel_target_alignment(shifted, y, centred=True) == pytest.approx(1, rel=1e-11)


def test_angles_are_those_between_the_feature_vectors():
    A = np.array([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0], [0.0, 0.0]])
    angles = metrics.angle_matrix(metrics.gram(A))
    # arccos has infinite slope at the ends: rounding of 1e-16 in a cosine of -1 is 1e-8 in the angle.
    expected = np.array([[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]])
    assert angles[:3, :3] / np.pi == pytest.approx(expected, abs=2e-8)
    assert np.isnan(angles[3]).all()


def test_neural_collapse_and_separation_from_the_gram_are_those_of_the_covariances():
    A, labels = features(5, 10, 7), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    A[labels == 1] += 1.5
    means = np.array([A[labels == c].mean(0) for c in range(3)])
    within = (A - means[labels]).T @ (A - means[labels]) / 10
    spread = means - means.mean(0)
    between = spread.T @ spread / 3
    K = metrics.gram(A)
    assert metrics.neural_collapse(K, labels) == pytest.approx(
        np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 3, rel=1e-10
    )
    ratio = np.trace(between) / np.trace(within)
    assert metrics.class_separation(K, labels) == pytest.approx(ratio, rel=1e-12)
    assert metrics.neural_collapse(metrics.gram(means[labels]), labels) == pytest.approx(0, abs=1e-20)


def test_dead_units_and_saturated_entries_are_counted():
    A = np.array([[0.0, 0.999, -0.5], [0.0, 0.2, -1.0]])
    assert metrics.dead_fraction(A) == 1 / 3
    assert metrics.saturation_fraction(A) == 2 / 6
    assert metrics.saturation_fraction(A, low=-1, high=1, margin=0.3) == 3 / 6
    assert metrics.saturation_fraction(np.array([[0.001, 0.5]]), 0, 1) == 1 / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.change(np.ones((2, 3)), np.ones((3, 2))), r"initial must have the shape"),
        (lambda: metrics.change([[np.inf]], [[1.0]]), "features must be finite"),
        (lambda: metrics.joint_gram([np.ones((2, 3))]), "at least 2 arrays, got 1"),
        (lambda: metrics.kernel_distance(np.eye(2), np.eye(3)), r"K must have the shape of K0"),
        (lambda: metrics.linear_cka(np.eye(3), np.eye(3), unbiased=True), "at least 4 samples, got 3"),
        (lambda: metrics.linear_cka(np.ones((3, 3)), np.eye(3)), "must not vanish"),
        (lambda: metrics.kernel_target_alignment(np.eye(2), [1, 2, 3]), "targets must have one row"),
        (lambda: metrics.neural_collapse(np.eye(2), [0, 0]), "at least 2 classes, got 1"),
        (lambda: metrics.class_separation(np.eye(2), [0, 1, 1]), r"labels must be \(2,\)"),
        (lambda: metrics.saturation_fraction([[1.0]], margin=0.5), "margin must be in"),
        (lambda: metrics.saturation_fraction([[1.0]], 1, 0), "low must be below high"),
    ],
)
def test_bad_input_is_refused_with_its_name_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
