"""The layers of `test_reference_layer.py` as options of TPAttention, in torch and in flax."""

from test_reference_layer import LAYERS

from tpa_attention.config import RopeConfig

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
