"""Tensor Product Attention for PyTorch: layers, functions, caches and the T6 model.

The Hugging Face classes are in `tpa_attention.torch.hf` (extra `[hf]`), conversion in
`tpa_attention.torch.convert`, the authors' checkpoints in `tpa_attention.torch.checkpoints`.
"""

try:
    import jaxtyping  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"tpa_attention.torch needs torch and jaxtyping, and {error.name} is not installed: "
        'pip install "tpa-attention[torch]"',
        name=error.name,
    ) from error

from .baselines import GQA, MHA, MLA, MQA
from .cache import FactorCache
from .factors import RecordLayout, TPAFactors, from_authors_layout, materialize
from .functional import merge_partials, tpa_attention, tpa_decode, tpa_decode_factors
from .layers import TPAttention
from .model import T6, param_groups
from .paged_cache import PagedFactorCache
from .quantized_cache import QuantizedFactorCache
from .rope import rope, unrope

__all__ = [
    "GQA",
    "MHA",
    "MLA",
    "MQA",
    "T6",
    "FactorCache",
    "PagedFactorCache",
    "QuantizedFactorCache",
    "RecordLayout",
    "TPAFactors",
    "TPAttention",
    "from_authors_layout",
    "materialize",
    "merge_partials",
    "param_groups",
    "rope",
    "tpa_attention",
    "tpa_decode",
    "tpa_decode_factors",
    "unrope",
]
