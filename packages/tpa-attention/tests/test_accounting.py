"""Every integer of the specification's tables, and every count against the NumPy-free truth of the tests."""

from dataclasses import replace

import pytest
import reference_accounting as truth
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention import accounting
from tpa_attention.accounting import (
    LayerShape,
    arithmetic_intensity,
    cache_numbers,
    decode_macs,
    decode_projection,
    decode_slope,
    layer_shape,
    model_params,
    params,
    prefers_factored_query,
    saved_activations,
    training_macs,
)
from tpa_attention.config import PRESETS, ModelConfig, preset

EXAMPLES = {
    "I": {"d_model": 2048, "num_heads": 32, "head_dim": 64},
    "II": {"d_model": 4096, "num_heads": 32, "head_dim": 128},
    "III": {"d_model": 7168, "num_heads": 64, "head_dim": 128},
}
GROUPS = {"I": 4, "II": 4, "III": 8}
LATENTS = {
    "I": {"kv_latent": 256, "rope_dim": 32, "q_latent": 768},
    "II": {"kv_latent": 512, "rope_dim": 64, "q_latent": 1536},
    "III": {"kv_latent": 512, "rope_dim": 64, "q_latent": 1536},
}
RANKS = ((16, 1, 1), (16, 2, 2), (8, 1, 1), (8, 2, 2))
SLOPES = {
    "I": (4096, 4096, 17408, 3584, 7168, 2816, 5632),
    "II": (8192, 8192, 34816, 6656, 13312, 5376, 10752),
    "III": (16384, 16384, 69632, 11264, 22528, 9728, 19456),
}
TOTALS = {  # TPA, KV-only, and MHA = MQA = GQA
    "small": (124_342_272, 124_379_136, 123_568_128),
    "medium": (353_992_704, 353_157_120, 353_452_032),
    "large": (773_698_560, 773_053_440, 772_131_840),
    "xl": (1_555_814_400, 1_559_500_800, 1_554_892_800),
}
RELEASED_MLA = {"medium": 417_976_320, "large": 909_321_216, "xl": 1_810_065_408}
CACHES = {  # MHA, MQA, GQA, MLA, KV-only, TPA
    "small": (1536, 128, 256, 288, 344, 392),
    "medium": (2048, 128, 256, 544, 372, 444),
    "large": (2560, 128, 256, 544, 404, 500),
    "xl": (3200, 128, 256, 544, 444, 568),
}


def ranks(q, k, v):
    return {"q_rank": q, "k_rank": k, "v_rank": v}


# -------------------------------------------------------------------------------------- decode examples


@pytest.mark.parametrize("example", EXAMPLES)
def test_decode_slopes_are_those_of_the_examples(example):
    sizes = EXAMPLES[example]
    found = [
        decode_slope("mha", **sizes),
        decode_slope("gqa", num_kv_heads=GROUPS[example], **sizes),
        decode_slope("mla", **sizes, **LATENTS[example]),
        *(decode_slope("tpa", **sizes, **ranks(*r)) for r in RANKS),
    ]
    assert tuple(found) == SLOPES[example]
    assert decode_slope("mqa", **sizes) == SLOPES[example][0]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_decode_step_costs_its_projection_and_its_slope_times_the_cache(example):
    sizes, d = EXAMPLES[example], EXAMPLES[example]["d_model"]
    h, D, G = sizes["num_heads"], sizes["head_dim"], GROUPS[example]
    d_c, d_r, d_cq = LATENTS[example].values()
    M = 4096
    slope = SLOPES[example]
    assert decode_macs("mha", M, **sizes) == 3 * d * h * D + M * slope[0]
    assert decode_macs("mqa", M, **sizes) == d * D * (h + 2) + M * slope[0]
    assert decode_macs("gqa", M, num_kv_heads=G, **sizes) == d * D * (h + 2 * G) + M * slope[1]
    projection = d * d_cq + d_cq * h * (D + d_r) + d * (d_c + d_r) + h * d_c * D
    assert decode_macs("mla", M, **sizes, **LATENTS[example]) == projection + M * slope[2]
    for column, r in zip(slope[3:], RANKS, strict=True):
        assert decode_macs("tpa", M, **sizes, **ranks(*r)) == d * sum(r) * (h + D) + M * column


def test_parameters_of_example_one():
    sizes = EXAMPLES["I"]
    assert params("mha", **sizes) == 16_777_216
    assert params("gqa", num_kv_heads=4, **sizes) == 9_437_184
    found = [params("tpa", **sizes, **ranks(*r)) for r in RANKS]
    assert found == [7_733_248, 8_126_464, 6_160_384, 6_553_600]


def test_a_full_query_costs_less_than_a_factored_one_of_rank_16():
    sizes = {"num_heads": 32, "head_dim": 64, **ranks(16, 1, 1)}
    assert decode_slope("tpa", query="factored", **sizes) == 3584
    assert decode_slope("tpa", query="full", **sizes) == 1 * 32 * 64 + 32 * 1 * 64
    assert decode_slope("tpa", query="auto", **sizes) == 3584  # 1536 + 2048 < 2048 + 2048
    many = {**sizes, "q_rank": 32}
    assert decode_slope("tpa", query="auto", **many) == decode_slope("tpa", query="full", **many) == 4096
    for query in ("factored", "full", "auto"):
        assert decode_slope("kvonly", query=query, **sizes) == 4096


def test_kernels_prefer_the_factored_query_while_padded_ranks_are_small():
    assert prefers_factored_query("tpa", num_heads=32, head_dim=64, **ranks(16, 1, 1))  # 1536 < 2048
    assert not prefers_factored_query("tpa", num_heads=32, head_dim=64, **ranks(17, 1, 1))  # 3072 > 2048
    assert not prefers_factored_query("tpa", num_heads=16, head_dim=16, **ranks(1, 1, 1))  # padded: 512 > 256
    assert not prefers_factored_query("kvonly", num_heads=32, head_dim=64, **ranks(16, 1, 1))


def test_training_in_factor_space_costs_more_than_heads_with_the_trained_ranks():
    medium = preset("medium")
    assert decode_slope(medium) == 7348
    assert training_macs(medium, 10) == 734_800
    assert 2 * medium.num_attention_heads * medium.head_dim == 6016


# --------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_total_parameters_of_the_presets(name):
    assert (model_params(preset(name)), model_params(preset(name, "kvonly"))) == TOTALS[name][:2]
    assert {model_params(preset(name, m)) for m in ("mha", "mqa", "gqa")} == {TOTALS[name][2]}


def test_total_parameters_of_the_released_mla_models():
    found = {name: model_params(preset(name, "mla_paper")) for name in RELEASED_MLA}
    assert found == RELEASED_MLA
    assert model_params(replace(preset("small", "mla_paper"), num_attention_heads=13)) == 123_085_824
    assert preset("small", "mla_matched") == replace(preset("small", "mla_paper"), num_attention_heads=13)


@pytest.mark.parametrize("name", PRESETS)
def test_matched_mla_has_the_most_heads_whose_parameters_fit(name):
    config = preset(name, "mla_matched")
    more = replace(config, num_attention_heads=config.num_attention_heads + 1)
    budget = 4 * config.hidden_size**2
    assert params(config, latent_norms=True) <= budget < params(more)


@pytest.mark.parametrize("name", PRESETS)
def test_cached_numbers_of_the_presets(name):
    mechanisms = ("mha", "mqa", "gqa", "mla", "kvonly", "tpa")
    assert tuple(cache_numbers(preset(name, m)) for m in mechanisms) == CACHES[name]
    assert cache_numbers(preset(name, "mla_paper")) == CACHES[name][3]


def test_attention_parameters_of_the_language_model_experiment():
    sizes = {"d_model": 128, "head_dim": 32}
    assert params("mha", num_heads=4, **sizes) == 65_536
    assert params("mqa", num_heads=7, **sizes) == 65_536
    assert params("gqa", num_heads=6, num_kv_heads=2, **sizes) == 65_536
    assert params("tpa", num_heads=8, **ranks(4, 1, 1), **sizes) == 63_488
    assert params("kvonly", num_heads=6, k_rank=1, v_rank=1, **sizes) == 58_880
    assert params("tpa", num_heads=7, **ranks(3, 2, 2), **sizes) == 63_616
    assert cache_numbers("tpa", num_heads=8, **ranks(4, 1, 1), **sizes) == 80
    assert cache_numbers("mha", num_heads=4, **sizes) == 256


def test_untied_embeddings_and_norm_weights_are_counted():
    small = preset("small")
    assert model_params(replace(small, tie_word_embeddings=False)) - model_params(small) == 50304 * 768
    assert model_params(replace(small, norm_affine=True)) - model_params(small) == (2 * 12 + 1) * 768


# ------------------------------------------------------------------------------- any sizes, all mechanisms

COUNTED = {
    "tpa": "tpa",
    "kvonly": "kv_only",
    "noncontextual_a": "noncontextual_a",
    "noncontextual_b": "noncontextual_b",
    "shared_b": "shared_b",
    "higher_order": "higher_order",
    "mha": "mha",
    "mqa": "mqa",
    "gqa": "gqa",
    "mla": "mla",
    "mfa": "mfa",
}
COSTED = ("tpa", "kvonly", "mha", "mqa", "gqa", "mla")


def both(mechanism, d, groups, share, factors, rank, latent):
    """The same sizes as a LayerShape and as the truth's Shape; h = groups share, D = prod(factors)."""
    h, D = groups * share, factors[0] * factors[1]
    rv = rank[1] if mechanism == "shared_b" else rank[2]
    factored = mechanism in accounting.MECHANISMS[:6]
    ours = LayerShape(
        mechanism=mechanism,
        d_model=d,
        num_heads=h,
        head_dim=D,
        q_rank=rank[0],
        k_rank=rank[1],
        v_rank=rv,
        num_kv_heads=groups,
        kv_latent=latent[0],
        q_latent=latent[1],
        rope_dim=latent[2],
        factor_dims=factors if factored and mechanism == "higher_order" else None,
    )
    expected = truth.Shape(
        COUNTED[mechanism],
        d=d,
        h=h,
        D=D,
        G=groups,
        rq=rank[0],
        rk=rank[1],
        rv=rv,
        d_c=latent[0],
        d_cq=latent[1],
        d_r=latent[2],
        dims=factors,
    )
    return ours, expected


size = st.integers(1, 64)
sizes_strategy = {
    "d": size,
    "groups": st.integers(1, 8),
    "share": st.integers(1, 8),
    "factors": st.tuples(st.integers(1, 8), st.integers(1, 8)),
    "rank": st.tuples(st.integers(1, 16), st.integers(1, 4), st.integers(1, 4)),
    "latent": st.tuples(size, size, size),
}


@given(mechanism=st.sampled_from(sorted(COUNTED)), **sizes_strategy)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_cache_and_parameters_are_those_of_table_1(mechanism, d, groups, share, factors, rank, latent):
    ours, expected = both(mechanism, d, groups, share, factors, rank, latent)
    assert cache_numbers(ours) == truth.cache_numbers(expected)
    assert params(ours) == truth.parameters(expected)
    assert params(ours, latent_norms=True) == truth.parameters(expected) + truth.latent_norms(expected)


@given(mechanism=st.sampled_from(COSTED), **sizes_strategy)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_multiply_adds_are_those_of_appendix_a4(mechanism, d, groups, share, factors, rank, latent):
    ours, expected = both(mechanism, d, groups, share, factors, rank, latent)
    assert decode_slope(ours) == truth.decode_slope(expected)
    if mechanism != "kvonly":
        assert decode_projection(ours) == truth.decode_projection(expected)
    if mechanism == "tpa":
        assert training_macs(ours, 7) == truth.training_macs(expected, 7)
        for materialised in (True, False):
            found = saved_activations(ours, materialised=materialised)
            assert found == truth.saved_activations(expected, materialised=materialised)


@pytest.mark.parametrize("mechanism", ["tpa", "kvonly", "mha", "mqa", "gqa"])
def test_a_projection_is_every_parameter_but_the_output(mechanism):
    config = preset("medium", mechanism)
    out = config.hidden_size * config.num_attention_heads * config.head_dim
    assert decode_projection(config) == params(config) - out


def test_multi_matrix_factorisation_reads_one_shared_head():
    mfa = LayerShape(mechanism="mfa", d_model=96, num_heads=5, kv_latent=12)
    down, up, out = 96 * 12, 5 * 12 * 12, 5 * 12 * 96
    assert params(mfa) == down + up + 2 * down + out
    assert decode_projection(mfa) == params(mfa) - out
    assert decode_slope(mfa) == 2 * 5 * 12


VARIANTS = {
    # d = 10, h = 6, D = 8, ranks (3, 2, 2): what is added up is each map, then W^O
    "kv_only with free a": (
        {"variant": "kv_only+noncontextual_a"},
        (2 + 2) * 8,
        10 * 48 + 2 * (6 + 80) * 2 + 480,
    ),
    "kv_only with free b": ({"variant": "kv_only+noncontextual_b"}, 4 * 6, 480 + 2 * (60 + 8) * 2 + 480),
    "shared free b": ({"variant": "noncontextual_b", "shared_kv_b": True}, 24, 3 * 68 + 2 * (128) + 480),
    "third order with free b": (
        {"variant": "noncontextual_b", "factor_dims": (4, 2)},
        24,
        7 * (60 + 6) + 480,
    ),
    "third order, shared": (
        {"factor_dims": (4, 2), "shared_kv_b": True},
        2 * (12 + 6),
        10 * (3 * (6 + 6) + 2 * (12 + 6)) + 480,
    ),
    "wide values": ({"v_head_dim": 12}, 2 * 14 + 2 * 18, 10 * (5 * 14 + 2 * 18) + 10 * 6 * 12),
    "head bias": ({"a_bias": True}, 56, 10 * 7 * 14 + 7 * 6 + 480),
    "norm, gate, shift": (
        {"out_norm": True, "output_gate": True, "kv_shift": True},
        56,
        10 * 7 * 14 + 480 + 8 + 480 + 10,
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_combined_options_are_counted_map_by_map(case):
    options, cached, parameters = VARIANTS[case]
    shape = layer_shape("tpa", d_model=10, num_heads=6, head_dim=8, **ranks(3, 2, 2), **options)
    assert cache_numbers(shape) == cached
    assert params(shape) == parameters


def test_options_of_a_configuration_reach_its_count():
    plain = ModelConfig(hidden_size=10, num_attention_heads=6, head_dim=8, q_rank=3)
    for options, cached, parameters in VARIANTS.values():
        config = replace(plain, **options)
        assert (cache_numbers(config), params(config)) == (cached, parameters)


# --------------------------------------------------------------------------------------- bytes and speed


def test_bandwidth_floors():
    sizes = {"num_heads": 32, "head_dim": 64}
    assert 2 * cache_numbers("tpa", **sizes, k_rank=1, v_rank=1) == 384
    assert 2 * cache_numbers("tpa", **sizes, k_rank=2, v_rank=2) == 768
    assert 2 * cache_numbers("tpa", num_heads=32, head_dim=128, k_rank=1, v_rank=1) == 640
    assert round(arithmetic_intensity("tpa", **sizes, **ranks(16, 1, 1)), 1) == 18.7
    assert arithmetic_intensity("mha", **sizes) == 1.0
    assert arithmetic_intensity("mha", dtype="float32", **sizes) == 0.5


def test_cached_numbers_at_32_heads_of_64():
    sizes = {"num_heads": 32, "head_dim": 64}
    assert cache_numbers("mha", **sizes) == 4096
    assert cache_numbers("gqa", num_kv_heads=4, **sizes) == 512
    assert cache_numbers("mla", kv_latent=256, rope_dim=32) == 288
    assert cache_numbers("tpa", k_rank=1, v_rank=1, **sizes) == 192
    assert cache_numbers("mqa", **sizes) == 128


def test_saved_activations_of_the_medium_preset():
    assert saved_activations(preset("medium"), materialised=False) == 4165
    assert saved_activations(preset("medium"), materialised=True) == 13189


def test_saved_activations_of_kv_only_keep_the_full_query_once():
    kv_only = preset("medium", "kvonly")  # h = 29, D = 64, ranks 2 and 2
    factors = 29 * 64 + 4 * (29 + 64)
    assert saved_activations(kv_only, materialised=False) == factors + 29 * 64 + 29
    assert saved_activations(kv_only, materialised=True) == factors + 3 * 29 * 64 + 29


# ----------------------------------------------------------------------------------------- what is refused

SMALL = preset("small")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: params("mhsa"), ValueError, "mechanism must be one of 'tpa', .*, got 'mhsa'"),
        (
            lambda: params("mha", num_heads=2, head_dim=4),
            ValueError,
            "d_model must be given for mechanism 'mha'",
        ),
        (lambda: cache_numbers("tpa", num_heads=2, head_dim=4, v_rank=1), ValueError, "k_rank must be given"),
        (lambda: cache_numbers("gqa", num_heads=2, head_dim=4), ValueError, "num_kv_heads must be given"),
        (
            lambda: cache_numbers("gqa", num_heads=6, head_dim=4, num_kv_heads=4),
            ValueError,
            "num_kv_heads must divide num_heads, got 4 and 6",
        ),
        (
            lambda: decode_projection("mla", d_model=1, kv_latent=3, rope_dim=2),
            ValueError,
            "q_latent must be given",
        ),
        (lambda: cache_numbers("mfa"), ValueError, "kv_latent must be given for mechanism 'mfa'"),
        (lambda: cache_numbers("higher_order", head_dim=4), ValueError, "factor_dims must be given"),
        (
            lambda: cache_numbers("mha", num_heads=2, head_dim=2.0),
            TypeError,
            "head_dim must be an int, got 2.0",
        ),
        (lambda: cache_numbers("mha", num_heads=0, head_dim=2), ValueError, "num_heads must be >= 1, got 0"),
        (lambda: cache_numbers("mha", heads=2), TypeError, "heads"),
        (lambda: cache_numbers("mha", num_heads=2, head_dim=2, shared_kv_b=True), ValueError, "are of TPA"),
        (
            lambda: layer_shape("shared_b", k_rank=1, v_rank=2),
            ValueError,
            "needs k_rank = v_rank, got 1 and 2",
        ),
        (
            lambda: layer_shape("shared_b", k_rank=1, v_rank=1, head_dim=4, v_head_dim=2),
            ValueError,
            "needs v_head_dim = head_dim, got 2 and 4",
        ),
        (
            lambda: layer_shape("noncontextual_a", variant="noncontextual_b"),
            ValueError,
            "needs a contextual A or a contextual B",
        ),
        (lambda: params(SMALL, d_model=3), TypeError, "also given: d_model"),
        (
            lambda: params(3),
            TypeError,
            "mech must be a mechanism's name, a ModelConfig or a LayerShape, got 3",
        ),
        (lambda: decode_slope(SMALL, query="fast"), ValueError, "query must be one of .*, got 'fast'"),
        (lambda: decode_macs(SMALL, 0), ValueError, "cached_tokens must be >= 1, got 0"),
        (lambda: training_macs(SMALL, 2.0), TypeError, "tokens must be an int, got 2.0"),
        (
            lambda: saved_activations("mha", materialised=True, num_heads=1, head_dim=2),
            ValueError,
            "counted for TPA alone, got mechanism 'mha'",
        ),
    ],
)
def test_wrong_sizes_are_refused_by_name_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
