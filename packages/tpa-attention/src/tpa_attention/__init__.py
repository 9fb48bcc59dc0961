"""Tensor Product Attention: layers, the T6 model, the factor cache and decoding straight from it.

Zhang, Liu, Yuan, Qin, Yuan, Gu, Yao, "Tensor Product Attention Is All You Need", NeurIPS 2025, arXiv
2501.06425. Importing this package is light and imports no framework and no NumPy; the names below are loaded
when first used, from `tpa_attention.torch` (extra `[torch]`, or `[hf]` for the Hugging Face classes).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .torch.cache import FactorCache
    from .torch.checkpoints import load_authors_state_dict
    from .torch.convert import mha_to_tpa
    from .torch.factors import TPAFactors, materialize
    from .torch.functional import merge_partials, tpa_attention, tpa_decode, tpa_decode_factors
    from .torch.hf import T6Config, T6ForCausalLM
    from .torch.layers import TPAttention
    from .torch.model import T6
    from .torch.paged_cache import PagedFactorCache
    from .torch.quantized_cache import QuantizedFactorCache

__version__ = "0.1.0"

__all__ = [
    "T6",
    "FactorCache",
    "PagedFactorCache",
    "QuantizedFactorCache",
    "T6Config",
    "T6ForCausalLM",
    "TPAFactors",
    "TPAttention",
    "__version__",
    "load_authors_state_dict",
    "materialize",
    "merge_partials",
    "mha_to_tpa",
    "tpa_attention",
    "tpa_decode",
    "tpa_decode_factors",
]

_HOME = {
    "T6": "torch.model",
    "FactorCache": "torch.cache",
    "PagedFactorCache": "torch.paged_cache",
    "QuantizedFactorCache": "torch.quantized_cache",
    "T6Config": "torch.hf",
    "T6ForCausalLM": "torch.hf",
    "TPAFactors": "torch.factors",
    "TPAttention": "torch.layers",
    "load_authors_state_dict": "torch.checkpoints",
    "materialize": "torch.factors",
    "merge_partials": "torch.functional",
    "mha_to_tpa": "torch.convert",
    "tpa_attention": "torch.functional",
    "tpa_decode": "torch.functional",
    "tpa_decode_factors": "torch.functional",
}


def __getattr__(name: str) -> object:
    """Load an exported name from the submodule it lives in, once; without torch that says what to install."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
