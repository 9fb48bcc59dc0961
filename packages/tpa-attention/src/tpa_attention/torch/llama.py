"""LLaMA of transformers in the terms of T6: its configuration, the names of its weights, its hidden states.

Names of LLaMA and of T6:

    model.layers.i.input_layernorm, post_attention_layernorm      attn_norm, ffn_norm
    model.layers.i.self_attn.{q,k,v,o}_proj                       attn, converted
    model.layers.i.mlp.gate_proj, up_proj, down_proj              ffn.w1, w2, w3
    model.embed_tokens, model.norm, lm_head                       the same
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from tpa_attention._checks import SCALING_KEYS
from tpa_attention.config import RopeConfig

from .hf import T6Config, T6ForCausalLM  # first: says what to install where transformers is missing
from .layers import TPAttention
from .rope import frequencies

# isort: split
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "tie_word_embeddings", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn.w1",
    "mlp.up_proj": "ffn.w2",
    "mlp.down_proj": "ffn.w3",
}
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
SCALINGS = ("linear", "yarn", "llama3")  # ntk is no kind of transformers: "dynamic" moves with the length
FLOAT32_POWER = 1e-5  # transformers raises the base to its powers in float32


def load(model_or_dir: LlamaForCausalLM | str | PathLike[str]) -> LlamaForCausalLM:
    """The model given, or the one that is saved there, in the type it was saved in."""
    model: object = model_or_dir
    if isinstance(model_or_dir, str | PathLike):
        model = AutoModelForCausalLM.from_pretrained(model_or_dir, dtype="auto")
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(
            f"model_or_dir must be a LlamaForCausalLM or where one is saved, got {type(model).__name__}"
        )
    return model


def t6_config(
    config: LlamaConfig, k_rank: int, v_rank: int, q_rank: int | None, contextual: bool
) -> T6Config:
    """The configuration of the converted model.

    Raises:
        ValueError: if LLaMA's has what T6 has not.
    """
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(f"config.{name} must be {value!r} for T6, got {getattr(config, name)!r}")
    rope = rope_config(config)
    names = [*(["kv_only"] if q_rank is None else []), *([] if contextual else ["noncontextual_a"])]
    return T6Config(
        mechanism="tpa",
        variant="+".join(names) or "contextual",
        a_bias=contextual,
        q_rank=config.num_attention_heads if q_rank is None else q_rank,
        k_rank=k_rank,
        v_rank=v_rank,
        head_dim=head_dim(config),
        norm_affine=True,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope.base,
        rope_sign=rope.sign,
        rope_layout=rope.layout,
        rope_scaling=rope.scaling,
        **{name: getattr(config, name) for name in SAME},
    )


def rope_config(config: LlamaConfig) -> RopeConfig:
    """LLaMA's rotation, compared number by number with the one that transformers computes.

    Raises:
        ValueError: if it is of another kind, or has options that change it and are not known here.
    """
    given: dict[str, Any] = dict(config.rope_parameters or {})
    kind = given["rope_type"]
    if kind not in ("default", *SCALINGS):
        raise ValueError(
            f"config.rope_parameters must be of type default, {', '.join(SCALINGS)}, got {kind!r}, whose "
            "frequencies change with the length of the text or are listed one by one"
        )
    scaling = None
    if kind != "default":
        scaling = {key: given[key] for key in SCALING_KEYS[kind] if given.get(key) is not None}
        if kind == "yarn":
            scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        scaling["rope_type"] = kind
    rope = RopeConfig(base=float(given["rope_theta"]), sign=1, scaling=scaling)
    ours, our_factor = frequencies(rope.rotary_dim(head_dim(config)), rope, torch.device("cpu"))
    with torch.device("cpu"):
        theirs = LlamaRotaryEmbedding(config)
    pairs = [(our_factor, float(theirs.attention_scaling))]
    if len(ours) == len(theirs.inv_freq):
        pairs += zip(ours.tolist(), theirs.inv_freq.tolist(), strict=True)
    else:
        pairs.append((len(ours), len(theirs.inv_freq)))
    for mine, original in pairs:
        if abs(mine - original) > FLOAT32_POWER * abs(original):
            raise ValueError(
                f"config.rope_parameters must give the RoPE that RopeConfig gives, got {given}: "
                f"{original} in transformers and {mine} here"
            )
    return rope


def head_dim(config: LlamaConfig) -> int:
    """D, d / h unless the configuration says otherwise."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def key_value_heads(config: LlamaConfig) -> int:
    """G, h unless the configuration says otherwise."""
    return config.num_key_value_heads or config.num_attention_heads


def attention_weights(model: LlamaForCausalLM, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W^Q, W^K, W^V and W^O of a layer."""
    attention: Any = model.model.layers[index].self_attn
    q, k, v, o = (getattr(attention, f"{name}_proj").weight.detach() for name in "qkvo")
    return q, k, v, o


@torch.no_grad()
def visit_hidden_states(
    model: LlamaForCausalLM,
    input_ids: Int[Tensor, "B T"],
    visit: Callable[[int, Float[Tensor, "B T d"]], None],
) -> None:
    """Call `visit` with every layer's index and what enters its attention, one layer after the other.

    Raises:
        TypeError: if the ids are no integers.
        ValueError: if they have no shape (B, T) or lie outside of the vocabulary.
    """
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"calibration must hold integers, got {input_ids.dtype}")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"calibration must have shape (B, T) and hold tokens, got {tuple(input_ids.shape)}")
    least, most, vocabulary = int(input_ids.min()), int(input_ids.max()), model.config.vocab_size
    if not 0 <= least <= most < vocabulary:
        raise ValueError(f"calibration must hold ids in [0, {vocabulary}), got ids from {least} to {most}")

    def visitor(index: int) -> Callable[[Module, Any, Tensor], None]:
        return lambda _module, _args, hidden: visit(index, hidden)

    hooks = [
        model.get_submodule(f"model.layers.{index}.input_layernorm").register_forward_hook(visitor(index))
        for index in range(len(model.model.layers))
    ]
    try:
        model.model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def assemble(
    model: LlamaForCausalLM, config: T6Config, layers: Sequence[TPAttention], *, shared: bool
) -> T6ForCausalLM:
    """T6 of the converted layers and LLaMA's other weights, which are copied unless they may be shared."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name in OUTSIDE}
    for name, tensor in model.state_dict().items():
        prefix, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, leaf = rest.rpartition(".")
        if part in PARTS:
            state[f"model.layers.{prefix}.{PARTS[part]}.{leaf}"] = tensor
    if not shared:
        state = {name: tensor.clone() for name, tensor in state.items()}
    for index, layer in enumerate(layers):
        state |= {f"model.layers.{index}.attn.{name}": t for name, t in layer.state_dict().items()}
    with torch.device("meta"):
        new = T6ForCausalLM(config)
    new.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        new.lm_head.weight = new.model.embed_tokens.weight
    new.generation_config = deepcopy(model.generation_config)
    new.config.dtype = model.dtype
    return new.eval()
