"""From multi-head or grouped attention to TPA, in float64 NumPy.

The heads' weights W_1 .. W_h (each D x d) form an h x (D d) matrix whose rows are heads. A factorisation

    W_i = (1/R) sum_r a_{r,i} V_r      <=>      K_t = (1/R) sum_r a_r (x) V_r x_t

is a TPA with free (non-contextual) head factors a_r and contextual b_r(x) = V_r x, and RoPE commutes with it.
With R at least the number of distinct heads it is exact (Section 4); the best of lower rank is a truncated
SVD (Eckart-Young), of W for the error in the weights, of W C^{1/2} with C = E[x x^T] for the error in K.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 4; truncation, calibration and refinement are ours.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from reference_baselines import Heads
from reference_layer import FactorMap, Layer
from reference_rope import Rope

Array = np.ndarray


class Truncated(NamedTuple):
    """Free head factors, maps of the rows, and the relative error (in the chosen norm) for ranks 1 .. h."""

    a: Float[Array, "R h"]
    b: Float[Array, "R D d"]
    relative_errors: Float[Array, " n"]


# -------------------------------------------------------------------------------------------------- exact


def group_masks(num_heads: int, groups: int) -> Float[Array, "G h"]:
    """a_j = G mask_j: head i belongs to group floor(i / (h/G)); G = h is MHA (h e_i), G = 1 MQA (1_h)."""
    group = np.arange(num_heads) // (num_heads // groups)
    return groups * (group == np.arange(groups)[:, None]).astype(np.float64)


def exact(weights: Heads, rope: Rope | None, *, factored_query: bool = False) -> Layer:
    """The same function of x as the given heads, as a TPA of rank G (Section 4)."""
    h, G = weights.q.shape[0], weights.k.shape[0]
    heads = FactorMap(constant=group_masks(h, G))
    return Layer(
        q_a=FactorMap(constant=group_masks(h, h)) if factored_query else None,
        q_b=(FactorMap(weight=weights.q),),
        k_a=heads,
        k_b=(FactorMap(weight=weights.k),),
        v_a=heads,
        v_b=(FactorMap(weight=weights.v),),
        o=weights.o,
        rope=rope,
    )


def per_head(w: Float[Array, "G D d"], num_heads: int) -> Float[Array, "h D d"]:
    """Group weights repeated for the heads that share them."""
    return np.repeat(w, num_heads // w.shape[0], axis=0)


# ------------------------------------------------------------------------------------------------- low rank


def relative_errors(singular_values: Float[Array, " n"]) -> Float[Array, " n"]:
    """sqrt(sum_{i>R} sigma_i^2 / sum sigma_i^2) for R = 1 .. n."""
    squares = singular_values**2
    tails = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
    return np.sqrt(tails / squares.sum())


def truncate(w: Float[Array, "h D d"], rank: int) -> Truncated:
    """Best rank-R head factorisation in Frobenius norm; the R of 1/R is absorbed in a."""
    h, D, d = w.shape
    u, sigma, vt = np.linalg.svd(w.reshape(h, D * d), full_matrices=False)
    a = rank * u[:, :rank].T
    b = (sigma[:rank, None] * vt[:rank]).reshape(rank, D, d)
    return Truncated(a, b, relative_errors(sigma))


def second_moment(x: Float[Array, "N d"], ridge: float = 1e-6) -> Float[Array, "d d"]:
    """C = E[x x^T] + ridge tr(C)/d I."""
    c = x.T @ x / len(x)
    return c + ridge * np.trace(c) / len(c) * np.eye(len(c))


def square_root(c: Float[Array, "d d"]) -> Float[Array, "d d"]:
    values, vectors = np.linalg.eigh(c)
    return (vectors * np.sqrt(values)) @ vectors.T


def truncate_for(w: Float[Array, "h D d"], rank: int, c: Float[Array, "d d"]) -> Truncated:
    """Best rank-R factorisation in E ||K - K^||^2 = ||(W - W^) C^{1/2}||_F^2 for E[x x^T] = C > 0."""
    root = square_root(c)
    a, b, errors = truncate(w @ root, rank)
    return Truncated(a, b @ np.linalg.inv(root), errors)


def rebuild(a: Float[Array, "R h"], b: Float[Array, "R D d"]) -> Float[Array, "h D d"]:
    """W^_i = (1/R) sum_r a_{r,i} V_r."""
    return np.einsum("rh,rnd->hnd", a, b) / len(a)


# ------------------------------------------------------------------------------------- contextual refinement


class Contextual(NamedTuple):
    """a_r(x) = c_r + W_r x and b_r(x) = V_r x."""

    c: Float[Array, "R h"]
    w: Float[Array, "R h d"]
    b: Float[Array, "R D d"]


def contextualise(truncated: Truncated) -> Contextual:
    """W = 0 reproduces the converted layer; a purely linear a cannot, since a(x) (x) b(x) is even in x."""
    R, h = truncated.a.shape
    return Contextual(truncated.a, np.zeros((R, h, truncated.b.shape[-1])), truncated.b)


def heads_of(model: Contextual, x: Float[Array, "N d"]) -> Float[Array, "N h D"]:
    a = model.c + np.einsum("nd,rhd->nrh", x, model.w)
    b = np.einsum("nd,rkd->nrk", x, model.b)
    return np.einsum("nrh,nrk->nhk", a, b) / len(model.c)


def ridge_solve(
    design: Float[Array, "rows columns"],
    target: Float[Array, "rows k"],
    near: Float[Array, "columns k"],
    ridge: float,
) -> Float[Array, "columns k"]:
    """argmin ||design z - target||^2 + ridge tr(design^T design)/columns ||z - near||^2."""
    gram = design.T @ design
    lam = ridge * np.trace(gram) / len(gram)
    return near + np.linalg.solve(gram + lam * np.eye(len(gram)), design.T @ (target - design @ near))


def refine(
    model: Contextual, x: Float[Array, "N d"], target: Float[Array, "N h D"], steps: int, ridge: float = 1e-6
) -> tuple[Contextual, list[float]]:
    """Alternating least squares, (W, c) then V, until the error stops falling or `steps` are done."""
    R, h = model.c.shape
    N, d = x.shape
    D = model.b.shape[1]
    extended = np.concatenate([np.ones((N, 1)), x], axis=1)
    errors = [float(np.mean((heads_of(model, x) - target) ** 2))]
    for _ in range(steps):
        rows = np.einsum("nd,rkd->nrk", x, model.b) / R
        design = np.einsum("nrk,ne->nkre", rows, extended).reshape(N * D, R * (d + 1))
        near = (
            np.concatenate([model.c[:, :, None], model.w], axis=2).transpose(0, 2, 1).reshape(R * (d + 1), h)
        )
        solved = ridge_solve(design, target.transpose(0, 2, 1).reshape(N * D, h), near, ridge).reshape(
            R, d + 1, h
        )
        c, w = solved[:, 0], solved[:, 1:].transpose(0, 2, 1)

        heads = (c + np.einsum("nd,rhd->nrh", x, w)) / R
        design = np.einsum("nrh,nd->nhrd", heads, x).reshape(N * h, R * d)
        near = model.b.transpose(0, 2, 1).reshape(R * d, D)
        b = ridge_solve(design, target.reshape(N * h, D), near, ridge).reshape(R, d, D).transpose(0, 2, 1)

        tried = Contextual(c, w, b)
        error = float(np.mean((heads_of(tried, x) - target) ** 2))
        if error >= errors[-1]:
            break
        model = tried
        errors.append(error)
    return model, errors
