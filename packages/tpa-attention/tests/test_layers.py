"""TPAttention without a cache: every variant against its NumPy truth, masks, gradients, errors."""

from dataclasses import replace

import numpy as np
import pytest
import reference_layer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import OPTIONS, build, copy_weights, load
from reference_layer import forward
from reference_rope import Rope
from test_reference_layer import LAYERS, PRINTED, WORKED_INPUT, WORKED_ROWS, D, d, h, hidden, worked_layer

from tpa_attention.config import RopeConfig
from tpa_attention.torch.functional import tpa_attention
from tpa_attention.torch.layers import TPAttention

ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10, in float64
EVERY_NAME = pytest.mark.parametrize("name", OPTIONS)


def close(found, expected, atol=ROUNDING):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=atol)


# ---------------------------------------------------------------------------------- the reference's layers


@EVERY_NAME
@pytest.mark.parametrize("fused_proj", [True, False])
def test_every_variant_equals_the_reference(name, fused_proj):
    x = hidden(20)
    expected, _ = forward(LAYERS[name], x)
    close(build(name, fused_proj=fused_proj)(torch.from_numpy(x)), expected)


@EVERY_NAME
def test_every_variant_equals_the_reference_at_any_positions(name):
    x = hidden(21)
    positions = np.array([[5, 2, 9, 9, 100, 0, 7], [0, 1, 2, 3, 4, 5, 6]])
    expected, _ = forward(LAYERS[name], x, positions=positions)
    close(build(name)(torch.from_numpy(x), torch.from_numpy(positions)), expected)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("name", ["contextual", "KV-only", "third order, shared B"])
def test_every_implementation_gives_the_same_layer(name, impl):
    x = hidden(22)
    expected, _ = forward(LAYERS[name], x)
    close(build(name, impl=impl)(torch.from_numpy(x)), expected)


def test_worked_layer_of_the_specification_is_reproduced():
    layer = TPAttention(6, 2, 4, 3, 2, 1, dtype=torch.float64)
    copy_weights(worked_layer(), layer)
    close(layer(torch.from_numpy(WORKED_INPUT)), WORKED_ROWS[None], atol=PRINTED)


@EVERY_NAME
def test_factors_are_what_the_attention_function_takes(name):
    layer, x = build(name), torch.from_numpy(hidden(23))
    factors = layer.factors(x)
    heads = tpa_attention(*factors, rank_scale=layer.rank_scale)
    plain = heads.flatten(2)
    if layer.out_norm is None and layer.gate is None:
        close(layer.o(plain), layer(x))
    assert factors.bk.shape == (2, 7, 2, D)
    assert (factors.aq is None) is layer.kv_only


def test_a_value_width_of_its_own_makes_heads_of_that_width():
    rng = np.random.default_rng(24)
    wide = reference_layer.FactorMap(rng.normal(size=(2, 5, d)))
    truth = replace(LAYERS["contextual"], v_b=(wide,), o=rng.normal(size=(d, h * 5)))
    layer = TPAttention(d, h, D, 3, 2, 2, v_head_dim=5, dtype=torch.float64)
    copy_weights(truth, layer)
    x = hidden(25)
    close(layer(torch.from_numpy(x)), forward(truth, x)[0], atol=10 * ROUNDING)  # weights of size 1, not 0.3


def test_kv_only_of_third_order_turns_every_block_of_q_so_that_logits_depend_on_distances():
    options = {"variant": "kv_only", "factor_dims": (4, 2), "zero_init_output": False}
    layer = TPAttention(d, h, D, 3, 2, 2, **options, dtype=torch.float64)
    x = torch.from_numpy(hidden(26))
    close(
        layer(x, torch.arange(7) + 1000), layer(x), atol=1e-11
    )  # angles near 1000 carry 1e-13 of their turn
    factors = layer.factors(x)
    q = torch.einsum("btd,hnd->bthn", x, layer.b_q.weight.unflatten(0, (h, D)))
    row = reference_layer.rotate_first((q[..., :4].detach().numpy(),), np.tile(np.arange(7), (2, 1)), Rope())[
        0
    ]
    close(factors.bq[..., :4], row)
    row = reference_layer.rotate_first((q[..., 4:].detach().numpy(),), np.tile(np.arange(7), (2, 1)), Rope())[
        0
    ]
    close(factors.bq[..., 4:], row)


# ----------------------------------------------------------------------------------- masks, packing, padding


@EVERY_NAME
def test_padding_on_the_left_changes_no_valid_row(name):
    layer, x = build(name), torch.from_numpy(hidden(27, T=5, B=1))
    padded = torch.cat([torch.from_numpy(hidden(28, T=3, B=1)), x], dim=1)
    valid = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    expected = layer(x)
    close(layer(padded, attention_mask=valid)[:, 3:], expected)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    close(layer(padded, positions, valid.bool())[:, 3:], expected)


@EVERY_NAME
def test_packed_sequences_do_not_see_each_other(name):
    layer, x = build(name), torch.from_numpy(hidden(29, T=9, B=1))
    found = layer(x, cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=torch.int32))
    close(found, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], dim=1))


def test_a_mask_of_four_axes_joins_causality():
    layer, x = build("contextual"), torch.from_numpy(hidden(30))
    allowed = torch.ones(2, h, 7, 7, dtype=torch.bool)
    close(layer(x, attention_mask=allowed), layer(x))
    allowed[..., 2] = False
    valid = torch.ones(2, 7, dtype=torch.int64)
    valid[:, 2] = 0
    close(layer(x, attention_mask=allowed), layer(x, attention_mask=valid))
    bias = torch.zeros(2, 1, 7, 7, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    close(layer(x, attention_mask=bias), layer(x, attention_mask=valid))


def test_a_finite_bias_enters_once_whatever_the_rank_of_k():
    layer, x = build("contextual"), torch.from_numpy(hidden(31))
    bias = np.random.default_rng(32).normal(size=(1, h, 7, 7))
    truth = LAYERS["contextual"]
    q = reference_layer.query_factors(truth, x.numpy(), np.tile(np.arange(7), (2, 1)))
    k, v = reference_layer.load(truth, forward(truth, x.numpy())[1])
    heads, _ = reference_layer.reference.tpa_attention(
        *(q.a, q.b[0], k.a, k.b[0], v.a, v.b[0]),
        mask=reference_layer.reference.causal_mask(7, 7),
        bias=bias,
    )
    expected = reference_layer.output(truth, x.numpy(), heads)
    close(layer(x, attention_mask=torch.from_numpy(bias)), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_later_tokens_and_shifts_of_all_positions_leave_rows_alone_under_any_options(data):
    draw = data.draw
    heads, width = draw(st.integers(1, 5)), draw(st.sampled_from([2, 4, 6, 8]))
    dims = draw(st.sampled_from([None, (2, width // 2)])) if width > 2 else None
    shared = draw(st.booleans())
    ranks = [draw(st.integers(1, 4)) for _ in range(3)]
    variant = draw(st.sampled_from(["contextual", "kv_only", "noncontextual_a", "kv_only+noncontextual_b"]))
    layer = TPAttention(
        *(6, heads, width, *ranks[:2], ranks[1] if shared else ranks[2]),
        v_head_dim=None if shared or dims else draw(st.integers(1, 5)),
        variant=variant,
        shared_kv_b=shared,
        factor_dims=dims,
        head_activation=draw(st.sampled_from(["none", "sigmoid", "softmax"])),
        a_bias="noncontextual_a" not in variant and draw(st.booleans()),
        rope=RopeConfig(
            fraction=draw(st.sampled_from([0.0, 0.5, 1.0])),
            layout=draw(st.sampled_from(["half", "interleaved"])),
            sign=draw(st.sampled_from([-1, 1])),
        ),
        rank_scale=draw(st.booleans()),
        rotate_on_load=draw(st.booleans()),
        out_norm=draw(st.booleans()),
        factor_norm=draw(st.booleans()),
        output_gate=draw(st.booleans()),
        kv_shift=draw(st.booleans()),
        fused_proj=draw(st.booleans()),
        init=draw(st.sampled_from(["t6", "xavier", "normal"])),
        zero_init_output=False,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 9))),
    )
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 5, 6)))
    y = layer(x)
    assert y.shape == x.shape
    changed = torch.cat([x[:, :3], x[:, 3:] + 1], dim=1)
    torch.testing.assert_close(layer(changed)[:, :3], y[:, :3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer(x, torch.arange(5) + 50), y, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------- gradients


@EVERY_NAME
def test_gradients_reach_every_parameter_once_the_output_is_not_zero(name):
    layer = build(name)  # the reference's W^O is random
    layer(torch.from_numpy(hidden(33))).square().sum().backward()
    for parameter_name, p in layer.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


def test_a_zero_output_matrix_hides_the_first_gradients_of_all_factors():
    layer = TPAttention(d, h, D, 3, 2, 2)
    layer(torch.randn(2, 5, d, generator=torch.Generator().manual_seed(8))).sum().backward()
    for name, p in layer.named_parameters():
        assert (p.grad.abs().max() > 0) == (name == "o.weight")


@pytest.mark.parametrize("name", ["contextual", "KV-only", "shared B", "third order", "KV shift"])
def test_gradients_are_those_of_finite_differences(name):
    layer = build(name)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.from_numpy(hidden(34, T=3, B=1))

    def run(*given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_fused_and_separate_projections_have_the_same_gradients():
    x = torch.from_numpy(hidden(35))
    grads = []
    for fused_proj in (True, False):
        layer = build("KV shift", fused_proj=fused_proj)
        layer(x).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)  # sums of a thousand float64 terms


# ------------------------------------------------------------------------------------------------ precisions


@pytest.mark.parametrize("name", ["contextual", "KV-only with non-contextual A", "A with bias", "shared B"])
def test_autocast_computes_factors_in_its_type_and_stays_close(name):
    layer, x = build(name).float(), torch.from_numpy(hidden(36)).float()
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = layer.factors(x)
        found = layer(x)
    assert {f.dtype for f in factors if f is not None} == {torch.bfloat16}
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a chain of four roundings of 2^-9, values of size 1
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_sixteen_bits_return_sixteen_bits(dtype):
    layer = build("output norm and gate").to(dtype)
    x = torch.from_numpy(hidden(37)).to(dtype)
    found = layer(x)
    assert found.dtype == dtype
    expected = forward(LAYERS["output norm and gate"], hidden(37))[0]
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=0.15)  # as above


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_model": 0}, ValueError, r"d_model must be >= 1, got 0"),
        ({"num_heads": 2.0}, TypeError, r"num_heads must be an int, got 2.0"),
        ({"k_rank": 0}, ValueError, r"k_rank must be >= 1, got 0"),
        ({"v_head_dim": -1}, ValueError, r"v_head_dim must be >= 1, got -1"),
        ({"variant": "kv"}, ValueError, r"variant must be one of .*, got 'kv'"),
        ({"variant": "contextual+kv_only"}, ValueError, r"variant 'contextual' stands alone, got"),
        ({"variant": "kv_only+kv_only"}, ValueError, r"variant names a part twice"),
        ({"variant": "noncontextual_a+noncontextual_b"}, ValueError, r"variant needs a contextual A or a"),
        ({"shared_kv_b": True, "v_rank": 3}, ValueError, r"shared_kv_b needs .*, got ranks 2 and 3, widths"),
        ({"shared_kv_b": True, "v_head_dim": 6}, ValueError, r"shared_kv_b needs .* widths 6 and 8"),
        ({"factor_dims": (8,)}, ValueError, r"factor_dims needs at least two widths, got \(8,\)"),
        ({"factor_dims": (4, 4)}, ValueError, r"product of factor_dims must equal head_dim .* 16, 8 and 8"),
        ({"factor_dims": (4, 2), "v_head_dim": 6}, ValueError, r"product of factor_dims .* 8, 8 and 6"),
        ({"factor_dims": (1, 8)}, ValueError, r"width that RoPE rotates must be even, got 1"),
        ({"head_activation": "relu"}, ValueError, r"head_activation must be one of .*, got 'relu'"),
        (
            {"a_bias": True, "variant": "noncontextual_a"},
            ValueError,
            r"a_bias needs a contextual A, got variant",
        ),
        ({"head_dim": 7}, ValueError, r"width that RoPE rotates must be even, got 7"),
        ({"rope": None}, TypeError, r"rope must be a RopeConfig \(RopeConfig.none\(\) for none\), got None"),
        ({"init": "he"}, ValueError, r"init must be one of 't6', 'xavier', 'normal', got 'he'"),
        ({"impl": "cuda"}, ValueError, r"impl must be one of .*, got 'cuda'"),
        ({"head_dims": 8}, TypeError, r"unexpected keyword argument 'head_dims'"),
    ],
)
def test_options_that_make_no_layer_are_refused(options, error, message):
    sizes = {"d_model": d, "num_heads": h, "head_dim": D, "q_rank": 3, "k_rank": 2, "v_rank": 2}
    with pytest.raises(error, match=message):
        TPAttention(**{**sizes, **options})


def test_an_odd_width_is_fine_without_rotation():
    layer = TPAttention(d, h, 7, rope=RopeConfig.none())
    assert layer(torch.zeros(1, 2, d)).shape == (1, 2, d)


X = torch.zeros(2, 3, d, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \(B, T, 10\), got \(3, 10\)"),
        ({"x": X[..., :9]}, ValueError, r"x must have shape \(B, T, 10\), got \(2, 3, 9\)"),
        ({"position_ids": torch.zeros(3)}, TypeError, r"position_ids must be integers, got torch.float32"),
        (
            {"position_ids": torch.arange(4)},
            ValueError,
            r"position_ids must have shape \(3,\) or \(2, 3\), got",
        ),
        ({"attention_mask": torch.ones(2, 3)}, TypeError, r"attention_mask \(B, M\) must be bool or integer"),
        (
            {"attention_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"attention_mask must have shape \(B, M\) = \(2, 3\) .*, got \(2, 4\)",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 3, 4, dtype=torch.bool)},
            ValueError,
            r"\(B, 1 or H, T, M\) = \(2, \.\., 3, 3\), got \(2, 1, 3, 4\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"batch of B = 1, got B = 2"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 2])}, ValueError, r"must rise from 0 to the 3 tokens"),
        (
            {"x": X[:1], "cu_seqlens": torch.tensor([0.0, 3])},
            TypeError,
            r"must hold integers, got torch.float32",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, error, message):
    layer = build("contextual")
    with pytest.raises(error, match=message):
        layer(**{"x": X, **arguments})


def test_a_printed_layer_names_its_sizes_and_variant():
    text = repr(build("KV-only with non-contextual A"))
    assert "d_model=10, num_heads=3, head_dim=8, ranks=(3, 2, 2), variant='kv_only+noncontextual_a'" in text
    assert "d_model=10, rank=2, widths=(3,), contextual=False, bias=True" in text


def test_the_reference_weights_are_loaded_and_not_the_initial_ones():
    layer = build("contextual")
    truth = LAYERS["contextual"].k_a.weight
    assert np.array_equal(layer.a_k.weight.detach().numpy().reshape(2, h, d), truth)
    with pytest.raises(AssertionError):
        load(layer.a_k.weight, truth[:1])
