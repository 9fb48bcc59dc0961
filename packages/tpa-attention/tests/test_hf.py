"""T6 in Hugging Face: every way to generate, the caches, saving and loading, loss, checkpointing."""

import json
import re

import jaxtyping
import pytest
import torch
from hf_cases import MODELS, SIZES, VOCAB, build, greedy, prompt
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from tpa_attention.config import ModelConfig, preset
from tpa_attention.torch.hf import CACHE_FIELD, T6Config, T6ForCausalLM, T6Model
from tpa_attention.torch.model import T6

ROUNDING = 1e-10  # float64: two layers of sums of a few hundred products of size 1 to 100


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """Without the runtime check of annotations, a third of the time here: tests of the layers have it on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# ------------------------------------------------------------------------------------------- greedy decoding


def test_generated_text_varies_so_that_equal_tokens_mean_something():
    assert len(set(greedy(build(), prompt(1), new=12)[0, 7:].tolist())) > 6


@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_tokens_are_those_without_a_cache(name):
    model, ids = build(name), prompt(2, 5)  # decoded from records; below, 18 tokens are prefilled
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


STATIC = ("contextual", "non-contextual B", "shared B", "third order", "GQA", "MLA")


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, "dynamic") for name in MODELS), *((name, "static") for name in STATIC)]
)
def test_batch_with_left_padding_generates_what_each_row_does_alone(name, cache):
    assert_rows_generate_alone(build(name), cache_implementation=cache)


@pytest.mark.parametrize("kv_shift", [False, True])
def test_left_padding_without_a_cache_changes_no_token(kv_shift):
    assert_rows_generate_alone(build(kv_shift=kv_shift), use_cache=False)


def assert_rows_generate_alone(model, **options):
    rows = (prompt(1, 5, seed=3), prompt(1, 18, seed=2))
    ids, mask = torch.zeros(2, 18, dtype=torch.long), torch.zeros(2, 18, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 18 - row.shape[1] :] = row
        mask[i, 18 - row.shape[1] :] = 1
    together = greedy(model, ids, attention_mask=mask, **options)[:, 18:]
    for i, row in enumerate(rows):
        assert torch.equal(together[i], greedy(model, row, use_cache=False)[0, row.shape[1] :])


@pytest.mark.parametrize("name", ["contextual", "non-contextual A", "rotate on load", "MQA"])
def test_static_cache_generates_what_no_cache_does(name):
    model, ids = build(name), prompt(2, 4)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), greedy(model, ids, use_cache=False))


@pytest.mark.parametrize("name", ["contextual", "shared B", "non-contextual B", "MLA"])
def test_right_padding_changes_no_logit_and_decoding_goes_on_behind_it(name):
    model, long, short = build(name), prompt(1, 8, seed=2), prompt(1, 5, seed=3)
    ids, mask = torch.cat([long, torch.cat([short, short[:, :3]], dim=1)]), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    new = prompt(2, 1, seed=4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, **{CACHE_FIELD: cache}).logits
        torch.testing.assert_close(first[1, :5], model(short).logits[0], rtol=0, atol=ROUNDING)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        positions = torch.tensor([[8], [5]])
        second = model(new, attention_mask=mask, position_ids=positions, **{CACHE_FIELD: cache}).logits
        for i, row in enumerate((long, short)):
            expected = model(torch.cat([row, new[i : i + 1]], dim=1)).logits[0, -1]
            torch.testing.assert_close(second[i, 0], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["contextual", "rotate on load", "MLA"])
def test_chunks_with_a_cache_give_the_logits_of_one_call(name):
    model, ids = build(name), prompt(2, 30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, **{CACHE_FIELD: cache}).logits for part in ids.split([18, 1, 4, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=ROUNDING)


def test_a_mask_of_four_axes_is_taken_as_it_is():
    model, ids = build(), prompt(1, 6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2] = False
    keys = torch.tensor([[1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        expected = model(ids, attention_mask=keys).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=0, atol=ROUNDING)
    assert not torch.allclose(expected, model(ids).logits, atol=1e-3)


# ------------------------------------------------------------------------------------------ other strategies


@pytest.mark.parametrize("name", ["contextual", "rotate on load", "MLA"])
def test_beam_search_reorders_the_cache(name):
    model, ids = build(name), prompt(2, 6)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # many continuations are likely: beams part and change places
    options = {"new": 10, "num_beams": 3, "num_return_sequences": 2}
    expected = greedy(model, ids, use_cache=False, **options)
    assert torch.equal(greedy(model, ids, **options), expected)
    assert not torch.equal(expected[::2], greedy(model, ids, new=10))


def test_sampling_draws_the_same_tokens_with_and_without_cache():
    model, ids, drawn = build(), prompt(2, 6), []
    for cache in (True, False, True):
        torch.manual_seed(4 if len(drawn) < 2 else 5)
        options = {"max_new_tokens": 12, "do_sample": True, "top_k": 5, "temperature": 3.0}
        drawn.append(model.generate(ids, use_cache=cache, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", ["contextual", "rotate on load"])
def test_prompt_lookup_gives_the_greedy_tokens(name):
    model = build(name)
    ids = torch.cat([prompt(1, 5), prompt(1, 5), prompt(1, 5)], dim=1)
    stop = {"eos_token_id": VOCAB - 1}  # transformers 5.0 looks prompts up only if some token ends a text
    expected = greedy(model, ids, new=10, use_cache=False, **stop)
    assert torch.equal(greedy(model, ids, new=10, prompt_lookup_num_tokens=4, **stop), expected)


@pytest.mark.parametrize("name", ["contextual", "third order"])
def test_assisted_decoding_gives_the_greedy_tokens(name):
    model, assistant, ids = build(name), build(name), prompt(1, 5)
    noise = torch.randn(VOCAB, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # right often, wrong at times: drafts are accepted and rejected
        assistant.lm_head.weight.add_(0.2 * noise)
    expected = greedy(model, ids, new=12, use_cache=False)
    assert torch.equal(greedy(model, ids, new=12, assistant_model=assistant), expected)


def test_generation_starts_from_embeddings_too():
    model, ids = build(), prompt(2, 6)
    embedded = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embedded, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, greedy(model, ids, new=8)[:, 6:])


def test_bfloat16_model_generates_from_a_bfloat16_cache():
    model = build(dtype=torch.bfloat16)
    out = greedy(model, prompt(2, 6), return_dict_in_generate=True)
    layer = getattr(out, CACHE_FIELD).layers[0]
    assert layer.keys.dtype == torch.bfloat16
    assert out.sequences.shape == (2, 10)


# ---------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize(
    ("name", "widths"),  # numbers of a record, padded to 2 for float64
    [
        ("contextual", (22, 22)),  # 2 (3 + 8)
        ("KV-only", (22, 22)),
        ("non-contextual A", (16, 16)),
        ("non-contextual B", (6, 6)),
        ("shared B", (22, 6)),
        ("third order", (18, 18)),  # 2 (3 + 4 + 2)
        ("MHA", (24, 24)),
        ("MQA", (8, 8)),
        ("GQA", (16, 16)),
    ],
)
def test_stock_caches_hold_one_packed_record_per_token(name, widths):
    model, ids = build(name), prompt(2, 5)
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True), CACHE_FIELD)
    assert type(cache) is DynamicCache
    assert len(cache.layers) == 2
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 5, widths[0])
        assert layer.values.shape == (2, 1, 5, widths[1])


def test_static_cache_keeps_its_buffers_and_ignores_what_lies_beyond():
    model, ids = build(), prompt(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        first = model(ids[:, :4], **{CACHE_FIELD: cache}).logits
        buffer = cache.layers[0].keys
        assert buffer.shape == (2, 1, 20, 22)
        buffer[:, :, 5:] = 1e4  # garbage
        # transformers 5.0 would count the garbage as tokens; `generate` of 5.0 passes the places as well
        places = torch.arange(4, 6)
        second = model(ids[:, 4:], cache_position=places, **{CACHE_FIELD: cache}).logits
        assert cache.layers[0].keys is buffer
        torch.testing.assert_close(torch.cat([first, second], 1), model(ids).logits, rtol=0, atol=ROUNDING)


def test_no_cache_is_made_while_training_or_without_being_asked():
    model, ids = build(), prompt()
    assert getattr(model(ids, use_cache=False), CACHE_FIELD) is None
    assert getattr(model.train()(ids), CACHE_FIELD) is None
    assert getattr(model.eval()(ids), CACHE_FIELD) is not None


def test_kv_shift_generates_without_a_cache_and_says_why_it_cannot_with_one():
    model, ids = build(kv_shift=True), prompt()
    assert model.config.use_cache is False
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))
    message = "use_cache must be False under kv_shift: a Hugging Face cache has no place"
    with pytest.raises(ValueError, match=message):
        greedy(model, ids, use_cache=True)
    with pytest.raises(ValueError, match=message):
        model(ids, **{CACHE_FIELD: DynamicCache(config=model.config)})


# ----------------------------------------------------------------------------------- logits, loss, training


def test_hugging_face_and_plain_t6_have_one_state_dict_and_the_same_logits():
    for options in ({}, {"tie_word_embeddings": True}):
        model = build("gate and norms", **options)
        plain = T6(model.config.to_model_config(), dtype=torch.float64)
        plain.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(plain(prompt()), model(prompt(), use_cache=False).logits)


def test_logits_to_keep_selects_positions():
    model, ids = build(), prompt(2, 7)
    with torch.no_grad():
        full = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:], rtol=0, atol=ROUNDING)
        picked = model(ids, logits_to_keep=torch.tensor([0, 3])).logits
        torch.testing.assert_close(picked, full[:, [0, 3]], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_float32_cross_entropy_of_the_next_token(dtype):
    model, ids = build(dtype=dtype), prompt(2, 7)
    labels = ids.clone()
    labels[0, 3:5] = -100
    out = model(ids, labels=labels)
    picked = functional.log_softmax(out.logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = -picked[labels[:, 1:] != -100].mean()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], out.loss)


def test_hidden_states_are_the_input_of_each_block_and_the_output():
    model, ids = build(), prompt()
    out = model(ids, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[1], model.model.layers[0](out.hidden_states[0]))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None


def checkpointing(model, on):
    """Switch it, by the name that the installed version has for it."""
    switch = "enable" if on else "disable"
    new, old = f"activation_checkpointing_{switch}", f"gradient_checkpointing_{switch}"
    getattr(model, new if hasattr(model, new) else old)()


@pytest.mark.parametrize("name", ["contextual", "MLA"])
def test_gradient_checkpointing_changes_no_gradient_and_runs_blocks_twice(name):
    ids, gradients, calls = prompt(), [], []
    for on in (False, True):
        model = build(name).train()
        checkpointing(model, on)
        count = []
        model.model.layers[1].ffn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model(ids, labels=ids).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key
    with torch.no_grad():  # nothing runs twice then, and a cache does no harm
        assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))
    checkpointing(model, on=False)
    assert not model.model.gradient_checkpointing


# --------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("name", ["contextual", "KV-only", "third order", "gate and norms", "MLA"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_through_the_auto_classes(name, tied, tmp_path):
    options = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": 3, "pad_token_id": 0}
    model = build(name, dtype=torch.float32, tie_word_embeddings=tied, **options)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(tmp_path) == model.config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is T6ForCausalLM
    assert loaded.config.to_model_config() == model.config.to_model_config()
    assert loaded.generation_config.eos_token_id == 3
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(greedy(loaded, prompt()), greedy(model, prompt()))
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is T6Model
    assert torch.equal(base(prompt()).last_hidden_state, model.model(prompt()).last_hidden_state)


def test_a_model_loads_in_another_dtype(tmp_path):
    build(dtype=torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert greedy(loaded, prompt(), new=3).shape == (2, 10)


def test_weights_that_a_checkpoint_lacks_are_drawn_and_no_other_touched(tmp_path):
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    lost = "model.layers.1.attn.b_k.weight"
    kept = {key: value for key, value in state.items() if key != lost}
    loaded = T6ForCausalLM.from_pretrained(None, config=model.config, state_dict=kept)
    for key, value in loaded.state_dict().items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, state[key]) is (key != lost), key
    bound = (6 / ((2 + 24) * 8)) ** 0.5  # "t6": R = 2, d = 24, D = 8
    assert 0.9 * bound < loaded.state_dict()[lost].abs().max() <= bound


def test_a_new_model_starts_as_the_plain_one_does():
    model = T6ForCausalLM(T6Config(**{**SIZES, "tie_word_embeddings": True}))
    block = model.model.layers[0]
    assert not block.attn.o.weight.any()
    assert not block.ffn.w3.weight.any()
    assert 0.95 / 24**0.5 < model.model.embed_tokens.weight.abs().max() <= 1 / 24**0.5
    bound = (6 / ((3 + 24) * 6)) ** 0.5  # "t6": h = 3, d = 24, R = 6
    assert 0.9 * bound < block.attn.a_q.weight.abs().max() <= bound
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_resizing_the_vocabulary_keeps_the_tie():
    model = build(tie_word_embeddings=True)
    model.resize_token_embeddings(VOCAB + 5)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(prompt()).logits.shape == (2, 7, VOCAB + 5)
    assert model.config.vocab_size == VOCAB + 5


# -------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("mechanism", ["tpa", "kvonly", "gqa", "mla_paper"])
def test_preset_reads_the_table_and_takes_changes(mechanism):
    config = T6Config.preset("medium", mechanism, num_hidden_layers=2)
    expected = preset("medium", mechanism)
    assert config.to_model_config().num_attention_heads == expected.num_attention_heads
    assert config.num_hidden_layers == 2
    assert T6Config.preset("medium", mechanism).to_model_config() == expected
    assert T6Config.preset("medium", mechanism, recipe="paper-text").init == "xavier"


def test_config_survives_json_and_other_classes_reading_it(tmp_path):
    config = T6Config(**SIZES, factor_dims=(4, 2), rope_scaling={"type": "ntk", "factor": 2}, bos_token_id=1)
    config.save_pretrained(tmp_path)
    read = json.loads((tmp_path / "config.json").read_text())
    assert (read["model_type"], read["factor_dims"]) == ("t6", [4, 2])
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is T6Config
    assert again == config
    assert again.to_model_config().factor_dims == (4, 2)
    assert again.bos_token_id == 1
    assert again != T6Config(**SIZES)
    assert T6Config.from_model_config(config.to_model_config(), bos_token_id=1) == config
    assert T6Config().to_model_config() == ModelConfig()


def test_misspelt_and_impossible_options_are_refused():
    with pytest.raises(TypeError, match="T6Config has no option 'q_ranks'; did you mean 'q_rank'"):
        T6Config(q_ranks=3)
    with pytest.raises(TypeError, match="did you mean 'num_attention_heads'"):
        T6Config(num_attention_head=3)
    with pytest.raises(ValueError, match="num_key_value_heads must divide num_attention_heads, got 3 and 4"):
        T6Config(mechanism="gqa", num_attention_heads=4, num_key_value_heads=3)
    assert T6Config(my_note="kept").my_note == "kept"


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_calls_are_refused_before_a_cache_changes():
    model, ids = build(), prompt(2, 4)
    cache = DynamicCache(config=model.config)
    with pytest.raises(
        ValueError, match="exactly one of input_ids and inputs_embeds must be given, got neither"
    ):
        model()
    with pytest.raises(ValueError, match="must be given, got both"):
        model(ids, inputs_embeds=torch.zeros(2, 4, 24))
    with pytest.raises(TypeError, match="input_ids must be integers"):
        model(ids.double())
    with pytest.raises(ValueError, match="output_attentions must be False: T6 forms no attention weights"):
        model(ids, output_attentions=True)
    for tokens in (3, 5):
        message = f"must have shape (B, M) with M = 4, cached tokens included, got (2, {tokens})"
        with pytest.raises(ValueError, match=re.escape(message)):
            model(ids, attention_mask=torch.ones(2, tokens), **{CACHE_FIELD: cache})
    with pytest.raises(ValueError, match="logits_to_keep must be 0 when labels are given, got 1"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 4\), got \(2, 3\)"):
        model(ids, labels=ids[:, :3])
    checkpointing(model.train(), on=True)
    with pytest.raises(ValueError, match="cache must be None under gradient checkpointing"):
        model(ids, **{CACHE_FIELD: cache})
    assert cache.get_seq_length() == 0


def test_model_type_t6_is_known_to_auto_config():
    assert AutoConfig.for_model("t6", **SIZES) == T6Config(**SIZES)
