"""Spectral norms of weights and updates stay at one multiple of sqrt(fan_out / fan_in)."""

import pytest
import torch
from models import MLP, build, on_meta

from mup_features import apply_mup, infer_roles, param_groups
from mup_features.torch import spectral_check, spectral_ratios, spectral_targets


def test_spectral_norms_keep_their_distance_from_the_target():
    ratios = {}
    for width in (32, 128, 512):
        model = build(MLP, width)
        roles = infer_roles(model, build(MLP, 32, 1), on_meta(MLP, 64))
        apply_mup(model, roles)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(param_groups(model, roles, 0.1, optimizer="sgd"))
        x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model(x).square().sum().backward()
        optimizer.step()
        ratios[width] = spectral_ratios(model, roles), spectral_ratios(model, roles, start)
    for width in (128, 512):
        for kind in (0, 1):
            assert spectral_check(ratios[width][kind], ratios[32][kind]).ok
    assert spectral_targets(model, roles)["fc2.weight"] == 2**0.5


def test_the_spectral_check_finds_a_layer_of_the_wrong_size():
    model = build(MLP, 64)
    roles = infer_roles(model, build(MLP, 16, 1))
    apply_mup(model, roles)
    good = spectral_ratios(model, roles)
    with torch.no_grad():
        model.fc2.weight *= 4
    report = spectral_check(spectral_ratios(model, roles), good)
    assert (report.ok, report.worst) == (False, "fc2.weight")
    with pytest.raises(ValueError, match="the same weights"):
        spectral_check({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="previous must hold every weight"):
        spectral_ratios(model, roles, {})
    with pytest.raises(ValueError, match="factor must be > 1, got 1"):
        spectral_check(good, good, 1)
