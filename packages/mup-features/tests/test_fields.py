"""Standard normal fields: Sobol points, their scrambling, moment matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import kstest, qmc

from mup_features.jax.columns import inverse_transpose, mean_products
from mup_features.jax.fields import FieldSource, _direction_numbers, _sobol_normal, match_moments

KEY = jax.random.key(0)


def uniform(fields) -> np.ndarray:
    """The points of the unit cube behind Sobol fields, in units of 2^-32."""
    return np.rint(ndtr(np.asarray(fields)) * 2.0**32 - 0.5)


def cells(fields, samples) -> np.ndarray:
    """Which of `samples` equal intervals each point lies in, by column."""
    return np.floor(ndtr(np.asarray(fields)) * samples).astype(int)


def test_direction_numbers_make_scipys_points_in_natural_instead_of_gray_order(x64):
    bits, dims = 9, 70
    number = np.arange(2**bits)
    gray = number ^ (number >> 1)
    plain = _sobol_normal(
        jnp.asarray(gray.astype(np.uint32)),
        jnp.asarray(_direction_numbers(dims, bits).T),
        jnp.zeros(dims, jnp.uint32),
    )
    expected = qmc.Sobol(dims, scramble=False, bits=32).random(2**bits) * 2.0**32
    # The quantile and back: the distribution function near 1 resolves 2^-32 to one unit.
    np.testing.assert_allclose(uniform(plain), expected, atol=1.0)


def test_scrambling_keeps_one_point_in_each_interval_of_every_dimension(x64):
    fields = FieldSource(KEY, 1, 2, 256).draw(0, 90)
    np.testing.assert_array_equal(np.sort(cells(fields, 256), axis=0), np.arange(256)[:, None] + np.zeros(90))


@pytest.mark.parametrize("split", [1, 4, 16, 64, 256])
def test_scrambling_keeps_one_point_in_each_elementary_interval_of_the_first_two_dimensions(x64, split):
    fields = FieldSource(KEY, 0, 0, 256).draw(0, 2)
    boxes = cells(fields[:, :1], split)[:, 0] * (256 // split) + cells(fields[:, 1:], 256 // split)[:, 0]
    np.testing.assert_array_equal(np.sort(boxes), np.arange(256))


def test_scrambling_moves_points_uniformly(x64):
    first = [float(ndtr(FieldSource(KEY, replica, 0, 64).draw(0, 1)[5, 0])) for replica in range(200)]
    assert kstest(first, "uniform").pvalue > 0.01


@pytest.mark.parametrize("sampler", ["sobol", "normal"])
def test_fields_do_not_depend_on_how_many_are_drawn_at_once(x64, sampler):
    source = FieldSource(KEY, 0, 1, 128, sampler, qmc_dims=5)
    together = np.asarray(source.draw(0, 9))
    apart = np.concatenate([source.draw(0, 2), source.draw(2, 4), source.draw(6, 3)], axis=1)
    np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("sampler", ["sobol", "normal"])
def test_errors_of_other_keys_replicas_and_populations_are_independent_and_centred(x64, sampler):
    def errors(key, population, replicas):
        sources = (FieldSource(key, replica, population, 64, sampler) for replica in replicas)
        return np.array([np.mean(np.cos(source.draw(0, 2).sum(axis=1))) for source in sources]) - np.exp(-1)

    of = np.stack(
        [
            errors(KEY, 0, range(100)),
            errors(KEY, 1, range(100)),
            errors(jax.random.key(1), 0, range(100)),
            errors(KEY, 0, range(100, 200)),
        ]
    )
    # 100 pairs: correlations of independent numbers are below 0.4 with probability 1 - 4e-5 each.
    assert np.abs(np.corrcoef(of) - np.eye(4)).max() < 0.4
    assert (np.abs(of.mean(axis=1)) < 4 * of.std(axis=1) / 10).all()
    assert (of.std(axis=1) > 1e-3).all()


def test_fields_beyond_the_sobol_dimensions_are_plain_normal_draws(x64):
    mixed = np.asarray(FieldSource(KEY, 0, 0, 512, "sobol", qmc_dims=3).draw(0, 6))
    np.testing.assert_array_equal(mixed[:, :3], FieldSource(KEY, 0, 0, 512).draw(0, 3))
    np.testing.assert_array_equal(mixed[:, 3:], FieldSource(KEY, 0, 0, 512, "normal").draw(3, 3))
    assert kstest(mixed[:, 3:].ravel(), "norm").pvalue > 0.01


def test_sobol_integrates_a_smooth_function_far_better_than_draws_do(x64):
    def error(sampler):
        drawn = [FieldSource(KEY, replica, 0, 4096, sampler).draw(0, 2) for replica in range(20)]
        return np.std([np.mean(np.cos(fields.sum(axis=1))) - np.exp(-1.0) for fields in drawn])

    # Plain draws have sqrt((1 + e^{-4}) / 2 - e^{-2}) / 64 = 0.0096; 20 of them estimate it to a third.
    assert 0.006 < error("normal") < 0.014
    assert error("sobol") < 0.001


def test_moment_matching_is_exact_and_keeps_earlier_fields(x64):
    source = FieldSource(KEY, 0, 0, 256)
    earlier = match_moments(source.draw(0, 7), ())
    padded = jnp.pad(earlier, ((0, 0), (0, 4)))
    new = match_moments(source.draw(7, 20), (padded,))
    both = jnp.concatenate([jnp.ones((256, 1)), earlier, new], axis=1)
    # Rounding of sums over 256 points.
    np.testing.assert_allclose(mean_products(both, both), np.eye(28), atol=1e-14)


def test_moment_matched_fields_do_not_depend_on_those_drawn_after_them(x64):
    source = FieldSource(KEY, 0, 0, 256)
    together = match_moments(source.draw(0, 9), ())
    first = match_moments(source.draw(0, 4), ())
    then = match_moments(source.draw(4, 5), (first,))
    np.testing.assert_allclose(together, jnp.concatenate([first, then], axis=1), atol=1e-12)


def test_inverse_transpose_is_what_it_says(x64):
    lower = jnp.asarray(np.tril(np.random.default_rng(0).standard_normal((6, 6))) + 3 * np.eye(6))
    np.testing.assert_allclose(inverse_transpose(lower) @ lower.T, np.eye(6), atol=1e-13)
