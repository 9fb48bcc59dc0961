"""Heads as sums of few outer products: the linear algebra of conversion, all of it in float64.

The weights W_1 .. W_h of the heads (each D x d) are the rows of an h x (D d) matrix. A factorisation of it,

    W_i = (1/R) sum_r a_{r,i} V_r      <=>      X_t = (1/R) sum_r a_r (x) V_r x_t,

is a TPA whose head factors a_r are free of the token and whose rows are b_r(x) = V_r x. G groups of equal
heads have rank G: a_g = G mask_g, V_g = W_g. The best of lower rank R is a truncated SVD (Eckart-Young), with

    relative error sqrt(sum_{i > R} sigma_i^2 / sum_i sigma_i^2),

of W for the error in the weights, of W C^{1/2} with C = E[x x^T] for the mean error E ||X_t - X^_t||^2.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 4, for the exact case; the rest is ours.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-6  # of mean squares, in the second moment and in the least squares of a refinement


class HeadFactors(NamedTuple):
    """a_r and V_r: head factors free of the token, weights of the rows b_r(x) = V_r x."""

    a: Float[Tensor, "R h"]
    b: Float[Tensor, "R D d"]


class ContextualFactors(NamedTuple):
    """a_r(x) = c_r + W_r x and b_r(x) = V_r x."""

    c: Float[Tensor, "R h"]
    w: Float[Tensor, "R h d"]
    b: Float[Tensor, "R D d"]


# -------------------------------------------------------------------------------------- heads of few groups


def group_exactly(w: Float[Tensor, "G D d"], num_heads: int, rank: int) -> HeadFactors:
    """The factorisation without error, for R >= G: a_g = R mask_g and V_g = W_g (Section 4).

    Head i belongs to group floor(i / (h / G)). Ranks beyond G have a = 1 and V = 0: they add nothing, and a
    later training of V can use them.
    """
    groups = w.shape[0]
    masks = torch.eye(groups, dtype=w.dtype, device=w.device).repeat_interleave(num_heads // groups, dim=1)
    return _filled_up(rank * masks, w, rank)


def truncate(w: Float[Tensor, "G D d"], num_heads: int, rank: int) -> HeadFactors:
    """The rank-R factorisation closest to the weights of all h heads in the Frobenius norm.

    The R of 1/R is absorbed in a. With M the h x G matrix of groups, M (G/h)^{1/2} has orthonormal columns,
    so the SVD of the h x (D d) matrix M W follows from that of (h/G)^{1/2} W, which has only G rows.
    """
    groups, D, d = w.shape
    share = num_heads // groups
    u, sigma, vt = torch.linalg.svd(share**0.5 * w.reshape(groups, D * d), full_matrices=False)
    a = rank * (u[:, :rank].T / share**0.5).repeat_interleave(share, dim=1)
    b = (sigma[:rank, None] * vt[:rank]).reshape(-1, D, d)
    return _filled_up(a, b, rank)


def singular_values(w: Float[Tensor, "G D d"], num_heads: int) -> Float[Tensor, " n"]:
    """Those of the h x (D d) matrix of all heads that are not zero because groups repeat: min(G, D d)."""
    groups = w.shape[0]
    return (num_heads // groups) ** 0.5 * torch.linalg.svdvals(w.reshape(groups, -1))


def rebuild(factors: HeadFactors) -> Float[Tensor, "h D d"]:
    """W^_i = (1/R) sum_r a_{r,i} V_r."""
    return torch.einsum("rh,rnd->hnd", factors.a, factors.b) / len(factors.a)


def _filled_up(a: Float[Tensor, "n h"], b: Float[Tensor, "n D d"], rank: int) -> HeadFactors:
    missing = rank - len(a)
    if missing == 0:
        return HeadFactors(a, b)
    return HeadFactors(
        torch.cat([a, a.new_ones(missing, *a.shape[1:])]), torch.cat([b, b.new_zeros(missing, *b.shape[1:])])
    )


# ------------------------------------------------------------------------------------ heads on given tokens


class SecondMoment(NamedTuple):
    """C^{1/2} and C^{-1/2}."""

    root: Float[Tensor, "d d"]
    inverse_root: Float[Tensor, "d d"]


def second_moment(x: Float[Tensor, "N d"], ridge: float = RIDGE) -> SecondMoment:
    """The roots of C = E[x x^T] + ridge tr(E[x x^T])/d I, which exist however few the tokens are."""
    c = x.T @ x / len(x)
    c.diagonal().add_(ridge * c.trace() / len(c))
    values, vectors = torch.linalg.eigh(c)
    return SecondMoment((vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T)


def truncate_for(w: Float[Tensor, "G D d"], num_heads: int, rank: int, moment: SecondMoment) -> HeadFactors:
    """The rank-R factorisation with the least E ||X - X^||^2 = ||(W - W^) C^{1/2}||_F^2.

    The ridge l in C does not spoil the comparison with plain truncation on the same tokens:
    err(this) + l ||W - W^||^2 <= err(plain) + l ||W - W_plain||^2, and ||W - W_plain|| is the least there is.
    """
    a, b = truncate(w @ moment.root, num_heads, rank)
    return HeadFactors(a, b @ moment.inverse_root)


# --------------------------------------------------------------------------------- contextual head factors


def contextualise(factors: HeadFactors) -> ContextualFactors:
    """a_r(x) = c_r + W_r x with W = 0, the same heads. A bias it must be: W x (x) V x is even in x."""
    ranks, num_heads = factors.a.shape
    return ContextualFactors(factors.a, factors.a.new_zeros(ranks, num_heads, factors.b.shape[-1]), factors.b)


def heads_of(model: ContextualFactors, x: Float[Tensor, "N d"]) -> Float[Tensor, "N h D"]:
    """X_t = (1/R) sum_r a_r(x_t) (x) b_r(x_t) of every token."""
    a, b = _evaluated(model, x)
    return torch.einsum("nrh,nrk->nhk", a, b) / len(model.c)


def refine(
    model: ContextualFactors,
    x: Float[Tensor, "N d"],
    target: Float[Tensor, "N h D"],
    steps: int,
    ridge: float = RIDGE,
) -> tuple[ContextualFactors, list[float]]:
    """Alternating least squares for (c, W), then V, until the error stops falling or the steps are done.

    X is linear in (c, W) for given V and the other way round. Each half step minimises the squared error plus
    a ridge on the distance from where it started, which leaves alone what few tokens do not determine. The
    normal equations are summed over tokens, sum_n g_n (x) x_n x_n^T with R x R matrices g_n, so that no
    design matrix of N D or N h rows is formed: they are R (d + 1) numbers square.

    Args:
        model: where to start.
        x: tokens.
        target: the heads wanted of them.
        steps: at most so many, >= 0.
        ridge: in units of the mean diagonal entry of the normal equations, > 0.

    Returns:
        The last model that lowered the error, and the mean squared errors, that of the start first.
    """
    ranks = len(model.c)
    extended = torch.cat([x.new_ones(len(x), 1), x], dim=1)
    residual = target - heads_of(model, x)
    errors = [residual.square().mean().item()]
    for _ in range(steps):
        if errors[-1] == 0:
            break
        rows = _evaluated(model, x)[1] / ranks
        moved = _least_squares(rows, extended, torch.einsum("nrk,nhk->nrh", rows, residual), ridge)
        tried = model._replace(c=model.c + moved[:, 0], w=model.w + moved[:, 1:].transpose(1, 2))

        heads = _evaluated(tried, x)[0] / ranks
        between = target - heads_of(tried, x)
        moved = _least_squares(heads, x, torch.einsum("nrh,nhk->nrk", heads, between), ridge)
        tried = tried._replace(b=tried.b + moved.transpose(1, 2))

        residual = target - heads_of(tried, x)
        error = residual.square().mean().item()
        if not error < errors[-1]:
            break
        model = tried
        errors.append(error)
    return model, errors


def _evaluated(
    model: ContextualFactors, x: Float[Tensor, "N d"]
) -> tuple[Float[Tensor, "N R h"], Float[Tensor, "N R D"]]:
    ranks, num_heads, d = model.w.shape
    a = model.c + (x @ model.w.reshape(-1, d).T).unflatten(-1, (ranks, num_heads))
    return a, (x @ model.b.reshape(-1, d).T).unflatten(-1, (ranks, -1))


def _least_squares(
    factor: Float[Tensor, "N R m"],
    x: Float[Tensor, "N e"],
    pulled: Float[Tensor, "N R k"],
    ridge: float,
) -> Float[Tensor, "R e k"]:
    """Z with the least sum_n ||r_n - sum_r f_nr (x) Z_r^T x_n||^2 + ridge, for f = factor, f^T r = pulled."""
    ranks, e = factor.shape[1], x.shape[1]
    inner = torch.einsum("nrm,nsm->rsn", factor, factor)
    gram = x.new_empty(ranks, e, ranks, e)
    for r in range(ranks):
        for s in range(r + 1):
            block = (x * inner[r, s, :, None]).T @ x
            gram[r, :, s] = block
            gram[s, :, r] = block  # a sum of multiples of x x^T: symmetric
    gram = gram.reshape(ranks * e, ranks * e)
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    right = torch.einsum("ne,nrk->rek", x, pulled).flatten(0, 1)
    return torch.linalg.solve(gram, right).unflatten(0, (ranks, e))
