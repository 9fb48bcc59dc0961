"""Rank-one updates equal direct inverses; spans equal matrix ranks; both hold in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import float64

from linbandit_lowerbounds import linalg
from linbandit_lowerbounds.environment import Spec


def spec(n_blocks, width):
    return Spec(None, None, n_blocks * width, n_blocks, width, 4, 0, 100)


def gathered(blocks, xs, rewards, weights, *, n_blocks, lam):
    """Statistics after all observations, one after the other."""
    start = linalg.ridge(spec(n_blocks, xs.shape[1]), lam)

    def step(statistics, one):
        return linalg.add(statistics, *one), None

    observations = tuple(jnp.asarray(a) for a in (blocks, xs, rewards, weights))
    return jax.lax.scan(step, start, observations)[0]


@pytest.fixture
def data(x64):
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, 40), rng.normal(size=(40, 4)), rng.normal(size=40), rng.uniform(0, 3, 40)


def test_updates_equal_direct_inverses_in_every_block(data):
    blocks, xs, rewards, weights = data
    statistics = gathered(*data, n_blocks=3, lam=0.7)
    log_det = 0.0
    for m in range(3):
        here = blocks == m
        gram = 0.7 * np.eye(4) + (xs[here].T * weights[here]) @ xs[here]
        response = xs[here].T @ (weights[here] * rewards[here])
        log_det += np.linalg.slogdet(gram / 0.7)[1]
        # 40 updates in float64 with condition numbers below 100.
        np.testing.assert_allclose(statistics.inverse[m], np.linalg.inv(gram), atol=1e-12)
        np.testing.assert_allclose(statistics.response[m], response, atol=1e-12)
        theta = linalg.estimate(statistics, jnp.asarray(m))
        np.testing.assert_allclose(theta, np.linalg.solve(gram, response), atol=1e-12)
    assert float(statistics.log_det) == pytest.approx(log_det, abs=1e-11)


def test_inverse_stays_symmetric_to_the_last_bit(data):
    statistics = gathered(*data, n_blocks=3, lam=0.7)
    np.testing.assert_array_equal(statistics.inverse, np.swapaxes(statistics.inverse, 1, 2))


def test_blocks_equal_one_dense_matrix(data):
    blocks, xs, rewards, weights = data
    statistics = gathered(*data, n_blocks=3, lam=0.7)
    wide = np.zeros((40, 12))
    for row, (m, x) in enumerate(zip(blocks, xs, strict=True)):
        wide[row, 4 * m : 4 * m + 4] = x
    dense = gathered(np.zeros(40, int), wide, rewards, weights, n_blocks=1, lam=0.7)
    for m in range(3):
        part = slice(4 * m, 4 * m + 4)
        np.testing.assert_allclose(dense.inverse[0, part, part], statistics.inverse[m], atol=1e-13)
        np.testing.assert_allclose(dense.response[0, part], statistics.response[m], atol=1e-13)
    assert float(dense.log_det) == pytest.approx(float(statistics.log_det), abs=1e-12)


def test_an_observation_of_weight_zero_changes_nothing(data):
    statistics = gathered(*data, n_blocks=3, lam=0.7)
    after = linalg.add(statistics, jnp.asarray(1), jnp.ones(4), jnp.asarray(5.0), 0.0)
    for old, new in zip(statistics, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_squared_norm_and_half_width_agree_with_the_definition(data):
    from linbandit_lowerbounds.decision_sets import DecisionSet

    statistics = gathered(*data, n_blocks=3, lam=0.7)
    x = np.array([0.3, -1.0, 0.0, 2.0])
    shown = DecisionSet(jnp.asarray(x)[None], jnp.ones(1, bool), jnp.asarray(2), 3)
    norm = np.sqrt(x @ np.asarray(statistics.inverse[2]) @ x)
    width = linalg.half_width(statistics, shown, jnp.asarray(0), jnp.asarray(1.5))
    assert float(width) == pytest.approx(1.5 * norm, rel=1e-14)
    # Rounding may push a form below zero; it is clipped.
    assert float(linalg.squared_norm(-jnp.eye(2), jnp.ones(2))) == 0.0


@pytest.mark.slow
def test_a_million_float32_updates_keep_the_inverse_positive_and_accurate():
    d, rounds = 4, 10**6
    key = jax.random.key(0)

    def step(k, statistics):
        x = jax.random.normal(jax.random.fold_in(key, k), (d,)) / d
        return linalg.add(statistics, jnp.zeros((), jnp.int32), x, jnp.ones(()))

    @jax.jit
    def exact(gram):
        chunks = jnp.arange(rounds).reshape(-1, 1000)

        def add(gram, ks):
            xs = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), (d,)))(ks) / d
            return gram + xs.T @ xs, None

        return jax.lax.scan(add, gram, chunks)[0]

    statistics = jax.jit(lambda s: jax.lax.fori_loop(0, rounds, step, s))(linalg.ridge(spec(1, d), 1.0))
    inverse = np.asarray(statistics.inverse[0], np.float64)
    np.testing.assert_array_equal(inverse, inverse.T)
    assert np.linalg.eigvalsh(inverse).min() > 0
    gram = np.asarray(exact(jnp.eye(d)), np.float64)
    # V P = I up to drift: a million float32 roundings, each 6e-8 relative, that partly cancel.
    np.testing.assert_allclose(gram @ inverse, np.eye(d), atol=0.02)


# ---------------------------------------------------------------------------------------------- spans


@pytest.mark.parametrize("enable", [False, True], ids=["float32", "float64"])
def test_span_follows_the_rank_and_predicts_exactly(enable):
    with float64(enable):
        rng = np.random.default_rng(1)
        theta, block = rng.normal(size=5), jnp.asarray(1)
        extend, outside = jax.jit(linalg.extend), jax.jit(linalg.outside)
        basis = linalg.span_basis(spec(2, 5))
        played = np.zeros((0, 5))
        for k in range(12):
            fresh = k % 3 == 0
            x = rng.normal(size=5) if fresh else rng.normal(size=len(played)) @ played
            assert bool(outside(basis, block, jnp.asarray(x[None], float))[0]) == fresh
            basis = extend(basis, block, jnp.asarray(x, float), jnp.asarray(x @ theta, float))
            played = np.vstack([played, x / np.linalg.norm(x)])
            assert int(basis.rank[1]) == np.linalg.matrix_rank(played, tol=1e-3)
        tests = jnp.asarray(rng.normal(size=(6, 4)) @ played[[0, 3, 6, 9]], float)
        rtol = 1e-12 if enable else 2e-5  # rounding times the condition of four random vectors
        vectors = np.asarray(basis.vectors[1])
        predicted = np.asarray(tests) @ vectors.T @ np.asarray(basis.values[1])
        np.testing.assert_allclose(predicted, np.asarray(tests) @ theta, rtol=rtol, atol=rtol)
        orthonormal = np.diag([1.0, 1, 1, 1, 0])
        np.testing.assert_allclose(vectors @ vectors.T, orthonormal, atol=1e-12 if enable else 1e-6)
        assert int(basis.rank[0]) == 0  # the other block was never touched
        assert not np.asarray(basis.vectors[0]).any()


def test_span_tolerance_is_relative_to_the_length(x64):
    block = jnp.asarray(0)
    basis = linalg.extend(linalg.span_basis(spec(1, 3)), block, jnp.array([1.0, 0.0, 0.0]))
    tilted = jnp.array([[1.0, 1e-6, 0.0], [1.0, 1e-10, 0.0], [1e-20, 1e-22, 0.0], [0.0, 0.0, 0.0]])
    assert linalg.outside(basis, block, tilted).tolist() == [True, False, True, False]
    assert linalg.outside(basis, block, tilted, 1e-3).tolist() == [False, False, True, False]
    same = linalg.extend(basis, block, tilted[1], 7.0)
    for old, new in zip(basis, same, strict=True):
        np.testing.assert_array_equal(old, new)


def test_nearly_parallel_actions_still_give_an_orthogonal_basis(x64):
    # One pass of Gram-Schmidt leaves 1e-16 / 1e-7 of the first vector in the second; two passes do not.
    block = jnp.asarray(0)
    first = np.random.default_rng(4).normal(size=4)
    basis = linalg.extend(linalg.span_basis(spec(1, 4)), block, jnp.asarray(first))
    basis = linalg.extend(basis, block, jnp.asarray(first + 1e-7 * np.array([1.0, -1, 1, 1])))
    assert int(basis.rank[0]) == 2
    assert abs(float(basis.vectors[0, 0] @ basis.vectors[0, 1])) < 1e-15
