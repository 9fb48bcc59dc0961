"""Configurations: the trained sizes, what is derived from a configuration, what is refused and how."""

import dataclasses
import json
import pickle

import pytest
import reference_accounting as truth
from reference_rope import rotary_dim

from tpa_attention.config import (
    MECHANISMS,
    PRESET_MECHANISMS,
    PRESETS,
    ModelConfig,
    RopeConfig,
    parse_variant,
    preset,
    training_recipe,
)

REFERENCE_NAMES = {"kvonly": "kv_only", "mla": "mla_matched"}


@pytest.mark.parametrize("mechanism", PRESET_MECHANISMS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_trained_sizes(name, mechanism):
    config = preset(name, mechanism)
    expected = truth.preset(name, REFERENCE_NAMES.get(mechanism, mechanism))
    assert config.num_hidden_layers == truth.LAYERS[name]
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (
        expected.d,
        expected.h,
        expected.D,
    )
    if mechanism in ("tpa", "kvonly"):
        assert (config.q_rank, config.k_rank, config.v_rank) == (6, 2, 2)
    if mechanism == "gqa":
        assert config.kv_heads == expected.G == 2
    if config.mechanism == "mla":
        found = (config.kv_latent, config.q_latent, config.rope_dim)
        assert found == (expected.d_c, expected.d_cq, expected.d_r)
    assert config.ffn_dim == truth.hidden_width(expected.d)


def test_presets_are_the_models_as_trained():
    config = preset("medium")
    assert config.vocab_size == truth.VOCABULARY == 50304
    assert config.max_position_embeddings == 1024
    assert (config.tie_word_embeddings, config.norm_affine, config.norm_eps) == (True, False, None)
    assert (config.init, config.zero_init_output) == ("t6", True)
    assert config.rope == RopeConfig(base=10000.0, fraction=1.0, layout="half", sign=-1)


def test_a_configuration_without_arguments_is_the_small_t6():
    assert ModelConfig() == preset("small", "tpa")


def test_the_papers_text_differs_in_initial_values_and_in_the_rates_of_medium():
    assert dataclasses.replace(preset("large", recipe="paper-text"), init="t6") == preset("large")
    assert preset("large", recipe="paper-text").init == "xavier"
    text, config = training_recipe("medium", recipe="paper-text"), training_recipe("medium")
    assert (text.lr, text.min_lr) == (3e-4, 6e-5)
    assert dataclasses.replace(text, lr=6e-4, min_lr=3e-5) == config
    for name in ("small", "large", "xl"):
        assert training_recipe(name, recipe="paper-text") == training_recipe(name)


def test_every_recipe_sees_480_sequences_of_1024_tokens_per_step():
    rates = {name: (training_recipe(name).lr, training_recipe(name).min_lr) for name in PRESETS}
    assert rates == {
        "small": (6e-4, 3e-5),
        "medium": (6e-4, 3e-5),
        "large": (2e-4, 1e-5),
        "xl": (1e-4, 1e-5),
    }
    for name in PRESETS:
        recipe = training_recipe(name)
        assert recipe.batch == 480
        assert recipe.tokens == 480 * 1024 * 100_000
        assert (recipe.betas, recipe.eps, recipe.weight_decay, recipe.clip) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    micro = {name: training_recipe(name).micro_batch for name in PRESETS}
    assert micro == {"small": 24, "medium": 20, "large": 15, "xl": 6}


def test_the_rate_rises_linearly_and_falls_along_a_cosine():
    recipe = training_recipe("small")
    assert recipe.learning_rate(0) == pytest.approx(6e-4 / 2000)
    assert recipe.learning_rate(999) == pytest.approx(3e-4)
    assert recipe.learning_rate(1999) == recipe.learning_rate(2000) == 6e-4
    assert recipe.learning_rate(51_000) == pytest.approx((6e-4 + 3e-5) / 2)  # half way through the cosine
    assert recipe.learning_rate(100_000) == recipe.learning_rate(200_000) == pytest.approx(3e-5)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        recipe.learning_rate(-1)


# -------------------------------------------------------------------------------------- what is derived


@pytest.mark.parametrize(
    ("mechanism", "variant", "layer"),
    [
        ("tpa", "contextual", "contextual"),
        ("kvonly", "contextual", "kv_only"),
        ("kvonly", "kv_only", "kv_only"),
        ("kvonly", "noncontextual_a", "kv_only+noncontextual_a"),
        ("tpa", "noncontextual_b+kv_only", "kv_only+noncontextual_b"),
    ],
)
def test_the_layers_variant_joins_mechanism_and_variant(mechanism, variant, layer):
    assert ModelConfig(mechanism=mechanism, variant=variant).layer_variant == layer
    assert parse_variant(layer) == set(layer.split("+")) - {"contextual"}


def test_key_and_value_heads_exist_for_three_mechanisms():
    assert [preset("small", m).kv_heads for m in ("mha", "mqa", "gqa")] == [12, 1, 2]
    for mechanism in ("tpa", "kvonly", "mla"):
        with pytest.raises(ValueError, match="has no key and value heads"):
            _ = preset("small", mechanism).kv_heads


def test_widths_follow_the_head_unless_given():
    assert (ModelConfig().value_dim, ModelConfig(v_head_dim=48).value_dim) == (64, 48)
    assert (ModelConfig().ffn_dim, ModelConfig(intermediate_size=100).ffn_dim) == (2048, 100)


@pytest.mark.parametrize("width", [2, 8, 30, 64, 128])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 0.3, 0.5, 0.99, 1.0])
def test_the_rotary_dimension_is_even_and_that_of_the_reference(width, fraction):
    found = RopeConfig(fraction=fraction).rotary_dim(width)
    assert found == rotary_dim(width, fraction)
    assert found % 2 == 0


def test_rope_that_is_off_rotates_nothing_of_any_width():
    assert [RopeConfig.none().rotary_dim(width) for width in (1, 7, 64)] == [0, 0, 0]
    assert ModelConfig(head_dim=7, rope_fraction=0.0).rope == RopeConfig.none()


@pytest.mark.parametrize("mechanism", PRESET_MECHANISMS)
def test_a_configuration_survives_json_and_pickle(mechanism):
    config = dataclasses.replace(preset("small", mechanism), rope_scaling={"type": "linear", "factor": 4.0})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    again = ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  # our own bytes


def test_factor_widths_read_from_json_are_a_tuple():
    assert ModelConfig(factor_dims=[8, 8]).factor_dims == (8, 8)


def test_a_scaling_is_copied_so_that_its_owner_cannot_change_it():
    scaling = {"rope_type": "ntk", "factor": 2.0}
    rope = RopeConfig(scaling=scaling)
    scaling["factor"] = 3.0
    assert rope.scaling == {"rope_type": "ntk", "factor": 2.0}


def test_the_scaling_of_llama3_has_the_bounds_of_llama_3_1_unless_given():
    plain = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    rope = RopeConfig(scaling=plain)
    assert rope == RopeConfig(scaling={**plain, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    assert rope != RopeConfig(scaling={**plain, "high_freq_factor": 8.0})
    assert ModelConfig(rope_scaling=plain).rope.scaling == rope.scaling


# ----------------------------------------------------------------------------------------- what is refused

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}

WRONG_ROPE = [
    ({"base": 1.0}, ValueError, "base must be finite and > 1, got 1.0"),
    ({"base": float("nan")}, ValueError, "base must be finite and > 1, got nan"),
    ({"base": "10000"}, TypeError, "base must be a number, got '10000'"),
    ({"fraction": 1.1}, ValueError, r"fraction must be in \[0, 1\], got 1.1"),
    ({"fraction": float("nan")}, ValueError, r"fraction must be in \[0, 1\], got nan"),
    ({"fraction": True}, TypeError, "fraction must be a number, got True"),
    ({"layout": "halves"}, ValueError, "layout must be one of 'half', 'interleaved', got 'halves'"),
    ({"sign": 0}, ValueError, "sign must be one of -1, 1, got 0"),
    ({"sign": True}, ValueError, "sign must be one of -1, 1, got True"),
    ({"dtype": "int8"}, ValueError, "dtype must be one of 'float64'.*, got 'int8'"),
    ({"scaling": 2.0}, TypeError, "scaling must be a dictionary or None, got 2.0"),
    (
        {"scaling": {"factor": 2.0}},
        ValueError,
        r"scaling\['rope_type'\] must be one of 'linear'.*, got None",
    ),
    ({"scaling": {"rope_type": ["ntk"], "factor": 2.0}}, ValueError, r"got \['ntk'\]"),
    ({"scaling": {"rope_type": "ntk"}}, TypeError, r"scaling\['factor'\] must be a number, got None"),
    (
        {"scaling": {"rope_type": "ntk", "factor": 0.5}},
        ValueError,
        r"scaling\['factor'\] must be >= 1, got 0.5",
    ),
    (
        {"scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}},
        ValueError,
        "got beta_fast as well",
    ),
    (
        {"scaling": {"rope_type": "yarn", "factor": 2.0}},
        TypeError,
        "original_max_position_embeddings.*got None",
    ),
    (
        {"scaling": {**YARN, "beta_slow": 0}},
        ValueError,
        r"scaling\['beta_slow'\] must be finite and > 0, got 0",
    ),
    (
        {"scaling": {"rope_type": "llama3", "factor": 8.0}},
        TypeError,
        "original_max_position_embeddings.*got None",
    ),
    (
        {"scaling": {**LLAMA3, "beta_fast": 32.0}},
        ValueError,
        "takes factor, original_max_position_embeddings, low_freq_factor, high_freq_factor, got beta_fast",
    ),
    (
        {"scaling": {**LLAMA3, "low_freq_factor": 0.0}},
        ValueError,
        r"scaling\['low_freq_factor'\] must be finite and > 0, got 0.0",
    ),
    (
        {"scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        ValueError,
        r"scaling\['high_freq_factor'\] must be > scaling\['low_freq_factor'\], got 4.0 and 4.0",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_ROPE)
def test_a_wrong_rotation_is_refused_by_name_and_value(options, error, message):
    with pytest.raises(error, match=message):
        RopeConfig(**options)


def test_odd_widths_cannot_turn():
    with pytest.raises(ValueError, match="must be even, got 63"):
        RopeConfig().rotary_dim(63)
    with pytest.raises(ValueError, match="'ntk' needs more than 2 rotated features, got 2"):
        RopeConfig(scaling={"rope_type": "ntk", "factor": 2.0}).rotary_dim(2)


WRONG_MODEL = [
    ({"mechanism": "mfa"}, ValueError, "mechanism must be one of 'tpa', 'kvonly', .*, got 'mfa'"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be >= 1, got 0"),
    ({"k_rank": 2.0}, TypeError, "k_rank must be an int, got 2.0"),
    ({"q_rank": True}, TypeError, "q_rank must be an int, got True"),
    ({"v_head_dim": -4}, ValueError, "v_head_dim must be >= 1, got -4"),
    ({"intermediate_size": 0}, ValueError, "intermediate_size must be >= 1, got 0"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps must be finite and > 0, got 0.0"),
    ({"out_norm": 1}, TypeError, "out_norm must be True or False, got 1"),
    ({"rope_theta": 0.0}, ValueError, "rope_theta must be finite and > 1, got 0.0"),
    ({"rope_sign": 2}, ValueError, "rope_sign must be one of -1, 1, got 2"),
    (
        {"rope_scaling": {"rope_type": "su"}},
        ValueError,
        r"rope_scaling\['rope_type'\] must be one of .*'su'",
    ),
    ({"head_dim": 63}, ValueError, "must be even, got 63"),
    ({"factor_dims": (7, 9), "head_dim": 63}, ValueError, "must be even, got 7"),
    ({"variant": "kvonly"}, ValueError, "variant must be one of 'contextual', .*, got 'kvonly'"),
    ({"variant": None}, ValueError, "variant must be one of .*, got None"),
    ({"variant": "kv_only+kv_only"}, ValueError, "names a part twice"),
    ({"variant": "contextual+kv_only"}, ValueError, "'contextual' stands alone"),
    ({"variant": "noncontextual_a+noncontextual_b"}, ValueError, "needs a contextual A or a contextual B"),
    ({"head_activation": "relu"}, ValueError, "head_activation must be one of .*, got 'relu'"),
    ({"init": "kaiming"}, ValueError, "init must be one of .*, got 'kaiming'"),
    ({"impl": "cuda"}, ValueError, "impl must be one of .*, got 'cuda'"),
    ({"shared_kv_b": True, "v_rank": 1}, ValueError, "shared_kv_b needs k_rank = v_rank, got 2 and 1"),
    ({"shared_kv_b": True, "v_head_dim": 32}, ValueError, "needs v_head_dim = head_dim, got 32 and 64"),
    ({"a_bias": True, "variant": "noncontextual_a"}, ValueError, "a_bias needs a contextual A"),
    ({"factor_dims": (64,)}, ValueError, r"factor_dims needs at least two widths, got \(64,\)"),
    ({"factor_dims": (8, 4)}, ValueError, r"got \(8, 4\) with product 32, 64 and 64"),
    ({"factor_dims": (8, 8), "v_head_dim": 32}, ValueError, "with product 64, 64 and 32"),
    ({"mechanism": "gqa"}, ValueError, "num_key_value_heads must be given under mechanism 'gqa', got None"),
    (
        {"mechanism": "gqa", "num_key_value_heads": 4},
        ValueError,
        "must divide num_attention_heads, got 4 and 34",
    ),
    ({"num_key_value_heads": 2}, ValueError, "is for mechanism 'gqa', got 2 with 'tpa'"),
    (
        {"mechanism": "mla", "kv_latent": 8, "q_latent": 8},
        ValueError,
        "rope_dim must be given under mechanism 'mla'",
    ),
    ({"kv_latent": 8}, ValueError, "kv_latent is for mechanism 'mla', got 8 with 'tpa'"),
    (
        {"mechanism": "mla", "kv_latent": 8, "q_latent": 8, "rope_dim": 3},
        ValueError,
        "must be even, got 3",
    ),
    (
        {"mechanism": "mha", "kv_shift": True},
        ValueError,
        "kv_shift is an option of mechanisms tpa and kvonly",
    ),
    ({"mechanism": "mha", "rank_scale": False}, ValueError, "mha takes only True, got False"),
    ({"mechanism": "mqa", "v_head_dim": 32}, ValueError, "must equal head_dim under mqa, got 32 and 64"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_MODEL)
def test_a_wrong_model_is_refused_by_name_and_value(options, error, message):
    with pytest.raises(error, match=message):
        ModelConfig(**options)


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="num_heads"):
        ModelConfig(num_heads=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("tiny"), "name must be one of 'small', .*, got 'tiny'"),
        (lambda: preset("small", "kv_only"), "mechanism must be one of 'tpa', 'kvonly', .*, got 'kv_only'"),
        (lambda: preset("small", recipe="text"), "recipe must be one of 'config', 'paper-text', got 'text'"),
        (lambda: training_recipe("tiny"), "name must be one of .*, got 'tiny'"),
        (lambda: training_recipe("small", recipe="text"), "recipe must be one of .*, got 'text'"),
    ],
)
def test_unknown_names_of_presets_and_recipes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_mechanism_has_a_preset():
    assert {preset("small", name).mechanism for name in PRESET_MECHANISMS} == set(MECHANISMS)
