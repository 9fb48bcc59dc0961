"""NNGP, NTK and gradient descent with a kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import float64
from reference import R4, X, kernels
from reference_kernels import expectation as trapezoid_expectation
from scipy.special import erf, ndtr

from mup_features.jax import kernel_recursion
from mup_features.jax.dual_activations import dual, expectation, has_closed_form
from mup_features.jax.kernels import KernelGD, limiting_kernel, nngp, ntk

UPPER = np.triu_indices(2)
SMOOTH = {
    "cos": (np.cos, lambda x: -np.sin(x)),
    "erf": (erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2))),
    "gelu": (
        lambda x: x * ndtr(x),
        lambda x: ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "identity": (lambda x: x, np.ones_like),
    "sin": (np.sin, np.cos),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
}
KINKED = {
    "abs": (np.abs, np.sign),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1, 0.01)),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
}
EVERY = SMOOTH | KINKED


@pytest.mark.parametrize("name", R4)
def test_kernels_of_r4(x64, name):
    k3, theta, without_first = R4[name]
    terms = ntk(X, depth=3, activation=name, return_layers=True)
    # Printed with 13 decimals; tanh by quadrature is exact to 1e-13 per layer.
    np.testing.assert_allclose(terms[-1][UPPER], k3, atol=5e-13)
    np.testing.assert_allclose(sum(terms)[UPPER], theta, atol=5e-13)
    np.testing.assert_allclose(
        limiting_kernel(X, depth=3, activation=name, parametrization="sp"), sum(terms[1:]), atol=1e-14
    )
    if without_first is not None:
        np.testing.assert_allclose(sum(terms[1:])[UPPER], without_first, atol=5e-13)


@pytest.mark.parametrize("name", EVERY)
def test_products_of_activations_have_the_expectations_of_trapezoids(x64, name):
    phi, dphi = EVERY[name]
    where = np.array([[1.3, 0.8], [0.6, 1.1], [0.5, -0.9]])
    values, slopes = jax.jit(dual(name))(*jnp.asarray(where))
    # The rule with spacing 0.115 is exact to rounding for smooth functions. At a kink of the integrand its
    # error is h^2, at a jump h.
    tolerances = (1e-11, 1e-11) if name in SMOOTH else (5e-3, 0.05)
    for (a, b, c), value, slope in zip(where.T, values, slopes, strict=True):
        assert abs(value - trapezoid_expectation(lambda u, v: phi(u) * phi(v), a, b, c)) < tolerances[0]
        assert abs(slope - trapezoid_expectation(lambda u, v: dphi(u) * dphi(v), a, b, c)) < tolerances[1]
    assert has_closed_form(name) is (name != "tanh")


@pytest.mark.parametrize("name", EVERY)
def test_derivative_in_the_covariance_is_the_expectation_of_derivatives(x64, name):
    a = jnp.full(4, 1.2)
    # Both at once are compiled once.
    (_, slope), (got, _) = jax.jit(lambda c: jax.jvp(lambda c: dual(name)(a, a, c), (c,), (jnp.ones(4),)))(
        a * jnp.array([-0.7, 0.0, 0.999, 1.0])
    )
    # Price's theorem; near cosine 1 the angle loses half the digits.
    np.testing.assert_allclose(got, slope, rtol=1e-7)


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu"])
def test_derivative_in_the_variance_is_that_of_finite_differences(x64, name):
    def moved(a):
        return dual(name)(a, jnp.full(3, 0.7), jnp.full(3, 0.4))[0]

    value, slope = jax.jit(lambda a: jax.jvp(moved, (a,), (jnp.ones(3),)))(1.1 + jnp.array([-1e-5, 0, 1e-5]))
    # Central differences: the square of the step, 1e-10.
    np.testing.assert_allclose(slope[1], (value[2] - value[0]) / 2e-5, rtol=1e-8)


def test_expectations_can_be_differentiated_where_a_variance_is_zero(x64):
    value = expectation(jnp.tanh, jnp.cos, 151)
    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(
        jnp.float64(0.0), jnp.float64(0.5), jnp.float64(0.0)
    )
    # tanh''(0) = 0; tanh'(0) E[-sin] = 0; E tanh(0) = 0.
    np.testing.assert_allclose(gradient, [0, 0, 0], atol=1e-13)
    curved = jax.jit(jax.grad(expectation(jnp.cos, jnp.cos, 151)))(
        jnp.float64(0.0), jnp.float64(0.5), jnp.float64(0.0)
    )
    np.testing.assert_allclose(curved, -0.5 * np.exp(-0.25), atol=1e-13)


def test_gradient_of_the_ntk_is_finite_on_equal_inputs(x64):
    def total(inputs):
        return jnp.sum(ntk_of(inputs))

    def ntk_of(inputs):
        value = dual("relu")
        K = inputs @ inputs.T
        q = jnp.diag(K)
        return value(q[:, None], q[None, :], K)[0]

    gradient = jax.jit(jax.grad(total))(jnp.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["gelu"])
def test_weights_and_biases_enter_as_in_the_reference(x64, name):
    K, layers = kernels(X, 2, *SMOOTH[name], w_std=1.3, b_std=0.4)
    options = {"depth": 2, "activation": name, "w_std": 1.3, "b_std": 0.4}
    np.testing.assert_allclose(nngp(X, **options), K, atol=1e-10)
    np.testing.assert_allclose(ntk(X, return_layers=True, **options), layers, atol=1e-10)
    np.testing.assert_allclose(ntk(X, **options), np.sum(layers, axis=0), atol=1e-10)
    stack = nngp(X, return_layers=True, **options)
    assert len(stack) == 3
    np.testing.assert_allclose(stack[-1], K, atol=1e-10)


def test_every_tile_of_a_large_kernel_equals_the_kernel_of_its_inputs(x64, monkeypatch):
    inputs, some = np.random.default_rng(0).standard_normal((10, 4)), np.array([0, 3, 4, 8, 9])
    # The same formula on the same numbers, but a row with itself loses half the digits of the angle.
    alone = ntk(inputs[some], depth=2, activation="relu")
    monkeypatch.setattr(kernel_recursion, "_tile", lambda *_: 4)
    whole = ntk(inputs, depth=2, activation="relu")
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(whole[np.ix_(some, some)], alone, atol=1e-12)
    np.testing.assert_allclose(
        ntk(inputs, inputs[some], depth=2, activation="relu"), whole[:, some], atol=1e-6
    )


def test_a_function_of_the_users_own_is_integrated(x64):
    theta = ntk(X, depth=3, activation=lambda x: jnp.tanh(x))
    np.testing.assert_allclose(theta[UPPER], R4["tanh"][1], atol=5e-13)
    assert not has_closed_form(lambda x: jnp.sin(2 * x))


def test_kernels_follow_the_precision_of_the_caller():
    theta = ntk(X.astype(np.float32), depth=3, activation="relu")
    assert theta.dtype == jnp.float32
    np.testing.assert_allclose(theta[UPPER], R4["relu"][1], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([("relu", ntk), ("gelu", nngp)]))
def test_kernels_are_positive_semidefinite(seed, pair):
    name, kernel = pair
    inputs = np.random.default_rng(seed).standard_normal((6, 3))
    with float64(True):
        for matrix in kernel(inputs, depth=3, activation=name, b_std=0.1, return_layers=True):
            eigenvalues = np.linalg.eigvalsh(matrix)
            # Rounding of a matrix of that size.
            assert eigenvalues[0] > -1e-13 * eigenvalues[-1]


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
@jax.grad
def tanh_gradient(weights, x):
    """Gradient of the output of a tanh net in its weights, for each input."""
    for W in weights[:-1]:
        x = jnp.tanh(W @ x)
    return (weights[-1] @ x)[0]


@pytest.mark.parametrize("sigma", [1.7, (0.5, 1.2, 0.8, 2.0)])
def test_limiting_kernel_is_the_mean_of_kernels_of_wide_nets(x64, sigma):
    rng, width, depth = np.random.default_rng(3), 500, 3
    sigmas = np.broadcast_to(sigma, 4)
    scales = sigmas / np.array([1.0] + [np.sqrt(width)] * depth)
    shapes = [(width, 2)] + [(width, width)] * (depth - 1) + [(1, width)]
    rates = np.array([1.0] + [1 / width] * depth)

    terms = []
    for _ in range(8):
        weights = [s * rng.standard_normal(shape) for s, shape in zip(scales, shapes, strict=True)]
        parts = [np.asarray(g).reshape(2, -1) for g in tanh_gradient(weights, X)]
        terms.append([rate * g @ g.T for rate, g in zip(rates, parts, strict=True)])
    for regime, first in (("ntp", 0), ("sp", 1)):
        empirical = np.sum(np.array(terms)[:, first:], axis=1)
        expected = limiting_kernel(X, depth=3, activation="tanh", parametrization=regime, sigma=sigma)
        error = empirical.std(axis=0, ddof=1) / np.sqrt(len(terms))
        # Four standard errors of a mean of 8 nets, and a bias of order 1/n.
        assert (np.abs(empirical.mean(axis=0) - expected) < 4 * error + np.abs(expected) / 100).all()


def test_kernel_descent_is_the_power_of_the_matrix(x64):
    rng = np.random.default_rng(0)
    theta = np.asarray(ntk(X, depth=3, activation="tanh", return_layers=True)).sum(axis=0)
    y, f0 = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    cross = rng.standard_normal((4, 2))
    run = KernelGD(theta, cross, lr=0.3).predict(y, [0, 1, 7], f0, f0_test=0.5)
    f, f_test = f0, np.full((4, 3), 0.5)
    for t in range(8):
        if t in (0, 1, 7):
            np.testing.assert_allclose(run.train[[0, 1, 7].index(t)], f, atol=1e-13)
            np.testing.assert_allclose(run.test[[0, 1, 7].index(t)], f_test, atol=1e-13)
        f, f_test = f - 0.3 * theta @ (f - y), f_test - 0.3 * cross @ (f - y)


def test_many_small_steps_are_the_flow(x64):
    theta, y = np.array([[1.2, 0.1], [0.1, 1.1]]), np.array([1.0, -0.5])
    flow = KernelGD(theta, theta, lr=0.3).predict(y, 2.0, continuous=True)
    steps = KernelGD(theta, theta, lr=3e-7).predict(y, 2_000_000)
    # First-order method: the error is proportional to the rate.
    np.testing.assert_allclose(flow.train, steps.train, atol=1e-6)
    np.testing.assert_allclose(flow.train, flow.test, atol=1e-14)
    assert flow.train.shape == (2,)


def test_null_directions_of_the_kernel_stay_where_they_were(x64):
    run = KernelGD(np.diag([1.0, 0.0]), np.ones((1, 2)), lr=0.5).predict(np.ones(2), 3)
    np.testing.assert_allclose(run.train, [0.875, 0.0], atol=1e-15)
    # Test output: sum of 0.5, 0.25, 0.125 from the first and 3 times 0.5 from the second residual.
    np.testing.assert_allclose(run.test, [2.375], atol=1e-15)
    overshooting = KernelGD(np.eye(1), lr=1.5).predict(np.ones(1), 3)
    np.testing.assert_allclose(overshooting.train, [1.125], atol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntk(X, depth=0, activation="relu"), "depth must be an integer >= 1, got 0"),
        (lambda: ntk(X, depth=2, activation="rely"), "activation must be one of"),
        (lambda: ntk(X[0], depth=2, activation="relu"), "X1 must be"),
        (lambda: ntk(X, X[:, :1], depth=2, activation="relu"), "X2 must have 2 columns like X1, got 1"),
        (lambda: nngp(X * np.nan, depth=2, activation="relu"), "X1 must be finite"),
        (lambda: nngp(X, depth=2, activation="relu", w_std=0.0), "w_std must be finite and > 0, got 0.0"),
        (lambda: nngp(X, depth=2, activation="relu", b_std=-1.0), "b_std must be finite and >= 0, got -1.0"),
        (lambda: nngp(X, depth=2, activation="tanh", points=2), "points must be an integer >= 3, got 2"),
        (lambda: limiting_kernel(X, depth=2, activation="relu", parametrization="mup"), "got 'mup'"),
        (lambda: limiting_kernel(X, depth=2, activation="relu", sigma=(1.0, 2.0)), "depth \\+ 1 = 3"),
        (lambda: KernelGD(np.ones((2, 3)), lr=1.0), "theta_train must be square"),
        (
            lambda: KernelGD(np.array([[1.0, 0.5], [0.4, 1.0]]), lr=1.0),
            "symmetric, got entries that differ by 0.1",
        ),
        (lambda: KernelGD(np.eye(2), lr=0.0), "lr must be finite and > 0, got 0.0"),
        (lambda: KernelGD(np.eye(2), np.ones((3, 1)), lr=1.0), "theta_test must be"),
        (lambda: KernelGD(np.eye(2), lr=1.0).predict(np.ones(3), 1), "y must be"),
        (
            lambda: KernelGD(np.eye(2), lr=1.0).predict(np.ones(2), -1),
            "steps must be finite and >= 0, got -1",
        ),
        (lambda: KernelGD(np.eye(2), lr=1.0).predict(np.ones(2), 0.5), "whole numbers unless continuous"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
