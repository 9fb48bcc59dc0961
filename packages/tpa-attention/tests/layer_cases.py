"""The layers of `test_reference_layer.py` as TPAttention: the same options, the same weights, float64."""

import numpy as np
import torch
from layer_options import OPTIONS
from test_reference_layer import LAYERS, D, d, h

from tpa_attention.torch.layers import TPAttention


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
