"""The specification's integers: Table 1, the decode examples, the T6 presets, the performance notes."""

from dataclasses import replace
from math import prod

import pytest
import reference_accounting as accounting
from reference_accounting import Shape

PRESETS = ("small", "medium", "large", "xl")

EXAMPLES = {
    "I": (Shape("tpa", d=2048, h=32, D=64, G=4, d_c=256, d_r=32, d_cq=768)),
    "II": (Shape("tpa", d=4096, h=32, D=128, G=4, d_c=512, d_r=64, d_cq=1536)),
    "III": (Shape("tpa", d=7168, h=64, D=128, G=8, d_c=512, d_r=64, d_cq=1536)),
}
RANKS = ((16, 1, 1), (16, 2, 2), (8, 1, 1), (8, 2, 2))
SLOPES = {
    "I": (4096, 4096, 17408, 3584, 7168, 2816, 5632),
    "II": (8192, 8192, 34816, 6656, 13312, 5376, 10752),
    "III": (16384, 16384, 69632, 11264, 22528, 9728, 19456),
}


def with_ranks(shape, ranks):
    return replace(shape, rq=ranks[0], rk=ranks[1], rv=ranks[2])


@pytest.mark.parametrize("example", EXAMPLES)
def test_decode_slopes_are_those_of_the_examples(example):
    shape = EXAMPLES[example]
    found = [accounting.decode_slope(replace(shape, kind=kind)) for kind in ("mha", "gqa", "mla")]
    found += [accounting.decode_slope(with_ranks(shape, ranks)) for ranks in RANKS]
    assert tuple(found) == SLOPES[example]
    assert accounting.decode_slope(replace(shape, kind="mqa")) == SLOPES[example][0]


def test_parameters_of_example_one():
    shape = EXAMPLES["I"]
    assert accounting.parameters(replace(shape, kind="mha")) == 16_777_216
    assert accounting.parameters(replace(shape, kind="gqa")) == 9_437_184
    found = [accounting.parameters(with_ranks(shape, ranks)) for ranks in RANKS]
    assert found == [7_733_248, 8_126_464, 6_160_384, 6_553_600]


def test_decode_projections_are_parameters_without_the_output_and_what_is_absorbed():
    for shape in EXAMPLES.values():
        out = shape.d * shape.h * shape.D
        for kind in ("mha", "gqa"):
            layer = replace(shape, kind=kind)
            assert accounting.decode_projection(layer) == accounting.parameters(layer) - out
        tpa = with_ranks(shape, (6, 2, 2))
        assert accounting.decode_projection(tpa) == accounting.parameters(tpa) - out
        mqa = replace(shape, kind="mqa")
        assert accounting.decode_projection(mqa) == accounting.parameters(mqa) - out
        mla = replace(shape, kind="mla")  # W^UV is applied after the sum, it is not in the projection
        up = shape.d_c * shape.h * shape.D
        assert accounting.decode_projection(mla) == accounting.parameters(mla) - out - up


def test_factor_space_costs_more_than_materialised_heads_with_the_trained_ranks():
    medium = accounting.preset("medium", "tpa")
    assert accounting.decode_slope(medium) == 7348
    assert 2 * medium.h * medium.D == 6016
    assert not accounting.factor_space_is_cheaper(medium)
    assert accounting.factor_space_is_cheaper(with_ranks(EXAMPLES["I"], (16, 1, 1)))
    assert accounting.training_macs(medium, 10) == 734_800


def test_multi_matrix_factorisation_has_a_low_rank_query_and_one_shared_head():
    d, h, d_c = 96, 5, 12
    arrays = {"q_down": (d_c, d), "q_up": (h, d_c, d_c), "k": (d_c, d), "v": (d_c, d), "o": (d, h * d_c)}
    mfa = Shape("mfa", d=d, h=h, d_c=d_c)
    assert accounting.parameters(mfa) == sum(prod(shape) for shape in arrays.values())
    assert accounting.cache_numbers(mfa) == arrays["k"][0] + arrays["v"][0]


# ---------------------------------------------------------------------------------------------- T6 models

TOTALS = {
    "small": (124_342_272, 124_379_136, 123_568_128),
    "medium": (353_992_704, 353_157_120, 353_452_032),
    "large": (773_698_560, 773_053_440, 772_131_840),
    "xl": (1_555_814_400, 1_559_500_800, 1_554_892_800),
}
MLA_TOTALS = {"medium": 417_976_320, "large": 909_321_216, "xl": 1_810_065_408}
CACHES = {
    "small": (1536, 128, 256, 288, 344, 392),
    "medium": (2048, 128, 256, 544, 372, 444),
    "large": (2560, 128, 256, 544, 404, 500),
    "xl": (3200, 128, 256, 544, 444, 568),
}


@pytest.mark.parametrize("name", PRESETS)
def test_total_parameters_of_the_presets(name):
    total = {m: accounting.model_parameters(name, accounting.preset(name, m)) for m in accounting.HEADS[name]}
    assert (total["tpa"], total["kv_only"], total["mha"]) == TOTALS[name]
    assert total["mha"] == total["mqa"] == total["gqa"]


def test_total_parameters_of_the_released_mla_models():
    for name, expected in MLA_TOTALS.items():
        assert accounting.model_parameters(name, accounting.preset(name, "mla_paper")) == expected
    released_small = replace(accounting.preset("small", "mla_paper"), h=13)
    assert accounting.model_parameters("small", released_small) == 123_085_824


def test_the_papers_larger_mla_models_carry_16_to_18_percent_more_parameters():
    more = [MLA_TOTALS[name] / TOTALS[name][2] - 1 for name in MLA_TOTALS]
    assert [round(100 * x) for x in more] == [18, 18, 16]


@pytest.mark.parametrize("name", PRESETS)
def test_matched_mla_has_the_most_heads_that_fit(name):
    assert accounting.matched_mla_heads(name) == accounting.HEADS[name]["mla_matched"]
    layer = accounting.preset(name, "mla_matched")
    assert accounting.parameters(layer) + accounting.latent_norms(layer) <= 4 * layer.d**2


@pytest.mark.parametrize("name", PRESETS)
def test_cached_numbers_of_the_presets(name):
    found = [
        accounting.cache_numbers(accounting.preset(name, m))
        for m in ("mha", "mqa", "gqa", "mla_paper", "kv_only", "tpa")
    ]
    assert tuple(found) == CACHES[name]


def test_the_trained_models_save_3_9_to_5_6_times_against_mha():
    savings = [CACHES[name][0] / CACHES[name][-1] for name in PRESETS]
    assert round(min(savings), 1) == 3.9
    assert round(max(savings), 1) == 5.6


def test_rank_one_saves_25_6_times_at_equal_heads():
    tpa = Shape("tpa", h=32, D=128, rk=1, rv=1)
    assert accounting.cache_numbers(replace(tpa, kind="mha")) / accounting.cache_numbers(tpa) == 25.6


def test_the_training_batch_is_480_sequences_however_it_is_split():
    splits = {"small": (24, 5, 4), "medium": (20, 3, 8), "large": (15, 4, 8), "xl": (6, 10, 8)}
    assert {micro * steps * gpus for micro, steps, gpus in splits.values()} == {480}
    assert round(480 * 1024 * 100_000 / 1e9, 2) == 49.15


def test_attention_parameters_of_the_language_model_experiment():
    layer = Shape("mha", d=128, h=4, D=32)
    assert accounting.parameters(layer) == 65_536
    assert accounting.parameters(replace(layer, kind="mqa", h=7)) == 65_536
    assert accounting.parameters(replace(layer, kind="gqa", h=6, G=2)) == 65_536
    tpa = replace(layer, kind="tpa", h=8, rq=4, rk=1, rv=1)
    assert accounting.parameters(tpa) == 63_488
    assert accounting.parameters(replace(tpa, kind="kv_only", h=6)) == 58_880
    assert accounting.parameters(replace(tpa, h=7, rq=3, rk=2, rv=2)) == 63_616
    assert (accounting.cache_numbers(tpa), accounting.cache_numbers(layer)) == (80, 256)
    assert 256 / 80 == 3.2


# -------------------------------------------------------------------------------------------- performance


def test_bandwidth_floors():
    rank_one = Shape("tpa", h=32, D=64, rq=16, rk=1, rv=1)
    rank_two = replace(rank_one, rk=2, rv=2)
    assert accounting.decode_bytes(rank_one, 1, 2) == 384
    assert accounting.decode_bytes(rank_two, 1, 2) == 768
    assert accounting.decode_bytes(replace(rank_one, D=128), 1, 2) == 640
    total = accounting.decode_bytes(rank_one, 2**20, 2)
    assert round(total / 1e6, 1) == 402.7
    assert round(total / 4.3e12 * 1e6, 1) == 93.6
    assert 2 * accounting.decode_slope(rank_one) == 7168
    assert round(7168 / 384, 1) == 18.7


def test_cached_numbers_at_32_heads_of_64():
    shape = Shape("mha", h=32, D=64, G=4, d_c=256, d_r=32, rk=1, rv=1)
    kinds = ("mha", "gqa", "mla", "tpa", "mqa")
    assert [accounting.cache_numbers(replace(shape, kind=kind)) for kind in kinds] == [
        4096,
        512,
        288,
        192,
        128,
    ]


def test_saved_activations_of_the_medium_preset():
    medium = accounting.preset("medium", "tpa")
    assert accounting.saved_activations(medium, materialised=False) == 4165
    assert accounting.saved_activations(medium, materialised=True) == 13189
    assert round(13189 / 4165, 1) == 3.2


def test_tensor_parallelism_divides_only_the_head_part_of_the_cache():
    shape = Shape("tpa", h=32, D=128, rk=2, rv=2)
    assert accounting.cache_per_device(shape, 1) == accounting.cache_numbers(shape) == 640
    assert accounting.cache_per_device(shape, 8) == 528


# ------------------------------------------------------------------------------------------ initialisation


def test_initial_bounds_of_the_medium_preset():
    bounds = {
        (scheme, rank): accounting.init_bounds(scheme, 1024, 47, 64, rank)
        for scheme in ("t6", "xavier")
        for rank in (6, 2)
    }
    expected = {  # A of Q, A of K, B of Q, B of K
        "t6": (0.030556616567607, 0.052925612402496, 0.0095404097121522, 0.0095589889112734),
        "xavier": (0.067780385838685, 0.073257943575826, 0.065279120983387, 0.072168783648703),
    }
    for scheme, values in expected.items():
        (a_q, b_q), (a_k, b_k) = bounds[scheme, 6], bounds[scheme, 2]
        assert (a_q, a_k, b_q, b_k) == pytest.approx(values, rel=5e-14)  # 14 digits are printed


def test_initial_spread_of_a_key_entry_in_the_medium_preset():
    assert round(accounting.initial_entry_std("t6", 1024, 47, 64, 2), 3) == 0.122
    assert round(accounting.initial_entry_std("xavier", 1024, 47, 64, 2), 3) == 1.276
