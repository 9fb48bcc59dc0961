"""Kernels by Mehler's series: equal to the integrals, and only where nothing is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_kernels import kernels
from reference_single_input import gaussian_grid

from mup_features.jax import kernel_recursion
from mup_features.jax.activations import resolve
from mup_features.jax.dual_activations import dual
from mup_features.jax.kernels import ntk
from mup_features.jax.mehler_series import enough_terms, expansion, product_means

INPUTS = np.random.default_rng(0).standard_normal((5, 3)) / 2


def by_series(name: str, a, b, cosines, terms: int):
    """Expectations of products for pairs of variances, and their covariances."""
    activation = resolve(name)
    c = cosines * np.sqrt(np.outer(a, b))
    u, v = (expansion(activation, jnp.asarray(variances), terms) for variances in (a, b))
    return product_means(u, v, jnp.asarray(c)), c


def test_the_series_equals_the_integrals_where_it_is_chosen(x64):
    name = "silu"  # neither even nor odd
    a, b = np.array([0.0, 0.3, 1.0]), np.array([1.0, 0.02, 0.8, 0.4])
    cosines = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.999, 0.1], [1.0, -0.5, -0.99, 0.7]])
    terms = enough_terms(resolve(name), jnp.asarray([*a, *b]))
    assert terms
    got, c = by_series(name, a, b, cosines, terms)
    pairs = [jnp.asarray(np.broadcast_to(part, c.shape)) for part in (a[:, None], b, c)]
    expected = jax.jit(dual(name))(*pairs)
    # Rounding of sums of 256 terms, and of 151 x 151 nodes.
    np.testing.assert_allclose(got, expected, atol=5e-14)


def test_what_is_missed_of_the_mean_square_bounds_what_is_missed_of_products(x64):
    variances, terms = np.array([4.0, 3.0]), 64
    cosines = np.array([[1.0, 0.99], [-1.0, 0.5]])
    (few, _), _ = by_series("tanh", variances, variances, cosines, terms)
    (many, _), _ = by_series("tanh", variances, variances, cosines, 1024)
    (z,), w = gaussian_grid(1)
    whole = np.tanh(np.sqrt(variances)[:, None] * z) ** 2 @ w
    missed = whole - np.sum(expansion(resolve("tanh"), jnp.asarray(variances), terms).value ** 2, axis=0)
    assert (missed > 1e-8).all()
    # With rounding: at u = v the bound is what is missed.
    assert (np.abs(many - few) <= np.sqrt(np.outer(missed, missed)) + 1e-13).all()
    assert np.abs(many - few)[0, 0] > 0.99 * missed[0]


@pytest.mark.parametrize(
    ("activation", "variance", "terms"),
    [
        ("tanh", 0.3, 64),
        ("tanh", 1.0, 256),
        ("tanh", 40.0, 0),
        ("elu", 0.3, 0),
        (lambda x: 0 * x, 1.0, 64),
        (lambda x: jnp.exp(x**2), 1.0, 0),
        (lambda x: jnp.sin(150 * x), 1.0, 0),  # at the nodes it equals a slow sine
    ],
    ids=["tame", "usual", "too steep", "kinked", "vanishing", "without moments", "faster than the nodes"],
)
def test_terms_are_as_many_as_leave_rounding_only(x64, activation, variance, terms):
    assert enough_terms(resolve(activation), jnp.asarray([variance])) == terms


def test_kernels_by_series_are_those_by_integrals(x64, monkeypatch):
    options = {"depth": 2, "activation": "tanh", "w_std": 1.2, "b_std": 0.1, "return_layers": True}
    series = np.asarray(ntk(INPUTS, **options))
    # A row with itself too, where the symmetric kernel takes an integral over one axis.
    np.testing.assert_allclose(ntk(INPUTS, INPUTS[:2], **options), series[:, :, :2], atol=1e-13)
    monkeypatch.setattr(kernel_recursion, "enough_terms", lambda *_: 0)
    integrals = np.asarray(ntk(INPUTS, **options))
    # Rounding of two layers; kernels are of order one.
    np.testing.assert_allclose(series, integrals, atol=1e-13)
    assert not np.array_equal(series, integrals)


def test_kernels_of_kinked_activations_are_those_of_the_reference(x64):
    def elu(x):
        return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))

    def slope(x):
        return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0)))

    _, layers = kernels(INPUTS[:2], 1, elu, slope)
    got = ntk(INPUTS[:2], depth=1, activation="elu", return_layers=True)
    # Second order of the spacing: phi' has a kink.
    np.testing.assert_allclose(got, layers, atol=2e-3)
