"""The truth of the tests gives the numbers of the specification."""

import numpy as np
import pytest
import reference
from reference import ETA, R1_F, R1_K, R4, X, Y
from reference_kernels import kernels
from reference_network import draw_weights
from reference_single_input import one_layer, single_input_limit
from scipy.special import erf

UPPER = np.triu_indices(2)


def dtanh(x):
    return 1 / np.cosh(x) ** 2


def derf(x):
    return 2 / np.sqrt(np.pi) * np.exp(-(x**2))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_linear_limit_gives_r1(depth):
    f, K = reference.identity_limit(X, Y[:, None], ETA, depth, 3)
    # Printed with 12 decimals.
    np.testing.assert_allclose(f[1:, :, 0], R1_F[depth], atol=1e-12, rtol=0)
    np.testing.assert_allclose(K[3][UPPER], R1_K[depth], atol=1e-12, rtol=0)


def test_first_step_of_a_deep_linear_limit_is_its_kernel():
    f, _ = reference.identity_limit(X, Y[:, None], ETA, 3, 1)
    np.testing.assert_allclose(f[1, :, 0], 4 * ETA * X @ X.T @ Y, atol=1e-14)


@pytest.mark.parametrize("depth", [2, 3])
def test_r1_needs_zdot_from_the_first_update_on(depth):
    f, _ = reference.identity_limit(X, Y[:, None], ETA, depth, 2, zdot=False)
    # The product W x_1 already meets b_0: without Zdot only the layers next to V and W^1 move f.
    assert np.abs(f[1, :, 0] - R1_F[depth][0]).max() > 0.1
    assert np.abs(f[2, :, 0] - R1_F[depth][1]).max() > 1e-2


def test_r2_of_one_layer():
    f, K = one_layer(1.0, 0.5, 3, np.tanh, dtanh)
    np.testing.assert_allclose(f[1:], [0.4010210353360, 0.6142789201910, 0.7509974538579], atol=1e-12)
    np.testing.assert_allclose([K[3, 3], K[3, 0]], [0.5187193291364, 0.3705208903176], atol=1e-12)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [0.4010210353360]),
        (2, [0.3458479750486, 0.2985712674847, 0.2205041889330]),
        (3, [0.3076859409459, 0.2368717310671, 0.1478372861255]),
    ],
)
def test_r2_after_one_update(depth, expected):
    got = single_input_limit(1.0, 0.5, depth, np.tanh, dtanh)
    np.testing.assert_allclose(got[: len(expected)], expected, atol=1e-12)


@pytest.mark.parametrize(("name", "phi", "dphi"), [("tanh", np.tanh, dtanh), ("erf", erf, derf)])
def test_r4_by_quadrature(name, phi, dphi):
    K, layers = kernels(X, 3, phi, dphi)
    k3, theta, without_first = R4[name]
    np.testing.assert_allclose(K[UPPER], k3, atol=1e-12)
    np.testing.assert_allclose(sum(layers)[UPPER], theta, atol=1e-12)
    if without_first is not None:
        np.testing.assert_allclose(sum(layers[1:])[UPPER], without_first, atol=1e-12)


def test_finite_nets_approach_r1_like_one_over_root_width():
    variances, rates = reference.effective("mup", 256, 2, ETA)
    weights = draw_weights(np.random.default_rng(0), variances, 256, 2, 1, 40)
    run = reference.train_networks(
        weights, rates, X, Y[:, None], 3, phi=lambda h: h, dphi=lambda h: np.ones_like(h)
    )
    f = run["f"][1:, :, :, 0]
    stderr = f.std(axis=1, ddof=1) / np.sqrt(f.shape[1])
    # Six numbers within 4 standard errors, and a bias of order 1/n beside them.
    assert (np.abs(f.mean(axis=1) - R1_F[2]) < 4 * stderr + 5 / 256).all()
    assert f.std(axis=1).max() < 10 / np.sqrt(256)


@pytest.mark.parametrize("preset", reference.PRESETS)
def test_gradients_of_the_finite_net_are_those_of_finite_differences(preset):
    rng = np.random.default_rng(1)
    X3, Y2 = rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    variances, rates = reference.effective(preset, 5, 3, 0.1)
    weights = draw_weights(rng, variances, 5, 2, 2, 1)

    def outputs(ws):
        run = reference.train_networks(ws, rates, X3, Y2, 1, phi=np.tanh, dphi=dtanh)
        return run["f"]

    f0, f1 = outputs(weights)
    moved = []
    for layer, W in enumerate(weights):
        gradient = np.empty_like(W)
        for index in np.ndindex(*W.shape):
            values = []
            for sign in (1, -1):
                shifted = [w.copy() for w in weights]
                shifted[layer][index] += sign * 1e-6
                values.append(0.5 * np.sum((outputs(shifted)[0] - Y2) ** 2))
            gradient[index] = (values[0] - values[1]) / 2e-6
        moved.append(W - rates[layer] * gradient)
    # Central differences with step 1e-6: 1e-10 relative to values of order one.
    np.testing.assert_allclose(outputs(moved)[0], f1, atol=1e-7)
    assert np.abs(f1 - f0).max() > 1e-5
