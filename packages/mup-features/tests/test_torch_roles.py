"""Roles of torch modules: every kind of layer, sharing, files, wrappers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MLP, Transformer, build, on_meta
from torch import nn

from mup_features import Role, save_shapes
from mup_features.roles import Layout
from mup_features.torch import base_shapes, infer_roles, role_table


def roles_of(make, width=64, base=16, **options):
    """Roles of a model made twice on the meta device, at two widths."""
    with torch.device("meta"):
        return infer_roles(make(width), make(base), **options)


def place(role):
    return role.kind, role.fan_in_mult, role.fan_out_mult


def test_the_layers_of_an_mlp():
    roles = infer_roles(on_meta(MLP, 64), on_meta(MLP, 16))
    assert place(roles["fc1.weight"]) == ("input", 1.0, 4.0)
    assert place(roles["fc2.weight"]) == place(roles["fc3.weight"]) == ("hidden", 4.0, 4.0)
    assert place(roles["readout.weight"]) == ("output", 4.0, 1.0)
    assert place(roles["fc2.bias"]) == ("input", 1.0, 4.0)
    assert place(roles["readout.bias"]) == ("input", 1.0, 1.0)
    assert roles["readout.bias"].default_fan_mult == 4.0
    assert roles["fc1.bias"].default_fan_mult == 1.0


def test_a_transformer_with_tied_embedding():
    roles = infer_roles(on_meta(Transformer, 64), on_meta(Transformer, 16))
    assert roles["embed.weight"] == roles["head.weight"]
    assert roles["embed.weight"].tied
    assert place(roles["embed.weight"]) == ("input", 1.0, 4.0)
    assert place(roles["position"]) == ("input", 1.0, 4.0)
    assert place(roles["blocks.0.norm1.weight"]) == ("input", 1.0, 4.0)
    assert {roles[f"blocks.1.{name}.weight"].kind for name in ("qkv", "proj", "up", "down")} == {"hidden"}
    assert not roles["position"].scalable


CONVOLUTIONS = {
    "plain": (lambda w: nn.Conv2d(w, 2 * w, 3), ("hidden", 4.0, 4.0)),
    "one dimension": (lambda w: nn.Conv1d(3, w, 5), ("input", 1.0, 4.0)),
    "three dimensions": (lambda w: nn.Conv3d(w, 2, 3), ("output", 4.0, 1.0)),
    "fixed groups": (lambda w: nn.Conv2d(w, w, 3, groups=4), ("hidden", 4.0, 4.0)),
    "groups of fixed size": (lambda w: nn.Conv2d(w, w, 3, groups=w // 4), ("input", 1.0, 4.0)),
    "depthwise": (lambda w: nn.Conv2d(w, w, 3, groups=w), ("input", 1.0, 4.0)),
    "transposed": (lambda w: nn.ConvTranspose2d(w, 3, 2), ("output", 4.0, 1.0)),
    "transposed, from few channels": (lambda w: nn.ConvTranspose1d(3, w, 2), ("input", 1.0, 4.0)),
    "transposed, fixed groups": (lambda w: nn.ConvTranspose2d(w, 2 * w, 2, groups=4), ("hidden", 4.0, 4.0)),
    "transposed, groups of fixed size": (
        lambda w: nn.ConvTranspose2d(w, w, 2, groups=w // 4),
        ("input", 1.0, 4.0),
    ),
    "transposed, depthwise": (lambda w: nn.ConvTranspose2d(w, 2 * w, 2, groups=w), ("input", 1.0, 4.0)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    make, expected = CONVOLUTIONS[name]
    roles = roles_of(make)
    assert place(roles["weight"]) == expected
    assert not roles["weight"].matrix
    grown = name not in ("three dimensions", "transposed")
    assert place(roles["bias"]) == ("input", 1.0, 4.0 if grown else 1.0)


def test_a_depthwise_transposed_convolution_is_known_from_shapes_alone(tmp_path):
    make, expected = CONVOLUTIONS["transposed, depthwise"]
    save_shapes(tmp_path / "base.json", make(16))
    assert place(infer_roles(make(64), tmp_path / "base.json")["weight"]) == expected


def test_attention_and_recurrent_layers():
    roles = roles_of(lambda w: nn.MultiheadAttention(w, 4, add_bias_kv=True))
    assert place(roles["in_proj_weight"]) == place(roles["out_proj.weight"]) == ("hidden", 4.0, 4.0)
    assert place(roles["in_proj_bias"]) == place(roles["bias_k"]) == ("input", 1.0, 4.0)
    roles = roles_of(lambda w: nn.MultiheadAttention(w, 4, kdim=8, vdim=w))
    assert place(roles["k_proj_weight"]) == ("input", 1.0, 4.0)
    assert not roles["k_proj_weight"].scalable
    assert roles["k_proj_weight"].default_fan_mult == (64 + 8) / (16 + 8)
    roles = roles_of(lambda w: nn.LSTM(8, w, proj_size=4))
    assert place(roles["weight_ih_l0"]) == place(roles["weight_hh_l0"]) == ("input", 1.0, 4.0)
    assert place(roles["weight_hr_l0"]) == ("output", 4.0, 1.0)
    assert {role.default_fan_mult for role in roles.values()} == {4.0}
    assert place(roles_of(lambda w: nn.GRUCell(w, w))["weight_hh"]) == ("hidden", 4.0, 4.0)


@pytest.mark.parametrize(
    "make",
    [
        nn.LayerNorm,
        nn.RMSNorm,
        nn.BatchNorm2d,
        lambda w: nn.GroupNorm(4, w),
        nn.PReLU,
        lambda w: nn.LayerNorm((w, 3)),
    ],
)
def test_gains_and_offsets_are_input_like(make):
    for role in roles_of(make).values():
        assert place(role) == ("input", 1.0, 4.0)
        assert (role.scalable, role.default_fan_mult) == (False, 1.0)


def test_subclasses_are_what_they_descend_from():
    class Scaled(nn.Linear):
        def __init__(self, width):
            super().__init__(width, width)
            self.gain = nn.Parameter(torch.ones(width))

    roles = roles_of(Scaled)
    assert roles["weight"].kind == "hidden"
    assert place(roles["gain"]) == ("input", 1.0, 4.0)


@pytest.mark.slow
def test_gpt2_stores_its_kernels_the_other_way_round():
    transformers = pytest.importorskip("transformers")

    def gpt2(width):
        config = transformers.GPT2Config(
            n_embd=width, n_head=width // 8, n_layer=1, vocab_size=50, n_positions=16
        )
        return transformers.GPT2LMHeadModel(config)

    roles = roles_of(gpt2, 64, 32)
    assert place(roles["transformer.h.0.mlp.c_fc.weight"]) == ("hidden", 2.0, 2.0)
    assert roles["transformer.wte.weight"].tied
    assert roles["lm_head.weight"] == roles["transformer.wte.weight"]
    assert roles["transformer.wpe.weight"] == Role(
        "input", fan_out_mult=2.0, matrix=False, default_fan_mult=1.0
    )
    from transformers.pytorch_utils import Conv1D

    assert place(roles_of(lambda w: Conv1D(w, 8), 64, 32)["weight"]) == ("input", 1.0, 2.0)
    assert place(roles_of(lambda w: Conv1D(5, w), 64, 32)["weight"]) == ("output", 2.0, 1.0)


class Raw(nn.Module):
    def __init__(self, width, shape):
        super().__init__()
        self.w = nn.Parameter(torch.empty(*(width if size is None else size for size in shape)))


@pytest.mark.parametrize("shape", [(None, None), (None, 10), (10, None), (None, None, None)])
def test_raw_parameters_that_shapes_cannot_place_need_an_override(shape):
    with pytest.raises(
        ValueError, match=r"parameter 'w' has shape .*64.*at base width .*16.*overrides=\{'w'"
    ):
        roles_of(lambda w: Raw(w, shape))


def test_raw_parameters_take_overrides():
    assert place(roles_of(lambda w: Raw(w, (None, 10)), overrides={"w": "output"})["w"]) == (
        "output",
        4.0,
        1.0,
    )
    assert place(roles_of(lambda w: Raw(w, (None, None)), overrides={"*": "hidden"})["w"]) == (
        "hidden",
        4.0,
        4.0,
    )
    experts = Layout("linear", fan_in=(1,), fan_out=(2,), scalable=False)
    role = roles_of(lambda w: Raw(w, (8, None, None)), overrides={"w": experts})["w"]
    assert place(role) == ("hidden", 4.0, 4.0)
    assert not role.matrix


class Shared(nn.Module):
    def __init__(self, width, *, second):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = second(width)
        self.second.weight = self.first.weight


def test_a_layer_used_twice_has_one_role():
    roles = roles_of(lambda w: Shared(w, second=lambda w: nn.Linear(w, w, bias=False)))
    assert roles["first.weight"] == roles["second.weight"]


def test_a_bias_kept_twice_has_one_role():
    class Head(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.decoder = nn.Linear(width, 10)
            self.bias = self.decoder.bias

    roles = roles_of(Head)
    assert roles["bias"] == roles["decoder.bias"]
    assert roles["bias"].default_fan_mult == 4.0


def test_a_parameter_in_two_places_of_different_roles_is_refused():
    with pytest.raises(ValueError, match=r"'first\.weight' \(hidden\), 'second\.weight' \(input\)"):
        roles_of(
            lambda w: Shared(w, second=lambda w: nn.Embedding(w, w)), overrides={"second.weight": "input"}
        )


def test_a_vocabulary_that_differs_is_no_width():
    with pytest.raises(ValueError, match=r"'weight' has shape \(48, 64\), at base width \(32, 16\): axis 0"):
        infer_roles(nn.Embedding(48, 64), nn.Embedding(32, 16))


def test_a_file_stands_in_for_the_base_model(tmp_path):
    save_shapes(tmp_path / "base.json", on_meta(Transformer, 16))
    expected = infer_roles(on_meta(Transformer, 64), on_meta(Transformer, 16))
    assert infer_roles(on_meta(Transformer, 64), tmp_path / "base.json") == expected
    assert infer_roles(on_meta(Transformer, 64), base_shapes(on_meta(Transformer, 16))) == expected


def test_a_bsh_file_of_a_tied_model_gives_the_same_roles(tmp_path):
    mup = pytest.importorskip("mup")
    mup.make_base_shapes(build(Transformer, 16), build(Transformer, 32), str(tmp_path / "base.bsh"))
    expected = infer_roles(on_meta(Transformer, 64), on_meta(Transformer, 16), on_meta(Transformer, 32))
    assert infer_roles(on_meta(Transformer, 64), tmp_path / "base.bsh") == expected


def test_a_stale_file_is_refused(tmp_path):
    save_shapes(tmp_path / "base.json", on_meta(MLP, 16), on_meta(MLP, 32))
    with pytest.raises(ValueError, match=r"stale"):
        infer_roles(
            nn.ModuleDict(
                {
                    "fc1": nn.Linear(9, 64),
                    "fc2": nn.Linear(64, 128),
                    "fc3": nn.Linear(128, 64),
                    "readout": nn.Linear(64, 3),
                }
            ),
            tmp_path / "base.json",
        )
    with pytest.raises(ValueError, match=r"the base lacks 'bias', 'weight'"):
        infer_roles(nn.Linear(3, 64), tmp_path / "base.json")


@given(hidden=st.lists(st.integers(1, 40), min_size=2, max_size=4), m=st.integers(2, 5), bias=st.booleans())
def test_any_chain_of_layers_has_input_hidden_and_output(hidden, m, bias):
    def chain(factor):
        sizes = [3, *(factor * size for size in hidden), 2]
        return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)))

    with torch.device("meta"):
        roles = infer_roles(chain(m), chain(1))
    last = len(hidden)
    assert place(roles["0.weight"]) == ("input", 1.0, m)
    assert all(place(roles[f"{i}.weight"]) == ("hidden", m, m) for i in range(1, last))
    assert place(roles[f"{last}.weight"]) == ("output", m, 1.0)
    if bias:
        grown = [place(roles[f"{i}.bias"])[2] for i in range(last + 1)]
        assert grown == [m] * last + [1.0]


def test_wrappers_do_not_change_names():
    model = build(MLP, 64)
    expected = infer_roles(model, on_meta(MLP, 16))
    assert infer_roles(nn.DataParallel(model), on_meta(MLP, 16)) == expected
    prefixed = {f"module.{name}": shape for name, shape in base_shapes(on_meta(MLP, 16)).items()}
    assert infer_roles(model, prefixed) == expected


@pytest.mark.slow
def test_compiled_models_and_layers_keep_their_names():
    model = build(MLP, 64)
    expected = infer_roles(model, on_meta(MLP, 16))
    assert infer_roles(torch.compile(model), on_meta(MLP, 16)) == expected
    model.fc2 = torch.compile(model.fc2)
    assert infer_roles(model, on_meta(MLP, 16)) == expected


def test_a_base_of_the_same_shapes_is_announced():
    with pytest.warns(UserWarning, match="every width multiplier is 1"):
        infer_roles(on_meta(MLP, 16), on_meta(MLP, 16))


def test_a_second_width_shows_the_readout_even_at_base_width():
    roles = infer_roles(on_meta(MLP, 16), on_meta(MLP, 16), on_meta(MLP, 32))
    assert [roles[f"{name}.weight"].kind for name in ("fc1", "fc2", "readout")] == [
        "input",
        "hidden",
        "output",
    ]


def test_the_table_names_every_parameter():
    model = on_meta(MLP, 64)
    rows = role_table(model, infer_roles(model, on_meta(MLP, 16)), "sgd").splitlines()
    assert "| readout.weight | 3x64 | output | 4 | 1 | 1 | 0.25 | 4 | 0.25 |" in rows
    assert len(rows) == 10
    with pytest.raises(ValueError, match=r"roles has no role for 'fc1\.bias'"):
        role_table(model, {})


def test_lazy_parameters_and_other_bases_are_refused():
    with pytest.raises(ValueError, match="'weight' is lazy"):
        infer_roles(nn.LazyLinear(4), nn.Linear(2, 4))
    with pytest.raises(TypeError, match="base must be a module, a dictionary of shapes or a path, got int"):
        infer_roles(nn.Linear(2, 4), 3)  # pyright: ignore[reportArgumentType]
