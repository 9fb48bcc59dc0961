"""The limit by response functions and trapezoids, against references and by other means than sampling."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import ETA, R1_F, R1_K, X, Y, effective, identity_limit, train_networks
from reference_network import draw_weights
from reference_single_input import one_layer

from mup_features.jax import quadrature
from mup_features.jax.quadrature import quadrature_trajectory
from mup_features.jax.run_plan import checked_data, settings
from mup_features.jax.single_site import fields_of, grid

ONE = np.ones((1, 1))


def run(
    X, y, steps, *, depth, activation="tanh", lr=0.5, record=(), points=151, X_test=None, every=1, **options
):
    chosen = {
        "loss": "mse", "reduction": "sum", "parametrization": "mup", "sigma": 1.0, "lr_schedule": None,
        "batch": None, "momentum": 0.0, "weight_decay": 0.0, "replicas": 1,
    } | options  # fmt: skip
    plan = settings(
        depth=depth, activation=activation, input_dim=X.shape[1], output_dim=y[0].size, lr=lr, **chosen
    )
    recorded = sorted({*range(0, steps, every), steps})
    return quadrature_trajectory(plan, checked_data(plan, X, y, X_test), recorded, record, points=points)


def test_r2_of_one_layer_and_three_steps(x64):
    got = run(ONE, np.ones(1), 3, depth=1, record=("K", "change"))
    f, K = one_layer(1.0, 0.5, 3, np.tanh, lambda x: 1 / np.cosh(x) ** 2)
    # Both are exact to rounding: 151 and 161 points.
    np.testing.assert_allclose(got.f[:, 0, 0], f, atol=1e-12)
    np.testing.assert_allclose(
        got.f[1:, 0, 0], [0.4010210353360, 0.6142789201910, 0.7509974538579], atol=1e-12
    )
    np.testing.assert_allclose(got.K_post[0, :, 0, 0], np.diag(K), atol=1e-12)
    np.testing.assert_allclose(got.mean("K_post_cross")[:, 0, 0, 0], K[0], atol=1e-12)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (2, [0.3458479750486, 0.2985712674847, 0.2205041889330]),
        (3, [0.3076859409459, 0.2368717310671, 0.1478372861255]),
    ],
)
def test_r2_of_deeper_nets_after_one_update(x64, depth, expected):
    got = run(ONE, np.ones(1), 1, depth=depth, record=("K",))
    found = [got.f[1, 0, 0], got.K_post[-1, 1, 0, 0], got.mean("K_post_cross")[1, -1, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(got.stderr("f"), 0)


def test_r2_of_two_layers_after_two_updates(x64):
    # Four fields; the printed number has an error of 1e-5, and 41 points add 4e-6.
    got = run(ONE, np.ones(1), 2, depth=2, points=41)
    np.testing.assert_allclose(got.f[2, 0, 0], 0.53556, atol=2e-5)


def test_two_layers_and_two_updates_of_a_linear_net_are_r1_on_one_input(x64):
    y = np.array([0.8])
    f, K = identity_limit(ONE, y[:, None], 0.3, 2, 2)
    # Polynomials times the density: the rule is exact to rounding for any spacing below 1.
    got = run(ONE, y, 2, depth=2, activation="identity", lr=0.3, points=31, record=("K",))
    np.testing.assert_allclose(got.f[:, :, 0], f[:, :, 0], atol=1e-11)
    np.testing.assert_allclose(got.K_post[1], K, atol=1e-11)


def test_r1_of_one_layer_with_all_that_is_recorded(x64):
    got = run(
        X, Y, 3, depth=1, activation="identity", lr=ETA, points=31, record=("K", "G", "change"), X_test=X[:1]
    )
    np.testing.assert_allclose(got.f[1:, :, 0], R1_F[1], atol=1e-11)
    np.testing.assert_allclose(got.K_post[0, 3][np.triu_indices(2)], R1_K[1], atol=1e-11)
    np.testing.assert_allclose(got.f_test, got.f[:, :1], atol=1e-12)
    np.testing.assert_allclose(got.K_pre, got.K_post, atol=1e-12)
    # b_0 = V_0 chi_0 with chi_0 = -y.
    np.testing.assert_allclose(got.G[0, 0], np.outer(Y, Y), atol=1e-12)
    moved = np.sqrt(
        np.diagonal(got.K_pre[0] + got.K_pre[0, 0] - 2 * got.mean("K_pre_cross")[:, 0], axis1=1, axis2=2)
    )
    sizes = np.sqrt(np.diag(got.K_pre[0, 0]))
    np.testing.assert_allclose(
        got.change[0], np.mean(moved / sizes, axis=1), atol=1e-6
    )  # a root of rounding at step 0


def test_two_outputs_and_a_schedule_of_rates_agree_with_wide_networks(x64):
    y, width, sigma = np.array([[1.0, -0.4]]), 10_000, 1.3
    options = {"lr": 0.4, "lr_schedule": lambda t: 1.0 / (1 + t), "reduction": "mean", "sigma": sigma}
    got = run(ONE, y, 2, depth=1, record=("K", "G"), points=61, **options)
    variances, rates = effective("mup", width, 1, 0.4)
    weights = draw_weights(np.random.default_rng(0), sigma**2 * np.asarray(variances), width, 1, 2, 8)
    wide = train_networks(
        weights, rates / 2, ONE, y, 2, phi=np.tanh, dphi=lambda x: 1 / np.cosh(x) ** 2, rates_0=rates
    )
    grams = {
        name: np.stack([layer[0] @ layer[0].swapaxes(-1, -2) / width for layer in wide[part]])
        for name, part in (("K_pre", "pre"), ("K_post", "post"), ("G", "b"))
    }
    for name, values in (("f", wide["f"]), *grams.items()):
        error = values.std(axis=1, ddof=1) / np.sqrt(8)
        # Four standard errors and the bias, of order 1/n.
        gap = np.abs(got.mean(name).reshape(error.shape) - values.mean(axis=1))
        assert (gap < 4 * error + 3e-3).all(), name
    np.testing.assert_allclose(got.learning_rates, [0.4, 0.2])
    other = run(ONE, y, 2, depth=1, every=2, points=61, **options)
    np.testing.assert_array_equal(other.steps, [0, 2])
    np.testing.assert_array_equal(other.f, got.f[[0, 2]])


def test_rules_have_the_moments_of_the_normal_and_roots_the_covariance(x64):
    rule = grid(3, 41)
    weights = (rule.leading_weights[..., None] * rule.last_weights).ravel()
    z = np.asarray(rule.leading).reshape(-1, 2)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-13)
    leading = np.asarray(rule.leading_weights).ravel()
    np.testing.assert_allclose((z * leading[:, None]).T @ z, np.eye(2), atol=1e-12)
    covariance = np.outer([1.0, 2.0, -1.0], [1.0, 2.0, -1.0]) + np.diag([0.0, 0.5, 0.0])
    root = fields_of(covariance)
    assert root.shape == (3, 2)
    np.testing.assert_allclose(root @ root.T, covariance, atol=1e-14)


def test_more_fields_than_four_are_refused(x64):
    with pytest.raises(ValueError, match="at most 4 Gaussian fields in a layer, got 5 in layer 1 at step 0"):
        run(np.eye(4), np.ones(4), 1, depth=1, points=31)
    assert quadrature.MAX_FIELDS == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parametrization": "ntp"}, "parametrization must be 'mup' for quadrature, got 'ntp'"),
        ({"batch": 1}, "batch must be None for quadrature, got 1"),
        ({"momentum": 0.5}, "momentum must be 0 for quadrature, got 0.5"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 for quadrature, got 0.1"),
    ],
)
def test_settings_that_quadrature_lacks_are_refused(x64, options, message):
    with pytest.raises(ValueError, match=message):
        run(X, Y, 1, depth=1, **options)


def test_an_activation_of_the_users_own_is_differentiated(x64):
    got = run(ONE, np.ones(1), 1, depth=1, activation=lambda x: jnp.tanh(x))
    np.testing.assert_allclose(got.f[1, 0, 0], 0.4010210353360, atol=1e-12)
