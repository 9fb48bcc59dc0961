"""The layers of `test_reference_layer.py` as TPAttention: the same options, the same weights, float64."""

import numpy as np
import torch
from test_reference_layer import LAYERS, D, d, h

from tpa_attention.config import RopeConfig
from tpa_attention.torch.layers import TPAttention

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
    """The named layer with the weights of the reference."""
    torch_layer = TPAttention(d, h, D, 3, 2, 2, **OPTIONS[name], **more, dtype=torch.float64)
    copy_weights(LAYERS[name], torch_layer)
    return torch_layer


def load(parameter, array):
    with torch.no_grad():
        assert parameter.numel() == array.size, (parameter.shape, array.shape)
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(array)).reshape(parameter.shape))


def load_map(factor_map, parts):
    """Weight rows of a map from the reference's parts (R, n_i, d): parts of a row lie side by side."""
    for name in ("weight", "constant"):
        arrays = [getattr(part, name) for part in parts]
        if all(array is not None for array in arrays):
            target = factor_map.weight if name == "weight" else factor_map.bias
            load(target, np.concatenate(arrays, axis=1))
        else:
            assert all(array is None for array in arrays)


def copy_weights(reference, layer):
    load_map(layer.a_k, (reference.k_a,))
    load_map(layer.a_v, (reference.v_a,))
    load_map(layer.b_q, reference.q_b)
    load_map(layer.b_k, reference.k_b)
    if reference.q_a is not None:
        load_map(layer.a_q, (reference.q_a,))
    if reference.v_b:
        load_map(layer.b_v, reference.v_b)
    load(layer.o.weight, reference.o)
    if reference.out_norm is not None:
        load(layer.out_norm.weight, reference.out_norm)
    if reference.gate is not None:
        load(layer.gate.weight, reference.gate)
    if reference.kv_shift is not None:
        load(layer.shift.mu, reference.kv_shift)
