"""Tensor Product Attention for flax nnx: the layer, the T6 model, its factor cache, weights from torch.

`TPAttention` and `T6` take `rngs`; `init_cache` makes the static cache that decoding fills, a module of
`nnx.Cache` variables which goes to `nnx.jit` beside the model; `from_torch` copies the weights of the torch
layer and model; `shard_heads` places a module or cache on a mesh, cut along the heads.

Source: Zhang et al. 2025 (arXiv 2501.06425).
"""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
    import jaxtyping  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"tpa_attention.flax needs flax, jax and jaxtyping, and {error.name} is not installed: "
        'pip install "tpa-attention[flax]"',
        name=error.name,
    ) from error

from tpa_attention._flax_cache import FactorCache, LayerCache
from tpa_attention._flax_layer import TPAttention
from tpa_attention._flax_model import T6, SwiGLU, T6Block
from tpa_attention._flax_norm import RMSNorm
from tpa_attention._flax_weights import from_torch, shard_heads

__all__ = [
    "T6",
    "FactorCache",
    "LayerCache",
    "RMSNorm",
    "SwiGLU",
    "T6Block",
    "TPAttention",
    "from_torch",
    "shard_heads",
]
