"""Bytes of caches, longest contexts and whole models: by formula, and as torch allocates them."""

from dataclasses import replace

import pytest

from tpa_attention.accounting import QUANTISED, cache_bytes, max_context, model_params
from tpa_attention.config import PRESETS, ModelConfig, preset

SMALL = preset("small")
RANK_TWO = ModelConfig(num_hidden_layers=3, num_attention_heads=32, head_dim=128)


def test_tensor_parallelism_divides_only_the_head_part_of_the_cache():
    one, eight = (cache_bytes(RANK_TWO, 1, 1, "bfloat16", tp=tp) // (2 * 3) for tp in (1, 8))
    assert (one, eight) == (640, 528)


def test_uneven_heads_are_padded_and_small_groups_replicated():
    config = replace(RANK_TWO, num_attention_heads=30)
    assert cache_bytes(config, 1, 1, tp=8, padded=False) == 3 * 2 * 4 * (4 + 128)
    gqa = preset("small", "gqa")
    halves = [cache_bytes(gqa, 1, 1, tp=tp) for tp in (1, 2, 8)]
    assert halves == [12 * 512, 12 * 256, 12 * 256]
    mla = preset("small", "mla")
    assert cache_bytes(mla, 1, 1, tp=8) == cache_bytes(mla, 1, 1)


def test_records_end_on_16_bytes():
    medium = preset("medium")  # 2 (47 + 64) = 222 numbers a record: 444 bytes, 448 with padding
    assert cache_bytes(medium, 2, 5, "bfloat16", padded=False) == 24 * 2 * 5 * 888
    assert cache_bytes(medium, 2, 5, "bfloat16") == 24 * 2 * 5 * 896
    assert cache_bytes(medium, 2, 5, "float32") == 24 * 2 * 5 * 2 * 896  # 888 bytes, 896
    # 250 numbers a record: 500 bytes, which 8 would pad to 504
    assert cache_bytes(preset("large"), 1, 1) == 36 * 2 * 512


@pytest.mark.parametrize("quant", QUANTISED)
def test_quantised_caches_hold_a_byte_per_number_and_a_scale_per_rank(quant):
    numbers, scales = 2 * 2 * (32 + 128), 2 + 2
    assert cache_bytes(RANK_TWO, 1, 7, quant=quant) == 3 * 7 * (numbers + 4 * scales)
    free_a = replace(RANK_TWO, variant="noncontextual_a")
    assert cache_bytes(free_a, 1, 1, quant=quant) == 3 * (2 * 2 * 128 + 4 * scales)


def test_the_kv_shift_keeps_hidden_states_per_sequence_and_layer():
    shifted = replace(RANK_TWO, kv_shift=True)
    more = cache_bytes(shifted, 5, 9, rewind=3) - cache_bytes(RANK_TWO, 5, 9)
    assert more == 5 * 3 * (3 + 1) * 768 * 2
    assert cache_bytes(RANK_TWO, 5, 9, rewind=3) == cache_bytes(RANK_TWO, 5, 9)


@pytest.mark.parametrize("options", [{}, {"quant": "int8"}, {"tp": 3}, {"padded": False}, {"batch": 7}])
def test_the_longest_context_fits_and_one_token_more_does_not(options):
    config = replace(preset("small"), kv_shift=True)
    batch, memory, weights = options.pop("batch", 3), 10**9 + 17, 3 * 10**8
    longest = max_context(memory, weights, config, batch=batch, reserved_bytes=10**7, **options)
    room = memory - weights - 10**7
    assert cache_bytes(config, batch, longest, **options) <= room
    assert cache_bytes(config, batch, longest + 1, **options) > room


def test_no_token_fits_where_the_weights_fill_the_memory():
    assert max_context(100, 100, preset("small")) == 0
    assert max_context(100, 90, replace(preset("small"), kv_shift=True)) == 0


# --------------------------------------------------------------------------------------- as torch allocates


ALL = ("tpa", "kvonly", "mha", "mqa", "gqa", "mla_matched", "mla_paper")


@pytest.mark.parametrize("mechanism", ALL)
@pytest.mark.parametrize("name", PRESETS)
def test_caches_of_the_presets_have_the_counted_size(name, mechanism):
    torch = pytest.importorskip("torch", reason="allocates on torch's meta device")
    from tpa_attention.torch.cache import FactorCache

    config = preset(name, mechanism)
    for dtype in ("bfloat16", "float32", "float64"):
        cache = FactorCache(config, 2, 5, device="meta", dtype=getattr(torch, dtype))
        assert cache.nbytes == cache_bytes(config, 2, 5, dtype)


OPTIONS = [
    {"variant": "kv_only+noncontextual_a"},
    {"variant": "noncontextual_a"},
    {"variant": "noncontextual_b"},
    {"variant": "noncontextual_b", "shared_kv_b": True},
    {"shared_kv_b": True},
    {"factor_dims": (4, 2)},
    {"factor_dims": (4, 2), "shared_kv_b": True},
    {"factor_dims": (4, 2), "mechanism": "kvonly"},
    {"factor_dims": (2, 2, 2), "variant": "noncontextual_b"},
    {"v_head_dim": 12},
    {"a_bias": True},
    {"a_bias": True, "mechanism": "kvonly"},
    {"out_norm": True, "output_gate": True, "kv_shift": True, "factor_norm": True},
    {"norm_affine": True, "tie_word_embeddings": False, "intermediate_size": 7},
    {"mechanism": "gqa", "num_key_value_heads": 3, "norm_affine": True},
    {"mechanism": "mla", "kv_latent": 5, "q_latent": 3, "rope_dim": 2},
]

FACTORED = [o for o in OPTIONS if o.get("mechanism", "tpa") in ("tpa", "kvonly")]
FACTORED.append({"variant": "noncontextual_a", "shared_kv_b": True})  # caches nothing of V


@pytest.mark.parametrize("mechanism", ALL)
def test_the_medium_models_have_the_counted_size(mechanism):
    pytest.importorskip("torch", reason="allocates on torch's meta device")
    from tpa_attention.torch.model import T6

    config = preset("medium", mechanism)
    assert sum(p.numel() for p in T6(config, device="meta").parameters()) == model_params(config)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_models_and_caches_with_options_have_the_counted_size(options):
    torch = pytest.importorskip("torch", reason="allocates on torch's meta device")
    from tpa_attention.torch.cache import FactorCache
    from tpa_attention.torch.model import T6

    sizes = {"vocab_size": 11, "hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = ModelConfig(head_dim=8, q_rank=3, **sizes, **options)
    model = T6(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == model_params(config)
    cache = FactorCache(config, 3, 4, device="meta", dtype=torch.bfloat16)
    hidden = 3 * 2 * (cache.rewind + 1) * 10 * 2 if config.kv_shift else 0  # kept beside the records
    assert cache.nbytes + hidden == cache_bytes(config, 3, 4)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("options", FACTORED, ids=str)
def test_caches_in_eight_bits_have_the_counted_size(options, kind):
    pytest.importorskip("torch", reason="allocates on torch's meta device")
    from tpa_attention.torch.quantized_cache import QuantizedFactorCache

    sizes = {"hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 8}
    config = ModelConfig(**sizes, **options | {"kv_shift": False})
    cache = QuantizedFactorCache(config, 3, 4, kind=kind, device="meta")
    assert cache.nbytes == cache_bytes(config, 3, 4, quant=kind)


def test_the_hidden_states_that_a_cache_keeps_have_the_counted_size():
    torch = pytest.importorskip("torch", reason="looks at a cache of torch")
    from tpa_attention.torch.cache import FactorCache

    config = replace(RANK_TWO, kv_shift=True)
    cache = FactorCache(config, 2, 3, dtype=torch.bfloat16)
    for layer in range(3):
        cache.set_last_hidden(layer, torch.zeros(2, 1, 768, dtype=torch.bfloat16))
    states = cache.state_dict()
    kept = sum(states[f"hidden.{layer}"].nbytes for layer in range(3))
    assert kept + cache.nbytes == cache_bytes(config, 2, 3)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cache_bytes(SMALL, 0, 1), ValueError, "batch must be >= 1, got 0"),
        (lambda: cache_bytes(SMALL, 1, 1.5), TypeError, "seq_len must be an int, got 1.5"),
        (lambda: cache_bytes(SMALL, 1, 1, tp=0), ValueError, "tp must be >= 1, got 0"),
        (lambda: cache_bytes(SMALL, 1, 1, tp=99), ValueError, "tp must be at most 34, the .* heads, got 99"),
        (lambda: cache_bytes(SMALL, 1, 1, "bf16"), ValueError, "dtype must be one of .*, got 'bf16'"),
        (lambda: cache_bytes(SMALL, 1, 1, quant="int4"), ValueError, "quant must be one of .*, got 'int4'"),
        (lambda: cache_bytes(SMALL, 1, 1, rewind=-1), ValueError, "rewind must be >= 0, got -1"),
        (
            lambda: cache_bytes(preset("small", "mha"), 1, 1, quant="int8"),
            ValueError,
            "quant is for caches of factors, got 'int8' with 'mha'",
        ),
        (lambda: max_context(10, 11, SMALL), ValueError, "must fit into gpu_bytes, got 11 and 0 in 10"),
        (lambda: max_context(10, -1, SMALL), ValueError, "weights_bytes must be >= 0, got -1"),
    ],
)
def test_wrong_cases_are_refused_by_name_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
