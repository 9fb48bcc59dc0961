"""Tensor Product Attention for PyTorch: the public face of the namespace."""

try:
    import jaxtyping  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"tpa_attention.torch needs torch and jaxtyping, and {error.name} is not installed: "
        'pip install "tpa-attention[torch]"',
        name=error.name,
    ) from error
