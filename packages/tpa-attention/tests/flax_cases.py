"""The layers of `test_reference_layer.py` as flax TPAttention: same options, same weights, float64."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_reference_layer import LAYERS, D, d, h

from tpa_attention.config import RopeConfig
from tpa_attention.flax import TPAttention, from_torch

OPTIONS = {
    "contextual": {},
    "without rank scale": {"rank_scale": False},
    "KV-only": {"variant": "kv_only"},
    "non-contextual A": {"variant": "noncontextual_a"},
    "KV-only with non-contextual A": {"variant": "kv_only+noncontextual_a"},
    "A with bias": {"a_bias": True},
    "non-contextual B": {"variant": "noncontextual_b"},
    "shared B": {"shared_kv_b": True},
    "shared non-contextual B": {"shared_kv_b": True, "variant": "noncontextual_b"},
    "rotate on load": {"rotate_on_load": True},
    "third order": {"factor_dims": (4, 2)},
    "fourth order": {"factor_dims": (2, 2, 2)},
    "third order, shared B": {"factor_dims": (4, 2), "shared_kv_b": True},
    "sigmoid": {"head_activation": "sigmoid"},
    "softmax": {"head_activation": "softmax"},
    "partial rotation": {"rope": RopeConfig(fraction=0.5)},
    "interleaved LLaMA rotation": {"rope": RopeConfig(layout="interleaved", sign=1)},
    "no rotation": {"rope": RopeConfig.none()},
    "factor norm": {"factor_norm": True},
    "factor norm, shared B, third order": {"factor_norm": True, "shared_kv_b": True, "factor_dims": (4, 2)},
    "output norm and gate": {"out_norm": True, "output_gate": True},
    "KV shift": {"kv_shift": True},
}
assert OPTIONS.keys() == LAYERS.keys()


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
