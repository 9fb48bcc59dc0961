"""Tensor Product Attention: layers, the T6 model, the factor cache and decoding straight from it.

Zhang, Liu, Yuan, Qin, Yuan, Gu, Yao, "Tensor Product Attention Is All You Need", NeurIPS 2025, arXiv
2501.06425. Importing this package is light and imports no framework and no NumPy; the names below are loaded
when first used, from `tpa_attention.torch` (extra `[torch]`, or `[hf]` for the Hugging Face classes).
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME: dict[str, str] = {}

__all__ = ["__version__"]


def __getattr__(name: str) -> object:
    """Load an exported name from the submodule it lives in, once; without torch that says what to install."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
