"""`generate` and `convert` of the command line, on small models in temporary directories."""

import json
import os
import shutil
import sys

import pytest

from tpa_attention import _model_commands
from tpa_attention.__main__ import main

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests read directories that they wrote
torch = pytest.importorskip("torch", reason="the commands run torch models")
transformers = pytest.importorskip("transformers", reason="the commands run Hugging Face models")
transformers.utils.logging.disable_progress_bar()

CONTEXT = 48
UNKNOWN = "?"


def save_model(directory, vocab_size=256, **options):
    from tpa_attention.torch.hf import T6Config, T6ForCausalLM

    config = T6Config(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=3,
        head_dim=8,
        q_rank=2,
        k_rank=1,
        v_rank=1,
        max_position_embeddings=CONTEXT,
        init="normal",
        zero_init_output=False,
        tie_word_embeddings=False,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = T6ForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def save_tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "not": 3, UNKNOWN: 4}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN).save_pretrained(directory)


def save_llama(directory):
    config = transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=None,  # 2 by default, one of our five words
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(directory)
    return llama


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    return directory, save_model(directory)


def output(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refusal(capsys, status, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


# ---------------------------------------------------------------------------------------------- generate


def test_greedy_bytes_are_those_of_generate_with_and_without_cache(capsys, byte_model):
    directory, model = byte_model
    ids = torch.tensor([list("né".encode())])
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)[0].tolist()
    text = bytes(expected).decode("utf-8", "replace")
    assert text.startswith("né")
    words = ("generate", directory, "--prompt", "né", "--max-new-tokens", 9)
    assert output(capsys, *words) == output(capsys, *words, "--no-cache") == f"{text}\n"


def test_token_numbers_are_answered_with_token_numbers(capsys, byte_model):
    directory, model = byte_model
    expected = model.generate(torch.tensor([[7, 255]]), max_new_tokens=3, do_sample=False)[0].tolist()
    printed = output(capsys, "generate", directory, "--tokens", "7,255", "--max-new-tokens", 3)
    assert printed == ",".join(map(str, expected)) + "\n"


def test_without_a_number_the_context_is_filled_at_most(capsys, byte_model):
    printed = output(capsys, "generate", byte_model[0], "--tokens", "1,2,3")
    assert len(printed.split(",")) == CONTEXT
    full = ",".join(["1"] * CONTEXT)
    message = refusal(capsys, 2, "generate", byte_model[0], "--tokens", full)
    assert f"must fit into the context of {CONTEXT}, got {CONTEXT} and 1" in message


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(capsys, byte_model):
    directory, _ = byte_model
    words = ("generate", directory, "--tokens", "1,2", "--max-new-tokens", 9, "--temperature", 1.5, "--seed")
    before = torch.random.get_rng_state()
    first, again, other = (output(capsys, *words, seed) for seed in (3, 3, 4))
    assert first == again != other
    one = output(capsys, "generate", directory, "--tokens", "1,2", "--max-new-tokens", 9)
    assert output(capsys, *words, 3, "--top-k", 1) == one  # the likeliest alone
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tokenizer_in_the_directory_reads_and_writes_the_text(capsys, tmp_path):
    save_model(tmp_path, vocab_size=5)
    save_tokenizer(tmp_path)
    words = output(capsys, "generate", tmp_path, "--prompt", "to be or", "--max-new-tokens", 4).split()
    assert words[:3] == ["to", "be", "or"]
    assert len(words) == 7
    assert set(words) <= {"to", "be", "or", "not", UNKNOWN}


def test_a_prompt_without_a_tokenizer_needs_a_vocabulary_of_bytes(capsys, tmp_path):
    save_model(tmp_path, vocab_size=300)
    message = refusal(capsys, 2, "generate", tmp_path, "--prompt", "a")
    assert "a vocabulary of 256 bytes, got one of 300; give --tokens" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt must have at least one token, got none"),
        (["--tokens", "256"], "tokens must be in [0, 256), got 256"),
        (["--tokens", "3,-1"], "tokens must be in [0, 256), got -1"),
        (
            ["--prompt", "a", "--max-new-tokens", CONTEXT],
            f"must fit into the context of {CONTEXT}, got 1 and",
        ),
        (["--prompt", "a", "--temperature", "inf"], "temperature must be finite and >= 0, got inf"),
        (["--prompt", "a", "--device", "abacus"], "device must be one that torch can use here, got 'abacus'"),
        (["--prompt", "a", "--device", "meta"], "device must be one that torch can use here, got 'meta'"),
        (["--prompt", "a", "--seed", -1], "seed must be in [0, 2^63), got -1"),
        (["--prompt", "a", "--seed", 2**63], "seed must be in [0, 2^63), got 9223372036854775808"),
    ],
)
def test_a_wrong_prompt_is_refused(capsys, byte_model, words, message):
    assert message in refusal(capsys, 2, "generate", byte_model[0], *words)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is no model configuration"),
        ("[]", "is no model configuration"),
        ('{"model_type": "llama"}', "model must be of type 't6', got 'llama'"),
        ('{"model_type": "t6", "vocab_size": 0}', "vocab_size must be >= 1, got 0"),
        ('{"model_type": "t6", "vocab_size": "x"}', "cannot be loaded: vocab_size must be an int, got 'x'"),
        ('{"model_type": "t6"}', "no file named"),
    ],
)
def test_a_directory_without_a_t6_is_refused(capsys, tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    assert message in refusal(capsys, 2, "generate", tmp_path, "--prompt", "a")


def test_damaged_weights_are_refused(capsys, byte_model, tmp_path):
    shutil.copy(byte_model[0] / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert "cannot be loaded: Error while deserializing" in refusal(
        capsys, 2, "generate", tmp_path, "--prompt", "a"
    )


def test_a_model_that_cannot_use_a_cache_generates_without(capsys, tmp_path):
    model = save_model(tmp_path, kv_shift=True)
    expected = model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False)[0].tolist()
    printed = output(capsys, "generate", tmp_path, "--tokens", "1,2", "--max-new-tokens", 4)
    assert printed == ",".join(map(str, expected)) + "\n"


def test_generate_without_transformers_says_what_to_install(capsys, byte_model, monkeypatch):
    import tpa_attention.torch

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "tpa_attention.torch.hf")
    monkeypatch.delattr(tpa_attention.torch, "hf")
    message = refusal(capsys, 1, "generate", byte_model[0], "--prompt", "a")
    assert "transformers is not installed" in message
    assert 'pip install "tpa-attention[hf]"' in message


# ----------------------------------------------------------------------------------------------- convert


def test_conversion_is_exact_by_default_and_the_result_generates(capsys, tmp_path):
    llama = save_llama(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    printed = output(capsys, "convert", tmp_path / "llama", tmp_path / "t6")
    assert "exact" in printed
    assert printed.splitlines()[-1] == f"wrote {tmp_path / 't6'}"
    config = json.loads((tmp_path / "t6" / "config.json").read_text())
    assert (config["model_type"], config["k_rank"], config["v_rank"]) == ("t6", 2, 2)
    expected = llama.generate(torch.tensor([[0, 1, 2]]), max_new_tokens=6, do_sample=False)
    words = ("generate", tmp_path / "t6", "--max-new-tokens", 6)
    found = output(capsys, *words, "--tokens", "0,1,2").strip()
    assert found == ",".join(map(str, expected[0].tolist()))
    assert output(capsys, *words, "--prompt", "to be or").startswith("to be or ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "t6"]  # nothing is left beside


def test_a_lower_rank_is_written_with_its_error(capsys, tmp_path):
    save_llama(tmp_path / "llama")
    printed = output(capsys, "convert", tmp_path / "llama", tmp_path / "t6", "--k-rank", 1, "--q-rank", 4)
    config = json.loads((tmp_path / "t6" / "config.json").read_text())
    assert (config["q_rank"], config["k_rank"], config["v_rank"]) == (4, 1, 2)
    assert "exact" in printed  # V and Q keep every head
    assert "e-0" in printed  # K does not


def test_a_failed_conversion_leaves_nothing_behind(capsys, tmp_path):
    save_llama(tmp_path / "llama")
    message = refusal(capsys, 2, "convert", tmp_path / "llama", tmp_path / "t6", "--k-rank", 5)
    assert "k_rank" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_an_existing_output_is_never_overwritten(capsys, tmp_path):
    save_llama(tmp_path / "llama")
    (tmp_path / "t6").mkdir()
    message = refusal(capsys, 2, "convert", tmp_path / "llama", tmp_path / "t6")
    assert "output must not exist yet" in message
    assert list((tmp_path / "t6").iterdir()) == []


def test_only_a_llama_is_converted(capsys, byte_model, tmp_path):
    message = refusal(capsys, 2, "convert", byte_model[0], tmp_path / "t6")
    assert "model must be of type 'llama', got 't6'" in message


@pytest.mark.parametrize("top_k", [None, 2, 9])
def test_noisy_scores_pick_each_token_as_often_as_its_probability(top_k):
    scores = torch.tensor([1.0, 0.2, -0.5, 2.0])
    noisy = _model_commands._noisy_scores(1.5, top_k, torch.Generator().manual_seed(0))
    picks = noisy(None, scores.expand(40_000, -1)).argmax(dim=-1)
    kept = scores.masked_fill(scores < scores.topk(min(top_k or 4, 4)).values[-1], -torch.inf)
    expected = (kept / 1.5).softmax(dim=-1)
    share = picks.bincount(minlength=4) / len(picks)
    # five standard deviations of a binomial share
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / len(picks)).sqrt()).all()
