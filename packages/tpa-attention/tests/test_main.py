"""`python -m tpa_attention`: the tables, and what is said about wrong input."""

import json
import subprocess
import sys

import pytest

from tpa_attention.__main__ import main
from tpa_attention.accounting import cache_bytes, decode_macs, max_context, model_params
from tpa_attention.config import ModelConfig, preset

SIZES = "--layers 1 --d-model 64 --heads 4 --head-dim 16"
EXAMPLE_ONE = (
    "--layers 24 --d-model 2048 --heads 32 --head-dim 64 --q-rank 16 --k-rank 1 --v-rank 1 "
    "--kv-heads 4 --kv-latent 256 --q-latent 768 --rope-dim 32"
)


def output(capsys, *words):
    assert main([part for word in words for part in word.split()]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def rows(capsys, *words):
    """Rows of the JSON form by name."""
    return {row["name"]: row for row in json.loads(output(capsys, *words, "--json"))["rows"]}


def test_the_module_runs_as_a_program():
    words = [sys.executable, "-m", "tpa_attention", "cache-size", "--preset", "xl", "--seq-len", "1024"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,555,814,400" in done.stdout


def test_cache_sizes_of_a_preset_hold_every_mechanism_and_say_which_mla_is_larger(capsys):
    lines = output(capsys, "cache-size", "--preset", "medium").splitlines()
    assert lines[0] == "batch 1, 32,768 cached tokens, bfloat16, devices 1, saving against mha"
    names = ["mechanism", "mha", "mqa", "gqa", "mla_matched", "mla_paper", "kvonly", "tpa"]
    assert [line.split()[0] for line in lines[1:9]] == names
    assert lines[8].split()[1:5] == ["47", "353,992,704", "444", "4.6x"]
    assert lines[9:] == ["mla_paper has 18.3 % more parameters than mha"]


def test_options_of_cache_size_reach_the_count(capsys):
    words = "cache-size --preset small --mechanism tpa --mechanism mqa --batch 3 --seq-len 777"
    found = rows(capsys, words, "--dtype float16 --quant int8 --tp 2 --unpadded")
    assert list(found) == ["tpa", "mqa"]
    expected = cache_bytes(preset("small"), 3, 777, "float16", "int8", tp=2, padded=False)
    assert found["tpa"]["cache_bytes"] == expected
    assert found["mqa"]["cache_bytes"] == cache_bytes(preset("small", "mqa"), 3, 777, "float16", tp=2)


def test_gpu_memory_adds_the_longest_context(capsys):
    found = rows(capsys, "cache-size", "--preset", "small", "--mechanism", "tpa", "--gpu-memory", "1.5")
    weights = 2 * model_params(preset("small"))
    expected = max_context(int(1.5 * 2**30), weights, preset("small"))
    assert found["tpa"]["max_context"] == expected
    text = output(capsys, "cache-size", "--preset", "small", "--gpu-memory", "1.5")
    assert "longest context" in text
    assert f"{expected:,}" in text
    assert "does not fit" not in text
    assert "tpa does not fit: its weights" in output(
        capsys, "cache-size", "--preset", "small", "--gpu-memory", "0.1"
    )


def test_flops_of_given_sizes_are_those_of_example_one(capsys):
    found = rows(capsys, "flops", EXAMPLE_ONE, "--seq-len", "4096")
    slopes = {name: row["slope"] for name, row in found.items()}
    assert slopes == {"mha": 4096, "mqa": 4096, "gqa": 4096, "mla": 17408, "kvonly": 4096, "tpa": 3584}
    config = ModelConfig(
        num_hidden_layers=24,
        hidden_size=2048,
        num_attention_heads=32,
        head_dim=64,
        q_rank=16,
        k_rank=1,
        v_rank=1,
    )
    assert found["tpa"]["macs"] == decode_macs(config, 4096)
    assert found["tpa"]["attention_parameters"] == 7_733_248
    full = rows(capsys, "flops", EXAMPLE_ONE, "--query", "full")
    assert full["tpa"]["slope"] == 4096
    assert "18.7" in output(capsys, "flops", EXAMPLE_ONE)


def test_mechanisms_whose_sizes_are_not_given_are_left_out(capsys):
    found = rows(capsys, f"cache-size {SIZES}")
    assert list(found) == ["mha", "mqa", "kvonly", "tpa"]


def test_sizes_beside_a_preset_replace_its(capsys):
    words = "cache-size --preset medium --k-rank 1 --v-rank 1 --heads 32 --head-dim 128"
    found = rows(capsys, words, "--mechanism", "tpa", "--mechanism", "mha")
    assert (found["tpa"]["cache_numbers"], found["tpa"]["saving"]) == (320, 25.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: {cache-size,flops,convert,generate,info}"),
        ("cachesize", "invalid choice: 'cachesize'"),
        ("info --loud", "unrecognized arguments: --loud"),
        ("flops", "give --preset, or sizes: --layers, --d-model, --heads, --head-dim missing"),
        ("flops --preset tiny", "argument --preset: invalid choice: 'tiny'"),
        ("cache-size --preset small --batch 0", "argument --batch: must be an integer >= 1, got '0'"),
        ("cache-size --preset small --seq-len 1e6", "argument --seq-len: must be an integer >= 1, got '1e6'"),
        ("cache-size --preset small --gpu-memory -1", "--gpu-memory must be > 0, got -1.0"),
        ("cache-size --preset small --gpu-memory nan", "--gpu-memory must be > 0, got nan"),
        ("cache-size --preset small --gpu-memory inf", "--gpu-memory must be finite, got inf"),
        ("cache-size --preset small --gpu-memory much", "argument --gpu-memory: invalid float value: 'much'"),
        ("cache-size --preset small --dtype bf16", "argument --dtype: invalid choice: 'bf16'"),
        ("cache-size --preset small --mechanism mfa", "argument --mechanism: invalid choice: 'mfa'"),
        (
            "cache-size --preset medium --mechanism gqa --kv-heads 4",
            "must divide num_attention_heads, got 4 and 30",
        ),
        (
            "cache-size --preset medium --mechanism tpa --kv-heads 2",
            "--kv-heads is for mechanism gqa, got tpa",
        ),
        (
            f"cache-size {SIZES} --mechanism mla_paper",
            "mechanism mla_paper needs --preset; with sizes it is mla",
        ),
        (f"cache-size {SIZES} --mechanism gqa", "num_key_value_heads must be given under mechanism 'gqa'"),
        ("generate there", "one of the arguments --prompt --tokens is required"),
        ("generate there --prompt a --tokens 1", "not allowed with argument"),
        ("generate there --tokens 1,b", "must be integers joined by commas, got '1,b'"),
        ("generate there --prompt a", "model must be a directory with a config.json, got there"),
        ("generate there --prompt a --temperature -1", "temperature must be finite and >= 0, got -1.0"),
        ("generate there --prompt a --top-k 3", "top_k needs a temperature > 0, got top_k 3"),
        ("convert there", "the following arguments are required: OUT_DIR"),
        ("convert there new", "model must be a directory with a config.json, got there"),
        ("convert there new --k-rank 0", "argument --k-rank: must be an integer >= 1, got '0'"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("python -m tpa_attention")
    assert printed.err.count("\n") == 1
