"""The sampler of the limit against networks of width 1e5, kernels and quadrature, option by option."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from limit_runs import assert_within_errors, limit, wide
from reference import ETA, X, Y

from mup_features.jax.kernels import KernelGD, limiting_kernel

SIGNS = np.sign(Y)
CLASSES = np.array([[1.0, 0.0], [0.0, 1.0]])


def huber(f, y):
    return jnp.sum(jnp.sqrt(1.0 + (f - y) ** 2) - 1.0)


def half(step):
    return 0.5**step


OPTIONS = {
    "momentum": ({"momentum": 0.7}, Y),
    "weight decay": ({"weight_decay": 0.3}, Y),
    "schedule": ({"lr_schedule": half}, Y),
    "mean and sizes": ({"reduction": "mean", "sigma": (0.8, 1.2, 1.5)}, Y),
    "minibatch": ({"batch": 1, "depth": 3}, Y),
    "all at once": ({"batch": 1, "momentum": 0.5, "weight_decay": 0.2, "lr_schedule": half}, Y),
    "cross-entropy": ({"loss": "cross_entropy", "output_dim": 2}, CLASSES),
    "logistic": ({"loss": "logistic"}, SIGNS),
    "a loss of one's own": ({"loss": huber}, Y),
    "activations by layer": ({"activation": ("sin", "tanh")}, Y),
    "plain draws": ({}, Y),
    "ip": ({"parametrization": "ip", "depth": 1}, Y),
    "ip with a bias of the activation": ({"parametrization": "ip", "activation": "sigmoid"}, Y),
    "ip_llr, homogeneous": ({"parametrization": "ip_llr", "depth": 2, "activation": "identity"}, Y),
    "ip_bias": ({"parametrization": "ip_bias"}, Y),
    "ip_noncentered": ({"parametrization": "ip_noncentered", "activation": "softplus"}, Y),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_wide_networks_agree(x64, name):
    options, y = OPTIONS[name]
    sampler = {"sampler": "normal"} if name == "plain draws" else {}
    ours = limit(**options, **sampler, samples=4096, replicas=4).fit(X, y, 3, X_test=X[:1] / 2)
    theirs = wide(**options).fit(X, y, 3, X_test=X[:1] / 2)
    np.testing.assert_array_equal(ours.learning_rates, theirs.learning_rates)
    crosses = ("K_pre_cross", "K_post_cross")
    for quantity in ("f", "f_test", "loss", "K_pre", "K_post", *crosses, "G", "change"):
        # Bias of width 1e5 is 1e-5; standard errors of a few replicas are known to a third only, and where
        # there are many numbers at once a few of them come out small: half the mean error is their floor.
        if np.isfinite(ours.mean(quantity)).all():
            error = np.hypot(ours.stderr(quantity), theirs.stderr(quantity))
            assert_within_errors(ours, theirs, quantity, floor=1e-4 + 2 * error.mean())
    assert np.abs(ours.f[3] - ours.f[0]).max() > 0.02


@pytest.mark.slow
def test_networks_of_three_layers_under_ip_llr_come_near_the_limit(x64):
    ours = limit(depth=3, parametrization="ip_llr", samples=4096).fit(X, Y, 3, record=())
    theirs = wide(depth=3, parametrization="ip_llr", replicas=2).fit(X, Y, 3, record=())
    # For tanh corrections are of order n^{-1/2}, 0.003 here, times a factor of order one: no standard error
    # covers this bias.
    assert np.abs(theirs.f - ours.f).max() < 5 / np.sqrt(100_000)
    assert np.abs(ours.f[3]).max() > 0.01


def test_ip_with_three_layers_stands_still_and_ip_llr_does_not(x64):
    still = limit(depth=3, parametrization="ip").fit(X, Y, 3, record=())
    np.testing.assert_array_equal(still.f, 0.0)
    moving = limit(depth=3, parametrization="ip_llr").fit(X, Y, 3, record=())
    np.testing.assert_allclose(moving.f[0], 0.0, atol=1e-12)
    assert np.abs(moving.f[2:]).max() > 1e-3


@pytest.mark.parametrize("scheme", ["ntp", "sp"])
def test_kernel_schemes_descend_with_their_kernel(x64, scheme):
    new = np.array([[0.4, -0.2]])
    run = limit(depth=3, parametrization=scheme, reduction="mean", lr=0.4).fit(X, Y, 5, X_test=new, every=5)
    options = {"depth": 3, "activation": "tanh", "parametrization": scheme}
    expected = KernelGD(
        limiting_kernel(X, **options), limiting_kernel(new, X, **options), lr=0.4 / 2
    ).predict(Y, [0, 5])
    assert run.method == "kernel"
    np.testing.assert_allclose(run.f[:, :, 0], expected.train, atol=1e-12)
    np.testing.assert_allclose(run.f_test[:, :, 0], expected.test, atol=1e-12)
    np.testing.assert_array_equal(run.change, 0.0)
    np.testing.assert_array_equal(run.K_post[:, 0], run.K_post[:, 1])
    assert (run.stderr("f") == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_quadrature_agrees(x64, depth):
    steps = 3 if depth == 1 else 1
    options = {"depth": depth, "input_dim": 1, "lr": 0.5, "activation": "silu"}
    exact = limit(**options, method="quadrature").fit([[1.0]], [1.0], steps)
    run = limit(**options, samples=8192, replicas=4).fit([[1.0]], [1.0], steps)
    assert exact.method == "quadrature"
    assert (exact.stderr("f") == 0).all()
    for name in ("f", "loss", "K_pre", "K_post", "G", "change"):
        # The floor is what Sobol points of this number leave in a quantity that has no spread to speak of.
        assert_within_errors(run, exact, name, floor=1e-5)
    assert run.stderr("f").max() < 1e-3


def test_weight_decay_and_several_activations_have_no_kernel_limit(x64):
    with pytest.raises(ValueError, match=r"weight_decay must be 0 in the 'ntp' limit, where it moves .* 0.1"):
        limit(parametrization="ntp", weight_decay=0.1).fit(X, Y, 1)
    with pytest.raises(ValueError, match=r"activation must be one for all layers .* \['sin', 'tanh'\]"):
        limit(parametrization="sp", activation=("sin", "tanh")).fit(X, Y, 1)


def test_momentum_and_minibatches_follow_the_kernel_too(x64):
    run = limit(parametrization="ntp", momentum=0.5).fit(X, Y, 2, record=())
    theta = np.asarray(limiting_kernel(X, depth=2, activation="tanh", parametrization="ntp"))
    first = ETA * theta @ Y
    second = first - ETA * theta @ (0.5 * -Y + (first - Y))
    np.testing.assert_allclose(run.f[1:, :, 0], [first, second], atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = limit(parametrization="ntp", batch=1).fit(X, Y, 1, record=()).f[1, :, 0]
    assert min(np.abs(single - ETA * theta[:, i] * Y[i]).max() for i in range(2)) < 1e-12
