"""One training in three forms and in every gauge; schedulers; fast paths of optimisers; resuming."""

import numpy as np
import pytest
import torch
from models import MLP, Transformer, build, on_meta
from torch import nn
from torch.optim import lr_scheduler

from mup_features import Parametrization, apply_mup, infer_roles, param_groups
from mup_features.torch import ScaledLRScheduler

FORMS = ("mult", "pure", "symmetric")


def prepared(kind, form="mult", width=64, dtype=torch.float64, **options):
    model = build(kind, width, 0, dtype, **options)
    roles = infer_roles(model, on_meta(kind, 16, **options))
    return apply_mup(model, roles, form=form, init="fan_in"), roles


def trajectory(model, optimizer, steps=10, scheduler=None):
    """Outputs on fixed data before each step and at the end."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    if isinstance(model, Transformer):
        data = torch.randint(0, 32, (4, 16), generator=generator)
        target = torch.randint(0, 32, (64,), generator=generator)
    else:
        data = torch.randn(16, 8, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randint(0, 3, (16,), generator=generator)
    outputs = []
    for _ in range(steps):
        output = model(data)
        outputs.append(output.detach())
        optimizer.zero_grad()
        nn.functional.cross_entropy(output.reshape(len(target), -1), target).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    outputs.append(model(data).detach())
    return torch.stack(outputs)


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, eps=0.0),
    "adamw": lambda groups: torch.optim.AdamW(groups, eps=0.0),
    "sign": lambda groups: torch.optim.Adam(groups, betas=(0.0, 0.0), eps=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("alignment", ["full", "none"])
def test_the_three_forms_are_one_training(optimizer, alignment):
    runs = []
    decay = 0.1 if optimizer in ("sgd", "adamw") else 0.0
    rate = 0.02 if optimizer == "sgd" else 0.01
    for form in FORMS:
        model, roles = prepared(MLP, form)
        groups = param_groups(model, roles, rate, decay, optimizer, form=form, alignment=alignment)
        runs.append(trajectory(model, OPTIMIZERS[optimizer](groups)))
    assert (runs[0][-1] - runs[0][0]).abs().max() > 0.1
    for run in runs[1:]:
        # the same real numbers in float64, ten steps apart; the spec asks for 1e-10
        assert torch.allclose(run, runs[0], rtol=0, atol=1e-10)


def test_the_three_forms_are_one_training_of_a_transformer_with_tied_embedding():
    runs = []
    for form in FORMS:
        model, roles = prepared(Transformer, form)
        runs.append(
            trajectory(model, torch.optim.SGD(param_groups(model, roles, 0.05, optimizer="sgd", form=form)))
        )
    assert (runs[0][-1] - runs[0][0]).abs().max() > 0.1
    for run in runs[1:]:
        assert torch.allclose(run, runs[0], rtol=0, atol=1e-10)


def test_scaled_epsilon_keeps_the_forms_one_training_and_a_fixed_one_does_not():
    runs = {}
    for scaling in (True, False):
        for form in FORMS:
            model, roles = prepared(MLP, form)
            groups = param_groups(model, roles, 0.01, form=form, eps_scaling=scaling, eps=1e-3)
            runs[scaling, form] = trajectory(model, torch.optim.Adam(groups, eps=1e-3))
    for form in FORMS[1:]:
        assert torch.allclose(runs[True, form], runs[True, "mult"], rtol=0, atol=1e-10)
        assert not torch.allclose(runs[False, form], runs[False, "mult"], rtol=0, atol=1e-4)


class AbcNet(nn.Module):
    """An MLP whose layers are n^{-a} w with w of size n^{-b}."""

    def __init__(self, a, b, width=32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [(width, 8), *[(width, width)] * (len(a) - 2), (3, width)]
        self.multipliers = [width**-x for x in a]
        self.weights = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=torch.float64) * width**-x
            for shape, x in zip(shapes, b, strict=True)
        )

    def forward(self, x):
        for weight, multiplier in zip(self.weights, self.multipliers, strict=True):
            x = multiplier * x @ weight.T
            x = x if weight is self.weights[-1] else torch.tanh(x)
        return x


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mup", "ntp", "sp", "ip"])
def test_the_gauge_does_not_change_the_training(name, optimizer):
    parametrization = Parametrization(name, optimizer=optimizer)
    runs = []
    for theta in ((0.0, 0.0, 0.0), (0.5, -0.5, 0.25), (-1.0, 0.5, 0.5)):
        a, b, c = (x.tolist() for x in parametrization.gauge(theta).exponents(3))
        model = AbcNet(a, b)
        groups = [{"params": [w], "lr": 0.2 * 32**-x} for w, x in zip(model.weights, c, strict=True)]
        steps = torch.optim.SGD(groups) if optimizer == "sgd" else torch.optim.Adam(groups, eps=0.0)
        runs.append(trajectory(model, steps, 5))
    assert (runs[0][-1] - runs[0][0]).abs().max() > 1e-6
    for run in runs[1:]:
        assert torch.allclose(run, runs[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_at_base_width_training_is_that_of_the_untouched_model(optimizer):
    runs = []
    for scaling in (False, True):
        model = build(MLP, 16)
        groups = model.parameters()
        if scaling:
            roles = infer_roles(model, build(MLP, 16, 1), on_meta(MLP, 32))
            groups = param_groups(apply_mup(model, roles), roles, 0.01, 0.1, optimizer)
        make = torch.optim.AdamW if optimizer == "adam" else torch.optim.SGD
        runs.append(trajectory(model, make(groups, lr=0.01, weight_decay=0.1, foreach=False)))
    assert torch.equal(*runs)


@pytest.mark.parametrize("option", ["foreach", "fused", "tensor"])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_fast_paths_train_the_same(make, option):
    family = "sgd" if make is torch.optim.SGD else "adam"
    runs = []
    for fast in (False, True):
        model, roles = prepared(MLP)
        # a rate in a tensor is what capturable optimisers need; the CPU has no capturable path itself
        lr = torch.tensor(0.01, dtype=torch.float64) if fast and option == "tensor" else 0.01
        options = {option: True} if fast and option != "tensor" else {"foreach": False}
        runs.append(trajectory(model, make(param_groups(model, roles, lr, 0.1, family), **options)))
    # the order of float64 operations differs between implementations
    assert torch.allclose(*runs, rtol=1e-12, atol=1e-13)


def ratios(optimizer):
    return [float(group["lr"]) / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]


def sgd(lr=0.1):
    model, roles = prepared(MLP)
    return torch.optim.SGD(param_groups(model, roles, lr, optimizer="sgd"), momentum=0.9)


def test_schedulers_that_multiply_keep_the_factors():
    optimizer = sgd()
    before = ratios(optimizer)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert [group["initial_lr"] for group in optimizer.param_groups] == scheduler.base_lrs
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert ratios(optimizer) == before
    assert len(set(before)) > 1


ABSOLUTE = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.01),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_the_wrapper_keeps_the_factors_of_every_schedule(name):
    optimizer, plain = sgd(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler, expected = ScaledLRScheduler(optimizer, ABSOLUTE[name]), ABSOLUTE[name](plain)
    for _ in range(6):
        rates = [group["lr_scale"] * plain.param_groups[0]["lr"] for group in optimizer.param_groups]
        assert scheduler.get_last_lr() == rates
        for each in (optimizer, plain, scheduler, expected):
            each.step()


def test_the_wrapper_does_not_let_rounding_pile_up():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 0.1 / 3.0, "lr_scale": 1.0 / 3.0}])
    plain = torch.optim.SGD([parameters[1]], lr=0.1)
    scheduler = ScaledLRScheduler(optimizer, lambda o: lr_scheduler.ExponentialLR(o, gamma=0.97))
    expected = lr_scheduler.ExponentialLR(plain, gamma=0.97)
    for _ in range(300):
        for each in (optimizer, plain, scheduler, expected):
            each.step()
    assert scheduler.get_last_lr() == [plain.param_groups[0]["lr"] * (1.0 / 3.0)]


def test_without_the_wrapper_an_absolute_schedule_erases_the_factors():
    optimizer = sgd()
    ABSOLUTE["OneCycleLR"](optimizer)
    assert set(ratios(optimizer)) == {1.0}


def test_the_wrapper_passes_metrics_and_survives_rates_set_by_hand():
    optimizer = sgd()
    scheduler = ScaledLRScheduler(
        optimizer, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=0.02)
    )
    for _ in range(4):
        scheduler.step(1.0)
    assert scheduler.get_last_lr() == [0.02 * group["lr_scale"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * group["lr_scale"]
    scheduler.step(1.0)
    assert scheduler.get_last_lr() == pytest.approx(
        [0.05 * group["lr_scale"] for group in optimizer.param_groups]
    )


def test_the_wrapper_scales_rates_in_tensors_in_place():
    model, roles = prepared(MLP)
    optimizer = torch.optim.Adam(param_groups(model, roles, torch.tensor(0.1)), foreach=False)
    tensors = [group["lr"] for group in optimizer.param_groups]
    scheduler = ScaledLRScheduler(optimizer, lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5))
    optimizer.step()
    scheduler.step()
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    assert scheduler.get_last_lr() == pytest.approx(
        [0.05 * group["lr_scale"] for group in optimizer.param_groups]
    )


def test_the_wrapper_follows_groups_that_are_added_later():
    optimizer = sgd()
    scheduler = ScaledLRScheduler(optimizer, lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8))
    extra = {"max_lr": 0.1, "min_lr": 1e-6, "initial_lr": 0.004, "max_momentum": 0.95, "base_momentum": 0.85}
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(1)), "lr_scale": 2.0, "lr": 0.008, **extra})
    optimizer.step()
    scheduler.step()
    rates = [group["lr"] / group["lr_scale"] for group in optimizer.param_groups]
    assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-12)


def test_the_wrapper_needs_groups_with_factors():
    with pytest.raises(ValueError, match="must be built from param_groups"):
        ScaledLRScheduler(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), ABSOLUTE["cosine"])


def test_a_resumed_run_is_the_uninterrupted_one():
    def start():
        model, roles = prepared(MLP)
        optimizer = torch.optim.AdamW(param_groups(model, roles, 0.01, 0.1))
        return model, optimizer, ScaledLRScheduler(optimizer, ABSOLUTE["cosine"])

    model, optimizer, scheduler = start()
    whole = trajectory(model, optimizer, 6, scheduler)
    parts = start()
    first = trajectory(parts[0], parts[1], 3, parts[2])
    states = [part.state_dict() for part in parts]
    model, optimizer, scheduler = start()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for part, state in zip((model, optimizer, scheduler), states, strict=True):
        part.load_state_dict(state)
    second = trajectory(model, optimizer, 3, scheduler)
    assert torch.equal(first, whole[:4])
    assert torch.equal(second, whole[3:])


def test_hidden_features_move_alike_at_every_width():
    """muP's promise in the smallest case: one Adam step moves the last features by a size free of width."""
    sizes = []
    for width in (64, 256, 1024):
        model, roles = prepared(MLP, width=width, dtype=torch.float32)
        optimizer = torch.optim.Adam(param_groups(model, roles, 0.01))
        features = []
        model.fc3.register_forward_hook(lambda _, __, output, kept=features: kept.append(output.detach()))
        trajectory(model, optimizer, 3)
        sizes.append(float((features[-1] - features[0]).square().mean().sqrt()))
    slope = np.polyfit(np.log([64, 256, 1024]), np.log(sizes), 1)[0]
    # standard parametrization has slope 1 here until it saturates; one seed leaves about 0.05
    assert abs(slope) < 0.15
