"""How far the momentum is from the gradient it estimates: ||m - grad F||^2.

The paper's whole argument is about this number: the correction is worth its cost where it makes the number
smaller. It needs the full-data gradient, so it is for finite sums small enough to sweep.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def estimator_error(m: Tensor | Sequence[Tensor], full_grad: Tensor | Sequence[Tensor]) -> Float[Tensor, ""]:
    """Squared Euclidean distance between a momentum and the full gradient, summed over all tensors.

    For an optimizer, m is `[opt.state[p]["exp_avg"] for p in params]`; divide each by 1 - beta1**t first
    if the start-up bias of m_0 = 0 is not what you want to measure.

    Args:
        m: momentum, one tensor or one per parameter.
        full_grad: gradient of the whole finite sum at the present parameters, with the shapes of m.

    Returns:
        A 0-d tensor on the device of the first tensor: float64 if any input is float64, else float32.

    Raises:
        TypeError: if one argument is a tensor and the other a sequence.
        ValueError: if there are no tensors, or numbers of tensors or shapes differ.

    Source: Yuan et al. 2025 (arXiv 2411.10438), Section 3.1: E||m_t - grad F(x_t)||^2.
    """
    if isinstance(m, Tensor) != isinstance(full_grad, Tensor):
        kinds = (type(m).__name__, type(full_grad).__name__)
        raise TypeError(f"m and full_grad must both be tensors or both be sequences of tensors, got {kinds}")
    momenta = [m] if isinstance(m, Tensor) else list(m)
    gradients = [full_grad] if isinstance(full_grad, Tensor) else list(full_grad)
    _check_alike(momenta, gradients)
    double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in momenta + gradients)
    dtype, device = (torch.float64 if double else torch.float32), momenta[0].device
    total = torch.zeros((), dtype=dtype, device=device)
    for momentum, gradient in zip(momenta, gradients, strict=True):
        difference = _real(momentum).to(dtype) - _real(gradient).to(dtype)
        total += difference.square().sum().to(device)
    return total


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check_alike(momenta: list[Tensor], gradients: list[Tensor]) -> None:
    if not momenta:
        raise ValueError("m must hold at least one tensor, got none")
    if len(momenta) != len(gradients):
        raise ValueError(f"full_grad must hold as many tensors as m, got {len(gradients)} for {len(momenta)}")
    for index, (momentum, gradient) in enumerate(zip(momenta, gradients, strict=True)):
        if momentum.shape != gradient.shape:
            shapes = f"{tuple(gradient.shape)} for {tuple(momentum.shape)}"
            raise ValueError(f"full_grad must have the shapes of m, got {shapes} at position {index}")
