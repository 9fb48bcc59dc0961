"""The correction in front of the base optimiser: c_t, its clip, and the momentum that needs no buffer.

Source: Yuan et al. 2025 (arXiv 2411.10438), eqs 3.3-3.5.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor

# a table, because torch.compile cannot trace dtype.to_real
_WORKING_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def gradient_correction(
    grad: Inexact[Tensor, "*shape"],
    reference: Inexact[Tensor, "*shape"],
    *,
    beta1: float | Tensor,
    gamma: float,
) -> Inexact[Tensor, "*shape"]:
    """Scaled stochastic recursive gradient c = g + gamma beta1 / (1 - beta1) (g - h).

    With gamma = 1 this is the STORM estimator, with gamma = 0 the plain gradient. The factor makes the
    correction survive the averaging that follows: the momentum keeps (1 - beta1) of what enters it.

    Args:
        grad: gradient g at the current parameters on the current batch.
        reference: gradient h at the previous parameters on the current batch (exact form), or the previous
            gradient (approximate form).
        beta1: momentum decay in [0, 1); a 0-d tensor is taken as it is, since a check would wait for the
            device.
        gamma: strength of the correction, >= 0.

    Raises:
        ValueError: if the shapes differ, beta1 is outside [0, 1) or gamma is negative.

    Source: Yuan et al. 2025, eqs 3.3-3.4.
    """
    if grad.shape != reference.shape:
        shapes = f"{tuple(grad.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"grad and reference must have the same shape, got {shapes}")
    if not isinstance(beta1, Tensor) and not 0 <= beta1 < 1:
        raise ValueError(f"beta1 must be in [0, 1), got {beta1!r}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma!r}")
    return (grad - reference).mul_(gamma * beta1 / (1 - beta1)).add_(grad)


def clip_by_norm(
    tensor: Inexact[Tensor, "*shape"], max_norm: float, *, batched: bool = False
) -> Inexact[Tensor, "*shape"]:
    """Tensor scaled to norm `max_norm` where its norm is larger; at equality it stays as it is.

    An infinite norm gives NaN rather than a silent zero step.

    Args:
        tensor: the tensor to clip.
        max_norm: largest Euclidean norm, > 0.
        batched: clip each slice over the last two dimensions of a tensor with three or more on its own.

    Raises:
        ValueError: if max_norm is not positive.

    Source: Yuan et al. 2025, eq 3.5.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
    return tensor / clip_divisor(norm_of(tensor, batched), max_norm)


def quasi_hyperbolic(
    grad: Inexact[Tensor, "*shape"], average: Inexact[Tensor, "*shape"], gamma: float
) -> Inexact[Tensor, "*shape"]:
    """Quasi-hyperbolic momentum gamma g_t + (1 - gamma) e_t, e_t the exponential average of the gradients.

    This is exactly the momentum of the approximate form without clipping, started from h_1 = 0, so that form
    needs no buffer for the last gradient. With h_1 = g_1, start the average at -gamma / (1 - gamma) g_1.
    """
    return torch.lerp(average, grad, gamma)


def norm_of(tensor: Tensor, batched: bool = False, *, paired: bool = False) -> Tensor:
    """Euclidean norm of a tensor; if batched and of three dimensions, of each slice over the last two.

    `paired` says that a complex tensor has been viewed as reals: the last dimension holds the pairs.
    """
    if batched and tensor.ndim >= 3 + paired:
        axes = (-3, -2, -1) if paired else (-2, -1)
        return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
    return torch.linalg.vector_norm(tensor)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """max(1, norm / max_norm), and NaN where the norm is infinite or NaN."""
    return (norm / max_norm).clamp_min(1.0) + norm * 0


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype an update is computed in: float32 for half precision, else that of the parts."""
    return _WORKING_DTYPES.get(dtype, dtype)
