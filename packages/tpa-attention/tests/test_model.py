"""T6 in torch alone against its float64 reference, its counts against the specification, and its parts."""

import jaxtyping
import numpy as np
import pytest
import reference_layer
import torch
from layer_cases import OPTIONS, copy_weights, load
from reference_layer import Block
from test_reference_layer import LAYERS, D, d, h
from torch.nn import functional

from tpa_attention import accounting
from tpa_attention.config import INITS, ModelConfig, preset
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.model import T6, RMSNorm, SwiGLU, T6Block, param_groups

ROUNDING = 1e-12  # float64: two layers of sums of a hundred products of size 1 to 10
VOCAB = 13

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 8,
    "zero_init_output": False,
    "max_position_embeddings": 64,
}
MECHANISMS = {
    "tpa": {"q_rank": 3},
    "kvonly": {},
    "mha": {},
    "mqa": {},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mla": {"kv_latent": 6, "q_latent": 5, "rope_dim": 4},
}


def tiny(mechanism="tpa", seed=0, dtype=torch.float64, **options):
    config = ModelConfig(**{**TINY, "mechanism": mechanism, **MECHANISMS[mechanism], **options})
    return T6(config, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=1, high=VOCAB):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ against the truth


def test_attention_of_a_block_gives_worked_value_2():
    config = ModelConfig(
        vocab_size=5,
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=4,
        q_rank=3,
        v_rank=1,
    )
    attn = T6(config, dtype=torch.float64).model.layers[0].attn

    def weight(rows, phi):
        o, i = np.ogrid[0:rows, 0:6]
        return np.cos(phi + 0.7 * o + 1.3 * i)

    for phi, rank, name in ((0.1, 3, "a_q"), (0.2, 2, "a_k"), (0.3, 1, "a_v")):  # rows (head, rank) there
        rows = weight(2 * rank, phi).reshape(2, rank, 6).transpose(1, 0, 2)
        load(getattr(attn, name).weight, rows.reshape(-1, 6))
    for phi, rank, name in ((0.4, 3, "b_q"), (0.5, 2, "b_k"), (0.6, 1, "b_v")):
        load(getattr(attn, name).weight, weight(rank * 4, phi))
    o, i = np.ogrid[0:6, 0:8]
    load(attn.o.weight, np.cos(0.7 + 0.7 * o + 1.3 * i))

    y = attn(torch.sin(0.1 * torch.arange(1, 5).double()[:, None] * torch.arange(1, 7))[None])
    first = [0.42272687838258, 0.029245032786357, -0.37799120869553]
    last = [-0.84317072539954, -0.75035284468416, -0.30463229652721]
    np.testing.assert_allclose(y[0, 0, :3].detach(), first, rtol=0, atol=1e-13)  # printed to 14 digits
    np.testing.assert_allclose(y[0, 3, 3:].detach(), last, rtol=0, atol=1e-13)


def model_of(name, layers=2, **options):
    """A torch model and the blocks and embedding of the reference, same weights."""
    rng = np.random.default_rng(3)
    given = dict(OPTIONS[name])
    if (rope := given.pop("rope", None)) is not None:
        given |= {"rope_fraction": rope.fraction, "rope_layout": rope.layout, "rope_sign": rope.sign}
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=h,
        head_dim=D,
        q_rank=3,
        intermediate_size=14,
        **given,
        **options,
    )
    model = T6(config, dtype=torch.float64)
    embedding = rng.normal(size=(VOCAB, d))
    load(model.model.embed_tokens.weight, embedding)
    blocks = []
    for layer in model.model.layers:
        ffn = [rng.normal(size=shape) / 3 for shape in ((14, d), (14, d), (d, 14))]
        for matrix, array in zip((layer.ffn.w1, layer.ffn.w2, layer.ffn.w3), ffn, strict=True):
            load(matrix.weight, array)
        copy_weights(LAYERS[name], layer.attn)
        blocks.append(Block(LAYERS[name], *ffn))
    return model, embedding, blocks


@pytest.mark.parametrize("name", list(OPTIONS))
def test_logits_equal_those_of_the_reference(name):
    model, embedding, blocks = model_of(name)
    ids = tokens(2, 7)
    expected, _ = reference_layer.t6_logits(embedding, blocks, ids.numpy())
    np.testing.assert_allclose(model(ids).detach(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["contextual", "KV-only", "shared B", "third order", "KV shift"])
def test_decoding_token_by_token_equals_the_reference_without_cache(name):
    model, embedding, blocks = model_of(name)
    ids = tokens(2, 7)
    expected, _ = reference_layer.t6_logits(embedding, blocks, ids.numpy())
    cache = FactorCache(model, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        parts = [
            model(ids[:, :3], cache=cache),
            *(model(ids[:, t : t + 1], cache=cache) for t in range(3, 7)),
        ]
    np.testing.assert_allclose(torch.cat(parts, dim=1), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_every_mechanism_decodes_what_it_computes_at_once(mechanism):
    model = tiny(mechanism)
    ids = tokens(2, 9)
    cache = FactorCache(model, 2, 9, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(ids[:, :5], cache=cache), model(ids[:, 5:7], cache=cache)]
        parts += [model(ids[:, t : t + 1], cache=cache) for t in (7, 8)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=ROUNDING)


def test_position_ids_shift_nothing_but_change_with_their_differences():
    model, ids = tiny(), tokens(1, 6)
    shifted = model(ids, position_ids=torch.arange(100, 106))
    torch.testing.assert_close(shifted, model(ids), rtol=0, atol=1e-10)  # angles of 100 radians in float64
    assert not torch.allclose(model(ids, position_ids=torch.arange(0, 12, 2)), model(ids), atol=1e-4)


# -------------------------------------------------------------------------------------------------- counts

TOTALS = {  # specification c, the table of presets
    ("small", "tpa"): 124_342_272,
    ("small", "kvonly"): 124_379_136,
    ("small", "mha"): 123_568_128,
    ("small", "mqa"): 123_568_128,
    ("small", "gqa"): 123_568_128,
    ("small", "mla_matched"): 123_085_824,
    ("medium", "tpa"): 353_992_704,
    ("medium", "kvonly"): 353_157_120,
    ("medium", "mha"): 353_452_032,
    ("medium", "mqa"): 353_452_032,
    ("medium", "gqa"): 353_452_032,
    ("medium", "mla_paper"): 417_976_320,
    ("large", "tpa"): 773_698_560,
    ("large", "kvonly"): 773_053_440,
    ("large", "mha"): 772_131_840,
    ("large", "mla_paper"): 909_321_216,
    ("xl", "tpa"): 1_555_814_400,
    ("xl", "kvonly"): 1_559_500_800,
    ("xl", "mqa"): 1_554_892_800,
    ("xl", "mla_paper"): 1_810_065_408,
}


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
@pytest.mark.parametrize("mechanism", ["tpa", "kvonly", "mha", "mqa", "gqa", "mla_matched", "mla_paper"])
def test_parameters_and_cache_of_every_preset_are_those_of_the_tables(size, mechanism):
    config = preset(size, mechanism)
    model = T6(config, device="meta")
    total = sum(p.numel() for p in model.parameters())
    assert total == accounting.model_params(config)
    assert total == TOTALS.get((size, mechanism), total)
    attention = sum(p.numel() for p in model.model.layers[0].attn.parameters())
    assert attention == accounting.params(config, latent_norms=True)
    layout = model.cache_layout
    assert layout.num_layers == config.num_hidden_layers
    assert layout.k_numbers + layout.v_numbers == accounting.cache_numbers(config)


# ------------------------------------------------------------------------------------------ initial values


def test_model_starts_as_trained_with_zero_outputs_and_uniform_embedding():
    config = ModelConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16
    )
    model = T6(config, generator=torch.Generator().manual_seed(0))
    block = model.model.layers[0]
    assert not block.attn.o.weight.any()
    assert not block.ffn.w3.weight.any()
    for weight in (model.model.embed_tokens.weight, block.ffn.w1.weight, block.ffn.w2.weight):
        assert weight.abs().max() <= 1 / 8  # 1/sqrt(64)
        # 10^4 draws or more: the standard deviation of a uniform is known to about 1 %
        assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.03)
    assert model(tokens(1, 4)).shape == (1, 4, 500)


def test_normal_initial_values_have_std_002_and_outputs_are_drawn_if_asked():
    config = ModelConfig(**{**TINY, "hidden_size": 96, "init": "normal"})
    block = T6(config, generator=torch.Generator().manual_seed(0)).model.layers[0]
    for weight in (block.ffn.w1.weight, block.ffn.w3.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)  # 24,576 draws


@pytest.mark.parametrize("init", INITS)
def test_same_generator_gives_the_same_model_whatever_the_global_one(init):
    first, second, other = (tiny(init=init, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert not torch.equal(value, other[name])


# -------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_that_of_torch(dtype):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = RMSNorm(7)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, functional.rms_norm(x, (7,)))


def test_rms_norm_has_the_epsilon_of_the_type_it_computes_in():
    tiny_values = torch.full((1, 4), 1e-6)
    expected = 1e-6 / (1e-12 + torch.finfo(torch.float32).eps) ** 0.5
    torch.testing.assert_close(RMSNorm(4)(tiny_values), torch.full((1, 4), expected))
    half = RMSNorm(4)(tiny_values.bfloat16())
    # bfloat16 has 8 bits: its own epsilon, 2^-7, would give 1.1e-5 instead of 2.9e-3
    torch.testing.assert_close(half.float(), torch.full((1, 4), expected), rtol=2**-7, atol=0)
    given = RMSNorm(4, eps=1.0)(tiny_values)
    torch.testing.assert_close(given, tiny_values)


def test_rms_norm_weight_scales_features():
    norm = RMSNorm(3, affine=True)
    assert torch.equal(norm.weight, torch.ones(3))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.tensor([[1.0, 1.0, 1.0]])
    torch.testing.assert_close(norm(x), torch.tensor([[1.0, 2.0, 3.0]]))
    assert RMSNorm(3).weight is None


def test_swiglu_multiplies_the_activated_gate_with_the_value():
    ffn = SwiGLU(6, zero_init_output=False, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert ffn.w1.weight.shape == (16, 6)  # floor(8/3 6)
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gate = x @ ffn.w1.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ ffn.w2.weight.T)) @ ffn.w3.weight.T
    torch.testing.assert_close(ffn(x), expected, rtol=0, atol=1e-14)


def test_block_adds_attention_and_ffn_of_the_normed_input():
    model = tiny(norm_affine=True)
    block = model.model.layers[1]
    assert isinstance(block, T6Block)
    assert block.layer_idx == 1
    x = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    middle = x + block.attn(block.attn_norm(x))
    torch.testing.assert_close(block(x), middle + block.ffn(block.ffn_norm(middle)), rtol=0, atol=1e-14)


def test_output_is_tied_unless_the_configuration_says_otherwise():
    tied, free = tiny(), tiny(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert free.lm_head.weight is not free.model.embed_tokens.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == VOCAB * 16


def test_training_step_reaches_every_parameter():
    model = tiny(norm_affine=True, out_norm=True, output_gate=True, kv_shift=True, dtype=torch.float32)
    ids = tokens(2, 9)
    functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# -------------------------------------------------------------------------------------------- param_groups


def test_param_groups_decay_everything_once_as_in_the_paper():
    model = tiny()
    (group,) = param_groups(model)
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len({id(p) for p in group["params"]}) == len(list(model.parameters()))


def test_param_groups_exempt_modules_parameters_and_patterns():
    model = tiny(norm_affine=True)
    decayed, free = param_groups(
        model, 0.2, no_decay=("norm", "a_k", "*.attn.b_*", "model.embed_tokens.weight")
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    exempt = {names[id(p)] for p in free["params"]}
    expected = {"model.norm.weight", "model.embed_tokens.weight"}
    for i in (0, 1):
        expected |= {f"model.layers.{i}.attn.{part}.weight" for part in ("a_k", "b_q", "b_k", "b_v")}
    assert exempt == expected
    assert exempt | {names[id(p)] for p in decayed["params"]} == set(names.values())


def test_param_groups_leave_out_frozen_parameters():
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    (group,) = param_groups(model)
    assert all(p is not model.model.embed_tokens.weight for p in group["params"])


# ----------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def unchecked():
    """Without the check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    model = tiny()
    with pytest.raises(TypeError, match=r"input_ids must be integers, got torch.float32"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, T\), got \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        RMSNorm(0)
    with pytest.raises(ValueError, match=r"eps must be > 0 or None, got -1\.0"):
        RMSNorm(3, eps=-1.0)
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        SwiGLU(6, 0)
    with pytest.raises(ValueError, match=r"init must be one of .*, got 'zeros'"):
        SwiGLU(6, init="zeros")
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0, got -0\.1"):
        param_groups(model, -0.1)
    with pytest.raises(ValueError, match="no_decay must name trainable parameters of the model, got 'a_z'"):
        param_groups(model, no_decay=("a_k", "a_z"))
    with pytest.raises(TypeError, match="no_decay must be a sequence of names, got the string 'a_k'"):
        param_groups(model, no_decay="a_k")
