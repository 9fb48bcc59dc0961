"""Checkpoints of the authors' training code, as models of this package.

Their names and ours, per layer i, with the rows of W_A in (head, rank) order there and (rank, head) here:

    transformer.wte, lm_head                      embed_tokens, lm_head (tied)
    transformer.h.i.attn.c_qkv.W_A_q, W_B_q       layers.i.attn.a_q, b_q; k and v alike
    transformer.h.i.attn.c_qkv.c_q                layers.i.attn.b_q (KV-only)
    transformer.h.i.attn.c_proj, subln            layers.i.attn.o, out_norm
    transformer.h.i.mlp.c_fc1, c_fc2, c_proj      layers.i.ffn.w1, w2, w3

RoPE is theirs: sign -1, half layout, base 10000. They round cos and sin to bfloat16, which a configuration
with rope_dtype="bfloat16" reproduces.

Source: Zhang et al. 2025 (arXiv 2501.06425), the released training code.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from math import isqrt
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tpa_attention.config import ModelConfig

from .hf import T6Config, T6ForCausalLM

FILES = ("model.safetensors", "pytorch_model.bin", "ckpt.pt")  # looked for in a folder, in this order
INDEX = ".index.json"  # behind the name of a file that was split: which part holds which tensor
WRAPPERS = ("_orig_mod.", "module.")  # left by torch.compile and DistributedDataParallel
LAYER = "transformer.h."
QKV = "attn.c_qkv."


def load_authors_state_dict(
    path_or_dict: str | PathLike[str] | Mapping[str, Any],
    config: ModelConfig | T6Config | None = None,
    *,
    num_attention_heads: int | None = None,
    head_dim: int | None = None,
    q_rank: int | None = None,
    k_rank: int | None = None,
    v_rank: int | None = None,
    torch_dtype: torch.dtype | None = None,
) -> T6ForCausalLM:
    """A T6 or T6-KVonly that the authors' code trained, ready to generate.

    Sizes are read off the tensors: with n_o = h D columns of W^O, n_A = h R_K rows of W_A_k and n_B = R_K D
    rows of W_B_k, h = sqrt(n_o n_A / n_B). Those given besides are checked against them, as is every tensor.

    Args:
        path_or_dict: a state dict, or a dictionary with one under "model" or "state_dict"; or a file of
            safetensors or `torch.save`, or a folder with model.safetensors, pytorch_model.bin (either may be
            split, with an index) or ckpt.pt. Files are read without unpickling anything but tensors and plain
            containers.
        config: what the model is to be, for options that tensors do not show (a partial RoPE, rope_dtype, a
            longer context); None for the defaults, as trained.
        num_attention_heads: h, to be checked.
        head_dim: D, to be checked.
        q_rank: R_Q, to be checked; KV-only has none.
        k_rank: R_K, to be checked.
        v_rank: R_V, to be checked.
        torch_dtype: type of the model's parameters; that of the embedding if None.

    Raises:
        FileNotFoundError: if there is no such file, or none of those in the folder.
        TypeError: if the content is no dictionary of tensors.
        ValueError: if names are missing or unknown, or shapes contradict one another, `config` or a size.
    """
    state = _state_dict(path_or_dict)
    ours = {_our_name(name): tensor for name, tensor in state.items()}
    own = _model_config(state, config)
    given = {
        "num_attention_heads": num_attention_heads,
        "head_dim": head_dim,
        "q_rank": q_rank if own.mechanism == "tpa" else None,
        "k_rank": k_rank,
        "v_rank": v_rank,
    }
    for name, size in given.items():
        if size is not None and size != getattr(own, name):
            raise ValueError(
                f"{name} must be {getattr(own, name)}, as the shapes of the tensors say, got {size}"
            )
    with torch.device("meta"):
        model = T6ForCausalLM(_hf_config(own, config))
    _check_tensors(ours, model.state_dict(), own)
    dtype = ours["model.embed_tokens.weight"].dtype if torch_dtype is None else torch_dtype
    converted = {name: _our_rows(name, t, own).to(dtype=dtype, copy=True) for name, t in ours.items()}
    model.load_state_dict(converted, assign=True)
    if own.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.dtype = dtype
    return model.eval()


# ------------------------------------------------------------------------------------------------- reading


def _state_dict(source: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the authors' names, the output matrix added where only the embedding was saved."""
    content = source if isinstance(source, Mapping) else _read(Path(source))
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise TypeError(f"path_or_dict must hold a dictionary of tensors, got {_kinds(content)}")
    state = {_unwrapped(name): tensor for name, tensor in content.items()}
    for name, twin in (
        ("transformer.wte.weight", "lm_head.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
    ):
        if name not in state and twin in state:
            state[name] = state[twin]
    return state


def _read(path: Path) -> object:
    if not path.is_dir():
        return _read_file(path)
    for name in FILES:
        if (path / name).is_file():
            return _read_file(path / name)
        if (path / f"{name}{INDEX}").is_file():
            return _read_parts(path / f"{name}{INDEX}")
    raise FileNotFoundError(f"path_or_dict must hold one of {', '.join(FILES)}, got the folder {path}")


def _read_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_parts(index: Path) -> dict[str, object]:
    """The tensors of all parts, which lie beside the index."""
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    merged: dict[str, object] = {}
    for part in parts:
        if Path(part).name != part:
            raise ValueError(f"{index.name} must name files beside it, got {part!r}")
        content = _read_file(index.parent / part)
        if not isinstance(content, Mapping):
            raise TypeError(f"{part} must hold a dictionary of tensors, got {_kinds(content)}")
        merged |= content
    return merged


def _kinds(content: object) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return "values of " + ", ".join(sorted({type(value).__name__ for value in content.values()}))


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


# --------------------------------------------------------------------------------------------------- sizes


def _model_config(state: dict[str, Tensor], config: ModelConfig | T6Config | None) -> ModelConfig:
    """The configuration that the tensors show, in the options of `config` where they show nothing."""
    shown = _shown(state)
    if config is None:
        return ModelConfig(**shown)
    asked = config.to_model_config() if isinstance(config, T6Config) else config
    wanted = {name: getattr(asked, name) for name in shown}
    wanted["mechanism"] = "kvonly" if asked.layer_variant == "kv_only" else asked.mechanism
    wanted["intermediate_size"] = None if asked.ffn_dim == 8 * asked.hidden_size // 3 else asked.ffn_dim
    for name, value in shown.items():
        if wanted[name] != value:
            raise ValueError(f"config.{name} must be {value!r}, as the tensors say, got {wanted[name]!r}")
    return asked


def _shown(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of the embedding and of layer 0 tell."""

    def shape(name: str) -> tuple[int, int]:
        if name not in state:
            raise ValueError(f"path_or_dict must hold {name!r}, got {len(state)} tensors without it")
        if state[name].ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(state[name].shape)}")
        rows, columns = state[name].shape
        return rows, columns

    first = f"{LAYER}0."
    vocab, d = shape("transformer.wte.weight")
    a_k, b_k = shape(f"{first}{QKV}W_A_k.weight")[0], shape(f"{first}{QKV}W_B_k.weight")[0]
    n_o = shape(f"{first}attn.c_proj.weight")[1]
    heads = isqrt(n_o * a_k // b_k) if b_k else 0
    if heads == 0 or heads**2 * b_k != n_o * a_k or n_o % heads or a_k % heads:
        raise ValueError(
            "c_proj, W_A_k and W_B_k of layer 0 must have h D columns, h R rows and R D rows of integers h, "
            f"R and D, got {n_o}, {a_k} and {b_k}"
        )
    kv_only = f"{first}{QKV}c_q.weight" in state
    hidden = shape(f"{first}mlp.c_fc1.weight")[0]
    shown = {
        "mechanism": "kvonly" if kv_only else "tpa",
        "vocab_size": vocab,
        "hidden_size": d,
        "num_hidden_layers": len({name.split(".")[2] for name in state if name.startswith(LAYER)}),
        "num_attention_heads": heads,
        "head_dim": n_o // heads,
        "k_rank": a_k // heads,
        "v_rank": shape(f"{first}{QKV}W_A_v.weight")[0] // heads,
        "intermediate_size": None if hidden == 8 * d // 3 else hidden,
        "tie_word_embeddings": torch.equal(state["transformer.wte.weight"], state["lm_head.weight"]),
        "out_norm": f"{first}attn.subln.weight" in state,
    }
    if not kv_only:
        shown["q_rank"] = shape(f"{first}{QKV}W_A_q.weight")[0] // heads
    return shown


def _hf_config(own: ModelConfig, config: ModelConfig | T6Config | None) -> T6Config:
    """A T6Config given is kept as it is, with its token ids."""
    return deepcopy(config) if isinstance(config, T6Config) else T6Config.from_model_config(own)


# ------------------------------------------------------------------------------------------- names and rows

PARTS = {
    **{f"{QKV}W_{ab.upper()}_{x}.weight": f"attn.{ab}_{x}.weight" for ab in "ab" for x in "qkv"},
    f"{QKV}c_q.weight": "attn.b_q.weight",
    "attn.c_proj.weight": "attn.o.weight",
    "attn.subln.weight": "attn.out_norm.weight",
    "mlp.c_fc1.weight": "ffn.w1.weight",
    "mlp.c_fc2.weight": "ffn.w2.weight",
    "mlp.c_proj.weight": "ffn.w3.weight",
}


def _our_name(name: str) -> str:
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    if name == "lm_head.weight":
        return name
    layer, _, part = name.removeprefix(LAYER).partition(".")
    if not name.startswith(LAYER) or not layer.isdigit() or part not in PARTS:
        raise ValueError(f"path_or_dict must hold names of the authors' T6 alone, got {name!r}")
    return f"model.layers.{layer}.{PARTS[part]}"


def _check_tensors(ours: dict[str, Tensor], expected: Mapping[str, Tensor], own: ModelConfig) -> None:
    """All tensors that the model has, of its shapes, and no other."""
    if ours.keys() != expected.keys():
        raise ValueError(
            f"path_or_dict must hold the tensors of {own.num_hidden_layers} layers, got "
            f"{sorted(ours.keys() - expected.keys())} besides and no {sorted(expected.keys() - ours.keys())}"
        )
    for name, tensor in ours.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(expected[name].shape)} with {own.num_attention_heads} heads "
                f"of width {own.head_dim} and ranks ({own.q_rank}, {own.k_rank}, {own.v_rank}), "
                f"got {tuple(tensor.shape)}"
            )


def _our_rows(name: str, tensor: Tensor, own: ModelConfig) -> Tensor:
    """Rows of W_A from (head, rank) to (rank, head) order; all other tensors agree."""
    if ".attn.a_" not in name:
        return tensor
    return tensor.unflatten(0, (own.num_attention_heads, -1)).transpose(0, 1).flatten(0, 1)
