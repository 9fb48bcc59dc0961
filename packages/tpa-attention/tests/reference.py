"""The float64 NumPy truth of tensor product attention: from factors to outputs, without any framework.

Per token the query, key and value blocks (heads x features) are short sums of outer products,

    X_t = (1/R_X) sum_r a_r (x) b_r = (1/R_X) A_X^T B_X,    X in {Q, K, V}             (3.1)
    head_i = softmax(Q_i K_i^T / sqrt(D)) V_i                                         (3.2)

Here are the three ways to compute (3.2) (materialised, in factor space, FlashTPA with split caches), their
masks, and the gradients. `reference_rope.py` turns the factors, `reference_layer.py` makes them.

Shapes (the package's public contract): A is (B, T, R, H), B is (B, T, R, D or E); outputs are (B, T, H, E),
log-sum-exps (B, T, H), masks broadcast to (B, H, T, M) with True = attend. Under KV-only `aq` is None and
`bq` is Q itself, (B, T, H, D). RoPE has been applied to bq and bk before they come here.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3, Appendix A (Algorithm 1), Algorithms 2-3.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Array = np.ndarray
Mask = Bool[Array, "..."] | None


# ------------------------------------------------------------------------------------------- materialised


def rank_factor(a: Float[Array, "B T R H"] | None, rank_scale: bool = True) -> float:
    """s_X = 1/R_X; 1 without rank scaling and for a Q that is not factorised."""
    return 1 / a.shape[2] if a is not None and rank_scale else 1.0


def materialize(
    a: Float[Array, "B T R H"] | None, b: Float[Array, "B T R D"], rank_scale: bool = True
) -> Float[Array, "B T H D"]:
    """X_t = s_X A^T B for every token (3.1); KV-only: b is X already."""
    if a is None:
        return b
    return rank_factor(a, rank_scale) * np.einsum("btrh,btrd->bthd", a, b)


def safe_softmax(logits: Float[Array, "*rows M"]) -> tuple[Float[Array, "*rows M"], Float[Array, "*rows"]]:
    """Softmax and log-sum-exp over the last axis; a row of -inf alone gives weights 0 and LSE -inf."""
    m = logits.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isfinite(m), m, 0.0)
    p = np.exp(logits - shift[..., None])
    s = p.sum(axis=-1)
    return p / np.where(s > 0, s, 1.0)[..., None], m + log(s)


def log(s: Array) -> Array:
    """ln s with ln 0 = -inf, silently: an empty row is not an error."""
    with np.errstate(divide="ignore"):
        return np.log(s)


def masked(
    logits: Float[Array, "B H T M"], mask: Mask, bias: Float[Array, "..."] | None
) -> Float[Array, "B H T M"]:
    """The additive bias enters once, whatever the rank of K; masked entries are -inf."""
    biased = logits if bias is None else logits + bias
    return biased if mask is None else np.where(mask, biased, -np.inf)


def softmax_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H E"],
    *,
    mask: Mask = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """(3.2) for materialised heads: outputs and log-sum-exps of the scaled logits."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("bthd,bmhd->bhtm", q, k)
    alpha, lse = safe_softmax(masked(logits, mask, bias))
    return np.einsum("bhtm,bmhe->bthe", alpha, v), lse.swapaxes(1, 2)


def tpa_attention(
    aq: Float[Array, "B T RQ H"] | None,
    bq: Float[Array, "B T RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    av: Float[Array, "B M RV H"],
    bv: Float[Array, "B M RV E"],
    *,
    mask: Mask = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Attention of factorised heads by materialising Q, K and V: the plain meaning of the paper."""
    q = materialize(aq, bq, rank_scale)
    k = materialize(ak, bk, rank_scale)
    v = materialize(av, bv, rank_scale)
    return softmax_attention(q, k, v, mask=mask, bias=bias, scale=scale)


# -------------------------------------------------------------------------------------------------- masks


def causal_mask(T: int, M: int, window: int | None = None) -> Bool[Array, "T M"]:
    """Query i stands at M - T + i (bottom-right), sees itself and what precedes it, `window` keys at most."""
    distance = (M - T + np.arange(T))[:, None] - np.arange(M)[None, :]
    return (distance >= 0) & (distance < (M + 1 if window is None else window))


def ragged_mask(
    N: int, M: int, seq_lens: Int[Array, " B"], window: int | None = None
) -> Bool[Array, "B 1 N M"]:
    """Decode: query n sees cached positions <= seq_len - N + n; what lies past seq_len is garbage."""
    distance = (seq_lens[:, None] - N + np.arange(N))[:, :, None] - np.arange(M)
    visible = (distance >= 0) & (distance < (M + 1 if window is None else window))
    return visible[:, None]


def padding_mask(valid: Bool[Array, "B M"]) -> Bool[Array, "B 1 1 M"]:
    """Padded tokens are no keys."""
    return valid[:, None, None, :]


def packed_mask(
    cu_seqlens_q: Int[Array, " boundaries"],
    cu_seqlens_k: Int[Array, " boundaries"],
    *,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Array, "total_q total_k"]:
    """Sequences laid end to end: each attends to itself alone, bottom-right causal inside."""
    allowed = np.zeros((int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])), dtype=bool)
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        columns = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        allowed[rows, columns] = causal_mask(*shape, window) if causal else True
    return allowed


# ------------------------------------------------------------------------------------------- factor space


def factored_logits(
    aq: Float[Array, "B T RQ H"] | None,
    bq: Float[Array, "B T RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    *,
    scale: float | None = None,
    rank_scale: bool = True,
) -> Float[Array, "B H T M"]:
    """Logits without K: scores of the factor rows, shared by all heads, then mixed per head."""
    scale = bq.shape[-1] ** -0.5 if scale is None else scale
    s_q, s_k = rank_factor(aq, rank_scale), rank_factor(ak, rank_scale)
    if aq is None:
        mixed = np.einsum("bqhd,bksd->bhqks", bq, bk)  # full Q: R_K h D per cached token
    else:
        p = np.einsum("bqrd,bksd->bqkrs", bq, bk)  # (A.1): R_Q R_K D per cached token
        mixed = np.einsum("bqrh,bqkrs->bhqks", aq, p)  # h R_Q R_K
    return scale * s_q * s_k * np.einsum("bhqks,bksh->bhqk", mixed, ak)  # (A.2)


def factor_space_attention(
    aq: Float[Array, "B T RQ H"] | None,
    bq: Float[Array, "B T RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    av: Float[Array, "B M RV H"],
    bv: Float[Array, "B M RV E"],
    *,
    mask: Mask = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Appendix A, Algorithm 1: attention that never forms Q, K or V."""
    logits = factored_logits(aq, bq, ak, bk, scale=scale, rank_scale=rank_scale)
    alpha, lse = safe_softmax(masked(logits, mask, bias))
    weighted = np.einsum("bhqk,bkuh->bhqku", alpha, av)
    out = rank_factor(av, rank_scale) * np.einsum("bhqku,bkue->bqhe", weighted, bv)  # (A.3)
    return out, lse.swapaxes(1, 2)


# ------------------------------------------------------------------------------------------------ FlashTPA


class Running(NamedTuple):
    """State of the online softmax per batch, query and head: weighted values, weights, maximum."""

    y: Float[Array, "B N H E"]
    s: Float[Array, "B N H"]
    m: Float[Array, "B N H"]


def flash_start(B: int, N: int, H: int, E: int) -> Running:
    return Running(np.zeros((B, N, H, E)), np.zeros((B, N, H)), np.full((B, N, H), -np.inf))


def flash_step(
    state: Running,
    logits: Float[Array, "B H N m"],
    av: Float[Array, "B m RV H"],
    bv: Float[Array, "B m RV E"],
) -> Running:
    """Algorithm 2: take in one block of m cached tokens; their logits may be -inf, all of them too."""
    logits = logits.swapaxes(1, 2)  # (B, N, H, m)
    m = np.maximum(state.m, logits.max(axis=-1, initial=-np.inf))
    shift = np.where(np.isfinite(m), m, 0.0)  # -inf - -inf is NaN
    keep = np.exp(state.m - shift)
    p = np.exp(logits - shift[..., None])
    s = state.s * keep + p.sum(axis=-1)
    y = state.y * keep[..., None] + np.einsum("bnhm,bmuh,bmue->bnhe", p, av, bv)
    return Running(y, s, m)


def flash_finish(state: Running, s_v: float) -> tuple[Float[Array, "B N H E"], Float[Array, "B N H"]]:
    """O = s_V y / s and LSE = m + ln s; an empty state gives 0 and -inf."""
    out = s_v * state.y / np.where(state.s > 0, state.s, 1.0)[..., None]
    return out, state.m + log(state.s)


def merge_partials(
    outs: Float[Array, "S *rows E"], lses: Float[Array, "S *rows"]
) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows"]]:
    """Algorithm 3 with the maximum: w_j = exp(LSE_j - max LSE), O = sum w_j O_j / sum w_j."""
    top = lses.max(axis=0)
    shift = np.where(np.isfinite(top), top, 0.0)
    w = np.exp(lses - shift)
    total = w.sum(axis=0)
    out = (w[..., None] * outs).sum(axis=0) / np.where(total > 0, total, 1.0)[..., None]
    return out, top + log(total)


def flash_decode(
    aq: Float[Array, "B N RQ H"] | None,
    bq: Float[Array, "B N RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    av: Float[Array, "B M RV H"],
    bv: Float[Array, "B M RV E"],
    *,
    seq_lens: Int[Array, " B"] | None = None,
    window: int | None = None,
    bias: Float[Array, "..."] | None = None,
    num_splits: int = 1,
    block: int = 64,
    scale: float | None = None,
    rank_scale: bool = True,
) -> tuple[Float[Array, "B N H E"], Float[Array, "B N H"]]:
    """FlashTPA: N new queries against M cached tokens, the cache cut in splits, each split read in blocks."""
    B, M, _, H = ak.shape
    N, E = bq.shape[1], bv.shape[-1]
    lens = np.full(B, M) if seq_lens is None else seq_lens
    mask = ragged_mask(N, M, lens, window)
    bias = None if bias is None else np.broadcast_to(bias, (B, H, N, M))
    partials = []
    for tokens in np.array_split(np.arange(M), num_splits):
        state = flash_start(B, N, H, E)
        for first in range(0, len(tokens), block):
            t = tokens[first : first + block]
            logits = factored_logits(aq, bq, ak[:, t], bk[:, t], scale=scale, rank_scale=rank_scale)
            logits = masked(logits, mask[..., t], None if bias is None else bias[..., t])
            state = flash_step(state, logits, av[:, t], bv[:, t])
        partials.append(flash_finish(state, rank_factor(av, rank_scale)))
    return merge_partials(np.stack([out for out, _ in partials]), np.stack([lse for _, lse in partials]))


def prefers_factored_query(q_rank: int, num_heads: int, head_dim: int, tile: int = 1) -> bool:
    """Scores cost R_K R_Q (D + h) per cached token from factors, R_K h D from a full q; in whole tiles."""
    R, h, D = (-(-size // tile) * tile for size in (q_rank, num_heads, head_dim))
    return R * (D + h) < h * D


# ----------------------------------------------------------------------------------------------- gradients


class Gradients(NamedTuple):
    """Gradients of sum(O * dO) in the factors that entered, B factors still rotated."""

    aq: Float[Array, "B T RQ H"] | None
    bq: Float[Array, "B T RQ D"]
    ak: Float[Array, "B M RK H"]
    bk: Float[Array, "B M RK D"]
    av: Float[Array, "B M RV H"]
    bv: Float[Array, "B M RV E"]


def attention_backward(
    aq: Float[Array, "B T RQ H"] | None,
    bq: Float[Array, "B T RQ D"],
    ak: Float[Array, "B M RK H"],
    bk: Float[Array, "B M RK D"],
    av: Float[Array, "B M RV H"],
    bv: Float[Array, "B M RV E"],
    d_out: Float[Array, "B T H E"],
    *,
    mask: Mask = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | None = None,
    rank_scale: bool = True,
) -> Gradients:
    """What the fused backward kernel evaluates; `unrotate` takes gradients of bq and bk past RoPE."""
    scale = bq.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (materialize(a, b, rank_scale) for a, b in ((aq, bq), (ak, bk), (av, bv)))
    alpha, _ = safe_softmax(masked(scale * np.einsum("bthd,bmhd->bhtm", q, k), mask, bias))
    out = np.einsum("bhtm,bmhe->bthe", alpha, v)
    delta = np.einsum("bthe,bthe->bht", out, d_out)
    d_v = np.einsum("bhtm,bthe->bmhe", alpha, d_out)
    d_s = alpha * (np.einsum("bthe,bmhe->bhtm", d_out, v) - delta[..., None])
    d_q = scale * np.einsum("bhtm,bmhd->bthd", d_s, k)
    d_k = scale * np.einsum("bhtm,bthd->bmhd", d_s, q)
    query = factor_gradients(d_q, aq, bq, rank_scale)
    return Gradients(
        *query, *factor_gradients(d_k, ak, bk, rank_scale), *factor_gradients(d_v, av, bv, rank_scale)
    )


def factor_gradients(
    d_x: Float[Array, "B T H D"],
    a: Float[Array, "B T R H"] | None,
    b: Float[Array, "B T R D"],
    rank_scale: bool,
) -> tuple[Float[Array, "B T R H"] | None, Float[Array, "B T R D"]]:
    """dA[r,h] = s <dX[h], B[r]>, dB[r] = s sum_h A[r,h] dX[h]."""
    if a is None:
        return None, d_x
    s = rank_factor(a, rank_scale)
    return s * np.einsum("bthd,btrd->btrh", d_x, b), s * np.einsum("btrh,bthd->btrd", a, d_x)
