"""Certificates against real networks: identity, bounds, reductions, readout multiplier, and all layers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mup_features.metrics import gram, lambda_min
from mup_features.theory import global_min_certificate, tangent_certificate, tangent_kernel

N, D, n = 5, 3, 24


def network(seed, outputs, layers=2):
    """Raw muP at width n: weights with their effective SGD rates, and the features of a forward pass."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(n, D), *[(n, n)] * (layers - 1), (outputs, n)]
    stds = [1, *[n**-0.5] * (layers - 1), 1 / n]
    normal = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    weights = [w * std for w, std in zip(normal, stds, strict=True)]
    rates = [n, *[1] * (layers - 1), 1 / n]
    X = torch.randn(N, D, generator=draw, dtype=torch.float64)
    Y = torch.randn(N, outputs, generator=draw, dtype=torch.float64)
    return [w.requires_grad_() for w in weights], rates, X, Y


def forward(weights, X):
    """Outputs, pre-activations and post-activations."""
    pre, post = [], [X]
    for W in weights[:-1]:
        pre.append(post[-1] @ W.T)
        post.append(torch.tanh(pre[-1]))
    return post[-1] @ weights[-1].T, pre, post


def loss_of(f, Y, reduction):
    return ((f - Y) ** 2).sum() / 2 / (N if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_gradient_of_a_real_readout_is_the_trace_and_the_bound_holds(reduction, multiplier, recwarn):
    weights, _, X, Y = network(0, 2)
    stored = (weights[-1].detach() / multiplier).requires_grad_()
    f = multiplier * forward([*weights[:-1], stored], X)[2][-1] @ stored.T
    f.retain_grad()
    loss = loss_of(f, Y, reduction)
    loss.backward()
    x = forward(weights, X)[2][-1].detach().numpy()
    grad_sq = float((stored.grad**2).sum()) / n
    found = global_min_certificate(gram(x), f.grad.numpy(), reduction, grad_sq, readout_multiplier=multiplier)
    computed = global_min_certificate(gram(x), f.grad.numpy(), reduction)
    assert not recwarn.list
    assert found.value == pytest.approx(loss.item(), rel=1e-13)
    assert found.bound == pytest.approx(computed.bound, rel=1e-10)
    # The formula as the spec has it: ||grad||^2 / (2 n lambda_min), times N for a mean.
    expected = grad_sq / multiplier**2 / (2 * lambda_min(gram(x))) * (N if reduction == "mean" else 1)
    assert found.bound == pytest.approx(expected, rel=1e-9)
    assert found.certifiable and found.ratio == found.bound / found.value >= 1


@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(["mean", "sum"]),
    st.floats(-6, 6),
)
def test_bound_is_never_below_the_loss(seed, samples, outputs, width, reduction, log_scale):
    rng = np.random.default_rng(seed)
    K = gram(np.tanh(rng.standard_normal((samples, width)) * 10**log_scale))
    found = global_min_certificate(K, rng.standard_normal((samples, outputs)), reduction)
    if found.certifiable:
        assert found.bound >= found.value and found.chi_bound >= found.chi_norm
    else:
        assert found.bound is None and found.ratio is None and "not certifiable" in found.reason
        assert width < samples or found.lambda_min < 1e-12 * np.trace(K)


def test_bound_is_attained_along_the_smallest_eigenvector():
    K = gram(np.random.default_rng(0).standard_normal((6, 30)))
    chi = np.linalg.eigh(K)[1][:, 0]
    assert global_min_certificate(K, chi, "sum").ratio == pytest.approx(1, rel=1e-12)


def test_dependent_features_are_not_certifiable_rather_than_hugely_bounded():
    A = np.random.default_rng(0).standard_normal((4, 30))
    A[3] = A[0] + A[1]
    found = global_min_certificate(gram(A), np.ones(4))
    assert (found.certifiable, found.bound, found.chi_bound) == (False, None, None)
    assert found.value == 4 * 4 / 2


def test_a_convex_loss_gets_a_bound_of_its_output_gradient():
    K = np.diag([1.0, 4.0])
    found = global_min_certificate(K, [[3.0], [0.0]], loss="convex")
    assert found.value == 3.0 and found.bound == pytest.approx(3.0, rel=1e-14) == found.chi_bound


def test_zero_error_has_ratio_one():
    assert global_min_certificate(np.eye(2), [0.0, 0.0]).ratio == 1.0


@pytest.mark.parametrize("factor", [0.25**2, 24.0])
def test_a_forgotten_multiplier_or_width_is_noticed(factor):
    K, chi = np.diag([1.0, 2.0]), np.array([1.0, 1.0])
    with pytest.warns(UserWarning, match="check the multiplier"):
        global_min_certificate(K, chi, readout_grad_sq=3.0 * factor)


def tangent_parts(weights, X, outputs):
    """Grams of features and of J^l(i, c) = n df_c(i) / dh^l(i)."""
    f, pre, post = forward(weights, X)
    signals = []
    for h in pre:
        columns = [torch.autograd.grad(f[:, c].sum(), h, retain_graph=True)[0] for c in range(outputs)]
        J = n * torch.stack(columns, 1).detach().numpy()
        GJ = np.einsum("icu,jdu->icjd", J, J) / n
        signals.append(GJ[:, 0, :, 0] if outputs == 1 else GJ)
    K = [X.numpy() @ X.numpy().T, *(gram(x.detach().numpy()) for x in post[1:])]
    return f, K, signals


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
def test_tangent_kernel_is_the_rate_weighted_kernel_of_all_jacobians(outputs, layers):
    weights, rates, X, _ = network(1, outputs, layers)
    f, K, GJ = tangent_parts(weights, X, outputs)
    expected = np.zeros((N * outputs,) * 2)
    for W, rate in zip(weights, rates, strict=True):
        J = np.stack([torch.autograd.grad(v, W, retain_graph=True)[0].reshape(-1) for v in f.reshape(-1)])
        expected += rate * J @ J.T
    assert tangent_kernel(K, GJ) == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tangent_certificate_uses_the_rate_of_descent_and_bounds_the_loss(outputs, reduction):
    weights, rates, X, Y = network(2, outputs, 3)
    f, K, GJ = tangent_parts(weights, X, outputs)
    loss = loss_of(f, Y, reduction)
    gradients = torch.autograd.grad(loss, [f, *weights])
    found = tangent_certificate(K, GJ, gradients[0].numpy(), reduction)
    rate = sum(float(r * (g**2).sum()) for r, g in zip(rates, gradients[1:], strict=True))
    assert found.value == pytest.approx(loss.item(), rel=1e-12)
    factor = N if reduction == "mean" else 1
    assert found.bound == pytest.approx(factor * rate / (2 * found.lambda_min), rel=1e-9)
    assert found.bound >= found.value
    assert found.lambda_min == pytest.approx(lambda_min(tangent_kernel(K, GJ)), rel=1e-12)
    # Schur and Weyl: the layers' shares add up to a lower bound.
    assert len(found.layer_bounds) == 4
    assert 0 < sum(found.layer_bounds) <= found.lambda_min
    own = global_min_certificate(K[-1], gradients[0].numpy(), reduction)
    assert found.lambda_min > own.lambda_min


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_each_layers_share_is_below_the_smallest_eigenvalue_of_its_product(seed, outputs):
    rng = np.random.default_rng(seed)
    J, A = rng.standard_normal((4, outputs, 3)), rng.standard_normal((4, 9))
    GJ, K = np.einsum("icu,jdu->icjd", J, J), gram(A)
    found = tangent_certificate([K, np.zeros((4, 4))], [GJ], np.ones((4, outputs)))
    product = GJ.reshape(4 * outputs, -1) * np.kron(K, np.ones((outputs, outputs)))
    assert found.layer_bounds[0] <= lambda_min(product) + 1e-12


def test_bad_input_is_refused_with_its_name_and_value():
    K = np.eye(3)
    for call, message in [
        (lambda: global_min_certificate(K, np.ones(2)), r"chi must be \(3,\)"),
        (lambda: global_min_certificate(K, [1, np.nan, 1]), "chi must be finite, got 1"),
        (lambda: global_min_certificate(K, np.ones(3), "batch"), "reduction must be .*, got 'batch'"),
        (lambda: global_min_certificate(K, np.ones(3), readout_grad_sq=-1), "readout_grad_sq must be"),
        (lambda: global_min_certificate(K, np.ones(3), loss="hinge"), "loss must be .*, got 'hinge'"),
        (lambda: global_min_certificate(K, np.ones(3), readout_multiplier=0), "readout_multiplier must be"),
        (lambda: tangent_kernel([K], []), "one Gram more than GJ"),
        (lambda: tangent_kernel([K, np.eye(2)], [K]), r"K\[1\] must have 3 samples"),
        (lambda: tangent_kernel([K, K], [np.eye(4)]), r"GJ\[0\] must be \(3, 3\)"),
        (lambda: tangent_certificate([K, K], [K], np.ones((3, 2))), "chi must have 1 outputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
