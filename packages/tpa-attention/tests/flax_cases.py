"""The layers of `test_reference_layer.py` as flax TPAttention: same options, same weights, float64."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from layer_options import OPTIONS
from test_reference_layer import LAYERS, D, d, h

from tpa_attention.config import ModelConfig
from tpa_attention.flax import T6, TPAttention, from_torch

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=6,
    head_dim=8,
    q_rank=3,
    zero_init_output=False,
    norm_affine=True,
)


def build(name, **more):
    """The named layer with the weights of the reference; call it under enable_x64."""
    options = {"param_dtype": jnp.float64, **OPTIONS[name], **more}
    module = nnx.eval_shape(lambda: TPAttention(d, h, D, 3, 2, 2, rngs=nnx.Rngs(0), **options))
    return from_torch(state_dict(LAYERS[name]), module)


def state_dict(layer):
    """The weights of a reference layer as the torch layer calls and lays them out."""
    maps = {
        "a_q": () if layer.q_a is None else (layer.q_a,),
        "b_q": layer.q_b,
        "a_k": (layer.k_a,),
        "b_k": layer.k_b,
        "a_v": (layer.v_a,),
        "b_v": layer.v_b,
    }
    arrays = {"o.weight": layer.o, "gate.weight": layer.gate, "shift.mu": layer.kv_shift}
    arrays["out_norm.weight"] = layer.out_norm
    for name, parts in maps.items():  # parts of a row of B lie side by side
        if parts and parts[0].weight is not None:
            rows = np.concatenate([part.weight for part in parts], axis=1)
            arrays[f"{name}.weight"] = rows.reshape(-1, d)
        if parts and parts[0].constant is not None:
            arrays[f"{name}.bias"] = np.concatenate([part.constant for part in parts], axis=1).reshape(-1)
    return {name: array for name, array in arrays.items() if array is not None}


def shapes_of(make):
    """A module without initial values, which `from_torch` fills."""
    return nnx.eval_shape(make)


def random_model(seed=0, config=SMALL):
    model = shapes_of(lambda: T6(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in torch_shapes(config).items():
        weights[name] = rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[-1])
    return from_torch(weights, model)


def torch_shapes(config):
    """Parameter shapes of the torch model, from the formulas of the paper."""
    width, heads, D = config.hidden_size, config.num_attention_heads, config.head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}."
        for x, rank in (("q", config.q_rank), ("k", config.k_rank), ("v", config.v_rank)):
            shapes[f"{block}attn.a_{x}.weight"] = (rank * heads, width)
            shapes[f"{block}attn.b_{x}.weight"] = (rank * D, width)
        shapes[f"{block}attn.o.weight"] = (width, heads * D)
        shapes[f"{block}attn_norm.weight"] = shapes[f"{block}ffn_norm.weight"] = (width,)
        shapes[f"{block}ffn.w1.weight"] = shapes[f"{block}ffn.w2.weight"] = (config.ffn_dim, width)
        shapes[f"{block}ffn.w3.weight"] = (width, config.ffn_dim)
    return shapes
