"""The empirical neural tangent kernel of any torch model: inner products of the outputs' parameter gradients.

    Theta[i, c, j, d] = sum over parameters p of  df_c(x_i)/dp  df_d(x_j)/dp

Per-sample Jacobians come from torch.func (vmap over the vector-Jacobian product), a block of samples at a
time, and are contracted parameter by parameter in float64; no autograd graph outlives a block. With `rates`
each parameter's part is weighted, which gives the kernel that governs training with such learning rates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mup_features.similarity import kernel_distance, relative_frobenius_change

from .gram_sums import require_float64
from .passes import recording_mode, unwrapped

# Bytes of Jacobians in one block.
_BUDGET = 1 << 28


def empirical_ntk(
    model: nn.Module,
    X: Tensor,
    *,
    outputs: bool = False,
    rates: Mapping[str, float] | None = None,
    block_size: int | None = None,
) -> Float[np.ndarray, "samples samples"] | Float[np.ndarray, "samples outputs samples outputs"]:
    """The kernel at the model's present parameters, in eval mode.

    Memory is two blocks of Jacobians, block_size x outputs x parameters each. Every pair of blocks is
    contracted, and a block's Jacobians are computed again for each partner.

    Args:
        model: maps (batch, ...) to (batch, ...) with independent samples; all other axes are outputs.
        X: inputs (samples, ...), on the model's device.
        outputs: return all pairs of outputs; otherwise the mean over equal ones, (1/C) sum_c Theta[i,c,j,c].
        rates: parameter name -> weight of its part, >= 0; those not named have weight 1.
        block_size: samples in a block; None takes as many as fit 256 MB of Jacobians.

    Raises:
        ValueError: if X is empty, the model has no trainable parameters, or an option is out of range.
    """
    parameters = {n: p.detach() for n, p in unwrapped(model).named_parameters() if p.requires_grad}
    if not isinstance(X, Tensor) or X.ndim < 1 or not len(X):
        raise ValueError(f"X must be a tensor (samples >= 1, ...), got {tuple(X.shape)}")
    if not parameters:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    weights = dict.fromkeys(parameters, 1.0) | dict(rates or {})
    unknown = sorted(set(weights) - set(parameters))
    if unknown:
        raise ValueError(f"rates must be keyed by trainable parameters, got {unknown[0]!r}")
    if min(weights.values()) < 0:
        raise ValueError(f"rates must be >= 0, got {min(weights.values())!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be >= 1 or None, got {block_size!r}")
    require_float64(X.device)
    plain = unwrapped(model)
    # The fused attention kernels have no batching rule for vmap.
    with recording_mode(model), sdpa_kernel(SDPBackend.MATH):
        C = plain(X[:1]).numel()
        size = block_size or _fitting_block(parameters, C)
        blocks = list(X.split(size))
        Theta = torch.zeros(len(X), C, len(X), C, dtype=torch.float64, device=X.device)
        for i, first in enumerate(blocks):
            J = _jacobians(plain, parameters, first, C)
            for j, second in enumerate(blocks[: i + 1]):
                other = J if j == i else _jacobians(plain, parameters, second, C)
                part = _contract(J, other, weights)
                rows = slice(i * size, i * size + len(first))
                columns = slice(j * size, j * size + len(second))
                Theta[rows, :, columns] = part
                Theta[columns, :, rows] = part.permute(2, 3, 0, 1)
    found = Theta.cpu().numpy()
    return found if outputs else np.einsum("icjc->ij", found) / C


def ntk_change(before: nn.Module, after: nn.Module, X: Tensor, **options: Any) -> dict[str, float]:
    """How far the tangent kernel moved: `kernel_distance` (blind to scale) and `relative_frobenius_change`.

    Args:
        before: the model at the earlier time.
        after: the model at the later time.
        X: inputs.
        options: of `empirical_ntk`, but for `outputs`.
    """
    K0, K = (empirical_ntk(model, X, **options) for model in (before, after))
    return {
        "kernel_distance": kernel_distance(K0, K),
        "relative_frobenius_change": relative_frobenius_change(K0, K),
    }


def _jacobians(
    model: nn.Module, parameters: dict[str, Tensor], X: Tensor, C: int
) -> dict[str, Float[Tensor, "samples outputs entries"]]:
    everything = (*model.named_buffers(), *model.named_parameters())
    rest = {name: value.detach() for name, value in everything if name not in parameters}

    def of_sample(x: Tensor) -> dict[str, Tensor]:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, (values, rest), (x[None],)).reshape(-1)

        found = vjp(outputs, parameters)
        basis = torch.eye(C, dtype=found[0].dtype, device=found[0].device)
        return vmap(found[1])(basis)[0]

    return {name: J.detach().flatten(2) for name, J in vmap(of_sample)(X).items()}


def _contract(J: dict[str, Tensor], other: dict[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    parts = [
        weights[name] * (block.flatten(0, 1).double() @ other[name].flatten(0, 1).double().T)
        for name, block in J.items()
    ]
    b, C = next(iter(J.values())).shape[:2]
    return torch.stack(parts).sum(0).reshape(b, C, -1, C)


def _fitting_block(parameters: dict[str, Tensor], C: int) -> int:
    each = C * sum(p.numel() * p.element_size() for p in parameters.values())
    return max(1, _BUDGET // max(each, 1))
