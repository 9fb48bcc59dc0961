"""The empirical tangent kernel against Jacobians taken one by one."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mup_features.torch.features import empirical_ntk, ntk_change

N, D, C = 5, 3, 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, C)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.fc(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net().double()
    net(torch.randn(20, D).double())  # running statistics that differ from the initial ones
    return net


@pytest.fixture
def X():  # noqa: N802
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_by_one(model, X, rates=None):
    """Theta (N, C, N, C) from one backward pass for each output of each sample."""
    model = copy.deepcopy(model).eval()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rows = []
    for x in X:
        for c in range(C):
            gradients = torch.autograd.grad(model(x[None])[0, c], [p for _, p in named])
            weights = [(rates or {}).get(name, 1.0) ** 0.5 for name, _ in named]
            rows.append(torch.cat([w * g.reshape(-1) for w, g in zip(weights, gradients, strict=True)]))
    J = torch.stack(rows).numpy()
    return (J @ J.T).reshape(N, C, N, C)


@pytest.mark.parametrize("block_size", [None, 1, 2, 5])
def test_kernel_is_the_product_of_jacobians_for_any_block(model, X, block_size):
    expected = one_by_one(model, X)
    found = empirical_ntk(model, X, outputs=True, block_size=block_size)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-13)
    mean = empirical_ntk(model, X, block_size=block_size)
    assert mean == pytest.approx(np.einsum("icjc->ij", expected) / C, rel=1e-12, abs=1e-13)


def test_rates_weight_the_parameters_and_frozen_ones_do_not_count(model, X):
    rates = {"fc.weight": 3.0, "out.weight": 0.0}
    assert empirical_ntk(model, X, outputs=True, rates=rates) == pytest.approx(
        one_by_one(model, X, rates), rel=1e-12, abs=1e-13
    )
    model.fc.requires_grad_(False)
    assert empirical_ntk(model, X, outputs=True) == pytest.approx(one_by_one(model, X), rel=1e-12, abs=1e-13)


def test_model_modes_and_gradients_are_untouched(model, X):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.norm.eval()
    empirical_ntk(model, X)
    assert model.training and not model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_transformer_layers_are_differentiated_through_their_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
    X = torch.randn(2, 3, 4).double()
    found = empirical_ntk(layer, X, outputs=True)
    layer.eval()
    gradients = torch.autograd.grad(layer(X[:1])[0, 2, 1], list(layer.parameters()))
    # Output 2 x 4 + 1 of sample 0; all of torch.func's products are those of autograd in float64.
    assert found[0, 9, 0, 9] == pytest.approx(sum(float((g**2).sum()) for g in gradients), rel=1e-11)


def test_change_of_the_kernel_is_zero_for_a_copy_and_scale_shows_in_one_measure_only(model, X):
    assert ntk_change(model, copy.deepcopy(model), X) == pytest.approx(
        {"kernel_distance": 0.0, "relative_frobenius_change": 0.0}, abs=1e-14
    )
    linear = nn.Sequential(nn.Linear(D, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    doubled = copy.deepcopy(linear)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter *= 2
    found = ntk_change(linear, doubled, X)
    assert found == pytest.approx({"kernel_distance": 0.0, "relative_frobenius_change": 3.0}, abs=1e-12)


def test_bad_input_is_refused_by_name(model, X):
    for call, message in [
        (lambda: empirical_ntk(model, X[:0]), r"X must be a tensor .*, got \(0, 3\)"),
        (lambda: empirical_ntk(nn.Tanh(), X), "model must have a parameter"),
        (lambda: empirical_ntk(model, X, rates={"fc2": 1.0}), "got 'fc2'"),
        (lambda: empirical_ntk(model, X, rates={"fc.weight": -1.0}), "rates must be >= 0, got -1.0"),
        (lambda: empirical_ntk(model, X, block_size=0), "block_size must be >= 1 or None, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
