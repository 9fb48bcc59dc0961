"""A flax and a torch model of equal weights have the same features and the same tangent kernel."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mup_features.flax.features import empirical_ntk, record_features
from mup_features.torch import features as torch_features

N, D, n = 6, 4, 32


class Mlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc, self.out = nnx.Linear(D, n, rngs=rngs), nnx.Linear(n, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.fc(x)))


def in_torch(net):
    model = torch.nn.Sequential(torch.nn.Linear(D, n), torch.nn.Tanh(), torch.nn.Linear(n, 2)).double()
    with torch.no_grad():
        for linear, own in ((model[0], net.fc), (model[2], net.out)):
            linear.weight.copy_(torch.tensor(np.asarray(own.kernel[...], dtype=np.float64).T))
            linear.bias.copy_(torch.tensor(np.asarray(own.bias[...], dtype=np.float64)))
    return model


def test_kernel_and_features_are_those_of_torch_at_equal_weights(x64):
    X = np.random.default_rng(1).standard_normal((N, D))
    net = Mlp()
    model, T = in_torch(net), torch.tensor(X, dtype=torch.float64)
    inputs = jnp.asarray(X, dtype=jnp.float64)
    rates = {"fc.kernel": 3.0, "out.bias": 0.5}
    found = empirical_ntk(net, inputs, outputs=True, rates=rates, block_size=4)
    in_names = {"0.weight": 3.0, "2.bias": 0.5}
    expected = torch_features.empirical_ntk(model, T, outputs=True, rates=in_names)
    # nnx keeps parameters in float32; tanh and products are in float64 on both sides.
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    mean = np.einsum("icjc->ij", found) / 2
    assert empirical_ntk(net, inputs, rates=rates) == pytest.approx(mean, rel=1e-12)
    gram = record_features(net, inputs).layers["out.input"].gram
    expected = torch_features.FeatureRecorder(model).snapshot([T], "t").layers["2.input"].gram
    assert gram == pytest.approx(expected, rel=1e-6, abs=1e-7)
