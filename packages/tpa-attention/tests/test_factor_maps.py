"""Factor maps: how many parameters and products, how they start, what does not depend on the token."""

from dataclasses import replace

import pytest
import reference_accounting as accounting
import torch
from layer_cases import OPTIONS, build
from reference_accounting import Shape
from test_reference_layer import D, d, h, hidden
from torch.utils._python_dispatch import TorchDispatchMode

from tpa_attention.accounting import cache_numbers, params
from tpa_attention.config import ModelConfig
from tpa_attention.torch.layers import TPAttention

EVERY_NAME = pytest.mark.parametrize("name", OPTIONS)


class CountProducts(TorchDispatchMode):
    """Products of two matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "fused_proj", "products"),
    [
        ("contextual", True, 1),
        ("contextual", False, 6),
        ("KV shift", True, 2),  # Q reads another input than K and V
        ("shared B", False, 5),
        ("non-contextual A", False, 3),
        ("KV-only", True, 1),
    ],
)
def test_fused_projections_are_one_product_per_input(name, fused_proj, products):
    layer, x = build(name, fused_proj=fused_proj), torch.from_numpy(hidden(23))
    with torch.no_grad(), CountProducts() as counter:
        layer(x)
    assert counter.count == products + 1  # and W^O


# -------------------------------------------------------------------------------- parameters, initial values

COUNTED = {
    "contextual": Shape("tpa", rq=3, rk=2, rv=2),
    "KV-only": Shape("kv_only", rk=2, rv=2),
    "non-contextual A": Shape("noncontextual_a", rq=3, rk=2, rv=2),
    "non-contextual B": Shape("noncontextual_b", rq=3, rk=2, rv=2),
    "shared B": Shape("shared_b", rq=3, rk=2, rv=2),
    "third order": Shape("higher_order", rq=3, rk=2, rv=2, dims=(4, 2)),
    "fourth order": Shape("higher_order", rq=3, rk=2, rv=2, dims=(2, 2, 2)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_layers_have_the_parameters_and_the_cache_of_table_one(name):
    shape = replace(COUNTED[name], d=d, h=h, D=D)
    layer = TPAttention(d, h, D, 3, 2, 2, **OPTIONS[name], device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert sum(p.numel() for p in layer.parameters()) == accounting.parameters(shape)
    assert layer.cache_layout.k_numbers + layer.cache_layout.v_numbers == accounting.cache_numbers(shape)


@EVERY_NAME
def test_the_accounting_counts_the_parameters_and_records_of_every_variant(name):
    options = {key: value for key, value in OPTIONS[name].items() if key != "rope"}
    sizes = {"hidden_size": d, "num_attention_heads": h, "head_dim": D}
    config = ModelConfig(**sizes, q_rank=3, k_rank=2, v_rank=2, **options)
    layer = TPAttention(d, h, D, 3, 2, 2, **options, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == params(config)
    assert layer.cache_layout.k_numbers + layer.cache_layout.v_numbers == cache_numbers(config)


@pytest.mark.parametrize("size", accounting.LAYERS)
@pytest.mark.parametrize("kind", ["tpa", "kv_only"])
def test_trained_layers_have_the_parameters_of_the_paper(size, kind):
    shape = accounting.preset(size, kind)
    variant = "kv_only" if kind == "kv_only" else "contextual"
    layer = TPAttention(shape.d, shape.h, shape.D, variant=variant, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == accounting.parameters(shape)


def test_state_dicts_have_the_same_names_fused_or_not():
    fused = TPAttention(d, h, D, 3, 2, 2)
    separate = TPAttention(d, h, D, 3, 2, 2, fused_proj=False)
    names = [f"{side}_{x}.weight" for x in "qkv" for side in "ab"]
    assert list(fused.state_dict()) == [*names, "o.weight"] == list(separate.state_dict())
    separate.load_state_dict(fused.state_dict())
    assert fused.state_dict()["a_k.weight"].shape == (2 * h, d)
    assert fused.state_dict()["b_k.weight"].shape == (2 * D, d)


# worked value 4 of the specification: medium preset, bounds of A_Q, A_K, B_Q, B_K
BOUNDS = {
    "t6": (0.030556616567607, 0.052925612402496, 0.0095404097121522, 0.0095589889112734),
    "xavier": (0.067780385838685, 0.073257943575826, 0.065279120983387, 0.072168783648703),
}


@pytest.mark.parametrize("init", BOUNDS)
def test_initial_weights_are_uniform_within_the_bounds_of_the_specification(init):
    layer = TPAttention(1024, 47, 64, init=init, generator=torch.Generator().manual_seed(0))
    for factor_map, bound in zip((layer.a_q, layer.a_k, layer.b_q, layer.b_k), BOUNDS[init], strict=True):
        largest = factor_map.weight.detach().abs().max().item()
        # float32 rounds the bound by 1e-7 of it; the largest of 10^5 draws misses it by about 1e-5 of it
        assert bound * (1 - 1e-3) < largest <= bound * (1 + 1e-6)
        # the standard deviation of 10^5 draws is known to 0.2 %; five of those
        assert factor_map.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not layer.o.weight.any()


@pytest.mark.parametrize(("init", "expected"), [("t6", 0.122), ("xavier", 1.276)])
def test_key_entries_have_the_spread_of_the_specification(init, expected):
    layer = TPAttention(1024, 47, 64, init=init, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 64, 1024, generator=torch.Generator().manual_seed(2))
    factors = layer.factors(x)
    k = torch.einsum("btrh,btrd->bthd", factors.ak, factors.bk) / 2
    assert k.std().item() == pytest.approx(expected, rel=0.05)  # products of 111 weights rows: 2 % of spread


@pytest.mark.parametrize("init", ["t6", "xavier"])
def test_parts_of_higher_order_and_full_queries_have_bounds_of_their_own(init):
    generator = torch.Generator().manual_seed(3)
    layer = TPAttention(64, 6, 32, 4, 3, 3, factor_dims=(16, 2), init=init, generator=generator)
    rows = layer.b_k.weight.detach().unflatten(0, (3, 18))
    for part, width in ((rows[:, :16], 16), (rows[:, 16:], 2)):
        _, bound = accounting.init_bounds(init, 64, 6, width, 3)
        assert bound * 0.95 < part.abs().max().item() <= bound * (1 + 1e-6)  # 384 draws or more
    queries = TPAttention(64, 6, 32, variant="kv_only", init=init, generator=generator).b_q.weight.detach()
    bound = (6 / (64 + 6 * 32)) ** 0.5
    assert bound * 0.99 < queries.abs().max().item() <= bound * (1 + 1e-6)


def test_normal_initial_values_have_standard_deviation_two_hundredths():
    generator = torch.Generator().manual_seed(4)
    options = {"init": "normal", "zero_init_output": False, "output_gate": True}
    layer = TPAttention(256, 8, 64, **options, generator=generator)
    for name, p in layer.named_parameters():
        assert p.std().item() == pytest.approx(0.02, rel=0.05), name  # 4096 draws or more: 1.1 % each


def test_free_factors_start_as_ones_and_as_rows_of_unit_length():
    generator = torch.Generator().manual_seed(5)
    a = TPAttention(32, 64, 16, variant="noncontextual_a", generator=generator).a_k.rows(None)
    torch.testing.assert_close(a.square().mean(-1), torch.ones(1, 1, 2))
    assert a.std().item() == pytest.approx(0.02, rel=0.3)  # 128 draws: 6 % each
    layer = TPAttention(32, 4, 4096, variant="noncontextual_b", factor_dims=(1024, 4), generator=generator)
    b = layer.b_k.rows(None)
    for part in b.split((1024, 4), dim=-1):
        assert part.square().sum(-1).mean().item() == pytest.approx(1.0, rel=0.8)  # 8 draws of N(0, 1/4)


def test_biases_start_at_zero_and_the_shift_at_the_identity():
    layer = TPAttention(d, h, D, 3, 2, 2, a_bias=True, kv_shift=True, out_norm=True)
    assert not any(m.bias.any() for m in (layer.a_q, layer.a_k, layer.a_v))
    assert layer.b_k.bias is None
    assert torch.equal(layer.shift.mu, torch.ones(d))
    assert torch.equal(layer.out_norm.weight, torch.ones(D))


def test_the_same_generator_gives_the_same_layer_and_leaves_the_global_state_alone():
    state = torch.random.get_rng_state()
    first, second = (TPAttention(d, h, D, generator=torch.Generator().manual_seed(6)) for _ in range(2))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    first.reset_parameters(torch.Generator().manual_seed(7))
    assert not torch.equal(first.a_k.weight, second.a_k.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_constants_are_written_only_where_there_are_some():
    layer = build("non-contextual A")
    layer.a_k.set_constant(torch.arange(6.0).view(2, 3))
    assert layer.a_k.rows(None)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"rows must have shape \(2, 3\), got \(3, 2\)"):
        layer.a_k.set_constant(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"map must have a bias to be used without W x"):
        layer.b_k.set_constant(torch.zeros(2, D))
    with pytest.raises(ValueError, match=r"map must be contextual to have a weight"):
        _ = layer.a_k.matrix
