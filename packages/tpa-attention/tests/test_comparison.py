"""The table of models side by side: what its rows hold, how it reads, what it refuses."""

import json

import pytest

from tpa_attention.accounting import cache_bytes, cache_numbers, compare, max_context, model_params
from tpa_attention.comparison import FLOP_COLUMNS
from tpa_attention.config import PRESETS, ModelConfig, preset

SMALL = preset("small")


def medium_models():
    mechanisms = ("mha", "mqa", "gqa", "mla_matched", "mla_paper", "kvonly", "tpa")
    return {m: preset("medium", m) for m in mechanisms}


def test_the_comparison_says_what_the_trained_models_save():
    savings = [compare({m: preset(n, m) for m in ("mha", "tpa")}, seq_len=1).saving("tpa") for n in PRESETS]
    assert (round(min(savings), 1), round(max(savings), 1)) == (3.9, 5.6)
    equal = {
        m: ModelConfig(mechanism=m, num_attention_heads=32, head_dim=128, k_rank=1, v_rank=1)
        for m in ("mha", "tpa")
    }
    assert compare(equal, seq_len=1).saving("tpa") == 25.6


def test_the_papers_mla_models_carry_16_to_18_percent_more_parameters():
    more = [
        compare({m: preset(n, m) for m in ("mha", "mla_paper")}, seq_len=1).more_parameters("mla_paper")
        for n in ("medium", "large", "xl")
    ]
    assert [round(100 * share) for share in more] == [18, 18, 16]


def test_rows_of_the_comparison_are_the_counts():
    models = medium_models()
    table = compare(models, seq_len=32768, batch=2, tp=2, gpu_bytes=80 * 2**30)
    assert [row.name for row in table.rows] == list(models)
    for row in table.rows:
        config = models[row.name]
        assert row.parameters == model_params(config)
        assert row.cache_numbers == cache_numbers(config)
        assert row.cache_bytes == cache_bytes(config, 2, 32768, tp=2)
        assert row.macs == row.projection + 32768 * row.slope
        weights = -(-2 * row.parameters // 2)
        assert row.max_context == max_context(80 * 2**30, weights, config, batch=2, tp=2)


def test_the_text_of_a_comparison_has_a_line_per_model_and_aligned_columns():
    text = compare(medium_models(), seq_len=32768).to_text()
    lines = text.splitlines()
    assert lines[0].startswith("mechanism")
    assert [line.split()[0] for line in lines[1:]] == list(medium_models())
    assert lines[-1].split() == ["tpa", "47", "353,992,704", "444", "4.6x", "bfloat16", "704,643,072"]
    assert len({len(line) for line in lines}) == 1  # the last column is flush right
    assert "7,348" in compare(medium_models(), seq_len=1).to_text(FLOP_COLUMNS)


def test_the_json_of_a_comparison_holds_the_same_integers():
    table = compare(medium_models(), seq_len=1024, quant="int8")
    found = json.loads(table.to_json())
    assert (found["baseline"], found["seq_len"], found["batch"], found["tp"]) == ("mha", 1024, 1, 1)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["tpa"]["parameters"] == 353_992_704
    assert (rows["tpa"]["stored_as"], rows["mha"]["stored_as"]) == ("int8", "bfloat16")
    assert rows["tpa"]["cache_bytes"] == cache_bytes(preset("medium"), 1, 1024, quant="int8")
    assert rows["mha"]["max_context"] is None


def test_memory_too_small_for_the_weights_leaves_the_context_empty():
    table = compare({"tpa": preset("xl")}, seq_len=1, gpu_bytes=10**6)
    assert table.rows[0].max_context is None
    assert table.to_text(("name", "max_context")).splitlines()[1].split() == ["tpa", "-"]
    assert table.baseline == "tpa"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare({}, seq_len=1), ValueError, "configs must name at least one model, got none"),
        (
            lambda: compare({"tpa": SMALL}, seq_len=1).to_text(("name", "price")),
            ValueError,
            "columns must be among .*, got 'price'",
        ),
        (lambda: compare({"tpa": SMALL}, seq_len=1).saving("mha"), KeyError, "mha"),
    ],
)
def test_a_wrong_table_is_refused_by_name_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
