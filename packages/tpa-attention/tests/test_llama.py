"""LLaMA of transformers as T6: logits and tokens at full rank, layers fitted below it, files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests read folders that they wrote

import pytest
import torch
import transformers
from hf_cases import build
from hf_cases import greedy as generate
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tpa_attention.torch.convert import convert_hf_llama, mha_to_tpa
from tpa_attention.torch.hf import T6ForCausalLM
from tpa_attention.torch.llama import rope_config
from tpa_attention.torch.rope import frequencies

transformers.utils.logging.disable_progress_bar()

FLOAT32 = 1e-5  # two layers; transformers has its angles in float32
VOCAB = 37
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": VOCAB - 1,
}
ROPES = {
    "base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,  # wavelengths 6.3 and 62.8 at D = 4: one kept, one stretched
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
MODELS = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 6},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 8},
    **{name: {"rope_parameters": parameters} for name, parameters in ROPES.items()},
}


def llama(name="GQA", seed=0, dtype=torch.float32, **options):
    """A LLaMA from a configuration alone, with parameters that make it say different things."""
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **MODELS[name], **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4, generator=generator)
            else:  # norms
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype).eval()


def prompt(batch=2, length=9, seed=1):
    return torch.randint(1, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("name", "q_rank"), [("GQA", 6), *((name, None) for name in MODELS)])
def test_full_rank_gives_the_same_logits_and_the_same_greedy_tokens(name, q_rank):
    model, ids = llama(name), prompt()
    heads = model.config.num_key_value_heads
    converted, report = convert_hf_llama(model, heads, heads, q_rank=q_rank)
    assert isinstance(converted, T6ForCausalLM)
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), rtol=FLOAT32, atol=FLOAT32)
    assert all(layer.k.exact and layer.v.exact for layer in report)
    assert (len(report), report.cache_ratio) == (2, 1.0)
    expected = generate(model, ids, new=6)
    assert torch.equal(generate(converted, ids, new=6), expected)
    assert torch.equal(generate(converted, ids, new=6, use_cache=False), expected)
    assert len(set(expected[0, 9:].tolist())) > 3  # equal tokens mean something


def test_left_padding_and_a_static_cache_give_the_tokens_of_llama():
    model, ids = llama(), prompt(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    converted, _ = convert_hf_llama(model, 2, 2)
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(converted, ids, attention_mask=mask), expected)
    assert torch.equal(generate(converted, ids, attention_mask=mask, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("GQA", torch.float32), ("tied", torch.bfloat16), ("llama3", torch.float32)]
)
def test_converted_model_saves_as_safetensors_and_loads_as_t6(tmp_path, name, dtype):
    converted, _ = convert_hf_llama(llama(name, dtype=dtype), 1, 2, q_rank=3)
    assert converted.dtype == dtype
    converted.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is T6ForCausalLM
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, prompt()), logits(converted, prompt()))
    assert loaded.config.to_model_config() == converted.config.to_model_config()
    assert loaded.generation_config.eos_token_id == VOCAB - 1


def test_directory_of_a_llama_converts_like_the_model_in_memory(tmp_path):
    model = llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    converted, report = convert_hf_llama(tmp_path, 1, 1)
    same, same_report = convert_hf_llama(model, 1, 1)
    assert converted.dtype == torch.bfloat16
    assert report == same_report
    expected = same.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())


def test_llama_in_memory_is_left_as_it_was_when_the_copy_changes():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted, _ = convert_hf_llama(model, 1, 1, calibration=prompt())
    with torch.no_grad():
        for parameter in converted.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules() if "norm" in type(module).__name__)


def test_every_layer_is_fitted_to_the_hidden_states_that_enter_it():
    model, ids = llama(), prompt(4, 20)
    converted, report = convert_hf_llama(model, 1, 1, calibration=ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for index, found in enumerate(report):
        layer = model.model.layers[index]
        weights = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo"]
        entering = layer.input_layernorm(states[index])
        rope = rope_config(model.config)
        expected, own = mha_to_tpa(*weights, 6, 2, k_rank=1, v_rank=1, calibration=entering, rope=rope)
        assert found == own.layers[0]
        assert found.output_error > 1e-3
        attention = converted.model.layers[index].attn
        assert all(
            torch.equal(*pair) for pair in zip(attention.parameters(), expected.parameters(), strict=True)
        )
    _, plain = convert_hf_llama(model, 1, 1)
    assert all(layer.output_error is None for layer in plain)
    assert report.cache_ratio == 2.0


def test_refined_model_is_contextual_and_nearer_to_llama_on_its_tokens():
    model, ids = llama(), prompt(8, 40)
    plain, before = convert_hf_llama(model, 1, 1, calibration=ids)
    refined, after = convert_hf_llama(model, 1, 1, calibration=ids, refine_steps=3)
    assert (refined.config.a_bias, refined.config.variant) == (True, "kv_only")
    for earlier, later in zip(before, after, strict=True):
        assert later.k.token_error < earlier.k.token_error
        assert later.v.token_error < earlier.v.token_error
    target = logits(model, ids)
    assert (logits(refined, ids) - target).norm() < (logits(plain, ids) - target).norm()


def test_bias_without_refinement_changes_no_logit():
    model = llama()
    free, _ = convert_hf_llama(model, 1, 1)
    contextual, report = convert_hf_llama(model, 1, 1, a_bias=True)
    torch.testing.assert_close(
        logits(contextual, prompt()), logits(free, prompt()), rtol=FLOAT32, atol=FLOAT32
    )
    assert report.cache_after == 2 * 2 * (6 + 4)


@pytest.mark.parametrize(
    ("width", "factor", "high"),
    [(128, 8.0, 4.0), (64, 32.0, 4.0), (128, 8.0, 16.0)],
    ids=["3.1", "3.2", "another bound"],
)
def test_rotation_of_llama_3_has_the_frequencies_of_transformers(width, factor, high):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
    }
    # as the files of Llama 3.1 and 3.2 have it; transformers writes into the dictionary
    rotation = {"rope_theta": 500000.0, "rope_scaling": dict(scaling), "max_position_embeddings": 131072}
    config = LlamaConfig.from_dict({**SIZES, "head_dim": width, **rotation})
    rope = rope_config(config)
    assert (rope.base, rope.sign, rope.scaling) == (500000.0, 1, scaling)
    theirs = LlamaRotaryEmbedding(config)
    ours, scale = frequencies(width, rope, torch.device("cpu"))
    assert scale == theirs.attention_scaling == 1.0
    # transformers has its powers of the base in float32
    torch.testing.assert_close(ours.float(), theirs.inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, r"config.attention_bias must be False for T6, got True"),
        ({"mlp_bias": True}, r"config.mlp_bias must be False for T6, got True"),
        ({"hidden_act": "gelu"}, r"config.hidden_act must be 'silu' for T6, got 'gelu'"),
        ({"attention_dropout": 0.1}, r"config.attention_dropout must be 0 for T6, got 0.1"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"config.rope_parameters must be of type default, linear, yarn, llama3, got 'dynamic'",
        ),
        (
            {"rope_parameters": {**ROPES["yarn"], "attention_factor": 2.0}},
            r"config.rope_parameters must give the RoPE .* 2.0 in transformers and 1.138",
        ),
    ],
)
def test_llama_that_t6_cannot_be_is_refused_with_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        convert_hf_llama(llama(**options), 2, 2)


def test_ranks_and_calibration_are_checked_with_their_names(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match=r"k_rank must not exceed num_heads, got 7 and 6"):
        convert_hf_llama(model, 7, 2)
    with pytest.raises(ValueError, match=r"calibration must be given for a refinement, got refine_steps=2"):
        convert_hf_llama(model, 1, 2, refine_steps=2)
    for ids, error, message in (
        (prompt().float(), TypeError, r"calibration must hold integers, got torch.float32"),
        (prompt()[0], ValueError, r"calibration must have shape \(B, T\) and hold tokens, got \(9,\)"),
        (prompt()[:, :0], ValueError, r"calibration must have shape \(B, T\) and hold tokens, got \(2, 0\)"),
        (torch.tensor([[3, 37]]), ValueError, r"must hold ids in \[0, 37\), got ids from 3 to 37"),
        (torch.tensor([[-1, 3]]), ValueError, r"must hold ids in \[0, 37\), got ids from -1 to 3"),
    ):
        with pytest.raises(error, match=message):
            convert_hf_llama(model, 1, 2, calibration=ids)
    build("MQA").save_pretrained(tmp_path)
    for other in (build("MQA"), tmp_path):
        with pytest.raises(TypeError, match=r"model_or_dir must be a LlamaForCausalLM .* got T6ForCausalLM"):
            convert_hf_llama(other, 1, 1)
