"""From the momentum to the step: orthogonal directions, the cautious mask and decay."""

from collections.abc import Sequence

from torch import Tensor

from .orthogonalize import orthogonalize
from .rule import UpdateRule

_MARS_M_NS_EPS = 1e-7
_SMALLEST_KEPT_FRACTION = 1e-3


def orthogonal_scale(shape: Sequence[int], scale: str | float) -> float:
    """Factor of the orthogonal update of a rows x columns matrix.

    Args:
        shape: (rows, columns).
        scale: "none" is 1, "sqrt_ratio" is sqrt(max(1, rows / columns)) (mars-shampoo),
            "rms" is 0.2 sqrt(max(rows, columns)) (mars-m), a number is itself.
    """
    if not isinstance(scale, str):
        return float(scale)
    rows, columns = shape
    if scale == "sqrt_ratio":
        return max(1.0, rows / max(columns, 1)) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5 if scale == "rms" else 1.0


def orthogonal_eps(rule: UpdateRule) -> float | Tensor:
    """What Newton-Schulz adds to the norm; the release of mars-shampoo feeds m / (1 - beta1) instead of m."""
    return _MARS_M_NS_EPS if rule.kind == "m" else rule.eps * (1 - rule.beta1)


def orthogonal_directions(momenta: Sequence[Tensor], rule: UpdateRule) -> list[Tensor]:
    """Scaled orthogonal factor of every momentum, in the shape of the momentum."""
    views = [m if rule.batched and m.ndim >= 3 else m.flatten(1) for m in momenta]
    factors = orthogonalize(
        views,
        rule.orthogonalizer,
        steps=rule.ns_steps,
        coefficients=rule.ns_coefficients,
        eps=orthogonal_eps(rule),
        dtype=rule.ns_dtype,
    )
    return [
        factor.mul(orthogonal_scale(view.shape[-2:], rule.scale)).reshape(m.shape)
        for factor, view, m in zip(factors, views, momenta, strict=True)
    ]


def sign(momentum: Tensor) -> Tensor:
    """Sign of every entry, 0 at 0; NaN stays NaN, where torch.sign would make a silent zero step of it."""
    return momentum.sign().add_(momentum, alpha=0)


def mask_cautiously_(direction: Tensor, grad: Tensor) -> None:
    """Zero the entries that disagree in sign with the gradient and rescale the rest (arXiv 2411.16085)."""
    mask = (direction * grad > 0).to(direction.dtype)
    direction.mul_(mask).div_(mask.mean().clamp_min(_SMALLEST_KEPT_FRACTION))


def decay_(param: Tensor, direction: Tensor, decay: float | Tensor, only_towards_zero: bool) -> None:
    """Shrink the parameter by `decay`; cautiously where the step moves it towards zero (arXiv 2510.12402)."""
    if only_towards_zero:
        param.mul_(1 - decay * (direction * param >= 0).to(param.dtype))
    else:
        param.mul_(1 - decay)
