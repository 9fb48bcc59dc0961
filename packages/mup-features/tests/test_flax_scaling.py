"""Roles, initialization and multipliers of nnx models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import MLP, Layers, Transformer

from mup_features.flax import (
    attention_fn,
    base_shapes,
    infer_roles,
    init_rescale,
    readout_multiplier,
    role_table,
)
from mup_features.roles import Role
from mup_features.shapes import load_shapes, save_shapes


def abstract(build, width, **options):
    return nnx.eval_shape(lambda: build(width, nnx.Rngs(0), **options))


def summary(role):
    return role.kind, role.fan_in_mult, role.fan_out_mult


def test_roles_of_a_transformer_follow_from_its_shapes():
    roles = infer_roles(abstract(Transformer, 32), abstract(Transformer, 8))
    entry, hidden, vector, readout = ("input", 1, 4), ("hidden", 4, 4), ("input", 1, 4), ("output", 4, 1)
    expected = {
        "embed.embedding": entry,
        "positions": vector,
        "norm.scale": vector,
        "block.attention.query.kernel": hidden,
        "block.attention.query.bias": vector,
        "block.attention.out.kernel": hidden,
        "block.up.kernel": hidden,
        "block.down.bias": vector,
        "head.kernel": readout,
    }
    assert {name: summary(roles[name]) for name in expected} == expected
    assert len(roles) == 21


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv.kernel", ("input", 1, 2)),
        ("conv.bias", ("input", 1, 2)),
        ("grouped.kernel", ("hidden", 2, 2)),
        ("depthwise.kernel", ("input", 1, 2)),
        ("transposed.kernel", ("output", 2, 1)),
        ("transposed.bias", ("input", 1, 1)),
        ("flipped.kernel", ("output", 2, 1)),
        ("einsum.kernel", ("hidden", 2, 2)),
        ("einsum.bias", ("input", 1, 2)),
        ("into_heads.kernel", ("hidden", 2, 2)),
        ("into_heads.bias", ("input", 1, 2)),
        ("out_of_heads.kernel", ("output", 2, 1)),
        ("norm.scale", ("input", 1, 2)),
        ("scalar", ("input", 1, 1)),
    ],
)
def test_roles_of_every_layer(name, expected):
    assert summary(infer_roles(abstract(Layers, 8), abstract(Layers, 4))[name]) == expected


def test_a_third_width_marks_widths_of_a_model_of_base_width():
    roles = infer_roles(abstract(MLP, 8), abstract(MLP, 8), other=abstract(MLP, 4))
    assert summary(roles["leave.kernel"]) == ("output", 1, 1)
    with pytest.warns(UserWarning, match="every width multiplier is 1"):
        infer_roles(abstract(MLP, 8), abstract(MLP, 8))


def test_a_file_of_shapes_stands_in_for_the_base(tmp_path):
    save_shapes(tmp_path / "base.json", base_shapes(abstract(MLP, 4)))
    roles = infer_roles(abstract(MLP, 8), load_shapes(tmp_path / "base.json"))
    assert roles == infer_roles(abstract(MLP, 8), abstract(MLP, 4))


def test_overrides_settle_what_shapes_cannot():
    class Odd(nnx.Module):
        def __init__(self, width, rngs):
            self.mixing = nnx.Param(jax.random.normal(rngs.params(), (width, width)))

    with pytest.raises(ValueError, match="'mixing' has shape"):
        infer_roles(abstract(Odd, 8), abstract(Odd, 4))
    roles = infer_roles(abstract(Odd, 8), abstract(Odd, 4), overrides={"mix*": "hidden"})
    assert summary(roles["mixing"]) == ("hidden", 2, 2)


def values(model):
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@pytest.mark.parametrize("form", ["mult", "pure", "symmetric"])
def test_init_has_the_standard_deviations_of_the_table(form):
    m = 4
    model = MLP(8 * m, nnx.Rngs(0))
    before, roles = values(model), infer_roles(model, abstract(MLP, 8))
    assert init_rescale(model, roles, form) is model
    after = values(model)
    # flax's own laws: 1/sqrt(fan), so at base width the readout is sqrt(m) larger
    ratios = {
        "enter.kernel": 1.0 if form != "symmetric" else m**-0.5,
        "middle.kernel": 1.0,
        "leave.kernel": {"mult": m**0.5, "pure": m**-0.5, "symmetric": 1.0}[form],
    }
    for name, ratio in ratios.items():
        np.testing.assert_allclose(after[name], ratio * before[name], rtol=1e-6)  # float32


@pytest.mark.parametrize("tied", [False, True])
def test_the_three_forms_are_one_function(tied):
    tokens = jnp.arange(6)[None]
    outputs = []
    for form in ("mult", "pure", "symmetric"):
        model = Transformer(32, nnx.Rngs(1), tied=tied)
        init_rescale(model, infer_roles(model, abstract(Transformer, 8, tied=tied)), form, "fan_in")
        outputs.append(model(tokens))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)  # float32, outputs of order one
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-5)


@pytest.mark.parametrize("form", ["mult", "pure", "symmetric"])
def test_a_tied_readout_is_the_embedding_over_m_in_every_form(form):
    model, plain = (Transformer(32, nnx.Rngs(0), tied=True) for _ in range(2))
    roles = infer_roles(model, abstract(Transformer, 8, tied=True))
    init_rescale(model, roles, form, {"embed*": "constant", "*": "fan_in"})
    h, tokens = jnp.ones((2, 32)), jnp.arange(3)
    np.testing.assert_allclose(model.embed(tokens), plain.embed(tokens), rtol=1e-6)  # float32
    np.testing.assert_allclose(model.embed.attend(h), plain.embed.attend(h) / 4.0, rtol=1e-5, atol=1e-6)
    by_hand = (h * readout_multiplier(roles["embed.embedding"], form)) @ model.embed.embedding[...].T
    np.testing.assert_allclose(model.embed.attend(h), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_base_width_stays_as_it_is_bitwise(tied):
    model, plain = (Transformer(32, nnx.Rngs(1), tied=tied) for _ in range(2))
    other = abstract(Transformer, 8, tied=tied)
    init_rescale(model, infer_roles(model, abstract(Transformer, 32, tied=tied), other), "symmetric")
    tokens = jnp.arange(6)[None]
    assert (model(tokens) == plain(tokens)).all()


def test_multipliers_survive_split_merge_and_jit_and_leave_parameters_alone():
    model, plain = MLP(32, nnx.Rngs(0)), MLP(32, nnx.Rngs(0))
    init_rescale(model, infer_roles(model, abstract(MLP, 8)))
    assert {n: v.shape for n, v in values(model).items()} == {n: v.shape for n, v in values(plain).items()}
    x = jnp.ones((2, 8))
    expected = model(x)
    # the readout's kernel grew by 2 and is divided by 4, its bias is zero
    np.testing.assert_allclose(expected, plain(x) / 2.0, rtol=1e-5)
    graph, state = nnx.split(model)
    assert (nnx.merge(graph, state)(x) == expected).all()
    assert (nnx.clone(model)(x) == expected).all()
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-5)


def test_two_scaled_models_have_equal_graphs_so_that_jit_compiles_once():
    graphs = []
    for seed in (0, 1):
        model = Transformer(32, nnx.Rngs(seed), tied=True, attention_fn=attention_fn(2))
        init_rescale(model, infer_roles(model, abstract(Transformer, 8, tied=True)), init="fan_in")
        graphs.append(nnx.split(model)[0])
    assert graphs[0] == graphs[1]


def test_scaling_twice_is_scaling_once():
    model = MLP(32, nnx.Rngs(0))
    roles = infer_roles(model, abstract(MLP, 8))
    once = values(init_rescale(model, roles))
    twice = values(init_rescale(model, roles))
    assert all((once[name] == twice[name]).all() for name in once)
    with pytest.raises(
        ValueError, match="form must be 'mult', in which this model was scaled before, got 'pure'"
    ):
        init_rescale(model, roles, "pure")


def test_multipliers_alone_can_be_set_on_an_abstract_model():
    model = MLP(32, nnx.Rngs(0))
    roles = infer_roles(model, abstract(MLP, 8))
    init_rescale(model, roles)
    frame = init_rescale(abstract(MLP, 32), roles, rescale=False)
    nnx.update(frame, nnx.state(model))
    assert (frame(jnp.ones((1, 8))) == model(jnp.ones((1, 8)))).all()


def test_zero_readout_gives_a_zero_function():
    model = MLP(32, nnx.Rngs(0))
    init_rescale(model, infer_roles(model, abstract(MLP, 8)), zero_readout=True)
    assert (model(jnp.ones((3, 8))) == 0.0).all()
    with pytest.raises(ValueError, match="zero_readout needs a parameter of role 'output'"):
        fresh = Transformer(32, nnx.Rngs(0), tied=True)
        init_rescale(fresh, infer_roles(fresh, abstract(Transformer, 8, tied=True)), zero_readout=True)


class Constant(nnx.Module):
    """A standard deviation that does not depend on width, as GPT-2."""

    def __init__(self, width, rngs):
        init = nnx.initializers.normal(0.05)
        self.enter = nnx.Linear(8, width, kernel_init=init, rngs=rngs)
        self.middle = nnx.Linear(width, width, kernel_init=init, rngs=rngs)
        self.leave = nnx.Linear(width, 4, kernel_init=init, rngs=rngs)


@pytest.mark.parametrize("init", ["auto", "constant", {"leave*": "constant", "*": "auto"}])
def test_constant_initializers_are_told_apart_from_those_of_flax(init):
    model, base = Constant(32, nnx.Rngs(0)), Constant(8, nnx.Rngs(1))
    before = values(model)
    init_rescale(model, infer_roles(model, base), init=init)
    after = values(model)
    np.testing.assert_allclose(after["middle.kernel"], before["middle.kernel"] / 2.0, rtol=1e-6)
    np.testing.assert_allclose(after["leave.kernel"], before["leave.kernel"], rtol=1e-6)


def test_initializers_that_cannot_be_told_are_refused_before_anything_changes():
    model = Constant(32, nnx.Rngs(0))
    before, roles = values(model), infer_roles(model, abstract(Constant, 8))
    with pytest.raises(ValueError, match=r"init must say how 'leave.kernel' depends on width"):
        init_rescale(model, roles)
    with pytest.raises(ValueError, match=r"init has no pattern for parameter 'enter.bias'"):
        init_rescale(model, roles, init={"*.kernel": "constant"})
    with pytest.raises(ValueError, match="got 'xavier'"):
        init_rescale(model, roles, init="xavier")
    after = values(model)
    assert all((before[name] == after[name]).all() for name in before)


class ByHand(nnx.Module):
    """A readout outside flax's layers."""

    def __init__(self, width, rngs):
        self.enter = nnx.Linear(8, width, rngs=rngs)
        self.out = nnx.Param(jax.random.normal(rngs.params(), (width, 4)) / width**0.5)


def test_a_readout_outside_of_layers_takes_the_pure_form():
    model = ByHand(32, nnx.Rngs(0))
    roles = infer_roles(model, ByHand(8, nnx.Rngs(1)), overrides={"out": "output"})
    before = values(model)["out"]
    init_rescale(model, roles)
    np.testing.assert_allclose(values(model)["out"], before / 2.0, rtol=1e-6)  # sqrt(4) / 4
    assert readout_multiplier(roles["out"]) == 1.0


def test_a_role_that_asks_for_a_multiplier_where_none_can_stand_is_refused():
    model = ByHand(32, nnx.Rngs(0))
    role = Role("output", fan_in_mult=4)
    roles = infer_roles(model, abstract(ByHand, 8), overrides={"out": role})
    assert readout_multiplier(role) == 0.25
    with pytest.raises(
        ValueError, match="form 'mult' needs a multiplier in front of 'out', and ByHand has no"
    ):
        init_rescale(model, roles)


def test_attention_equals_that_of_flax_at_base_and_divides_by_d_beyond():
    q, k, v = (jax.random.normal(key, (1, 3, 2, 16)) for key in jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(attention_fn(16)(q, k, v), nnx.dot_product_attention(q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 4**0.5 / 16)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    np.testing.assert_allclose(attention_fn(4)(q, k, v), expected, rtol=1e-5)  # float32
    with pytest.raises(ValueError, match="base_head_dim must be >= 1, got 0"):
        attention_fn(0)


def test_tables_list_every_parameter():
    model = abstract(MLP, 32)
    text = role_table(model, infer_roles(model, abstract(MLP, 8)))
    assert all(name in text for name in ("enter.kernel", "middle.bias", "leave.kernel"))


def test_roles_of_another_model_are_refused():
    model = MLP(32, nnx.Rngs(0))
    roles = infer_roles(model, abstract(MLP, 8))
    with pytest.raises(ValueError, match=r"missing: leave.bias"):
        init_rescale(model, {name: role for name, role in roles.items() if name != "leave.bias"})
    with pytest.raises(ValueError, match=r"parameters of the model only, got head.kernel"):
        init_rescale(model, roles | {"head.kernel": Role("output")})
    with pytest.raises(TypeError, match=r"model must be a flax.nnx.Module, got dict"):
        infer_roles({}, abstract(MLP, 8))
