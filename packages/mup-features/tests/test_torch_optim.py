"""Groups: the values of R6 and of microsoft/mup, user's groups, depth, and every message."""

import math

import pytest
import torch
from models import MLP, Transformer, build, on_meta
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mup_features import Role, infer_roles, param_groups
from mup_features.torch import MuAdam, MuAdamW, MuSGD


def mlp_roles(width=64, base=16):
    return infer_roles(on_meta(MLP, width), on_meta(MLP, base))


def per_parameter(model, groups, key):
    """Name -> value of its group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


WEIGHTS = ("fc1.weight", "fc2.weight", "fc3.weight", "readout.weight")
BIASES = ("fc1.bias", "fc2.bias", "fc3.bias", "readout.bias")


def test_the_rates_of_r6_for_sgd():
    model = build(MLP, 64)
    rates = per_parameter(model, param_groups(model, mlp_roles(), 0.1, optimizer="sgd"), "lr")
    assert [rates[name] for name in WEIGHTS] == pytest.approx([0.4, 0.1, 0.1, 0.4], rel=1e-15)
    assert [rates[name] for name in BIASES] == pytest.approx([0.4, 0.4, 0.4, 0.1], rel=1e-15)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_rates_and_decays_of_r6_for_adam(optimizer):
    model = build(MLP, 64)
    groups = param_groups(model, mlp_roles(), 1e-2, 0.1, optimizer)
    assert len(groups) == 2
    hidden = ("fc2.weight", "fc3.weight")
    for key, inside, outside in (("lr", 2.5e-3, 1e-2), ("weight_decay", 0.4, 0.1)):
        values = per_parameter(model, groups, key)
        assert values == pytest.approx(
            {n: inside if n in hidden else outside for n in WEIGHTS + BIASES}, rel=1e-15
        )
    scales = per_parameter(model, groups, "lr_scale")
    assert (scales["fc2.weight"], scales["fc1.weight"]) == (0.25, 1.0)
    raw = param_groups(model, mlp_roles(), 1e-2, 0.1, optimizer, weight_decay_mode="raw")
    assert {group["weight_decay"] for group in raw} == {0.1}


def test_groups_with_equal_numbers_are_merged_and_say_what_they_hold():
    model = build(MLP, 64)
    assert {group["mup_role"] for group in param_groups(model, mlp_roles(), 1e-2)} == {
        "input+output",
        "hidden",
    }
    roles = {group["mup_role"] for group in param_groups(model, mlp_roles(), 1e-2, form="pure")}
    assert roles == {"input", "hidden+output"}
    assert len(param_groups(model, mlp_roles(), 1e-2, form="symmetric")) == 3


def microsoft(optimizer, **options):
    """Per-parameter numbers of microsoft/mup's optimiser on the same MLP, and its model."""
    mup = pytest.importorskip("mup")

    def make(width):
        model = build(MLP, width, dtype=torch.float32)
        weight, bias = model.readout.weight, model.readout.bias
        model.readout = mup.MuReadout(width, 3)
        model.readout.weight, model.readout.bias = weight, bias
        return model

    model = make(64)
    mup.set_base_shapes(model, make(16), delta=make(32))
    return model, getattr(mup, optimizer)(model.parameters(), **options)


@pytest.mark.parametrize(("name", "ours"), [("MuSGD", MuSGD), ("MuAdam", MuAdam), ("MuAdamW", MuAdamW)])
@pytest.mark.parametrize("weight_decay", [{}, {"weight_decay": 0.1}])
def test_rates_and_decays_are_those_of_microsoft_mup(name, ours, weight_decay):
    their_model, theirs = microsoft(name, lr=0.1, **weight_decay)
    model = build(MLP, 64, dtype=torch.float32)
    optimizer = ours(model, mlp_roles(), lr=0.1, **weight_decay)
    assert type(optimizer) is type(theirs)
    for key in ("lr", "weight_decay"):
        expected = per_parameter(their_model, theirs.param_groups, key)
        assert per_parameter(model, optimizer.param_groups, key) == pytest.approx(expected, rel=1e-12)


def test_weights_and_outputs_are_those_of_microsoft_mup():
    from mup_features import apply_mup

    theirs, _ = microsoft("MuSGD", lr=0.1)
    model = build(MLP, 64, dtype=torch.float32)
    apply_mup(model, mlp_roles())
    for (name, ours), their in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, their), name
    x = torch.randn(4, 8)
    assert torch.equal(model(x), theirs(x))


def test_options_go_to_the_optimizer_and_spelling_errors_are_its_own():
    model = build(MLP, 64)
    optimizer = MuSGD(model, mlp_roles(), lr=0.1, momentum=0.9, nesterov=True)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    with pytest.raises(TypeError, match="momentun"):
        MuSGD(model, mlp_roles(), lr=0.1, momentun=0.9)


def test_a_tied_embedding_is_in_one_group_once():
    model = build(Transformer, 64)
    groups = param_groups(model, infer_roles(model, on_meta(Transformer, 16)), 1e-2)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    assert per_parameter(model, groups, "lr_scale")["embed.weight"] == 1.0


def test_the_users_groups_are_split_and_keep_their_options():
    model, roles = build(MLP, 64), mlp_roles()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    weights = [(name, parameter) for name, parameter in model.named_parameters() if name.endswith("weight")]
    groups = param_groups(
        model,
        roles,
        1e-2,
        0.1,
        groups=[
            {"params": biases, "weight_decay": 0.0, "betas": (0.8, 0.9)},
            {"params": weights, "lr": 1e-3, "initial_lr": 2e-3},
        ],
    )
    assert len(groups) == 3
    rates, decays = (per_parameter(model, groups, key) for key in ("lr", "weight_decay"))
    assert [rates[name] for name in WEIGHTS] == pytest.approx([1e-3, 2.5e-4, 2.5e-4, 1e-3], rel=1e-15)
    assert [decays[name] for name in WEIGHTS] == pytest.approx([0.1, 0.4, 0.4, 0.1], rel=1e-15)
    assert {(rates[name], decays[name]) for name in BIASES} == {(1e-2, 0.0)}
    assert [group.get("betas") for group in groups] == [(0.8, 0.9), None, None]
    assert [group.get("initial_lr") for group in groups[1:]] == [2e-3, 5e-4]
    torch.optim.AdamW(groups)


def test_groups_may_name_parameters():
    model, roles = build(MLP, 64), mlp_roles()
    rest = [name for name in WEIGHTS + BIASES if name != "fc2.weight"]
    groups = param_groups(model, roles, 1e-2, groups=[{"params": "fc2.weight"}, {"params": rest}])
    assert [(group["mup_role"], len(group["params"])) for group in groups] == [
        ("hidden", 1),
        ("input+output", 6),
        ("hidden", 1),
    ]


def test_a_rate_in_a_tensor_gives_every_group_its_own():
    model = build(MLP, 64)
    lr = torch.tensor(1e-2)
    groups = param_groups(model, mlp_roles(), lr)
    assert sorted(float(group["lr"]) for group in groups) == pytest.approx([2.5e-3, 1e-2])
    groups[0]["lr"].zero_()
    assert float(lr) == pytest.approx(1e-2)
    assert sorted(float(group["lr"]) for group in groups)[1] > 0


def test_epsilon_follows_the_gradient_where_asked():
    model = build(MLP, 64)
    assert all("eps" not in group for group in param_groups(model, mlp_roles(), 1e-2))
    groups = param_groups(model, mlp_roles(), 1e-2, eps_scaling=True, eps=4e-8)
    eps = per_parameter(model, groups, "eps")
    assert {name: eps[name] for name in WEIGHTS + BIASES[:3]} == pytest.approx(
        dict.fromkeys(WEIGHTS + BIASES[:3], 1e-8)
    )
    assert eps["readout.bias"] == 4e-8
    pure = per_parameter(model, param_groups(model, mlp_roles(), 1e-2, eps_scaling=True, form="pure"), "eps")
    assert (pure["fc1.weight"], pure["readout.weight"]) == (2.5e-9, 1e-8)


def test_alignment_may_differ_between_hidden_and_readout():
    model = build(MLP, 64)
    groups = param_groups(model, mlp_roles(), 1.0, optimizer="adam", alignment=("none", "full"))
    scales = per_parameter(model, groups, "lr_scale")
    assert [scales[name] for name in WEIGHTS] == [1.0, 0.5, 0.5, 1.0]
    groups = param_groups(model, mlp_roles(), 1.0, optimizer="adam", alignment="none")
    scales = per_parameter(model, groups, "lr_scale")
    assert [scales[name] for name in WEIGHTS] == [1.0, 0.5, 0.5, 2.0]


def test_muon_groups_are_matrices_apart_from_the_rest():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(64, 128), nn.Linear(128, 3))
    base = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(16, 32), nn.Linear(32, 3))
    groups = param_groups(model, infer_roles(model, base), 1.0, optimizer="muon")
    (kernel,) = [group for group in groups if group["lr_scale"] == 0.25]
    (matrices,) = [group for group in groups if group["use_muon"]]
    assert (kernel["params"], kernel["use_muon"]) == ([model[0].weight], False)
    assert (matrices["params"], matrices["lr_scale"]) == ([model[1].weight], 1.0)


@pytest.mark.parametrize(
    ("depth", "optimizer", "lr_scale", "eps"),
    [
        ("sqrt", "adam", 1 / 8, 1.0),
        ("sqrt", "sgd", 1.0, 1.0),
        ("linear", "adamw", 1 / 4, 1 / 4),
        ("linear", "sgd", 4.0, 1.0),
    ],
)
def test_depth_changes_rate_and_epsilon_of_the_blocks(depth, optimizer, lr_scale, eps):
    model = build(MLP, 64)
    groups = param_groups(model, mlp_roles(), 1.0, 1.0, optimizer, depth=depth, layers=8, base_layers=2)
    scales = per_parameter(model, groups, "lr_scale")
    assert scales["fc2.weight"] == pytest.approx(lr_scale, rel=1e-15)
    assert scales["fc2.bias"] == (4.0 if optimizer == "sgd" else 1.0)
    decays = per_parameter(model, groups, "weight_decay")
    assert decays["fc2.weight"] * scales["fc2.weight"] == pytest.approx(1.0)
    (group,) = [group for group in groups if any(p is model.fc2.weight for p in group["params"])]
    assert group.get("eps", 1e-8) == pytest.approx(1e-8 * eps)


def test_blocks_are_named_by_patterns():
    model = build(Transformer, 64)
    roles = infer_roles(model, on_meta(Transformer, 16))
    options = {"depth": "sqrt", "layers": 8, "base_layers": 2, "blocks": ["blocks.*"]}
    scales = per_parameter(model, param_groups(model, roles, 1.0, **options), "lr_scale")
    assert scales["blocks.0.norm1.weight"] == 0.5
    assert scales["blocks.1.up.weight"] == 0.125
    assert scales["norm.weight"] == scales["embed.weight"] == 1.0


class CountedOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model, groups, **options):
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with CountedOperations() as counted:
        optimizer.step()
    return counted.count


def test_a_step_runs_no_operation_more_than_plain_adamw():
    model = build(Transformer, 64, layers=8, dtype=torch.float32)
    roles = infer_roles(model, on_meta(Transformer, 16, layers=8))
    plain = operations_of_a_step(model, list(model.parameters()), foreach=False)
    assert plain > len(list(model.parameters()))
    assert operations_of_a_step(model, param_groups(model, roles, 1e-3, 0.1), foreach=False) == plain
    # foreach and fused launch per group: as many as any two groups (decay and no decay) do
    for option in ("foreach", "fused"):
        groups = param_groups(model, roles, 1e-3, 0.1)
        halves = [{"params": group["params"]} for group in groups]
        assert len(groups) == 2
        ours = operations_of_a_step(model, groups, **{option: True})
        assert ours == operations_of_a_step(model, halves, **{option: True}) < plain


def test_a_forward_pass_runs_one_multiplication_more():
    from mup_features import apply_mup

    model, plain = build(Transformer, 64, dtype=torch.float32), build(Transformer, 64, dtype=torch.float32)
    apply_mup(model, infer_roles(model, on_meta(Transformer, 16)))
    counts = []
    for each in (model, plain):
        with torch.no_grad(), CountedOperations() as counted:
            each(torch.arange(8).view(1, 8))
        counts.append(counted.count)
    assert counts[0] == counts[1] + 1


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be finite"),
        (
            {"lr": torch.tensor([1.0, 2.0])},
            r"lr must be one floating point number, got torch.float32 of shape \(2,\)",
        ),
        ({"lr": torch.tensor(1)}, "lr must be one floating point number, got torch.int64"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"eps": math.inf}, "eps must be finite"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"optimizer": "sgd", "eps_scaling": True}, "eps_scaling needs an Adam optimizer, got 'sgd'"),
        ({"form": "odd"}, "form must be one of"),
        ({"alignment": 0.2}, "alignment must be"),
        ({"depth": "log"}, "depth must be 'sqrt', 'linear' or None, got 'log'"),
        ({"depth": "sqrt"}, "layers and base_layers must be >= 1 with depth, got None and None"),
        ({"layers": 4}, "depth must be 'sqrt' or 'linear' where layers"),
        (
            {"depth": "sqrt", "layers": 4, "base_layers": 2, "blocks": "h.*"},
            r"blocks must match some parameter, got 'h\.\*'",
        ),
        ({"groups": [{"params": []}]}, r"groups must hold every parameter, .* is in none \(8 in all\)"),
        ({"groups": [{"lr": 1.0}]}, r"groups must be dictionaries with 'params', got keys \['lr'\]"),
        ({"groups": [{"params": "fc9.weight"}]}, r"groups names 'fc9\.weight', which is no parameter"),
        (
            {"groups": [{"params": ["fc1.bias", "fc1.bias"]}]},
            r"hold each parameter once, 'fc1\.bias' appears again",
        ),
        ({"groups": [{"params": [nn.Parameter(torch.ones(5))]}]}, r"of shape \(5,\) that is not the model's"),
        ({"groups": [{"params": "fc1.bias", "lr": -2.0}]}, "lr must be finite and >= 0, got -2.0"),
    ],
)
def test_impossible_options_are_refused(options, rule):
    model = build(MLP, 64)
    with pytest.raises(ValueError, match=rule):
        param_groups(model, mlp_roles(), **{"lr": 1e-2, **options})


def test_parameters_without_role_are_named():
    model = build(MLP, 64)
    with pytest.raises(ValueError, match=r"roles has no role for 'fc1\.weight'"):
        param_groups(model, {"other": Role("input")}, 1e-2)
