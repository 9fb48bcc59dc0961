"""MHA, MQA, GQA and MLA against their NumPy truth, against TPA, with caches, masks and packed sequences."""

import numpy as np
import pytest
import reference_accounting as accounting
import reference_baselines
import torch
from layer_cases import load
from reference_accounting import Shape
from reference_baselines import Heads, Latent
from reference_rope import Rope
from torch.nn import functional

from tpa_attention.config import RopeConfig
from tpa_attention.torch.baselines import GQA, MHA, MLA, MQA, attend
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.layers import TPAttention

ROUNDING = 1e-12  # layers of a hundred products of numbers of size 1 to 10, in float64
GROUPS = {"mha": 6, "gqa": 3, "mqa": 1}
d, h, D = 10, 6, 4


def tensor(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def grouped(kind, **options):
    options = {"dtype": torch.float64, **options}
    if kind == "gqa":
        return GQA(d, h, D, 3, **options)
    return (MHA if kind == "mha" else MQA)(d, h, D, **options)


def grouped_weights(kind, seed=1):
    rng = np.random.default_rng(seed)
    groups = GROUPS[kind]
    return Heads(*(rng.normal(size=s) / 3 for s in ((h, D, d), (groups, D, d), (groups, D, d), (d, h * D))))


def latent_weights(seed=2):
    rng = np.random.default_rng(seed)
    shapes = ((7, d), (h, D, 7), (h, 2, 7), (5, d), (h, D, 5), (h, D, 5), (2, d), (d, h * D), (7,), (5,))
    return Latent(*(rng.normal(size=s) / np.sqrt(s[-1]) for s in shapes))


LATENT_NAMES = (*("q_down", "q_up", "q_rope", "kv_down", "k_up", "v_up", "k_rope", "o", "q_norm", "kv_norm"),)


def layer_and_truth(kind, **options):
    """A layer with random weights, and the function of x that NumPy says it is."""
    rope = options.get("rope", RopeConfig())
    numpy_rope = Rope(rope.base, rope.fraction, rope.layout, rope.sign) if rope.fraction else None
    if kind == "mla":
        weights, layer = latent_weights(), MLA(d, h, D, 5, 7, 2, dtype=torch.float64, **options)
        for name, array in zip(LATENT_NAMES, weights, strict=True):
            load(getattr(layer, name).weight, array)
        return layer, lambda x: reference_baselines.mla(weights, x, numpy_rope)[0]
    weights, layer = grouped_weights(kind), grouped(kind, **options)
    for name, array in zip("qkvo", weights, strict=True):
        load(getattr(layer, name).weight, array)
    return layer, lambda x: reference_baselines.grouped_attention(weights, x, numpy_rope)


EVERY_KIND = pytest.mark.parametrize("kind", ["mha", "gqa", "mqa", "mla"])


def close(found, expected, atol=ROUNDING):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=atol)


@EVERY_KIND
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(layout="interleaved", sign=1, base=100.0)])
def test_baselines_equal_their_reference(kind, impl, rope):
    layer, truth = layer_and_truth(kind, impl=impl, rope=rope)
    x = tensor(3, 2, 7, d)
    close(layer(x), truth(x.numpy()))


@EVERY_KIND
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("chunks", [(1,) * 7, (3, 1, 3)])
def test_baselines_with_a_cache_give_the_rows_of_one_pass(kind, impl, chunks):
    layer, truth = layer_and_truth(kind, impl=impl)
    x = tensor(4, 2, 7, d)
    cache = FactorCache(layer, 2, 9, dtype=torch.float64)
    rows = torch.cat([layer(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    close(rows, truth(x.numpy()))


@EVERY_KIND
def test_baselines_prefill_long_chunks_behind_a_cache(kind):
    layer, truth = layer_and_truth(kind)
    x = tensor(5, 1, 43, d)
    cache = FactorCache(layer, 1, 43, dtype=torch.float64)
    rows = torch.cat([layer(part, cache=cache) for part in x.split((20, 23), dim=1)], dim=1)
    close(rows, truth(x.numpy()))


def test_absorbed_decode_equals_the_reference_decode():
    layer, _ = layer_and_truth("mla")
    x = tensor(6, 2, 7, d)
    weights = latent_weights()
    _, expected_cache = reference_baselines.mla(weights, x.numpy(), Rope())
    expected = reference_baselines.mla_decode(weights, x[:, -1:].numpy(), Rope(), 6, expected_cache)
    cache = FactorCache(layer, 2, 7, dtype=torch.float64)
    layer(x[:, :6], cache=cache)
    close(layer(x[:, 6:], cache=cache), expected)


@EVERY_KIND
def test_decoding_sequences_of_unequal_length_equals_decoding_them_alone(kind):
    layer, _ = layer_and_truth(kind)
    x, token = tensor(7, 2, 5, d), tensor(8, 2, 1, d)
    cache = FactorCache(layer, 2, 6, dtype=torch.float64)
    layer(x, cache=cache)
    cache.crop(torch.tensor([5, 3]))
    found = layer(token, cache=cache)
    for row, length in enumerate((5, 3)):
        alone = layer(torch.cat([x[row : row + 1, :length], token[row : row + 1]], dim=1))
        close(found[row, 0], alone[0, -1])


@EVERY_KIND
def test_padding_on_the_left_changes_no_valid_row_of_a_baseline(kind):
    layer, _ = layer_and_truth(kind)
    x, token = tensor(9, 1, 5, d), tensor(10, 1, 1, d)
    padded = torch.cat([tensor(11, 1, 3, d), x], dim=1)
    valid = torch.tensor([[0] * 3 + [1] * 5])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    cache = FactorCache(layer, 1, 9, dtype=torch.float64)
    found = layer(padded, positions, valid, cache)
    close(found[:, 3:], layer(x))
    close(found[:, :3], torch.zeros(1, 3, d, dtype=torch.float64))  # nothing to see: attention gives 0
    decoded = layer(token, torch.tensor([5]), functional.pad(valid, (0, 1), value=1), cache)
    close(decoded[:, 0], layer(torch.cat([x, token], dim=1))[:, -1])


@EVERY_KIND
def test_packed_sequences_do_not_see_each_other_in_a_baseline(kind):
    layer, _ = layer_and_truth(kind)
    x = tensor(12, 1, 9, d)
    found = layer(x, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    close(found, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], dim=1))


@EVERY_KIND
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_bias_of_four_axes_enters_a_baseline_once_and_keeps_it_causal(kind, impl):
    layer, _ = layer_and_truth(kind, impl=impl)
    x = tensor(13, 2, 5, d)
    bias = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    close(layer(x, attention_mask=bias), layer(x))
    bias[..., 1] = -torch.inf
    hidden = torch.ones(2, 5, dtype=torch.bool)
    hidden[:, 1] = False
    close(layer(x, attention_mask=bias), layer(x, attention_mask=hidden))


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("kv_only", [True, False])
def test_grouped_attention_is_tpa_with_a_free_a(kind, kv_only):
    layer, truth = layer_and_truth(kind)
    as_tpa = layer.as_tpa(kv_only=kv_only)
    x = tensor(14, 2, 7, d)
    close(as_tpa(x), truth(x.numpy()))
    assert as_tpa.k_rank == as_tpa.v_rank == GROUPS[kind]
    assert as_tpa.cache_layout == layer.cache_layout
    cache = FactorCache(as_tpa, 2, 7, dtype=torch.float64)
    rows = torch.cat([as_tpa(x[:, t : t + 1], cache=cache) for t in range(7)], dim=1)
    close(rows, truth(x.numpy()))


def test_mha_equals_scaled_dot_product_attention_of_its_heads():
    layer, _ = layer_and_truth("mha", rope=RopeConfig.none())
    x = tensor(15, 2, 7, d)
    q, k, v = (m(x).unflatten(-1, (h, D)).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(layer(x), layer.o(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", GROUPS)
def test_grouped_layers_have_the_parameters_and_the_cache_of_table_one(kind):
    layer = grouped(kind, device="meta")
    shape = Shape(kind, d=d, h=h, D=D, G=GROUPS[kind])
    assert sum(p.numel() for p in layer.parameters()) == accounting.parameters(shape)
    assert layer.cache_layout.k_numbers + layer.cache_layout.v_numbers == accounting.cache_numbers(shape)


@pytest.mark.parametrize("name", ["small", "medium", "large", "xl"])
def test_mla_layers_have_the_parameters_and_the_cache_of_table_one(name):
    shape = accounting.preset(name, "mla_paper")
    layer = MLA(shape.d, shape.h, shape.D, shape.d_c, shape.d_cq, shape.d_r, device="meta")
    counted = accounting.parameters(shape) + accounting.latent_norms(shape)
    assert sum(p.numel() for p in layer.parameters()) == counted
    assert layer.cache_layout.k_numbers + layer.cache_layout.v_numbers == accounting.cache_numbers(shape)


@EVERY_KIND
def test_gradients_reach_every_parameter_of_a_baseline(kind):
    layer, _ = layer_and_truth(kind)
    layer(tensor(16, 2, 5, d)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@EVERY_KIND
@pytest.mark.parametrize("init", ["t6", "xavier", "normal"])
def test_baselines_start_with_a_silent_output_and_repeat_with_a_generator(kind, init):
    def build(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        options = {"init": init, "generator": generator, **more}
        return MLA(d, h, D, 5, 7, 2, **options) if kind == "mla" else grouped(kind, **options)

    state = torch.random.get_rng_state()
    first, second, other = build(0), build(0), build(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.o.weight.any()
    for p, same, new in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, same, rtol=0, atol=0)
        drawn = p.ndim == 2 and p is not first.o.weight
        assert torch.equal(p, new) is not drawn
    assert build(0, zero_init_output=False).o.weight.any()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GQA(d, 6, 4, 4), ValueError, r"num_kv_heads must divide num_heads, got 4 and 6"),
        (lambda: MHA(0, 6, 4), ValueError, r"d_model must be >= 1, got 0"),
        (lambda: MHA(d, 6.0, 4), TypeError, r"num_heads must be an int, got 6.0"),
        (lambda: MHA(d, 6, 5), ValueError, r"width that RoPE rotates must be even, got 5"),
        (
            lambda: MHA(d, 6, 4, init="he"),
            ValueError,
            r"init must be one of 't6', 'xavier', 'normal', got 'he'",
        ),
        (lambda: MQA(d, 6, 4, impl="cuda"), ValueError, r"impl must be one of .*, got 'cuda'"),
        (lambda: MQA(d, 6, 4, rope=None), TypeError, r"rope must be a RopeConfig .*, got None"),
        (lambda: MLA(d, 6, 4, 5, 0, 2), ValueError, r"q_latent must be >= 1, got 0"),
        (lambda: MLA(d, 6, 4, 5, 7, 3), ValueError, r"width that RoPE rotates must be even, got 3"),
    ],
)
def test_baselines_refuse_options_that_make_no_layer(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_as_tpa_keeps_type_and_rotation():
    layer = GQA(d, h, D, 3, rope=RopeConfig(sign=1), dtype=torch.float32, zero_init_output=False)
    as_tpa = layer.as_tpa()
    assert isinstance(as_tpa, TPAttention)
    assert as_tpa.rope == layer.rope
    assert {p.dtype for p in as_tpa.parameters()} == {torch.float32}


@pytest.mark.parametrize("plain", [True, False])
def test_a_query_that_is_no_number_shows(plain):
    q, k, v = (tensor(seed, 1, 4, 2, D) for seed in range(3))
    q[0, 2] = torch.nan
    out = attend(q, k, v, None, 0.5, plain=plain)
    assert out.isnan().flatten(2).all(-1)[0].tolist() == [False, False, True, False]
    assert not out[0, [0, 1, 3]].isnan().any()
