"""Orthogonal factors of momentum matrices: the update directions of mars-shampoo and mars-m.

For M = U S V^T every solver approximates the polar factor U V^T. `newton_schulz` does it with a fixed
quintic,

    X <- p1 X + (p2 A + p3 A^2) X,   A = X X^T,

which is fast and maps singular values into [0.68, 1.13] without converging to 1; `polar` computes the
factor to the precision of the dtype. Matrices of equal shape are stacked, so that a network of L equal
layers costs one batched product instead of L small ones. A zero matrix has the zero factor.

Source: Yuan et al. 2025 (arXiv 2411.10438), Section 3.3.3; Nakatsukasa, Bai, Gygi 2010 for `polar` by
"newton".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Inexact
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
SOLVERS = ("newton_schulz", "svd", "newton", "cubic")

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_HALLEY_STEPS = 12
_CUBIC_STEPS = 300
_CUBIC_STEPS_BETWEEN_CHECKS = 5


def newton_schulz(
    matrix: Inexact[Tensor, "*batch rows columns"],
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float | Tensor = 1e-7,
    dtype: torch.dtype | None = None,
) -> Inexact[Tensor, "*batch rows columns"]:
    """Image of each matrix under `steps` quintic Newton-Schulz iterations, started from M / (||M||_F + eps).

    Args:
        matrix: one matrix or a batch of them; each is normalised on its own.
        steps: number of iterations, >= 0.
        coefficients: (p1, p2, p3) of the odd polynomial p1 s + p2 s^3 + p3 s^5 applied to the singular
            values.
        eps: added to the Frobenius norm, >= 0; a zero matrix gives zero even at eps=0.
        dtype: dtype of the products. None: bfloat16 on CUDA, float32 on CPU, float64 for float64 matrices;
            complex matrices keep their own.

    Returns:
        A tensor of the shape and dtype of `matrix`.

    Raises:
        ValueError: if steps or eps is negative, or `matrix` has fewer than two dimensions.

    Source: Yuan et al. 2025, Section 3.3.3; coefficients of Jordan et al. 2024 (Muon).
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps!r}")
    if not isinstance(eps, Tensor) and eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps!r}")
    _require_matrix(matrix)
    p1, p2, p3 = coefficients
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=_norm_dtype(matrix)) + eps
    x = (matrix / norm.masked_fill(norm == 0, 1.0)).to(_product_dtype(matrix, dtype))
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = _stacked(x.mT if tall else x)
    for _ in range(steps):
        a = x @ x.mH
        b = torch.baddbmm(a, a, a, beta=p2, alpha=p3)
        x = torch.baddbmm(x, b, x, beta=p1)
    x = x.mT if tall else x
    return x.reshape(matrix.shape).to(matrix.dtype)


def polar(
    matrix: Inexact[Tensor, "*batch rows columns"], method: str = "svd"
) -> Inexact[Tensor, "*batch rows columns"]:
    """Polar factor U V^T of each matrix, to the precision of its dtype (float32 at least).

    Directions whose singular value is zero get no update: the factor is the partial isometry on the support.
    Singular values of the size of rounding errors are noise, and "newton" and "cubic" may treat them
    otherwise than "svd".

    Args:
        matrix: one matrix or a batch of them.
        method: "svd", the exact factor; "newton", a scaled Newton-type iteration on the triangular factor
            of the small side, 6 QR-based steps that need no inverse, so that singular momenta (dead units)
            are fine; "cubic", X <- 1.5 X - 0.5 X X^T X until it stands still, products only.

    Raises:
        ValueError: if method is unknown or `matrix` has fewer than two dimensions.

    Source: Yuan et al. 2025, Section 3.3.3, which names these solvers.
    """
    _require_matrix(matrix)
    solvers = {"svd": _polar_by_svd, "newton": _polar_by_halley, "cubic": _polar_by_cubic}
    if method not in solvers:
        raise ValueError(f"method must be one of {', '.join(map(repr, solvers))}, got {method!r}")
    if matrix.numel() == 0:
        return matrix.clone()
    work = matrix.float() if matrix.dtype in _LOW_PRECISION else matrix
    tall = matrix.shape[-2] > matrix.shape[-1]
    factor = solvers[method](_stacked(work.mT if tall else work))
    factor = factor.mT if tall else factor
    return factor.reshape(matrix.shape).to(matrix.dtype)


def orthogonalize(
    matrices: Sequence[Tensor],
    method: str = "newton_schulz",
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float | Tensor = 1e-7,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Orthogonal factor of every matrix in a list; equal shapes (up to transposition) share one batched call.

    Args:
        matrices: tensors of two or more dimensions; the last two are the matrix, the others are batch.
        method: "newton_schulz" (see `newton_schulz`, which the options belong to) or a method of `polar`.
        steps: as in `newton_schulz`.
        coefficients: as in `newton_schulz`.
        eps: as in `newton_schulz`.
        dtype: as in `newton_schulz`.

    Returns:
        New tensors, aligned with `matrices`.
    """
    stacks: dict[tuple[object, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        _require_matrix(matrix)
        rows, columns = matrix.shape[-2:]
        shape = (min(rows, columns), max(rows, columns))
        stacks.setdefault((shape, matrix.dtype, matrix.device), []).append(index)
    factors: list[Tensor] = list(matrices)
    for members in stacks.values():
        wide = [_stacked(_widened(matrices[i])) for i in members]
        stack = wide[0] if len(wide) == 1 else torch.cat(wide)
        if method == "newton_schulz":
            done = newton_schulz(stack, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype)
        else:
            done = polar(stack, method)
        for i, factor in zip(members, done.split([len(w) for w in wide]), strict=True):
            matrix = matrices[i]
            factor = factor.mT if matrix.shape[-2] > matrix.shape[-1] else factor
            factors[i] = factor.reshape(matrix.shape)
    return factors


def _require_matrix(matrix: Tensor) -> None:
    if matrix.ndim < 2:
        raise ValueError(f"matrix must have at least two dimensions, got shape {tuple(matrix.shape)}")


def _widened(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def _stacked(matrix: Tensor) -> Tensor:
    """The batch dimensions merged into one, as baddbmm wants them."""
    batch = matrix.shape[:-2].numel()
    return matrix.reshape(batch, *matrix.shape[-2:])


def _norm_dtype(matrix: Tensor) -> torch.dtype | None:
    return torch.float32 if matrix.dtype in _LOW_PRECISION else None


def _product_dtype(matrix: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if matrix.is_complex():
        return matrix.dtype
    if dtype is not None:
        return dtype
    if matrix.dtype == torch.float64:
        return torch.float64
    # bfloat16 matrix products are slow on most CPUs
    return torch.bfloat16 if matrix.device.type == "cuda" else torch.float32


def _polar_by_svd(m: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    noise = s.amax(dim=-1, keepdim=True) * m.shape[-1] * torch.finfo(m.dtype).eps
    return (u * (s > noise).to(m.dtype).unsqueeze(-2)) @ vh


def _polar_by_halley(m: Tensor) -> Tensor:
    """Dynamically weighted Halley iteration in its inverse-free form, on the small triangular factor of M^H.

    With l a lower bound of the singular values, X <- X (a + b X^H X)(1 + c X^H X)^{-1} with the weights
    below is the best rational map of its degree, and 6 steps bring l = 1e-12 to 1. The inverse is taken
    through the QR factors of [sqrt(c) X; 1], which is stable whatever the condition of X. The bound l lies
    well above eps, so that rounding noise in place of zero singular values (linear in s/l below l) does not
    grow to one.
    """
    q, r = torch.linalg.qr(m.mH)
    x = r.mH
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.masked_fill(norm == 0, 1.0)
    size = x.shape[-1]
    identity = torch.eye(size, dtype=x.dtype, device=x.device).expand_as(x)
    eps = torch.finfo(x.dtype).eps
    lower = eps**0.75
    for _ in range(_HALLEY_STEPS):
        d = (4 * (1 - lower**2) / lower**4) ** (1 / 3)
        a = (1 + d) ** 0.5 + 0.5 * (8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * (1 + d) ** 0.5)) ** 0.5
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        q1, q2 = torch.linalg.qr(torch.cat([c**0.5 * x, identity], dim=-2))[0].split(size, dim=-2)
        x = (b / c) * x + (a - b / c) / c**0.5 * (q1 @ q2.mH)
        lower = min(lower * (a + b * lower**2) / (1 + c * lower**2), 1.0)
        if 1 - lower < eps:
            break
    return x @ q.mH


def _polar_by_cubic(m: Tensor) -> Tensor:
    """Every few steps it looks at the last change, which is a host synchronisation on a GPU."""
    norm = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True)
    x = m / norm.masked_fill(norm == 0, 1.0)
    tolerance = 4 * torch.finfo(m.dtype).eps * m.shape[-2] ** 0.5
    for step in range(_CUBIC_STEPS):
        previous = x
        x = torch.baddbmm(x, x @ x.mH, x, beta=1.5, alpha=-0.5)
        if step % _CUBIC_STEPS_BETWEEN_CHECKS == 0:
            change = torch.linalg.vector_norm(x - previous, dim=(-2, -1))
            if not bool((change > tolerance).any()):
                break
    return x
