"""Means, standard errors and smallest eigenvalues of what a run leaves behind."""

import numpy as np
import pytest

from mup_features.jax.trajectory import Trajectory

R, T, L, N = 5, 3, 2, 4
RNG = np.random.default_rng(0)


def features(noise=0.1):
    """Features at T steps in R replicas, [R, T, L, N, 8]; step 0 is where the later ones start."""
    start = RNG.normal(size=(1, 1, L, N, 8))
    drift = RNG.normal(size=(1, T, L, N, 8))
    drift[:, 0] = 0
    spread = noise * RNG.normal(size=(R, 1, L, N, 8))
    return start + drift + spread


def trajectory(x, method="limit"):
    grams = x @ np.swapaxes(x, -1, -2) / x.shape[-1]
    cross = x @ np.swapaxes(x[:, :1], -1, -2) / x.shape[-1]
    return Trajectory(np.arange(T), method, {"K_pre": grams, "K_pre_cross": cross, "f": x[:, :, 0, :, :2]})


def test_means_and_errors_are_over_replicas_and_grams_are_by_layer():
    x = features()
    run = trajectory(x)
    np.testing.assert_allclose(run.f, x[:, :, 0, :, :2].mean(axis=0))
    np.testing.assert_allclose(run.stderr("f"), x[:, :, 0, :, :2].std(axis=0, ddof=1) / R**0.5)
    np.testing.assert_allclose(
        run.K_pre[1, 2], (x[:, 2, 1] @ np.swapaxes(x[:, 2, 1], -1, -2) / 8).mean(axis=0)
    )


def test_smallest_eigenvalues_are_those_of_the_mean_with_the_jackknifes_error():
    x = features()
    values, errors = trajectory(x).min_eig("K_pre")
    grams = (x @ np.swapaxes(x, -1, -2) / 8)[:, 2, 1]
    left_out = [np.linalg.eigvalsh(np.delete(grams, r, axis=0).mean(axis=0))[0] for r in range(R)]
    assert values.shape == errors.shape == (L, T)
    assert values[1, 2] == pytest.approx(np.linalg.eigvalsh(grams.mean(axis=0))[0], rel=1e-12)
    # the jackknife's error: (R - 1) / R times the sum of squares, R times the variance of the parts
    assert errors[1, 2] == pytest.approx(((R - 1) * np.var(left_out)) ** 0.5, rel=1e-9)


def test_the_joint_gram_is_that_of_both_times_stacked():
    x = features(noise=0.0)
    values, errors = trajectory(x).joint_min_eig("pre")
    stacked = np.concatenate([x[0, 0, 1], x[0, 2, 1]])
    assert values[1, 2] == pytest.approx(np.linalg.eigvalsh(stacked @ stacked.T / 8)[0], rel=1e-9)
    np.testing.assert_allclose(values[:, 0], 0, atol=1e-13)  # step 0 twice: equal rows
    np.testing.assert_allclose(errors, 0, atol=1e-13)


def test_one_replica_has_no_error_and_exact_methods_have_none_to_have():
    x = features()[:1]
    assert np.isnan(trajectory(x).min_eig("K_pre")[1]).all() and np.isnan(trajectory(x).stderr("f")).all()
    assert not trajectory(x, "quadrature").min_eig("K_pre")[1].any()
    assert not trajectory(x, "kernel").stderr("f").any()


def test_what_was_not_recorded_is_named():
    run = trajectory(features())
    with pytest.raises(KeyError, match="K_post was not recorded; recorded were K_pre, K_pre_cross, f"):
        run.min_eig("K_post")
    with pytest.raises(ValueError, match="when must be 'pre' or 'post', got 'mid'"):
        run.joint_min_eig("mid")
    with pytest.raises(ValueError, match=r"replicas may hold .* got 'g'"):
        Trajectory(np.arange(T), "limit", {"g": np.zeros((1, T))})
    with pytest.raises(ValueError, match=r"f must be \[replicas, 3, ...\], got \(1, 2\)"):
        Trajectory(np.arange(T), "limit", {"f": np.zeros((1, 2))})
