"""Checkpoints under the authors' names and row order, made up here: what loads, what is refused."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from hf_cases import greedy
from reference_layer import Block, FactorMap, Layer, t6_logits
from safetensors.torch import save_file

from tpa_attention.config import ModelConfig
from tpa_attention.torch.checkpoints import load_authors_state_dict
from tpa_attention.torch.hf import T6Config

ROUNDING = 1e-12  # float64: two layers of sums of fewer than a hundred products of size 1

d, h, D, RQ, RK, RV, VOCAB, HIDDEN = 12, 3, 4, 3, 2, 2, 17, 32  # HIDDEN = floor(8/3 d)


def authors(kv_only=False, layers=2, seed=0, **sizes):
    """A state dict as the authors' model has it: rows of W_A are (head, rank), wte and lm_head are one."""
    rank = sizes.get("rank", RK)
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        return torch.from_numpy(rng.normal(size=(rows, columns)) / np.sqrt(columns))

    wte = matrix(VOCAB, d)
    state = {"transformer.wte.weight": wte, "lm_head.weight": wte}
    for i in range(layers):
        attn, mlp = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp."
        if kv_only:
            state[f"{attn}c_qkv.c_q.weight"] = matrix(h * D, d)
        else:
            state[f"{attn}c_qkv.W_A_q.weight"] = matrix(h * RQ, d)
            state[f"{attn}c_qkv.W_B_q.weight"] = matrix(RQ * D, d)
        for x in "kv":
            state[f"{attn}c_qkv.W_A_{x}.weight"] = matrix(h * rank, d)
            state[f"{attn}c_qkv.W_B_{x}.weight"] = matrix(rank * D, d)
        state[f"{attn}c_proj.weight"] = matrix(d, h * D)
        state[f"{mlp}c_fc1.weight"], state[f"{mlp}c_fc2.weight"] = matrix(HIDDEN, d), matrix(HIDDEN, d)
        state[f"{mlp}c_proj.weight"] = matrix(d, HIDDEN)
    return state


def reference(state, ids, layers=2):
    """Logits of the authors' model by the float64 reference, read from their names and row order."""
    arrays = {name: tensor.double().numpy() for name, tensor in state.items()}
    blocks = []
    for i in range(layers):
        own = {name.removeprefix(f"transformer.h.{i}."): a for name, a in arrays.items()}

        def a(x, own=own):  # (h R, d) in (head, rank) order
            w = own[f"attn.c_qkv.W_A_{x}.weight"]
            return FactorMap(w.reshape(h, -1, d).transpose(1, 0, 2))

        def b(name, own=own):
            return (FactorMap(own[f"attn.c_qkv.{name}.weight"].reshape(-1, D, d)),)

        kv_only = "attn.c_qkv.c_q.weight" in own
        attention = Layer(
            None if kv_only else a("q"),
            b("c_q" if kv_only else "W_B_q"),
            *(a("k"), b("W_B_k"), a("v"), b("W_B_v")),
            own["attn.c_proj.weight"],
            out_norm=own.get("attn.subln.weight"),
        )
        blocks.append(Block(attention, *(own[f"mlp.{m}.weight"] for m in ("c_fc1", "c_fc2", "c_proj"))))
    return t6_logits(arrays["transformer.wte.weight"], blocks, ids.numpy())[0]


def ids():
    return torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kv_only", [False, True])
def test_loaded_model_computes_what_the_authors_row_order_means(kv_only):
    state = authors(kv_only)
    model = load_authors_state_dict(state)
    assert model.config.mechanism == ("kvonly" if kv_only else "tpa")
    np.testing.assert_allclose(model(ids()).logits.detach(), reference(state, ids()), rtol=0, atol=ROUNDING)
    assert torch.equal(greedy(model, ids()), greedy(model, ids(), use_cache=False))
    assert not model.training


@pytest.mark.parametrize("kv_only", [False, True])
def test_norm_of_the_heads_is_the_groupnorm_switch_of_the_authors(kv_only):
    state = authors(kv_only)
    for i in range(2):
        state[f"transformer.h.{i}.attn.subln.weight"] = torch.linspace(0.5, 2, D, dtype=torch.float64)
    model = load_authors_state_dict(state)
    assert model.config.out_norm
    np.testing.assert_allclose(model(ids()).logits.detach(), reference(state, ids()), rtol=0, atol=ROUNDING)


def test_sizes_are_read_off_the_tensors():
    config = load_authors_state_dict(authors()).config.to_model_config()
    assert config == ModelConfig(
        vocab_size=VOCAB,
        hidden_size=d,
        num_hidden_layers=2,
        num_attention_heads=h,
        head_dim=D,
        q_rank=RQ,
        k_rank=RK,
        v_rank=RV,
    )
    assert load_authors_state_dict(authors(rank=1)).config.k_rank == 1
    sizes = {"num_attention_heads": h, "head_dim": D, "q_rank": RQ, "k_rank": RK, "v_rank": RV}
    assert load_authors_state_dict(authors(), **sizes).config.head_dim == D
    assert load_authors_state_dict(authors(kv_only=True), **{**sizes, "q_rank": 12}).config.head_dim == D


def test_sizes_of_the_released_models_are_found():
    """h = sqrt(hD hR / RD) on the shapes of every trained T6, on the meta device."""
    for width, heads in ((768, 34), (1024, 47), (1280, 61), (1600, 78)):
        shapes = {
            "attn.c_qkv.W_A_q": (heads * 6, width),
            "attn.c_qkv.W_B_q": (6 * 64, width),
            **{f"attn.c_qkv.W_A_{x}": (heads * 2, width) for x in "kv"},
            **{f"attn.c_qkv.W_B_{x}": (2 * 64, width) for x in "kv"},
            "attn.c_proj": (width, heads * 64),
            "mlp.c_fc1": (8 * width // 3, width),
            "mlp.c_fc2": (8 * width // 3, width),
            "mlp.c_proj": (width, 8 * width // 3),
        }
        state = {f"transformer.h.0.{name}.weight": torch.zeros(1).expand(s) for name, s in shapes.items()}
        state["lm_head.weight"] = torch.zeros(1).expand(64, width)
        config = load_authors_state_dict(state, torch_dtype=torch.bfloat16).config
        assert (config.num_attention_heads, config.head_dim) == (heads, 64)
        assert (config.q_rank, config.k_rank, config.v_rank) == (6, 2, 2)


def test_a_configuration_adds_what_tensors_do_not_show():
    state = authors()
    shown = load_authors_state_dict(state).config
    rounded = T6Config.from_model_config(shown.to_model_config(), rope_dtype="bfloat16", eos_token_id=5)
    model = load_authors_state_dict(state, rounded)
    assert (model.config.rope_dtype, model.config.eos_token_id) == ("bfloat16", 5)
    difference = (model(ids()).logits - load_authors_state_dict(state)(ids()).logits).abs().max()
    assert 1e-6 < difference < 0.1  # cos and sin to 8 bits
    longer = load_authors_state_dict(state, ModelConfig(**{**asked(), "max_position_embeddings": 2048}))
    assert longer.config.max_position_embeddings == 2048


def asked(**changes):
    sizes = {"vocab_size": VOCAB, "hidden_size": d, "num_hidden_layers": 2, "num_attention_heads": h}
    return {**sizes, "head_dim": D, "q_rank": RQ, **changes}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_parameters_have_the_dtype_asked_for_or_that_of_the_checkpoint(dtype):
    state = {name: tensor.half() for name, tensor in authors().items()}
    model = load_authors_state_dict(state, torch_dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float16 if dtype is None else dtype}
    assert model.config.dtype == (torch.float16 if dtype is None else dtype)


def test_model_is_tied_trainable_and_shares_nothing_with_the_checkpoint(tmp_path):
    state = authors()
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = load_authors_state_dict(state)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_an_output_matrix_of_its_own_is_kept():
    state = authors()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    model = load_authors_state_dict(state)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "ckpt.pt"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_files_and_folders_load(tmp_path, name, as_folder):
    state = authors()
    del state["transformer.wte.weight"]  # safetensors keeps one of two that share memory
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    elif name == "ckpt.pt":  # the training loop's, from a compiled model under DDP
        wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}
        torch.save({"model": wrapped, "iter_num": 7, "config": {"n_head": h}}, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    model = load_authors_state_dict(str(tmp_path) if as_folder else tmp_path / name)
    assert torch.equal(model(ids()).logits, load_authors_state_dict(authors())(ids()).logits)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_parts_named_by_an_index_load(tmp_path, kind):
    state = without(authors(), "transformer.wte.weight")
    names, stem = list(state), kind.split(".")
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"{stem[0]}-{i}.{stem[1]}"
        save = save_file if kind.endswith("safetensors") else torch.save
        save({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load_authors_state_dict(tmp_path)
    assert torch.equal(model(ids()).logits, load_authors_state_dict(authors())(ids()).logits)
    weight_map[names[0]] = "../elsewhere.bin"
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"must name files beside it, got '../elsewhere.bin'"):
        load_authors_state_dict(tmp_path)


class Opens:
    """What an attacker would pickle: unpickling it runs code of their choice."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"model": authors(), "extra": Opens(str(trace))}, tmp_path / "ckpt.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_authors_state_dict(tmp_path / "ckpt.pt")
    assert not trace.exists()


def test_missing_files_are_named(tmp_path):
    message = re.escape("path_or_dict must hold one of model.safetensors, pytorch_model.bin, ckpt.pt")
    with pytest.raises(FileNotFoundError, match=message):
        load_authors_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_authors_state_dict(tmp_path / "none.bin")


# ------------------------------------------------------------------------------------------------ bad input


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_attention_heads": 4},
            "num_attention_heads must be 3, as the shapes of the tensors say, got 4",
        ),
        ({"head_dim": 8}, "head_dim must be 4, as the shapes of the tensors say, got 8"),
        ({"q_rank": 6}, "q_rank must be 3, as"),
        ({"k_rank": 1}, "k_rank must be 2, as"),
        ({"v_rank": 1}, "v_rank must be 2, as"),
        (
            {"config": ModelConfig(**asked(head_dim=8))},
            "config.head_dim must be 4, as the tensors say, got 8",
        ),
        (
            {"config": ModelConfig(**asked(mechanism="kvonly"))},
            "config.mechanism must be 'tpa', .* got 'kvonly'",
        ),
        ({"config": ModelConfig(**asked(out_norm=True))}, "config.out_norm must be False, .* got True"),
        (
            {"config": ModelConfig(**asked(intermediate_size=9))},
            "config.intermediate_size must be None, .* 9",
        ),
    ],
)
def test_sizes_that_contradict_the_tensors_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        load_authors_state_dict(authors(), **sizes)


def test_every_tensor_is_checked():
    state, name = authors(), "transformer.h.1.attn.c_qkv.W_A_k.weight"
    state[name] = torch.zeros(9, d)
    message = (
        "model.layers.1.attn.a_k.weight must have shape (6, 12) with 3 heads of width 4 and ranks (3, 2, 2), "
        "got (9, 12)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_authors_state_dict(state)
    with pytest.raises(ValueError, match=re.escape("no ['model.layers.1.attn.a_k.weight']")):
        load_authors_state_dict(without(state, name))
    with pytest.raises(
        ValueError, match=r"names of the authors' T6 alone, got 'transformer.h.0.attn.c_attn.weight'"
    ):
        load_authors_state_dict(authors() | {"transformer.h.0.attn.c_attn.weight": torch.zeros(3, 3)})
    with pytest.raises(
        ValueError, match=r"'transformer.h.0.attn.c_qkv.W_B_k.weight', got \d+ tensors without it"
    ):
        load_authors_state_dict(without(authors(), "transformer.h.0.attn.c_qkv.W_B_k.weight"))


def test_shapes_without_integer_sizes_are_refused():
    state = authors()
    state["transformer.h.0.attn.c_proj.weight"] = torch.zeros(d, 13)
    message = re.escape("rows of integers h, R and D, got 13, 6 and 8")
    with pytest.raises(ValueError, match=message):
        load_authors_state_dict(state)


def test_content_that_is_no_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(TypeError, match="path_or_dict must hold a dictionary of tensors, got list"):
        load_authors_state_dict(tmp_path)
    with pytest.raises(TypeError, match="dictionary of tensors, got values of Tensor, int"):
        load_authors_state_dict(authors() | {"step": 3})
