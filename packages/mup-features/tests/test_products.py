"""Products of an infinite random matrix and its transpose with vectors of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_features.jax.columns import appended, inner, mean_products
from mup_features.jax.fields import FieldSource, match_moments
from mup_features.jax.products import empty_matrix, product, record_update

SAMPLES = 512
SIGMA = 1.3


class Side:
    """A population with fields that are there from the start, and a source of more."""

    def __init__(self, number: int, given: int) -> None:
        self.source = FieldSource(jax.random.key(3), 0, number, SAMPLES)
        self.given = match_moments(self.source.draw(0, given), ())
        self.used = given

    def fresh(self, count, columns, known):
        new = match_moments(self.source.draw(self.used, columns), (self.given, *known))
        self.used += count
        return new * (jnp.arange(columns) < count)


@pytest.fixture
def layers(x64):
    """A matrix that has met nothing, and the populations before and behind it."""
    here, there = Side(0, 3), Side(1, 4)
    return empty_matrix(SIGMA), here, there


def columns(blocks, rank):
    return jnp.concatenate(blocks, axis=1)[:, :rank]


def look(matrix, x, far, transpose=False):
    return product(matrix, x, transpose=transpose, fresh=far.fresh, tol=1e-10, extend=False).value


def times(matrix, x, there, tol=1e-10):
    made = product(matrix, x, transpose=False, fresh=there.fresh, tol=tol, extend=True)
    return made.value, matrix._replace(x=made.basis), made.coefficients


def times_transpose(matrix, y, here, tol=1e-10):
    made = product(matrix, y, transpose=True, fresh=here.fresh, tol=tol, extend=True)
    return made.value, matrix._replace(y=made.basis), made.coefficients


def met(layers):
    """A matrix after products in both directions with nonlinear functions of what came out before."""
    matrix, here, there = layers
    x = jnp.tanh(here.given)
    Wx, matrix, _ = times(matrix, x, there)
    y = jnp.sin(Wx) * there.given[:, :3] + 0.2
    WTy, matrix, _ = times_transpose(matrix, y, here)
    again = jnp.tanh(x + WTy)
    _, matrix, _ = times(matrix, again, there)
    return matrix, jnp.concatenate([x, again], axis=1), y


def test_a_matrix_and_its_transpose_are_adjoint(layers):
    matrix, x, y = met(layers)
    _, here, there = layers
    Wx, WTy = look(matrix, x, there), look(matrix, y, here, transpose=True)
    np.testing.assert_allclose(mean_products(y, Wx), mean_products(WTy, x), atol=1e-12)
    assert jnp.abs(mean_products(y, Wx)).max() > 0.1


def test_products_are_linear_and_repeat(layers):
    matrix, here, there = layers
    x = jnp.tanh(here.given)
    value, matrix, _ = times(matrix, x, there)
    mix = jnp.asarray([[1.0, -2.0], [0.5, 3.0], [0.0, 1e-3]])
    again, after, _ = times(matrix, x @ mix, there)
    np.testing.assert_allclose(again, value @ mix, atol=1e-11)
    assert after.x.rank == matrix.x.rank == 3


def test_first_products_are_gaussian_with_the_covariance_of_their_arguments(layers):
    matrix, here, there = layers
    x = jnp.tanh(here.given) + 0.4
    value, _, _ = times(matrix, x, there)
    np.testing.assert_allclose(mean_products(value, value), SIGMA**2 * mean_products(x, x), atol=1e-12)
    np.testing.assert_allclose(mean_products(value, there.given), 0.0, atol=1e-13)


def test_the_product_with_an_image_of_the_transpose_returns_to_where_it_came_from(layers):
    matrix, here, there = layers
    y = there.given[:, :1] ** 3
    image, matrix, _ = times_transpose(matrix, y, here)
    back, _, _ = times(matrix, image, there)
    # W W^T y = sigma^2 y + sigma |W^T y| g, with g independent of y: exact for matched fields.
    rest = back - SIGMA**2 * y
    np.testing.assert_allclose(mean_products(rest, there.given), 0.0, atol=1e-12)
    size = SIGMA**2 * mean_products(image, image)
    np.testing.assert_allclose(mean_products(rest, rest), size, rtol=1e-12)


def test_the_mean_derivative_multiplies_a_nonlinear_function_of_an_image(layers):
    matrix, here, there = layers
    y = there.given[:, :1]
    image, matrix, _ = times_transpose(matrix, y, here)
    value, _, _ = times(matrix, image**3, there)
    # Zdot = sigma^2 y E[3 (W^T y)^2] = 3 sigma^4 y; the sample's own moment stands for E.
    moment = mean_products(image**3, image)[0, 0] / SIGMA**2
    np.testing.assert_allclose(mean_products(value, y)[0, 0], SIGMA**2 * moment, rtol=1e-12)
    assert abs(float(moment) - 3 * SIGMA**2) < 0.2  # 512 Sobol points


def test_learned_parts_add_outer_products_of_signals(layers):
    matrix, here, there = layers
    x, b = jnp.tanh(here.given), jnp.sin(there.given[:, :3]) + 0.1
    _, matrix, cx = times(matrix, x, there)
    _, matrix, cb = times_transpose(matrix, b, here)
    # Both bases are complete now, so that Wx has its part along b.
    Wx, WTb = look(matrix, x, there), look(matrix, b, here, transpose=True)
    moved = matrix
    for _ in range(2):
        moved = record_update(moved, cb, cx, 0.3, 0.5, 0.9)
    # Two steps with gradient b x^T, momentum 1/2 and shrinking by 0.9.
    share = 0.3 * 0.9 + 0.3 * 1.5
    value, _, _ = times(moved, x, there)
    np.testing.assert_allclose(value, 0.81 * Wx - share * b @ mean_products(x, x), atol=1e-11)
    value, _, _ = times_transpose(moved, b, here)
    np.testing.assert_allclose(value, 0.81 * WTb - share * x @ mean_products(b, b), atol=1e-11)


def test_an_onlookers_product_has_the_right_law_and_leaves_no_trace(layers):
    matrix, x, _ = met(layers)
    _, _here, there = layers
    before = jax.tree.map(np.asarray, matrix)
    np.testing.assert_allclose(look(matrix, x, there), times(matrix, x, there)[0], atol=1e-11)
    new = jnp.cos(x)
    seen = look(matrix, new, there)
    kept, _, _ = times(matrix, new, there)
    # Both products have the same covariance with everything that was there, and with one another.
    y = columns(matrix.y.q, matrix.y.rank)
    for fields in (*matrix.x.g, there.given, seen * 0 + 1.0):
        np.testing.assert_allclose(mean_products(seen, fields), mean_products(kept, fields), atol=1e-11)
    free = seen - y @ mean_products(y, seen)
    kept_free = kept - y @ mean_products(y, kept)
    assert jnp.abs(mean_products(free, free) - mean_products(kept_free, kept_free)).max() < 0.1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, matrix))


def test_bases_stay_orthonormal_when_arguments_nearly_coincide(layers):
    matrix, here, there = layers
    x = jnp.tanh(here.given[:, :2])
    value, matrix, _ = times(matrix, x, there)
    near = x + 1e-7 * here.given[:, 1:] ** 2
    both = jnp.concatenate([near, near[:, :1] + 1e-8 * here.given[:, :1] ** 3], axis=1)
    after_value, after, coefficients = times(matrix, both, there)
    q = columns(after.x.q, 5)
    assert after.x.rank == 5
    np.testing.assert_allclose(mean_products(q, q), np.eye(5), atol=1e-13)
    np.testing.assert_allclose(q @ coefficients, both, atol=1e-13)
    # |W (near - x)| is sigma times 1e-7 |x^2|.
    assert 1e-8 < jnp.abs(after_value[:, :2] - value).max() < 1e-5


def test_short_directions_are_dropped_relative_to_the_longest_argument(layers):
    matrix, here, there = layers
    x = here.given[:, :2] * jnp.asarray([1.0, 1e-4])
    _, kept, _ = times(matrix, x, there, tol=1e-5)
    assert kept.x.rank == 2
    _, dropped, _ = times(matrix, x, there, tol=1e-3)
    assert dropped.x.rank == 1
    # The longest argument so far counts, not that of this product.
    _, later, _ = times(dropped, x[:, 1:], there, tol=1e-3)
    assert later.x.rank == 1


def test_dependent_arguments_cost_one_direction_each(layers):
    matrix, here, there = layers
    x = jnp.tanh(here.given[:, :2])
    value, matrix, _ = times(matrix, jnp.concatenate([x, x, x @ jnp.ones((2, 1))], axis=1), there)
    assert matrix.x.rank == 2
    np.testing.assert_allclose(value[:, :2], value[:, 2:4], atol=1e-12)
    np.testing.assert_allclose(value[:, 4], value[:, 0] + value[:, 1], atol=1e-12)


def test_the_order_of_arguments_does_not_matter(layers):
    matrix, here, there = layers
    x = jnp.tanh(here.given) + 0.1 * here.given**2
    value, _, _ = times(matrix, x, there)
    there.used = 4
    permuted, _, _ = times(matrix, x[:, jnp.asarray([2, 0, 1])], there)
    np.testing.assert_allclose(permuted, value[:, jnp.asarray([2, 0, 1])], atol=1e-11)


def test_a_matrix_that_vanished_keeps_what_was_learned(layers):
    matrix, here, there = layers
    matrix = matrix._replace(scale=0.0)
    x, b = jnp.tanh(here.given), jnp.sin(there.given[:, :3])
    value, matrix, cx = times(matrix, x, there)
    np.testing.assert_array_equal(value, jnp.zeros_like(value))
    assert there.used == 4  # no field is spent
    _, matrix, cb = times_transpose(matrix, b, here)
    value, _, _ = times(record_update(matrix, cb, cx, 0.3, 0.0, 1.0), x, there)
    np.testing.assert_allclose(value, -0.3 * b @ mean_products(x, x), atol=1e-12)


def test_learned_parts_cover_directions_that_came_after_the_last_update(layers):
    matrix, here, there = layers
    x, b = jnp.tanh(here.given), jnp.sin(there.given[:, :3]) + 0.1
    _, matrix, cx = times(matrix, x[:, :1], there)
    _, matrix, cb = times_transpose(matrix, b[:, :1], here)
    moved = record_update(matrix, cb, cx, 0.3, 0.0, 1.0)
    _, moved, cx = times(moved, x, there)
    _, moved, cb = times_transpose(moved, b, here)
    assert moved.learned.shape == (1, 1)
    moved = record_update(moved, cb, cx, 0.2, 0.0, 1.0)
    still = moved._replace(learned=0 * moved.learned)
    change = look(moved, x, there) - look(still, x, there)
    expected = -(b[:, :1] * 0.3) @ mean_products(x[:, :1], x) - 0.2 * b @ mean_products(x, x)
    np.testing.assert_allclose(change, expected, atol=1e-11)


@pytest.mark.parametrize(("new", "blocks"), [(3, 1), (20, 1), (40, 2), (150, 5)])
def test_blocks_hold_columns_in_order_however_they_arrive(x64, new, blocks):
    given = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2 * new)))
    held, used = (), 0
    for start, count in ((0, new), (new, new - 1), (2 * new - 1, 1)):
        block = jnp.pad(given[:, start : start + count], ((0, 0), (0, new - count)), constant_values=9.0)
        held, used = appended(held, used, block, count, 64), used + count
    assert len(held) == blocks
    np.testing.assert_array_equal(columns(held, used), given)
    assert not np.concatenate(held, axis=1)[:, used:].any()
    np.testing.assert_allclose(inner(held, given)[:used], given.T @ given / 8, atol=1e-15)


def test_signals_that_are_not_finite_are_refused(layers):
    matrix, here, there = layers
    with pytest.raises(FloatingPointError, match="signals or their squares are not finite"):
        times(matrix, here.given.at[0, 0].set(jnp.nan), there)
