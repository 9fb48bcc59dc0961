"""Param groups: options per group and per step, schedulers, decay of vectors, groups added later."""

import inspect

import numpy as np
import pytest
import torch
from reference import Mars, Options
from torch.optim import lr_scheduler
from trajectories import assert_same, draw

from mars_optim.torch import MARS, GammaScheduler, build_param_groups

ROUNDING = 1e-12  # a dozen float64 steps


def parameter(value):
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


def give(params, gradients):
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = torch.tensor(gradient, dtype=param.dtype)


# the paper's numbers where it has them, the release's elsewhere
DEFAULTS = {
    "lr": 3e-3,
    "betas": (0.95, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "gamma": 0.025,
    "is_approx": True,
    "mars_type": "mars-adamw",
    "optimize_1d": False,
    "lr_1d_ratio": 1.0,
    "betas_1d": (0.9, 0.95),
    "weight_decay_1d": 0.1,
    "clip": 1.0,
    "clip_scope": "tensor",
    "prev_grad_init": "current",
    "matrix_ndim": ">=2",
    "matrix_view": "flatten",
    "second_moment": "corrected",
    "decay_mode": "decoupled",
    "cautious": False,
    "orthogonalize": "newton_schulz",
    "ns_steps": 5,
    "ns_coefficients": (3.4445, -4.7750, 2.0315),
    "ns_dtype": None,
    "scale": None,
    "memory_efficient": False,
    "state_dtype": None,
    "prev_grad_dtype": None,
    "maximize": False,
}
# what the whole optimizer has rather than a group; of lr_1d a group keeps the ratio to lr
WHOLE = {"params", "lr_1d", "distributed", "preset", "foreach", "fused", "capturable"}
OPTIONS = [
    {"mars_type": "shampoo"},
    {"mars_type": "m", "scale": "none"},
    {"mars_type": "shampoo", "orthogonalize": "svd"},
    {"mars_type": "shampoo", "ns_steps": 2, "ns_coefficients": (1.5, -0.5, 0.0)},
    {"mars_type": "lion", "memory_efficient": True, "clip": None},
    {"amsgrad": True},
    {"eps": 1e-2},
    {"is_approx": False},
    {"optimize_1d": True},
    {"lr_1d": 0.3},
    {"betas_1d": (0.5, 0.6)},
    {"weight_decay": 0.3, "weight_decay_1d": 0.2},
    {"clip_scope": "global"},
    {"prev_grad_init": "zero", "clip": None},
    {"matrix_ndim": "==2"},
    {"matrix_view": "batch"},
    {"second_moment": "grad"},
    {"decay_mode": "cautious", "weight_decay": 0.3},
    {"decay_mode": "l2", "weight_decay": 0.3},
    {"cautious": True},
    {"maximize": True},
    {"prev_grad_dtype": torch.bfloat16},
    {"state_dtype": torch.bfloat16},
]


def test_defaults_are_those_of_the_paper():
    group = MARS([parameter([[1.0]])]).param_groups[0]
    assert {name: group[name] for name in DEFAULTS} == DEFAULTS


def test_every_option_but_the_choice_of_a_backend_lives_in_the_groups():
    options = inspect.signature(MARS).parameters.keys() - WHOLE
    group = MARS([parameter([[1.0]])]).param_groups[0]
    assert options - group.keys() == set()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_of_one_group_is_that_of_an_optimizer_of_its_own_and_leaves_the_other_group_alone(options):
    shapes = ((4, 3), (5,), (2, 3, 3))
    parameters, gradients, references = draw(seed=37, shapes=shapes, steps=5)

    def run(*groups):
        """Two copies of the tensors, the second with the options: in one optimizer or in two."""
        params = [[parameter(x) for x in parameters] for _ in range(2)]
        made = [{"params": p, **o} for p, o in zip(params, ({}, options), strict=True)]
        optimizers = [MARS([made[i] for i in members], lr=0.05, gamma=0.1) for members in groups]
        for g, h in zip(gradients, references, strict=True):
            for half in params:
                give(half, g)
            for optimizer in optimizers:
                held = [p for group in optimizer.param_groups for p in group["params"]]
                exact = [not group["is_approx"] for group in optimizer.param_groups for _ in shapes]
                given = [torch.tensor(h[i % len(shapes)]) for i in range(len(held))]
                optimizer.step(
                    prev_grads=[x if e else None for x, e in zip(given, exact, strict=True)]
                    if any(exact)
                    else None
                )
        return [[p.detach().numpy() for p in half] for half in params]

    together, apart = run((0, 1)), run((0,), (1,))
    for a, b in zip(together, apart, strict=True):
        assert_same(a, b, rtol=0, atol=ROUNDING)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*together, strict=True))


def test_options_differ_between_groups():
    parameters, gradients, _ = draw(seed=31, shapes=((4, 3), (3, 5), (2, 6)), steps=8)
    per_group = [
        {"mars_type": "lion", "gamma": 0.2, "betas": (0.8, 0.9), "lr": 0.01, "weight_decay": 0.1},
        {"mars_type": "adamw", "gamma": 0.1, "eps": 1e-2, "clip": None, "lr": 0.02},
        {"mars_type": "shampoo", "gamma": 0.0, "scale": 0.5, "prev_grad_init": "zero", "lr": 0.03},
    ]
    params = [parameter(x) for x in parameters]
    optimizer = MARS([{"params": [p], **options} for p, options in zip(params, per_group, strict=True)])
    truths = [Mars([x]) for x in parameters]
    for step in gradients:
        give(params, step)
        optimizer.step()
        for truth, gradient, options in zip(truths, step, per_group, strict=True):
            truth.step([gradient], Options(**options))
    expected = [truth.parameters[0] for truth in truths]
    assert_same([p.detach().numpy() for p in params], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("foreach", [False, True])
def test_every_option_is_read_again_at_each_step(foreach):
    parameters, gradients, _ = draw(seed=32, shapes=((4, 3), (5,)), steps=6)
    changes = [
        {},
        {"gamma": 0.2, "eps": 1e-2},
        {"betas": (0.7, 0.8), "betas_1d": (0.5, 0.6), "clip": 0.2},
        {"weight_decay": 0.3, "weight_decay_1d": 0.2, "lr": 0.01, "lr_1d_ratio": 3.0},
        {"clip": None, "decay_mode": "cautious", "cautious": True},
        {"mars_type": "lion", "maximize": True},
    ]
    params = [parameter(x) for x in parameters]
    optimizer = MARS(params, lr=0.02, lr_1d=0.02, foreach=foreach)
    truth, options = Mars(parameters), {"lr": 0.02}
    for step, change in zip(gradients, changes, strict=True):
        options |= change
        optimizer.param_groups[0].update(change)
        give(params, step)
        optimizer.step()
        truth.step(step, Options(**options))
    assert_same([p.detach().numpy() for p in params], truth.parameters, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
def test_splitting_a_group_changes_nothing(clip_scope):
    parameters, gradients, _ = draw(seed=33, steps=6)
    results = []
    for split in (False, True):
        params = [parameter(x) for x in parameters]
        groups = [{"params": params[:2]}, {"params": params[2:]}] if split else params
        optimizer = MARS(groups, clip_scope=clip_scope, lr=0.05)
        for step in gradients:
            give(params, step)
            optimizer.step()
        results.append([p.detach().numpy() for p in params])
    assert_same(results[1], results[0], rtol=0, atol=ROUNDING)


def test_group_added_during_training_starts_its_own_count():
    parameters, gradients, _ = draw(seed=34, shapes=((3, 4), (4, 2)), steps=6)
    params = [parameter(x) for x in parameters]
    optimizer = MARS(params[:1], lr=0.05)
    truths = [Mars(parameters[:1]), Mars(parameters[1:])]
    for t, step in enumerate(gradients):
        if t == 3:
            optimizer.add_param_group({"params": [params[1]], "gamma": 0.1, "mars_type": "lion"})
        used = params if t >= 3 else params[:1]
        give(used, step[: len(used)])
        optimizer.step()
        truths[0].step(step[:1], Options(lr=0.05))
        if t >= 3:
            truths[1].step(step[1:], Options(lr=0.05, gamma=0.1, mars_type="lion"))
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 3]
    expected = [truth.parameters[0] for truth in truths]
    assert_same([p.detach().numpy() for p in params], expected, rtol=0, atol=ROUNDING)


def test_rejected_group_is_not_added():
    optimizer = MARS([parameter([[1.0]])])
    with pytest.raises(ValueError, match="gamma must be finite and >= 0, got -1"):
        optimizer.add_param_group({"params": [parameter([[2.0]])], "gamma": -1})
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        optimizer.add_param_group([parameter([[2.0]])])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("group", "preset", "expected"),
    [
        ({}, None, 0.1),
        ({"weight_decay": 0.0}, None, 0.0),
        ({"weight_decay": 0.0, "weight_decay_1d": 0.3}, None, 0.3),
        ({"weight_decay": 0.2}, None, 0.1),
        ({"weight_decay": 0.0}, "official", 0.1),
    ],
)
def test_decay_of_vectors_follows_the_group_before_the_constructor(group, preset, expected):
    vector = parameter([2.0, -2.0])
    optimizer = MARS([{"params": [vector], **group}], preset=preset, lr=0.1, lr_1d=0.1)
    vector.grad = torch.zeros_like(vector)
    optimizer.step()
    torch.testing.assert_close(vector.detach(), torch.tensor([2.0, -2.0]).double() * (1 - 0.1 * expected))


def test_mars_m_decays_by_a_tenth_unless_told_otherwise():
    matrix = parameter([[1.0]])
    assert MARS([matrix], mars_type="mars-m").param_groups[0]["weight_decay"] == 0.1
    assert MARS([matrix], mars_type="m", weight_decay=0.0).param_groups[0]["weight_decay"] == 0.0
    assert MARS([matrix], mars_type="mars-adamw").param_groups[0]["weight_decay"] == 0.0
    optimizer = MARS([{"params": [matrix], "mars_type": "m"}, {"params": [parameter([[1.0]])]}])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_learning_rate_of_vectors_keeps_its_ratio_under_a_schedule():
    vector, matrix = parameter([1.0]), parameter([[1.0]])
    optimizer = MARS([vector, matrix], lr=0.1, lr_1d=0.05, weight_decay_1d=0.0, eps=0.0)
    assert optimizer.param_groups[0]["lr_1d_ratio"] == 0.5
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in range(3):
        before = vector.item()
        give([vector, matrix], [[1.0], [[1.0]]])
        optimizer.step()
        schedule.step()
        # a constant gradient moves AdamW by its learning rate
        assert before - vector.item() == pytest.approx(0.05 / (1 + t), rel=1e-12)


def test_only_passing_lr_leaves_lr_1d_absolute():
    assert MARS([parameter([1.0])], lr=1e-3).param_groups[0]["lr_1d_ratio"] == pytest.approx(3.0, rel=1e-15)
    group = {"params": [parameter([1.0])], "lr": 0.5, "lr_1d": 0.25}
    assert MARS([group], lr=1e-3).param_groups[0]["lr_1d_ratio"] == 0.5


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_cycle_betas_reach_the_momentum(kind):
    parameters, gradients, _ = draw(seed=35, shapes=((3, 4), (5,)), steps=10)
    params = [parameter(x) for x in parameters]
    optimizer = MARS(params, lr=0.05, lr_1d=0.05)
    if kind == "OneCycleLR":
        schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    else:
        schedule = lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3)
    truth, seen = Mars(parameters), set()
    for step in gradients:
        group = optimizer.param_groups[0]
        options = Options(lr=group["lr"], betas=group["betas"])
        seen.add(group["betas"])
        give(params, step)
        optimizer.step()
        truth.step(step, options)
        schedule.step()
    assert len(seen) > 3
    assert_same([p.detach().numpy() for p in params], truth.parameters, rtol=0, atol=ROUNDING)


def test_gamma_scheduler_changes_the_correction():
    parameters, gradients, _ = draw(seed=36, shapes=((3, 4),), steps=8)
    params = [parameter(x) for x in parameters]
    optimizer = MARS(params, lr=0.05)
    schedule = GammaScheduler(optimizer, lambda t: 0.2 / (1 + t))
    truth = Mars(parameters)
    for t, step in enumerate(gradients):
        give(params, step)
        optimizer.step()
        schedule.step()
        truth.step(step, Options(lr=0.05, gamma=0.2 / (1 + t)))
    assert_same([p.detach().numpy() for p in params], truth.parameters, rtol=0, atol=ROUNDING)


def test_warm_up_from_zero_moves_nothing_at_first_but_fills_the_state():
    matrix = parameter([[1.0, 2.0]])
    optimizer = MARS([matrix], lr=0.1, weight_decay=0.1)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: float(t))
    give([matrix], [[[1.0, 1.0]]])
    optimizer.step()
    schedule.step()
    assert torch.equal(matrix.detach(), torch.tensor([[1.0, 2.0]]).double())
    assert optimizer.state[matrix]["exp_avg"].any()
    optimizer.step()
    assert not torch.equal(matrix.detach(), torch.tensor([[1.0, 2.0]]).double())


@pytest.mark.parametrize(
    ("algorithm", "ndim", "names"),
    [
        ("adamw", 2, {"step", "exp_avg", "exp_avg_sq"}),
        ("mars", 1, {"step", "exp_avg", "exp_avg_sq", "last_grad"}),
        (None, 1, {"step", "exp_avg", "exp_avg_sq"}),
        (None, 2, {"step", "exp_avg", "last_grad"}),
    ],
)
def test_algorithm_of_a_group_forces_the_path(algorithm, ndim, names):
    param = parameter(np.ones((3,) * ndim))
    optimizer = MARS([{"params": [param], "algorithm": algorithm}], mars_type="shampoo")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param].keys() == names


def test_groups_built_from_a_model_train_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    optimizer = MARS(build_param_groups(model, "mars-shampoo"), mars_type="mars-shampoo", lr=0.02)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    target = torch.randn(5, 6)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(torch.arange(5)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert "last_grad" in optimizer.state[model[1].weight]
    assert "last_grad" not in optimizer.state[model[0].weight]
