"""Initial sizes and multipliers of apply_mup: base width, forms, laws of initialisation, copies, graphs."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from models import MLP, Transformer, build, on_meta
from torch import nn

from mup_features import Role, apply_mup, attention_scale, infer_roles, save_shapes
from mup_features.torch import residual_scale
from mup_features.torch._multipliers import multiplier_of

FORMS = ("mult", "pure", "symmetric")


def scaled(kind, width=64, base=16, *, form="mult", seed=0, dtype=torch.float64, **options):
    """A model of the given width with roles against a real base model, scaled, and its roles."""
    model = build(kind, width, seed, dtype)
    roles = infer_roles(model, build(kind, base, 1, dtype), on_meta(kind, 2 * base))
    return apply_mup(model, roles, form=form, **options), roles


def entries(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [MLP, Transformer])
def test_at_base_width_the_model_is_untouched(kind, form):
    model = build(kind, 16)
    before = entries(model)
    roles = infer_roles(model, build(kind, 16, 1), on_meta(kind, 32))
    assert apply_mup(model, roles, form=form) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


SIZES = {  # factor on torch's default at width 64 that makes base std times muP's factor, m = 4
    "mult": {"fc1": 1, "fc2": 1, "readout": 2, "readout.bias": 2},
    "pure": {"fc1": 1, "fc2": 1, "readout": 1 / 2, "readout.bias": 2},
    "symmetric": {"fc1": 1 / 2, "fc2": 1, "readout": 1, "readout.bias": 2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["real", "meta", "file"])
def test_initial_sizes_are_those_of_the_table(form, base, tmp_path):
    plain, model = build(MLP, 64), build(MLP, 64)
    if base == "file":
        save_shapes(tmp_path / "base.json", build(MLP, 16))
    of_base = {"real": build(MLP, 16, 1), "meta": on_meta(MLP, 16), "file": tmp_path / "base.json"}[base]
    apply_mup(model, infer_roles(model, of_base), form=form)
    for layer in ("fc1", "fc2", "fc3", "readout"):
        factor = SIZES[form].get(layer, 1)
        assert torch.equal(
            model.get_parameter(f"{layer}.weight"), factor * plain.get_parameter(f"{layer}.weight")
        )
    # torch draws a bias with its layer's 1/sqrt(fan_in); muP keeps the size it has at base width
    assert torch.equal(model.fc1.bias, plain.fc1.bias)
    assert torch.equal(model.fc2.bias, 2 * plain.fc2.bias)
    assert torch.equal(model.readout.bias, 2 * plain.readout.bias)
    assert multiplier_of(model.fc1) == {"symmetric": 2}.get(form, 1)
    assert multiplier_of(model.readout) == {"mult": 1 / 4, "pure": 1, "symmetric": 1 / 2}[form]


@pytest.mark.parametrize("kind", [MLP, Transformer])
def test_the_three_forms_are_one_function_at_the_start(kind):
    x = torch.randn(5, 8, dtype=torch.float64) if kind is MLP else torch.arange(10).view(2, 5)
    outputs = [scaled(kind, form=form)[0](x) for form in FORMS]
    for output in outputs[1:]:
        # two orders of the same products in float64
        assert torch.allclose(output, outputs[0], rtol=0, atol=1e-13)


def test_calling_again_changes_nothing():
    model, roles = scaled(MLP)
    before, output = entries(model), model(torch.ones(1, 8, dtype=torch.float64))
    apply_mup(model, roles)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.ones(1, 8, dtype=torch.float64)), output)


def test_a_checkpoint_is_loaded_into_a_scaled_model_and_not_scaled_again():
    trained, roles = scaled(MLP, zero_readout=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    fresh, _ = scaled(MLP, seed=5)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    apply_mup(fresh, roles, zero_readout=True)
    x = torch.ones(2, 8, dtype=torch.float64)
    assert torch.equal(fresh(x), trained(x))


def test_a_checkpoint_of_a_scaled_model_does_not_slip_into_an_unscaled_one():
    trained, _ = scaled(MLP)
    with pytest.raises(RuntimeError, match="mup_form"):
        build(MLP, 64).load_state_dict(trained.state_dict())


def test_parameters_that_are_already_mups_get_multipliers_only():
    trained, roles = scaled(MLP)
    fresh = build(MLP, 64, 5)
    fresh.load_state_dict(trained.state_dict(), strict=False)
    apply_mup(fresh, roles, rescale=False)
    x = torch.ones(2, 8, dtype=torch.float64)
    assert torch.equal(fresh(x), trained(x))


def test_a_model_has_one_form():
    model, roles = scaled(MLP)
    with pytest.raises(
        ValueError, match="form must be 'mult', in which the model was scaled already, got 'pure'"
    ):
        apply_mup(model, roles, form="pure")


def test_a_scaled_model_keeps_its_roles():
    model, _ = scaled(MLP)
    with pytest.raises(ValueError, match=r"a Linear has the multiplier 0\.25, these ask for 0\.125"):
        apply_mup(model, infer_roles(model, build(MLP, 8)))


@pytest.mark.parametrize("form", FORMS)
def test_deepcopy_and_pickle_keep_function_and_guard(form):
    model, roles = scaled(Transformer, form=form)
    tokens = torch.arange(10).view(2, 5)
    expected = model(tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 (own bytes)
        assert torch.equal(twin(tokens), expected)
        assert torch.equal(apply_mup(twin, roles, form=form)(tokens), expected)


def test_zero_readout_starts_at_zero_with_its_bias():
    model, _ = scaled(MLP, zero_readout=True)
    assert not model(torch.randn(4, 8, dtype=torch.float64)).any()
    assert model.fc3.weight.any()
    at_base = build(MLP, 16)
    apply_mup(at_base, infer_roles(at_base, build(MLP, 16, 1), on_meta(MLP, 32)), zero_readout=True)
    assert not at_base.readout.weight.any()
    assert torch.equal(at_base.fc3.weight, build(MLP, 16).fc3.weight)


def test_zero_readout_needs_a_readout_of_its_own():
    deep, plain = build(MLP, 64), build(MLP, 64)
    roles = {
        name: Role("input", fan_out_mult=4.0, scalable=name.endswith("weight"))
        for name, _ in deep.named_parameters()
    }
    with pytest.raises(ValueError, match="zero_readout needs a parameter of role 'output'"):
        apply_mup(deep, roles, form="symmetric", zero_readout=True, init="fan_in")
    assert torch.equal(deep.fc1.weight, plain.fc1.weight)
    with pytest.raises(ValueError, match=r"zero_readout must be False where .*'embed\.weight'"):
        scaled(Transformer, zero_readout=True)


def test_a_tied_embedding_is_read_out_with_a_smaller_multiplier():
    plain = build(Transformer, 64)
    tokens = torch.arange(10).view(2, 5)
    for form, embedding, readout in (("mult", 1, 1 / 4), ("pure", 1, 1 / 4), ("symmetric", 2, 1 / 2)):
        model, _ = scaled(Transformer, form=form)
        assert (multiplier_of(model.embed), multiplier_of(model.head)) == (embedding, readout)
        assert torch.equal(model.embed.weight * embedding, plain.embed.weight)
        assert torch.equal(model.embed(tokens), plain.embed(tokens))
        assert model.head.weight is model.embed.weight


def test_a_multiplier_leaves_the_bias_and_takes_keyword_inputs():
    layer = nn.Linear(8, 3)
    plain = copy.deepcopy(layer)
    apply_mup(layer, {"weight": Role("output", fan_in_mult=4.0), "bias": Role("input")}, rescale=False)
    x = torch.randn(2, 8)
    expected = nn.functional.linear(x / 4, plain.weight, plain.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(input=x), expected)


def test_convolutions_are_scaled_as_linear_layers():
    def net(width, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(3, width, 3),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3),
                nn.ConvTranspose2d(2 * width, 2, 2),
            )

    plain, model = net(32), net(32)
    apply_mup(model, infer_roles(model, net(8, 1)))
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(model[2].weight, plain[2].weight)
    assert torch.equal(model[2].bias, 2 * plain[2].bias)
    assert multiplier_of(model[3]) == 1 / 4
    # torch's fan of a transposed convolution is its outputs, here no width: the default is constant
    assert torch.equal(model[3].weight, plain[3].weight)


def test_raw_readouts_take_the_pure_form():
    class Raw(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.hidden = nn.Linear(8, width)
            self.out = nn.Parameter(torch.randn(width, 16) * width**-0.5)

        def forward(self, x):
            return self.hidden(x) @ self.out

    model, base = build(Raw, 64, dtype=torch.float32), build(Raw, 16, 1, dtype=torch.float32)
    plain = build(Raw, 64, dtype=torch.float32)
    roles = infer_roles(model, base, overrides={"out": "output"})
    of_role = infer_roles(model, base, overrides={"out": Role("output", fan_in_mult=4.0)})
    assert not of_role["out"].scalable
    with pytest.raises(ValueError, match="scalable=False for 'out'"):
        apply_mup(model, {**roles, "out": Role("output", fan_in_mult=4.0)})
    apply_mup(model, roles)
    assert torch.equal(model.out, plain.out / 2)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_its_type_and_is_recognised(dtype):
    model, _ = scaled(MLP, 128, 32, dtype=dtype)
    output = model(torch.ones(2, 8, dtype=dtype))
    assert output.dtype == dtype
    assert model.mup_form.dtype == torch.uint8
    assert model.half().mup_form.dtype == torch.uint8


def test_export_shows_one_multiplication_by_a_constant():
    model, _ = scaled(MLP)
    x = torch.randn(2, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        plain = torch.export.export(build(MLP, 64), (x,))
        program = torch.export.export(model, (x,))

    def operations(program):
        return [node for node in program.graph.nodes if node.op == "call_function"]

    extra = [node for node in operations(program) if "mul" in str(node.target)]
    assert len(operations(program)) == len(operations(plain)) + 1
    assert [node.args[1] for node in extra] == [0.25]
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.slow
def test_compiled_and_eager_models_agree():
    model, _ = scaled(Transformer, form="symmetric", dtype=torch.float32)
    tokens = torch.arange(10).view(2, 5)
    compiled = torch.compile(model, fullgraph=True)
    # inductor reorders float32 sums
    assert torch.allclose(compiled(tokens), model(tokens), atol=1e-5)


def test_the_compiled_graph_has_no_break_and_two_constants():
    model, _ = scaled(Transformer, form="symmetric", dtype=torch.float32)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    tokens = torch.arange(10).view(2, 5)
    output = torch.compile(model, backend=backend, fullgraph=True)(tokens)
    assert torch.equal(output, model(tokens))
    constants = [
        node.args[1]
        for node in graphs[0].graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "mul"
    ]
    assert len(graphs) == 1
    assert sorted(constants) == [0.5, 2.0]


def test_attention_and_residual_scales():
    assert attention_scale(64, 64) == 1 / 8
    assert attention_scale(256, 64) == 8 / 256
    assert residual_scale(16, 4) == 0.5
    assert residual_scale(16, 4, "linear") == 0.25
    with pytest.raises(ValueError, match="d_head must be >= 1, got 0"):
        attention_scale(0, 64)
    with pytest.raises(ValueError, match="base_depth must be >= 1, got 0"):
        residual_scale(4, 0)
    with pytest.raises(ValueError, match="mode must be 'sqrt' or 'linear', got 'log'"):
        residual_scale(4, 4, "log")  # pyright: ignore[reportArgumentType]


def test_refusals_come_before_any_change():
    model, base = build(MLP, 64), build(MLP, 16, 1)
    roles = infer_roles(model, base)
    with pytest.raises(ValueError, match="form must be one of"):
        apply_mup(model, roles, form="odd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"init must be 'auto', .* or name patterns with these, got 'odd'"):
        apply_mup(model, roles, init="odd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"roles has no role for 'fc2\.bias' \(1 missing and 0 unknown"):
        apply_mup(model, {name: role for name, role in roles.items() if name != "fc2.bias"})
    with pytest.raises(ValueError, match="roles names 'more', which the model lacks"):
        apply_mup(model, {**roles, "more": Role("input")})
    with pytest.raises(ValueError, match=r"'fc1\.weight' is on the meta device"):
        apply_mup(on_meta(MLP, 64), roles)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), build(MLP, 64).parameters(), strict=True)
    )
    assert "mup_form" not in model.state_dict()


def test_a_readout_without_its_layer_gets_the_same_multiplier_by_hand():
    from mup_features.torch import readout_multiplier

    model, base = (torch.nn.Sequential(torch.nn.Linear(4, n), torch.nn.Linear(n, 3)) for n in (64, 16))
    roles = infer_roles(model, base=base)
    apply_mup(model, roles)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    readout = model[1]
    by_hand = torch.nn.functional.linear(
        x * readout_multiplier(roles["1.weight"]), readout.weight, readout.bias
    )
    torch.testing.assert_close(by_hand, readout(x))
